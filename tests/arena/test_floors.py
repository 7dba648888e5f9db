"""Both baselines of an environment behind its guard, and what is said where it does not live through them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import pytest

from tasks.arena.environment import Task
from tasks.arena.floors import Floor, beside, floor_of
from tasks.arena.guarded import Guarded, Limits
from tasks.core.digest import canonical_json
from tasks.core.errors import UsageError
from tests.leaderboard import doors
from tests.leaderboard.doors import Doors

QUICK = Limits(seconds=0.5)


class Told(Doors):
    """Its baselines are whatever it was made with; an exception is raised."""

    def __init__(self, constant: Any, random: Any = 0.5) -> None:
        super().__init__("told")
        self._told = constant, random

    def constant_baseline(self, tasks: Sequence[Task]) -> tuple[str, float]:
        return self._give(0)

    def random_baseline(self, tasks: Sequence[Task], seed: int) -> float:
        return self._give(1)

    def _give(self, place: int) -> Any:
        if isinstance(self._told[place], Exception):
            raise self._told[place]
        return self._told[place]


def test_a_floor_is_what_the_environment_says() -> None:
    env = doors.plain()
    tasks = env.tasks("heldout", 20, 0)
    action, constant = env.constant_baseline(tasks)
    with Guarded(env, QUICK) as guarded:
        floor = floor_of(guarded, tasks, 3)
    assert floor == Floor(20, constant, action, env.random_baseline(tasks, 3))
    assert floor == floor_of(env, tasks, 3)


@pytest.mark.parametrize(
    ("env", "says"),
    [
        (doors.sleepy(), r"constant_baseline\(\) of .*:sleepy took more than 1.5 s and was ended\."),
        (doors.trap(), r"constant_baseline\(\) of .*:trap ended its process \(exit status 3\)\."),
        (Told(RuntimeError("the tool broke \ud800")), r"failed: RuntimeError: the tool broke \?\."),
        (Told(("left", 0.5), MemoryError("all gone")), r"random_baseline\(\) of .*: MemoryError: all gone\."),
        (Told(None), "gave no pair of an action and its mean reward"),
        (Told(("\ud800", 0.5)), "gave no pair of an action and its mean reward"),
        (Told(("left", math.nan)), r"gave the mean reward nan, which is not in \[0.0, 1.0\]"),
        (Told(("left", 0.5), 1.5), r"random_baseline\(\) of .* gave the mean reward 1.5, which is not in"),
        (Told(("left", 0.5), "much"), "gave the mean reward 'much'"),
    ],
)
def test_a_fault_costs_the_floor_and_the_next_step_works(env: Doors, says: str) -> None:
    tasks = env.tasks("heldout", 3, 0)
    with Guarded(env, QUICK) as guarded:
        floor = floor_of(guarded, tasks, 0)
        assert guarded.step(tasks[0], ["left"]).done
    assert (floor.tasks, floor.constant, floor.constant_action, floor.random) == (3, None, None, None)
    assert re.search(says, floor.error), floor.error
    canonical_json(floor.error)  # it can be kept


def test_tasks_that_cannot_be_sent_cost_the_floor() -> None:
    (task,) = doors.plain().tasks("heldout", 1, 0)
    task.payload["f"] = lambda: 0  # type: ignore[index]
    with Guarded(doors.plain(), QUICK) as guarded:
        assert "could not be sent to its process" in floor_of(guarded, [task], 0).error


def test_without_tasks_there_is_no_floor_and_the_environments_own_word_is_kept() -> None:
    with Guarded(Told(UsageError("It names no actions.")), QUICK) as guarded:
        assert floor_of(guarded, [], 0) == Floor(
            0, None, None, None, "there are no tasks to measure them on."
        )
        found = floor_of(guarded, guarded.tasks("heldout", 1, 0), 0)
        assert (found.constant, found.random, found.error) == (None, None, "It names no actions.")


def test_the_words_beside_a_score() -> None:
    assert beside(0.25, 1 / 3, "") == "constant 0.250, random 0.333"
    assert beside(0.25, None, "") == "constant 0.250"  # of an earlier release
    assert beside(None, None, "it hung.") == "no baselines: it hung."
    assert beside(None, None, "") == "no baselines"
