"""What becomes of episodes whose environment hangs, dies, raises or answers nonsense, and of the run that plays them?

    python -m benchmarks.episode_faults [--episodes 10000] [--workers 2] [--seconds 1] [--seed 0]

The product's own `rollout` plays groups of 8 with a tiny random model, so actions are whatever such a model writes, in
`tests.arena.faulty.Faulty` behind a guard. A hash of task and action decides which step fails and how, at the rates
below, so for each episode that comes out it is known what had to happen: reward 0 and finish reason "error", or not.
Printed are the counts, what is wrong with them (nothing may be), worker restarts, and the resident memory of the parent.
Then what a guard costs a healthy step, against a bare exchange over the same kind of socket.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from models.machine import describe
from tasks.arena.guarded import Guarded, Limits
from tasks.arena.largest import Largest
from tasks.replay.schema import Episode
from tasks.rollout.rollout import BehaviourIdentity, rollout
from tests.arena.faulty import FAULTS, FLOOD, Faulty
from tests.tiny import make_tiny_model

GROUP = 8
ROWS = 64
RATES = {
    "hang": 0.004, "busy loop": 0.002, "exit": 0.01, "kill": 0.005, "memory": 0.002, "exception": 0.02, "SystemExit": 0.005,
    "NaN": 0.01, "out of range": 0.005, "NaN component": 0.005, "None": 0.01, "text reward": 0.005, "bytes": 0.005,
    "surrogate": 0.005, "unpicklable": 0.005, "huge components": 0.002, FLOOD: 0.02,
}  # fmt: skip
ENDS_WORKER = {"hang", "busy loop", "exit", "kill", "memory"}
IDENTITY = BehaviourIdentity("agent/1", "a" * 64, "b" * 64, "c" * 64)


@dataclass
class Report:
    """Counts of one run; `wrong` names every episode that did not end as it had to."""

    episodes: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    errors: int = 0
    wrong: list[str] = field(default_factory=list)
    restarts: int = 0
    seconds: float = 0.0
    rss: list[int] = field(default_factory=list)  # bytes, of the parent, after each group


def play(episodes: int, workers: int, limits: Limits, seed: int) -> Report:
    """Play whole groups, at least `episodes` in all."""
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        path = make_tiny_model(Path(folder) / "tiny", hidden_size=16, layers=1, heads=2, kv_heads=1)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    env = Faulty(RATES)
    tasks = env.tasks("train", -(-episodes // GROUP), seed)
    started = time.perf_counter()
    ids = set()
    with Guarded(env, limits, workers) as guarded:
        groups = rollout(
            model,
            tokenizer,
            guarded,
            tasks,
            group_size=GROUP,
            temperature=1.0,
            seed=seed,
            batch_rows=ROWS,
            identity=IDENTITY,
        )
        for task, group in zip(tasks, groups, strict=True):
            report.rss.append(psutil.Process().memory_info().rss)
            for episode in group:
                ids.add(episode.episode_id)
                action = _first_action(tokenizer, episode)
                fault = env.fault_of(task, action)
                report.episodes += 1
                report.faults[fault] += 1
                report.errors += episode.finish_reason == "error"
                if not _as_it_had_to(episode, fault, task.id):
                    report.wrong.append(
                        f"{episode.episode_id} ({fault}): {episode.finish_reason} {episode.reward}"
                    )
        report.restarts = guarded.restarts
    report.seconds = time.perf_counter() - started
    if len(ids) != len(tasks) * GROUP:
        report.wrong.append(f"{len(ids)} different episodes of {len(tasks) * GROUP}")
    expected = sum(report.faults[fault] for fault in ENDS_WORKER)
    if report.restarts != expected:
        report.wrong.append(f"{report.restarts} restarts instead of {expected}")
    return report


def _first_action(tokenizer: Any, episode: Episode) -> str:
    columns = zip(episode.response_ids, episode.turn_ids, episode.loss_mask, strict=True)
    ids = [token for token, turn, mine in columns if mine and turn == 0]
    return str(tokenizer.decode(ids, skip_special_tokens=True)).partition("\n")[0]


def _as_it_had_to(episode: Episode, fault: str, task_id: str) -> bool:
    if episode.task_id != task_id:
        return False
    if fault in FAULTS:
        error = (episode.finish_reason, episode.reward, episode.reward_components) == (
            "error",
            0.0,
            '{"error":1.0}',
        )
        return error and all(episode.loss_mask)
    turns = 2 if fault == FLOOD else 1
    return (
        episode.finish_reason in ("done", "length")
        and episode.reward == 1
        and len(set(episode.turn_ids)) == turns
    )


def overhead(repeats: int = 3000) -> dict[str, float]:
    """Median microseconds of a step of `Largest`: called, guarded, and of an exchange of as many bytes alone."""
    env = Largest()
    task, answer = env.tasks("train", 1, 0)[0], ["51"]
    ours, theirs = Pipe()
    if (pid := os.fork()) == 0:
        ours.close()
        _echo(theirs)
    theirs.close()

    def exchange() -> None:
        ours.send_bytes(bytes(500))
        ours.recv_bytes()

    with Guarded(env) as guarded:
        found = {
            "called": _median(lambda: env.step(task, answer), repeats),
            "exchange": _median(exchange, repeats),
            "guarded": _median(lambda: guarded.step(task, answer), repeats),
        }
    ours.close()
    os.waitpid(pid, 0)
    return found


def _echo(orders: Connection) -> None:
    try:
        while True:
            orders.send_bytes(orders.recv_bytes())
    finally:
        os._exit(0)


def _median(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="time limit of a step")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    logging.getLogger("tasks.rollout.rollout").setLevel(logging.ERROR)  # a warning for each fault
    print(describe(), flush=True)
    limits = Limits(seconds=chosen.seconds, memory=256 << 20, observation=200)
    report = play(chosen.episodes, chosen.workers, limits, chosen.seed)
    for fault, count in sorted(report.faults.items()):
        print(f"  {fault:<16} {count}")
    early = report.rss[len(report.rss) // 10]
    print(
        f"{report.episodes} episodes in {report.seconds:.0f} s, {report.errors} errors, {len(report.wrong)} wrong, "
        f"{report.restarts} restarts of {chosen.workers} workers"
    )
    print(
        f"resident memory of the parent: {early / 2**20:.0f} MiB after a tenth, {report.rss[-1] / 2**20:.0f} at the end, "
        f"{max(report.rss) / 2**20:.0f} at most"
    )
    for line in report.wrong[:20]:
        print(f"  {line}")
    print(
        "a healthy step, median microseconds:", {name: round(value, 1) for name, value in overhead().items()}
    )
    if report.wrong:
        raise SystemExit("Something went wrong; see above.")


if __name__ == "__main__":
    main()
