"""Rooms of MiniGrid and BabyAI: an agent that sees what is before it, a mission, and a bot that solves BabyAI's levels.

The text names what the agent sees of its seven by seven cells, from its own point of view ("red ball 2 ahead 1 left"), and the
wall it faces; `picture` shows the same state from above. The reward is 1 if the mission is accomplished, else 0; the
level's own reward, which falls with each turn, is the component `score`.

The prompt names the room by a number, a digest of its whole state, of which the agent sees a part: so a prompt has one truth,
and equal rooms are one task.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version as package_version
from typing import TYPE_CHECKING, Any

from tasks.arena.environment import Split, Step, Task, draw_tasks
from tasks.arena.playing import Games, best_repeated, random_play
from tasks.core.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_WALK = ("left", "right", "forward")
_EXAMPLES = "act: right\nact: forward\n"  # in every prompt, for the form alone: a small model needs it
_TILE = 16  # pixels
_UNSEEN, _EMPTY, _WALL, _DOOR, _GOAL = 0, 1, 2, 4, 8  # minigrid.core.constants.OBJECT_TO_IDX


@dataclass(frozen=True)
class Level:
    """One of the registered levels.

    Attributes:
        id: as gymnasium knows it.
        max_turns: an episode may have; BabyAI's own limits are several times what the way takes.
        actions: that can be of use in it.
    """

    id: str
    max_turns: int
    actions: tuple[str, ...] = _WALK


LEVELS: Mapping[str, Level] = {
    "BabyAI-GoToLocalS5N2": Level("BabyAI-GoToLocalS5N2-v0", 10),
    "BabyAI-GoToRedBallGrey": Level("BabyAI-GoToRedBallGrey-v0", 32),
    "BabyAI-OpenDoor": Level("BabyAI-OpenDoor-v0", 20, (*_WALK, "toggle")),
    "BabyAI-PickupDist": Level("BabyAI-PickupDist-v0", 16, (*_WALK, "pickup", "drop")),
    "DoorKey-5x5": Level("MiniGrid-DoorKey-5x5-v0", 20, (*_WALK, "pickup", "toggle")),
    "DoorKey-6x6": Level("MiniGrid-DoorKey-6x6-v0", 28, (*_WALK, "pickup", "toggle")),
    "Empty-Random-6x6": Level("MiniGrid-Empty-Random-6x6-v0", 12),
    "Fetch-5x5-N2": Level("MiniGrid-Fetch-5x5-N2-v0", 12, (*_WALK, "pickup")),
}


def make(name: str) -> MiniGrid:
    """The environment of one of `LEVELS`."""
    return BabyAI(name, LEVELS[name]) if name.startswith("BabyAI-") else MiniGrid(name, LEVELS[name])


@dataclass
class _Room:
    """An episode in progress."""

    world: Any  # the gymnasium environment itself, without wrappers
    view: NDArray[np.uint8]  # its newest observation
    turns: int = 0
    formatted: int = 0  # actions of the right form so far
    accepted: int = 0  # actions that changed anything
    changed: bool = True  # by the last action
    over: bool = False
    reward: float = 0.0


class MiniGrid:
    """One level; see the module's docstring."""

    licence = "Apache-2.0"
    max_new_tokens = 8

    def __init__(self, name: str, level: Level) -> None:
        self.name = f"minigrid/{name}"
        self.level = level
        self.version = f"1+minigrid-{package_version('minigrid')}"
        self.max_turns = level.max_turns
        self._rooms: Games[_Room] = Games(self._begin, self._advance)

    def tasks(self, split: Split, n: int, seed: int) -> list[Task]:
        """See `Environment.tasks`."""
        return draw_tasks(self, self._candidates(seed), split, n, seed)

    def step(self, task: Task, actions: Sequence[str]) -> Step:
        """See `Environment.step`."""
        with self._rooms.after(task.payload["seed"], actions) as room:
            if not room.over:
                return Step(_observe(room.view), done=False, valid=room.changed)
            success = float(room.reward > 0)
            components = {
                "valid_format": room.formatted / room.turns,
                "valid_action": room.accepted / room.turns,
                "success": success,
                "score": room.reward,
            }
            return Step("", True, success, components, valid=room.changed)

    def choices(self, task: Task) -> Sequence[str]:
        """See `Listed.choices`."""
        return self.level.actions

    def constant_baseline(self, tasks: Sequence[Task]) -> tuple[str, float]:
        """See `Environment.constant_baseline`."""
        return best_repeated(self, tasks)

    def random_baseline(self, tasks: Sequence[Task], seed: int) -> float:
        """See `Environment.random_baseline`."""
        return random_play(self, tasks, seed)

    def picture(self, task: Task, actions: Sequence[str]) -> NDArray[np.uint8]:
        """See `Pictured.picture`: the whole room from above, 16 pixels a cell."""
        with self._rooms.after(task.payload["seed"], actions) as room:
            frame: NDArray[np.uint8] = room.world.get_frame(highlight=False, tile_size=_TILE)
            return frame

    def _candidates(self, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
        rng = random.Random(f"{self.name}/{seed}")
        while True:
            number = rng.getrandbits(31)
            room = self._begin(number)
            name, mission = f"Room {_number(room.world)}.", f"Mission: {room.world.mission}."
            actions = f"Actions: {', '.join(self.level.actions)}."
            prompt = f"{name} {mission} {actions}\n{_EXAMPLES}{_observe(room.view)}"
            yield prompt, {"seed": number}

    def _begin(self, seed: int) -> _Room:
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame, which minigrid imports, opens no window
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        import gymnasium
        import minigrid  # noqa: F401  # registers the levels

        world: Any = gymnasium.make(self.level.id).unwrapped
        with redirect_stdout(io.StringIO()):  # BabyAI prints each room that it rejects
            seen, _ = world.reset(seed=seed)
        world.max_steps = self.max_turns  # after the reset, which sets BabyAI's own
        return _Room(world, seen["image"])

    def _advance(self, room: _Room, action: str) -> None:
        if room.over:
            return
        action, world = action.strip(), room.world
        room.turns += 1
        room.changed = False
        if action not in self.level.actions:
            world.step_count += 1  # the score falls with every turn
            room.over = room.turns == self.max_turns
            return
        room.formatted += 1
        before = _state(world)
        seen, reward, terminated, truncated, _ = world.step(world.actions[action])
        room.view = seen["image"]
        room.changed = _state(world) != before
        room.accepted += room.changed
        room.over, room.reward = bool(terminated or truncated), float(reward)


class BabyAI(MiniGrid):
    """A level with BabyAI's bot as its expert."""

    def expert(self, task: Task, actions: Sequence[str]) -> str:
        """See `Expert.expert`; the bot watches the episode from its beginning, for it remembers what it has seen."""
        from minigrid.utils.baby_ai_bot import BabyAIBot

        room = self._begin(task.payload["seed"])
        bot: Any = BabyAIBot(room.world)  # type: ignore[no-untyped-call]
        advice = bot.replan(None)
        for action in actions:
            self._advance(room, action)
            if room.over:
                raise UsageError(f"The task {task.id} is over after {room.turns} actions.")
            taken = action.strip()
            # What is no action changed nothing, so the advice stands.
            advice = bot.replan(room.world.actions[taken]) if taken in self.level.actions else advice
        return str(advice.name)


def _state(world: Any) -> tuple[object, ...]:
    """All that an action can change: where the agent stands and looks, what it carries, and the cell before it."""
    before = world.grid.get(*world.front_pos)
    pose = (*map(int, world.agent_pos), int(world.agent_dir))
    return pose, world.carrying and world.carrying.encode(), before and before.encode()


def _number(world: Any) -> int:
    """A digest of a room in which nothing has happened yet."""
    state = hashlib.sha256(world.grid.encode().tobytes())
    state.update(repr((_state(world), world.mission)).encode())
    return int.from_bytes(state.digest()[:8]) % 10**8


def _observe(image: NDArray[np.uint8]) -> str:
    """The level's own observation, [column, row, (object, colour, state)], in words: what is nearest first."""
    columns, rows, _ = image.shape
    middle, bottom = (
        columns // 2,
        rows - 1,
    )  # where the agent stands, looking up; this cell shows what it carries
    cells = {
        (column, row): tuple(image[column, row].tolist()) for column in range(columns) for row in range(rows)
    }
    carried = cells.pop((middle, bottom))
    seen = [
        (bottom - row + abs(column - middle), bottom - row, column - middle, _describe(*cell))
        for (column, row), cell in cells.items()
        if cell[0] not in (_UNSEEN, _EMPTY, _WALL)
    ]
    walls = [bottom - row for row in range(bottom) if cells[middle, row][0] == _WALL]
    if walls:
        seen.append((min(walls), min(walls), 0, "wall"))
    what = ", ".join(f"{thing} {_where(ahead, right)}" for _, ahead, right, thing in sorted(seen))
    lines = [f"see: {what or 'nothing'}"]
    if carried[0] != _EMPTY:
        lines.append(f"carry: {_describe(*carried)}")
    return "\n".join([*lines, "act:"])


def _describe(kind: int, colour: int, state: int) -> str:
    from minigrid.core.constants import IDX_TO_COLOR, IDX_TO_OBJECT

    if kind == _GOAL:
        return "goal"
    thing = f"{IDX_TO_COLOR[colour]} {IDX_TO_OBJECT[kind]}"
    return f"{('open', 'closed', 'locked')[state]} {thing}" if kind == _DOOR else thing


def _where(ahead: int, right: int) -> str:
    side = f"{abs(right)} {'right' if right > 0 else 'left'}"
    return " ".join(([f"{ahead} ahead"] if ahead else []) + ([side] if right else []))
