"""Does a run that was killed at any moment, and resumed, end with the bytes of one that was not?

    python -m benchmarks.resume [--runs 1000] [--workers 2] [--json PATH] [--save]

Every run trains the same small model on the same replay in a process of its own, forked from a warm parent, by the
settings of one of `CASES` in turn, and is killed (SIGKILL) one to three times at uniformly random moments; then it goes
on until it is finished. Weights, groups used, steps and reason are compared with those of runs of its case that nobody
disturbed. A run that ended before its first kill
is made again, so each one was killed at least once. Where a kill fell is read from what it left on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from models.machine import describe
from tasks.core.digest import digest_json
from tasks.training.checkpoint import KEPT
from tasks.training.settings import (
    Adapter,
    Admission,
    Guards,
    Mixture,
    Penalties,
    Sampling,
    TrainingSettings,
)
from tasks.training.trainer import train
from tests.tiny import make_tiny_model
from tests.training.replay import Source, make_episodes, write_shards

BASELINE = Path(__file__).parent / "baselines" / "resume.json"
# Groups that do not divide into the epoch and an order that depends on what was measured: a resumed run that
# knew less than the one that was killed would use other groups. Enough checkpoints for old ones to be dropped.
PLAIN = TrainingSettings(
    steps=11,
    groups_per_step=2,
    learning_rate=1e-3,
    token_budget=128,
    checkpoint_every=2,
    sampling=Sampling(order="priority"),
    guards=Guards(min_ess=0, max_kl=100),
)
CASES = {
    "VESPO, by priority": PLAIN,
    "decoupled PPO in rounds, LoRA": PLAIN.model_copy(
        update={
            "objective": "decoupled_ppo",
            "updates_per_round": 2,
            "adapter": Adapter(rank=2, targets=("q_proj", "up_proj")),
            "sampling": Sampling(order="staleness"),
        }
    ),
    "EMPG, admission by divergence": PLAIN.model_copy(
        update={"advantage": "empg", "admission": Admission(max_divergence=5.0)}
    ),
    "fresh groups steered, KL penalty": PLAIN.model_copy(
        update={
            "mixture": Mixture(schedule="ess", target_ess=0.99),
            "sampling": Sampling(order="ess"),
            "penalties": Penalties(kl=0.1),
        }
    ),
}
PLACES = (
    "before the first checkpoint",
    "inside the writing of a checkpoint",
    "while an old checkpoint was dropped",
    "after a checkpoint",
    "inside the writing of the export",
    "after the export",
)


@dataclass(frozen=True, slots=True)
class Run:
    """One run: its case, where its kills fell, and the SHA-256 of what it came to."""

    case: str
    kills: tuple[str, ...]
    outcome: str


def prepare(folder: Path) -> dict[str, Any]:
    """Write a model and replay under `folder`; the arguments of `train` that all runs share."""
    model = make_tiny_model(folder / "model", seed=1, hidden_size=16, layers=1, heads=2, kv_heads=1)
    shards = write_shards(folder / "data", make_episodes(model, groups=5, size=4))
    return {
        "init_dir": model,
        "shards": shards,
        "shard_root": folder / "data",
        "seed": 0,
        "device": "cpu",
        "dtype": "float32",
    }


def go_on(options: dict[str, Any], case: str, run_dir: Path, kill_after: float | None) -> str | None:
    """Train in a forked process for `kill_after` seconds (None: to the end); its outcome, None if it was killed.

    Raises:
        RuntimeError: the training itself failed.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        code = 1
        try:
            settings, root = CASES[case], options["shard_root"]
            fresh = Source(options["init_dir"], root, f"fresh/{run_dir.name}")
            result = train(run_dir=run_dir, settings=settings, fresh=fresh, **options)
            known = [result.digest, result.steps, result.stop_reason, list(result.groups_consumed)]
            os.write(writing, digest_json(known).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading, "rb") as stream:
        ended, _, _ = select.select([stream], [], [], kill_after)
        if not ended:
            os.kill(child, signal.SIGKILL)
        outcome = stream.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and not ended:
        return None
    if status:
        raise RuntimeError(f"a run in {run_dir} failed; its traceback stands above")
    return outcome


def killed_at(run_dir: Path, old: set[int]) -> str:
    """One of `PLACES`. `old`: inodes of unfinished directories that an earlier kill left."""
    unfinished = {path.name for path in _unfinished(run_dir) if path.stat().st_ino not in old}
    checkpoints = list((run_dir / "checkpoints").glob("step-*"))
    if any("export" in name for name in unfinished):
        return PLACES[4]
    if (run_dir / "export").exists():
        return PLACES[5]
    if unfinished:
        return PLACES[1]
    if len(checkpoints) > KEPT:
        return PLACES[2]
    return PLACES[3] if checkpoints else PLACES[0]


def disturbed(options: dict[str, Any], case: str, run_dir: Path, seed: int, seconds: float) -> Run:
    """One run with kills at moments between 0 and `seconds`, the time that an undisturbed one takes."""
    rng = random.Random(seed)
    while True:
        kills: list[str] = []
        outcome = None
        for _ in range(rng.randint(1, 3)):
            old = {path.stat().st_ino for path in _unfinished(run_dir)}
            outcome = go_on(options, case, run_dir, rng.uniform(0, seconds))
            if outcome is not None:
                break
            kills.append(killed_at(run_dir, old))
        outcome = outcome or go_on(options, case, run_dir, None)
        _clear(options, run_dir)
        if kills and outcome:
            return Run(case, tuple(kills), outcome)


def undisturbed(options: dict[str, Any], case: str, run_dir: Path) -> tuple[Run, float]:
    """A run that nobody kills, and its seconds."""
    started = time.perf_counter()
    outcome = go_on(options, case, run_dir, None)
    seconds = time.perf_counter() - started
    _clear(options, run_dir)
    assert outcome is not None
    return Run(case, (), outcome), seconds


def _clear(options: dict[str, Any], run_dir: Path) -> None:
    shutil.rmtree(run_dir)
    shutil.rmtree(options["shard_root"] / "fresh" / run_dir.name, ignore_errors=True)


def measure(runs: int, workers: int, folder: Path) -> Iterator[Any]:
    """What `undisturbed` says of 3 runs a case, then `runs` results of `disturbed` as they come."""
    options = prepare(folder)
    cases = list(CASES)
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        todo = [
            (case, folder / f"u{number}-{place}") for number, case in enumerate(cases) for place in range(3)
        ]
        plain = list(pool.map(undisturbed, [options] * len(todo), *zip(*todo, strict=True)))
        yield plain
        seconds = {
            case: statistics.median(seconds for run, seconds in plain if run.case == case) for case in cases
        }
        futures = [
            pool.submit(disturbed, options, case, folder / f"r{i}", i, seconds[case])
            for i, case in zip(range(runs), cycle(cases), strict=False)
        ]
        for future in as_completed(futures):
            yield future.result()


def _unfinished(run_dir: Path) -> list[Path]:
    return [*run_dir.glob(".aside-*"), *run_dir.glob("checkpoints/.aside-*")]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--save", action="store_true", help="write them to benchmarks/baselines")
    words = parser.parse_args()
    # A forked process must not need threads that the parent had.
    torch.set_num_threads(1)
    disable_progress_bar()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(words.runs, words.workers, Path(folder))
        plain = next(results)
        bar = track(results, "killing and resuming", words.runs, console=Console(stderr=True))
        runs: list[Run] = list(bar)
    kills = Counter(place for run in runs for place in run.kills)
    every = [*runs, *(run for run, _ in plain)]
    figures = {
        "machine": describe(),
        "runs": len(runs),
        "kills": sum(kills.values()),
        "kills_by_place": {place: kills[place] for place in PLACES},
        "cases": {
            case: {
                "runs": sum(run.case == case for run in runs),
                "outcomes": len({run.outcome for run in every if run.case == case}),
            }
            for case in CASES
        },
        "seconds": round(time.perf_counter() - started, 1),
        "seconds_undisturbed": round(statistics.median(seconds for _, seconds in plain), 3),
        "settings": {case: settings.digest() for case, settings in CASES.items()},
    }
    for path in filter(None, (words.json, BASELINE if words.save else None)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=2) + "\n")
    _show(figures)
    return 0 if all(case["outcomes"] == 1 for case in figures["cases"].values()) else 1


def _show(figures: dict[str, Any]) -> None:
    table = Table("what", "count", title=f"{figures['machine']}, {figures['seconds']:.0f} s")
    table.add_row("runs killed and resumed", str(figures["runs"]))
    table.add_row("kills", str(figures["kills"]))
    for place, count in figures["kills_by_place"].items():
        table.add_row(f"  {place}", str(count))
    for case, found in figures["cases"].items():
        table.add_row(
            f"distinct outcomes of {found['runs']} and 3 undisturbed: {case}", str(found["outcomes"])
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
