"""Whole episodes against an environment, without a model: baselines by playing, and games that are kept between steps."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import RLock
from typing import Any, Generic, Protocol, TypeVar

from tasks.arena.environment import Environment, Expert, Listed, Step, Task, require_some
from tasks.core.errors import UsageError


class ListedEnvironment(Environment, Listed, Protocol):
    """An environment whose tasks have a finite list of actions."""


G = TypeVar("G")
_KEPT = 1024  # games in progress that an environment keeps


class Games(Generic[G]):
    """Games that can only go forward, as a function of where they begin and of the actions so far.

    The game after some actions is found again and moved on by the next one; where it is gone (another sample of the same
    task took another action, or too many games are in progress) it is played again from the beginning. So what is kept
    changes the time of a step and never its result. Games that share global state are played by one thread at a time.

    Args:
        begin: makes the game of a seed.
        advance: plays an action in it, in place; must be deterministic.
        most: games in progress that are kept.
    """

    def __init__(
        self, begin: Callable[[int], G], advance: Callable[[G, str], None], most: int = _KEPT
    ) -> None:
        self._begin, self._advance, self._most = begin, advance, most
        self._kept: OrderedDict[tuple[int, tuple[str, ...]], G] = OrderedDict()
        self._lock = RLock()

    def __getstate__(self) -> dict[str, Any]:
        """Where games begin and how they go on: another process plays its own."""
        return {"begin": self._begin, "advance": self._advance}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Games.__init__(self, **state)

    @contextmanager
    def after(self, seed: int, actions: Sequence[str]) -> Iterator[G]:
        """The game of `seed` in which `actions` have been played, to be looked at and not changed."""
        done = tuple(actions)
        with self._lock:
            if (game := self._kept.pop((seed, done), None)) is None:
                if done and (before := self._kept.pop((seed, done[:-1]), None)) is not None:
                    game, left = before, done[-1:]
                else:
                    game, left = self._begin(seed), done
                for action in left:
                    self._advance(game, action)
            self._kept[seed, done] = game
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
            yield game


def play(env: Environment, task: Task, policy: Callable[[Sequence[str]], str]) -> list[Step]:
    """Play an episode to its end; `policy` writes the next action, given those so far.

    Raises:
        UsageError: the environment did not end the episode within its own limit of turns.
    """
    actions: list[str] = []
    steps: list[Step] = []
    while not (steps and steps[-1].done):
        if len(actions) == env.max_turns:
            raise UsageError(f"{env.name} did not end the task {task.id} after {env.max_turns} actions.")
        actions.append(policy(actions))
        steps.append(env.step(task, actions))
    return steps


def mean_reward(
    env: Environment, tasks: Sequence[Task], policy: Callable[[Task, Sequence[str]], str]
) -> float:
    """Mean reward of one episode for each task.

    Raises:
        UsageError: there are no tasks.
    """
    require_some(tasks)

    def reward(task: Task) -> float:
        return play(env, task, lambda actions: policy(task, actions))[-1].reward

    return sum(map(reward, tasks)) / len(tasks)


def best_repeated(env: ListedEnvironment, tasks: Sequence[Task]) -> tuple[str, float]:
    """`best_of` every action of the tasks.

    Raises:
        UsageError: there are no tasks.
    """
    return best_of(env, tasks, dict.fromkeys(action for task in tasks for action in env.choices(task)))


def best_of(env: Environment, tasks: Sequence[Task], actions: Iterable[str]) -> tuple[str, float]:
    """The constant baseline by playing: the best of `actions`, written in every turn of every task, and its mean reward.

    Raises:
        UsageError: there are no tasks, or no actions.
    """
    require_some(tasks)
    means = {action: mean_reward(env, tasks, partial(_always, action)) for action in actions}
    if not means:
        raise UsageError(f"{env.name} names no actions; its constant baseline needs at least one.")
    best = max(means, key=lambda action: means[action])
    return best, means[best]


def random_play(env: ListedEnvironment, tasks: Sequence[Task], seed: int) -> float:
    """The random baseline by playing: mean reward of one episode for each task, its actions drawn from `choices`.

    Raises:
        UsageError: there are no tasks.
    """
    rng = random.Random(f"{env.name}/random/{seed}")
    return mean_reward(env, tasks, lambda task, actions: rng.choice(env.choices(task)))


def _always(action: str, task: Task, actions: Sequence[str]) -> str:
    return action


def expert_baseline(env: Environment, tasks: Sequence[Task]) -> float | None:
    """Mean reward of the environment's own expert; None where it has none."""
    if not isinstance(env, Expert):
        return None
    return mean_reward(env, tasks, env.expert)
