"""Any Gymnasium environment with discrete actions, as text: `World` says how it is told and judged.

An action is one of the world's words; anything else takes a turn and changes nothing. The reward is a function of the
episode's return, mapped into [0, 1]; the component `score` is the same, `success` is 1 where it is 1.

`make` knows some environments, and tells any other registered one by its numbers. For another wording write a factory
in a module of your own, with module-level functions (they are sent to other processes), and name it `module:factory`:

    def lake():
        world = replace(WORLDS["FrozenLake-v1"], options={"is_slippery": False}, hidden=False)
        return Gymnasium("my_worlds:lake", world)
"""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version as package_version
from typing import Any

from tasks.arena.environment import Split, Step, Task, draw_tasks
from tasks.arena.playing import Games, best_repeated, random_play
from tasks.core.digest import digest_json
from tasks.core.errors import UsageError

_MOST_NUMBERS = 16  # of an observation that is told by its numbers


def numbers(world: Any, seen: Any) -> str:
    """An observation by its numbers, to three digits, parts of a dictionary by name.

    Raises:
        UsageError: it has more than sixteen, a picture say; no model reads that.
    """
    import numpy as np

    if isinstance(seen, Mapping):
        return ", ".join(f"{name}: {numbers(world, part)}" for name, part in seen.items())
    if isinstance(seen, tuple):
        return " ".join(numbers(world, part) for part in seen)
    flat = np.asarray(seen).ravel()
    if flat.size > _MOST_NUMBERS:
        raise UsageError(f"An observation of {flat.size} numbers is no text; give the world a `show`.")
    return " ".join(f"{x:.3g}" for x in flat.tolist())


@dataclass(frozen=True)
class World:
    """How a Gymnasium environment is made, told and judged.

    Attributes:
        id: as `gymnasium.make` knows it, "module:Name-v0" for one that importing a module registers.
        actions: the words of the actions 0, 1, …
        max_turns: an episode may have.
        reward: (sum of rewards, whether the episode ended by itself) -> [0, 1]; other values are cut.
        intro: what is said once, before the first observation.
        show: (the environment without wrappers, observation) -> text.
        options: of `gymnasium.make`.
        hidden: an observation does not tell everything, or chance plays along: the prompt names the level by its seed. Else
            levels that begin alike are one task.
        version: changes with anything of the above.
        licence: SPDX identifier.
    """

    id: str
    actions: tuple[str, ...]
    max_turns: int
    reward: Callable[[float, bool], float]
    intro: str = ""
    show: Callable[[Any, Any], str] = numbers
    options: Mapping[str, Any] = field(default_factory=dict)
    hidden: bool = True
    version: str = "1"
    licence: str = "MIT"
    max_new_tokens: int = 8


def share_of(most: float, total: float, terminated: bool) -> float:
    """The reward of a return as a share of the greatest one; partial(share_of, most) is a `World.reward`."""
    return total / most


def ended(total: float, terminated: bool) -> float:
    """1 if the episode ended by itself: the reward of a world that ends with its aim alone."""
    return float(terminated)


def _cart(world: Any, seen: Any) -> str:
    place, speed, angle, turning = (f"{x:+.2f}" for x in seen.tolist())
    return f"cart {place} moving {speed}, pole {angle} turning {turning}"


def _lake(world: Any, seen: Any) -> str:
    rows = [[cell.decode().replace("S", ".").replace("F", ".") for cell in row] for row in world.desc]
    rows[int(seen) // world.ncol][int(seen) % world.ncol] = "P"
    return "\n".join(map("".join, rows))


def _taxi(world: Any, seen: Any) -> str:
    row, column, passenger, destination = world.decode(int(seen))
    names = ["R", "G", "Y", "B", "taxi"]
    return f"taxi {row} {column}, passenger {names[passenger]}, to {names[destination]}"


WORLDS: Mapping[str, World] = {
    "CartPole-v1": World(
        "CartPole-v1",
        ("left", "right"),
        max_turns=50,
        reward=partial(share_of, 50.0),
        intro="Keep the pole upright: push the cart left or right.\nact: left\nact: right\n",
        show=_cart,
    ),
    "FrozenLake-v1": World(
        "FrozenLake-v1",
        ("left", "down", "right", "up"),
        max_turns=40,
        reward=partial(share_of, 1.0),
        intro="Frozen lake, slippery: walk from P to the goal G, not into a hole H.\nMoves: up, down, left, right.\nact: left\nact: down\n",
        show=_lake,
    ),
    "Taxi-v4": World(
        "Taxi-v4",
        ("south", "north", "east", "west", "pickup", "dropoff"),
        max_turns=30,
        reward=ended,
        intro=(
            "Taxi: fetch the passenger and bring them to where they want to go. R is at 0 0 (row, column), G 0 4, Y 4 0, B 4 3.\n"
            "Walls stand between columns 1 and 2 in rows 0 and 1; 0 and 1, and 2 and 3 in rows 3 and 4.\n"
            "Actions: south, north, east, west, pickup, dropoff.\nact: west\nact: pickup\n"
        ),
        show=_taxi,
        hidden=False,
    ),
}


def make(name: str) -> Gymnasium:
    """The environment `gymnasium/<name>`: one of `WORLDS`, or any registered one told by its numbers.

    Raises:
        UsageError: Gymnasium does not know it, its actions are not discrete, or its spec does not say what is a success.
    """
    if name in WORLDS:
        return Gymnasium(f"gymnasium/{name}", WORLDS[name])
    import gymnasium

    try:
        spec = gymnasium.spec(name)
        space: Any = gymnasium.make(name).action_space
    except Exception as error:  # whatever importing and making it raises
        known = ", ".join(WORLDS)
        raise UsageError(
            f"Gymnasium has no environment {name!r} ({error}); ready for use are {known}."
        ) from None
    if not isinstance(space, gymnasium.spaces.Discrete):
        raise UsageError(f"{name} has the actions {space}; only discrete ones can be written as words.")
    if not spec.max_episode_steps or not spec.reward_threshold or spec.reward_threshold <= 0:
        raise UsageError(
            f"{name} does not say how many steps an episode has and from which return above 0 it is solved; write a factory "
            "that gives a `World` with its own `reward` (docs/environments.md#your-own), and name it module:factory."
        )
    first = int(space.start)
    words = tuple(str(i) for i in range(first, first + int(space.n)))
    reward = partial(share_of, float(spec.reward_threshold))
    intro = f"{name}. Actions: {', '.join(words)}.\n"
    return Gymnasium(f"gymnasium/{name}", World(name, words, spec.max_episode_steps, reward, intro))


@dataclass
class _Played:
    """An episode in progress."""

    world: Any
    seen: Any
    total: float = 0.0
    turns: int = 0
    formatted: int = 0
    terminated: bool = False
    over: bool = False
    valid: bool = True  # the last action


class Gymnasium:
    """One world; see the module's docstring.

    Args:
        name: what `get` knows it by: gymnasium/<id>, or module:factory.
    """

    def __init__(self, name: str, world: World) -> None:
        self.name = name
        self.world = world
        self.licence = world.licence
        self.max_turns = world.max_turns
        self.max_new_tokens = world.max_new_tokens
        self._games: Games[_Played] = Games(self._begin, self._advance)

    @cached_property
    def version(self) -> str:
        """The world's, the library's, and a digest of how the world is told and judged."""
        world = self.world
        told = [world.id, world.actions, world.max_turns, world.intro, world.hidden, repr(world.options)]
        digest = digest_json([*told, _source(world.reward), _source(world.show)])[:8]
        return f"{world.version}+gymnasium-{package_version('gymnasium')}+{digest}"

    def tasks(self, split: Split, n: int, seed: int) -> list[Task]:
        """See `Environment.tasks`."""
        return draw_tasks(self, self._candidates(seed), split, n, seed)

    def step(self, task: Task, actions: Sequence[str]) -> Step:
        """See `Environment.step`."""
        with self._games.after(task.payload["seed"], actions) as played:
            if not played.over:
                return Step(self._ask(played), done=False, valid=played.valid)
            reward = min(1.0, max(0.0, float(self.world.reward(played.total, played.terminated))))
            components = {
                "valid_format": played.formatted / played.turns,
                "success": float(reward >= 1.0),
                "score": reward,
            }
            return Step("", True, reward, components, played.valid)

    def choices(self, task: Task) -> Sequence[str]:
        """See `Listed.choices`."""
        return self.world.actions

    def constant_baseline(self, tasks: Sequence[Task]) -> tuple[str, float]:
        """See `Environment.constant_baseline`."""
        return best_repeated(self, tasks)

    def random_baseline(self, tasks: Sequence[Task], seed: int) -> float:
        """See `Environment.random_baseline`."""
        return random_play(self, tasks, seed)

    def _candidates(self, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
        rng = random.Random(f"{self.name}/{seed}")
        while True:
            level = rng.getrandbits(31)
            name = f"Level {level}. " if self.world.hidden else ""
            yield f"{name}{self.world.intro}{self._ask(self._begin(level))}", {"seed": level}

    def _ask(self, played: _Played) -> str:
        return f"{self.world.show(played.world.unwrapped, played.seen)}\nact:"

    def _begin(self, seed: int) -> _Played:
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # where an environment imports pygame
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        import gymnasium

        world: Any = gymnasium.make(self.world.id, disable_env_checker=True, **self.world.options)
        seen, _ = world.reset(seed=seed)
        return _Played(world, seen)

    def _advance(self, played: _Played, action: str) -> None:
        if played.over:
            return
        played.turns += 1
        played.valid = (word := action.strip()) in self.world.actions
        if played.valid:
            played.formatted += 1
            first = int(played.world.action_space.start)
            played.seen, reward, terminated, truncated, _ = played.world.step(
                first + self.world.actions.index(word)
            )
            played.total += float(reward)
            played.terminated = bool(terminated)
            played.over = bool(terminated or truncated)
        played.over |= played.turns == self.max_turns


def _source(function: Callable[..., Any]) -> str:
    """What a function computes, as far as its text tells."""
    if isinstance(function, partial):
        return f"{_source(function.func)} {function.args} {function.keywords}"
    return inspect.getsource(function)
