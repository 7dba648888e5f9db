"""An environment that fails in every way there is, at fixed rates decided by a hash, and says beforehand how.

It stands in a module of its own because workers import it by name; what it imports, they import.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tasks.arena.environment import Split, Step, Task
from tasks.arena.largest import Largest

DONE = Step("", done=True, reward=1.0, components={"correct": 1.0})


def _exit() -> Step:
    os._exit(3)


def _kill() -> Step:
    os.kill(os.getpid(), signal.SIGKILL)
    return DONE


def _raise() -> Step:
    raise RuntimeError("the tool broke")


def _leave() -> Step:
    raise SystemExit(0)


def _hang() -> Step:
    while True:
        time.sleep(1)


def _spin() -> Step:
    while True:
        pass


def _hoard() -> Step:
    hoard = []
    while True:
        hoard.append(bytearray(64 << 20))


def _answer(value: Any) -> Callable[[], Any]:
    return lambda: value


FAULTS: Mapping[str, Callable[[], Any]] = {
    "exit": _exit,
    "kill": _kill,
    "exception": _raise,
    "SystemExit": _leave,
    "hang": _hang,
    "busy loop": _spin,
    "memory": _hoard,
    "NaN": _answer(Step("", done=True, reward=math.nan)),
    "out of range": _answer(Step("", done=True, reward=1.5)),
    "NaN component": _answer(Step("", done=True, reward=1.0, components={"correct": math.nan})),
    "None": _answer(None),
    "text reward": _answer(Step("", done=True, reward="1")),  # type: ignore[arg-type]
    "bytes": _answer(Step(b"seen", done=False)),  # type: ignore[arg-type]
    "surrogate": _answer(Step("\ud800", done=False)),
    "unpicklable": _answer(Step("", done=True, components={"f": lambda: 0})),  # type: ignore[dict-item]
    "huge components": _answer(Step("", done=True, components={f"{i:060}": 0.0 for i in range(20_000)})),
}
FLOOD = "flood"  # 1 MB of observation: no fault, it is cut
HEALTHY = "healthy"


class Faulty(Largest):
    """One turn (two after a flood). `rates` gives faults their shares; the rest of the episodes earn 1."""

    name = "faulty"
    max_turns = 2

    def __init__(self, rates: Mapping[str, float], max_new_tokens: int = 4) -> None:
        self.rates = dict(rates)
        self.max_new_tokens = max_new_tokens

    def tasks(self, split: Split, n: int, seed: int) -> list[Task]:
        return [
            Task(f"faulty/{seed}/{i}", self.name, self.version, split, seed, f"{i % 10}:", {})
            for i in range(n)
        ]

    def fault_of(self, task: Task, action: str) -> str:
        digest = hashlib.sha256(f"{task.id}/{action}".encode()).digest()
        place = int.from_bytes(digest[:8]) / 2**64
        for fault, rate in self.rates.items():
            if place < rate:
                return fault
            place -= rate
        return HEALTHY

    def step(self, task: Task, actions: Sequence[str]) -> Step:
        fault = self.fault_of(task, actions[0])
        if fault == FLOOD and len(actions) == 1:
            return Step("flood " * (1_000_000 // 6) + "end:", done=False)
        step: Step = FAULTS[fault]() if fault in FAULTS else DONE
        return step
