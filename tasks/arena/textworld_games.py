"""Text adventures of TextWorldExpress: rooms, things and errands, played by what the text says.

The games, their texts and their judgement are TextWorldExpress's; the sizes are ours. Each observation lists the actions that
are possible. The reward is 1 if the task is solved, else 0; `score` is the game's own. An action that is not possible takes a
turn. Of the package's eight games sorting is left out: two games of one level share their state there. The gold path of
coin is drawn anew each time, so coin has no expert.

The games run in a Java machine, one for each process that steps, started with the first game. It listens on loopback, for
those who know its token, and ends with its process, however that ends: its standard input is then closed. It takes less
memory than the `Guarded` worker it may run in allows.
"""

from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from importlib.metadata import version as package_version
from typing import Any

from tasks.arena.environment import Split, Step, Task, draw_tasks
from tasks.arena.playing import Games, best_of, mean_reward
from tasks.core.errors import Unavailable, UsageError

_LEVELS = 1001  # 1 to 1000 of the fold "train"
_KEPT = 192  # games in progress; each is an object of the Java machine, of half a megabyte or so
_TRIED = 10  # actions that the constant baseline tries
_UNTOLD = ("inventory", "look around", "task")  # possible at any time; they only tell again what was told
_JAVA = (
    "-Xmx448m",
    "-Xshare:off",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:CompressedClassSpaceSize=32m",
    "-XX:ReservedCodeCacheSize=32m",
)  # of address space in all some 0.75 GiB


@dataclass(frozen=True)
class Game:
    """One of the games in a small size.

    Attributes:
        settings: as TextWorldExpress reads them.
        max_turns: an episode may have; levels whose gold path is longer than two thirds of it are left out.
        gold: there is a gold path.
        trivial: an action that solves a level at once where it is possible at first; such levels are left out.
    """

    settings: str
    max_turns: int
    gold: bool = True
    trivial: str = ""


GAMES: Mapping[str, Game] = {
    "arithmetic": Game("", 12),
    "coin": Game("numLocations=4,includeDoors=0,numDistractorItems=0", 12, gold=False, trivial="take coin"),
    "cookingworld": Game("numLocations=1,numIngredients=1,numDistractorItems=0,includeDoors=0", 24),
    "mapreader": Game("numLocations=4,maxDistanceApart=2,maxDistractorItemsPerLocation=0,includeDoors=0", 18),
    "peckingorder": Game("", 20),
    "simonsays": Game("gameLength=5,numDistractors=3", 8),
    "twc": Game("numLocations=1,numItemsToPutAway=1,includeDoors=0", 8),
}


def make(game: str) -> TextWorld:
    """The environment of one of `GAMES`."""
    return GoldTextWorld(game) if GAMES[game].gold else TextWorld(game)


class _Machine:
    """A Java machine with the games; it works in their package's folder, where it finds their words.

    Raises:
        Unavailable: there is no Java, or it does not start.
    """

    _gateway: Any

    def __init__(self) -> None:
        from py4j.java_gateway import GatewayParameters, JavaGateway, find_jar_path
        from textworld_express.constants import BASEPATH, JAR_PATH

        java = shutil.which("java")
        if java is None:
            raise Unavailable("The environments textworld/… need Java 11 or newer; put `java` on the PATH.")
        self.process = subprocess.Popen(
            [java, *_JAVA, "-classpath", os.pathsep.join((find_jar_path(), JAR_PATH)),
             "py4j.GatewayServer", "--die-on-broken-pipe", "--enable-auth", "0"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=BASEPATH,
            env={**os.environ, "MALLOC_ARENA_MAX": "1"},  # else each thread reserves 64 MiB of addresses
        )  # fmt: skip
        self._owner, self._gateway = os.getpid(), None
        atexit.register(self.close)
        assert self.process.stdout
        port, token = (self.process.stdout.readline().decode().strip() for _ in range(2))
        if not port.isdecimal():
            self.close()
            raise Unavailable(f"Java did not start the games of TextWorldExpress ({port or 'no answer'}).")
        self._gateway = JavaGateway(
            gateway_parameters=GatewayParameters(port=int(port), auth_token=token, auto_field=True)
        )
        self.games: Games[_Played] = Games(self._begin, _advance, _KEPT)  # of all environments together

    @property
    def ours(self) -> bool:
        """Whether it is this process's, and alive."""
        return self._owner == os.getpid() and self.process.poll() is None

    def load(self, game: str) -> _Play:
        """An object that plays one level of `game` after the other."""
        return _Play(self._gateway, game)

    def _begin(self, number: int) -> _Played:
        game, level = list(GAMES)[number // _LEVELS], number % _LEVELS
        return _deal(self.load(game), game, level)

    def forget(self) -> None:
        """Objects that are finalised from now on say nothing to it."""
        if self._gateway is not None:
            self._gateway._gateway_client.is_connected = False

    def close(self) -> None:
        """End it; a forked copy only forgets it."""
        self.forget()
        if self._owner == os.getpid():
            self.process.kill()
            self.process.wait()


class _Play:
    """An object of a Java machine; it is gone there as soon as it is gone here.

    py4j's own objects refer to themselves, so that they wait for Python's collector, which knows nothing of Java's memory.
    """

    def __init__(self, gateway: Any, game: str) -> None:
        self._gateway = gateway
        self.java = gateway.jvm.textworldexpress.runtime.PythonInterface()
        self.java.load(game, GAMES[game].settings)

    def __del__(self) -> None:
        with suppress(Exception):  # at the end of the interpreter
            self._gateway.detach(self.java)


_MACHINES: list[_Machine] = []  # the newest is this process's, if it is alive


def _machine() -> _Machine:
    if not _MACHINES or not _MACHINES[-1].ours:
        for other in _MACHINES:
            other.forget()
        _MACHINES.append(_Machine())
    return _MACHINES[-1]


@dataclass
class _Played:
    """An episode in progress; `said` is what the game told after the last action."""

    game: str
    play: _Play
    task: str
    gold: tuple[str, ...]
    said: Mapping[str, Any]
    turns: int = 0
    accepted: int = 0
    valid: bool = True
    over: bool = False

    @property
    def possible(self) -> list[str]:
        return sorted(set(self.said["validActions"]) - set(_UNTOLD))


def _deal(play: _Play, game: str, level: int) -> _Played:
    """Begin a level on an object that has loaded its game."""
    said = json.loads(play.java.generateNewGameJSON(level, "train", GAMES[game].gold))
    gold = tuple(play.java.getGoldActionSequence()) if GAMES[game].gold else ()
    return _Played(game, play, _flat(play.java.getTaskDescription()), gold, said)


def _advance(played: _Played, action: str) -> None:
    if played.over:
        return
    action = action.strip()
    played.turns += 1
    played.valid = action in played.said["validActions"]
    played.accepted += played.valid
    if played.valid:
        played.said = json.loads(played.play.java.stepJSON(action))
    ended = played.said["tasksuccess"] or played.said["taskfailure"]
    played.over = bool(ended) or played.turns == GAMES[played.game].max_turns


class TextWorld:
    """One game; see the module's docstring."""

    licence = "Apache-2.0"
    max_new_tokens = 16

    def __init__(self, game: str) -> None:
        self.game = game
        self.name = f"textworld/{game}"
        self.version = f"1+textworld-express-{package_version('textworld-express')}"
        self.max_turns = GAMES[game].max_turns

    def __reduce__(self) -> tuple[Any, ...]:
        return make, (self.game,)

    def tasks(self, split: Split, n: int, seed: int) -> list[Task]:
        """See `Environment.tasks`; there are at most a thousand levels.

        Raises:
            UsageError: there are fewer. Unavailable: there is no Java.
        """
        return draw_tasks(self, self._candidates(seed), split, n, seed)

    def step(self, task: Task, actions: Sequence[str]) -> Step:
        """See `Environment.step`."""
        with self._after(task, actions) as played:
            if not played.over:
                return Step(_ask(played), done=False, valid=played.valid)
            success = float(bool(played.said["tasksuccess"]))
            components = {
                "valid_action": played.accepted / played.turns,
                "success": success,
                "score": success or min(1.0, max(0.0, float(played.said["score"]))),
            }
            return Step("", True, success, components, played.valid)

    def possible(self, task: Task, actions: Sequence[str]) -> list[str]:
        """The actions that an observation lists."""
        with self._after(task, actions) as played:
            return played.possible

    def constant_baseline(self, tasks: Sequence[Task]) -> tuple[str, float]:
        """The best of the actions that are most often possible at first, written in every turn."""
        first = Counter(action for task in tasks for action in self.possible(task, ()))
        return best_of(self, tasks, (action for action, _ in first.most_common(_TRIED)))

    def random_baseline(self, tasks: Sequence[Task], seed: int) -> float:
        """Mean reward of one episode for each task, its actions drawn from what is listed."""
        rng = random.Random(f"{self.name}/random/{seed}")
        return mean_reward(
            self, tasks, lambda task, actions: rng.choice(self.possible(task, actions) or [""])
        )

    def _after(self, task: Task, actions: Sequence[str]) -> AbstractContextManager[_Played]:
        number = list(GAMES).index(self.game) * _LEVELS + int(task.payload["level"])
        return _machine().games.after(number, actions)

    def _candidates(self, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
        order = list(range(1, _LEVELS))
        random.Random(f"{self.name}/{seed}").shuffle(order)
        play = _machine().load(self.game)
        for level in order:
            played = _deal(play, self.game, level)
            if 3 * len(played.gold) <= 2 * self.max_turns and GAMES[self.game].trivial not in played.possible:
                yield f"Level {level}. {played.task}\n{_ask(played)}", {"level": level}


class GoldTextWorld(TextWorld):
    """A game with an expert."""

    def expert(self, task: Task, actions: Sequence[str]) -> str:
        """See `Expert.expert`: the next action of the gold path.

        Raises:
            UsageError: the task is over, or the actions have left the gold path.
        """
        with self._after(task, actions) as played:
            gold = played.gold
        if tuple(action.strip() for action in actions) != gold[: len(actions)] or len(actions) == len(gold):
            raise UsageError(f"The actions have left the gold path of the task {task.id}, or it is over.")
        return gold[len(actions)]


def _ask(played: _Played) -> str:
    told = played.said["observation"] if played.valid else "not possible"
    return f"{_flat(told)}\nactions: {', '.join(played.possible)}\nact:"


def _flat(text: str) -> str:
    return " ".join(text.split())
