"""Environments as a user would bring them: in a module of their own, named by module:factory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gymnasium

from tasks.arena.gymnasium_adapter import WORLDS, Gymnasium, World
from tasks.arena.largest import Largest

HERE = __name__


def _bar(world: Any, seen: Any) -> str:
    return "#" * int(seen)


def _closeness(total: float, terminated: bool) -> float:
    return total


class Counter(gymnasium.Env):
    """Count up to the goal that the seed draws; actions 5 (down) and 6 (up), so that the space does not begin at 0."""

    action_space = gymnasium.spaces.Discrete(2, start=5)
    observation_space = gymnasium.spaces.Discrete(20)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[int, dict]:
        super().reset(seed=seed)
        self.place = int(self.np_random.integers(1, 10))
        return self.place, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        assert self.action_space.contains(action)
        self.place += {5: -1, 6: 1}[action]
        done = self.place in (0, 12)
        return self.place, 2.0 * (self.place == 12), done, False, {}


gymnasium.register("ForebayCounter-v0", entry_point=Counter)


def counter() -> Gymnasium:
    world = World(
        "tests.arena.own_worlds:ForebayCounter-v0", ("down", "up"), 20, _closeness, show=_bar, hidden=False
    )
    return Gymnasium(f"{HERE}:counter", world)


def lake() -> Gymnasium:
    world = replace(WORLDS["FrozenLake-v1"], options={"is_slippery": False}, max_turns=12)
    return Gymnasium(f"{HERE}:lake", world)


def nameless() -> Largest:
    return Largest()


def broken() -> Largest:
    raise RuntimeError("no licence key")


def number() -> int:
    return 7
