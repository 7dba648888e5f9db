"""Environments of one's own, named tests.leaderboard.doors:FACTORY: the prompt says which door is the right one."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.arena.environment import Split, Step, Task, draw_tasks
from tasks.arena.playing import best_repeated, random_play
from tasks.core.errors import UsageError

SIDES = ("left", "right")
SHUT = Path("shut")  # while there is such a file in the working directory, no tasks of `shut` can be drawn


class Doors:
    version = "1"
    licence = "CC0-1.0"
    max_turns = 2
    max_new_tokens = 8

    def __init__(self, factory: str, *others: str) -> None:
        """`others` are further actions, which end nothing; "sleep" never comes back, "exit" ends the process."""
        self.name = f"{__name__}:{factory}"
        self._others = others

    def tasks(self, split: Split, n: int, seed: int) -> list[Task]:
        if self.name.endswith(":shut") and SHUT.exists():
            raise RuntimeError("The house is shut.")
        doors = ((f"Door {i}. Go {SIDES[i % 2]}.\n", {"side": SIDES[i % 2]}) for i in range(400))
        return draw_tasks(self, doors, split, n, seed)

    def step(self, task: Task, actions: Sequence[str]) -> Step:
        last = actions[-1].strip()
        while last == "sleep" and self._others:
            time.sleep(1)
        if last == "exit" and self._others:
            os._exit(3)
        right = last == task.payload["side"]
        done = right or last in SIDES or len(actions) == self.max_turns
        return Step("", done, float(right), {"correct": float(right)}, last in self.choices(task))

    def choices(self, task: Task) -> list[str]:
        return [*SIDES, *self._others]

    def expert(self, task: Task, actions: Sequence[str]) -> str:
        if actions:
            raise UsageError("Somebody waits at this door already.")
        return str(task.payload["side"])

    def constant_baseline(self, tasks: Sequence[Task]) -> tuple[str, float]:
        return best_repeated(self, tasks)

    def random_baseline(self, tasks: Sequence[Task], seed: int) -> float:
        return random_play(self, tasks, seed)


def plain() -> Doors:
    return Doors("plain")


def sleepy() -> Doors:
    return Doors("sleepy", "sleep", "wait")


def trap() -> Doors:
    return Doors("trap", "exit")


def shut() -> Doors:
    return Doors("shut")


class Bed(Doors):
    """Every step hangs, whatever is written."""

    def step(self, task: Task, actions: Sequence[str]) -> Step:
        return super().step(task, ["sleep"])


def bed() -> Doors:
    return Bed("bed", "sleep")


class Locked:
    """No action opens a door, and nobody knows one."""

    def __init__(self, factory: str) -> None:
        self._inside = Doors(factory)

    def __getattr__(self, name: str) -> Any:
        if name == "expert":
            raise AttributeError(name)
        return getattr(self._inside, name)

    def step(self, task: Task, actions: Sequence[str]) -> Step:
        return Step("", True, 0.0)
