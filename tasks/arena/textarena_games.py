"""Single-player games of textarena, with small levels and short texts.

The rules, the levels and the judgement are textarena's. Ours are the sizes, and the prompts and observations: its own texts
repeat boards and instructions until a short game is thousands of tokens, ours show the state once in each turn. Two actions in
the prompt, always the same, show their form: without them a small model hardly ever writes one. An action is what the player
writes, without textarena's brackets.

An action that is not possible takes a turn and changes nothing (textarena ends the game at the second). The reward is 1 if
the game is won, else 0; how near the end was is in the component `score`, as textarena tells it.

Levels of which a player sees everything are distinct by their first board. Games that hide something name the level by a
number, a digest of what is hidden, so that a prompt has one truth and equal levels are one task.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version as package_version
from threading import RLock
from typing import Any, ClassVar

from tasks.arena import solvers
from tasks.arena.environment import Split, Step, Task, draw_tasks
from tasks.arena.playing import Games, best_repeated, random_play
from tasks.core.errors import UsageError

_ARROWS = tuple(solvers.MOVES)


class Rules:
    """What differs between the games: how one is set up, shown, and read. `engine` is textarena's object of the game."""

    entry: ClassVar[str]  # module below textarena.envs, and class
    intro: ClassVar[str]
    cue: ClassVar[str] = "move:"  # what an action follows
    examples: ClassVar[tuple[str, ...]] = ("left", "down")  # shown in every prompt, for the form alone
    max_turns: ClassVar[int]
    max_new_tokens: ClassVar[int] = 6
    longest: ClassVar[int] = (
        0  # levels that need more actions are left out; 0: they are not solved beforehand
    )

    def settings(self, rng: random.Random) -> dict[str, Any]:
        """Arguments of the engine's class for a level."""
        raise NotImplementedError

    def prepare(self, engine: Any, rng: random.Random) -> None:
        """Change a fresh engine, where textarena has one level only or a first move is to be made."""

    def introduce(self, engine: Any) -> str:
        """What is said once, before the first state."""
        return self.intro

    def show(self, engine: Any) -> str:
        """The state, as it stands in the prompt and in each observation."""
        raise NotImplementedError

    def choices(self, engine: Any) -> Sequence[str]:
        """Every action of the right form."""
        return _ARROWS

    def won(self, engine: Any) -> bool:
        """Whether the aim is reached."""
        raise NotImplementedError

    def hidden(self, engine: Any, seed: int) -> object | None:
        """What a player does not see, as a value whose `repr` is stable; None if all is seen."""
        return None

    def fatal(self, engine: Any, action: str) -> bool:
        """Whether this action loses the game although textarena only calls it invalid."""
        return False


class Solved(Rules):
    """Rules of a game that we can play well."""

    def solve(self, engine: Any) -> list[str] | None:
        """Actions that win from here, as few as possible where all is seen; at least the next one."""
        raise NotImplementedError


class _Sokoban(Solved):
    """One box in a room of four by four cells at most; a solution has ten moves at most."""

    entry = "Sokoban.env:SokobanEnv"
    intro = "Sokoban: push the box $ onto the goal . (you @, wall #). Moves: up, down, left, right.\n"
    max_turns = 15
    longest = 10

    def settings(self, rng: random.Random) -> dict[str, Any]:
        return {"dim_room": (6, 6), "num_boxes": 1}

    def show(self, engine: Any) -> str:
        signs = {0: "#", 1: " ", 2: ".", 3: "*", 4: "$", 5: "@"}
        rows = [[signs[int(cell)] for cell in row] for row in engine.room_state]
        row, column = map(int, engine.player_position)
        if engine.room_fixed[row, column] == 2:
            rows[row][column] = "+"  # you on a goal
        return "\n".join("".join(row) for row in rows)

    def won(self, engine: Any) -> bool:
        return bool(engine._check_if_all_boxes_on_target()[1])

    def solve(self, engine: Any) -> list[str] | None:
        fixed, state = engine.room_fixed, engine.room_state
        cells = list(itertools.product(range(fixed.shape[0]), range(fixed.shape[1])))
        row, column = map(int, engine.player_position)
        return solvers.sokoban(
            (row, column),
            [cell for cell in cells if state[cell] in (3, 4)],
            [cell for cell in cells if fixed[cell] == 2],
            {cell for cell in cells if fixed[cell] != 0},
        )


class _FrozenLake(Solved):
    """Four by four cells with three holes, from a corner to the opposite one."""

    entry = "FrozenLake.env:FrozenLakeEnv"
    intro = "Frozen lake: walk from P to the goal G, not into a hole H. Moves: up, down, left, right.\n"
    max_turns = 10

    def settings(self, rng: random.Random) -> dict[str, Any]:
        return {"size": 4, "num_holes": 3, "randomize_start_goal": True}

    def show(self, engine: Any) -> str:
        state = engine.state.game_state
        rows = [["." if cell == " " else cell for cell in row] for row in state["grid"]]
        row, column = state["player_pos"]
        rows[row][column] = "P"
        return "\n".join("".join(row) for row in rows)

    def won(self, engine: Any) -> bool:
        return bool(engine.state.game_state["player_pos"] == engine.state.game_state["goal_pos"])

    def solve(self, engine: Any) -> list[str] | None:
        state = engine.state.game_state
        cells = itertools.product(range(engine.size), repeat=2)
        free = {(row, column) for row, column in cells if state["grid"][row][column] != "H"}
        return solvers.walk(state["player_pos"], state["goal_pos"], free)


class _TowerOfHanoi(Solved):
    """Two to five disks that stand anywhere; a solution has 15 moves at most. (textarena begins with all on A.)"""

    entry = "TowerOfHanoi.env:TowerOfHanoiEnv"
    intro = "Tower of Hanoi: bring all disks to C, a larger one never on a smaller. A move: A C (from, to).\n"
    examples = ("A C", "B A")
    max_turns = 20
    longest = 15

    def settings(self, rng: random.Random) -> dict[str, Any]:
        return {"num_disks": rng.choice((2, 3, 4, 5))}

    def prepare(self, engine: Any, rng: random.Random) -> None:
        towers = engine.state.game_state["towers"]
        towers["A"].clear()
        for disk in range(engine.num_disks, 0, -1):
            towers[rng.choice("ABC")].append(disk)

    def show(self, engine: Any) -> str:
        towers = engine.state.game_state["towers"]
        return "\n".join(" ".join([f"{name}:", *map(str, disks)]) for name, disks in towers.items())

    def choices(self, engine: Any) -> Sequence[str]:
        return [f"{a} {b}" for a, b in itertools.permutations("ABC", 2)]

    def won(self, engine: Any) -> bool:
        return bool(len(engine.state.game_state["towers"]["C"]) == engine.num_disks)

    def solve(self, engine: Any) -> list[str] | None:
        return solvers.hanoi(engine.state.game_state["towers"], "C")


class _LightsOut(Solved):
    """Three by three lights; a solution has four presses at most."""

    entry = "LightsOut.env:LightsOutEnv"
    intro = "Lights out: turn all lights O off. Pressing one toggles it and its neighbours. A move: 1 2 (row, column).\n"
    examples = ("1 2", "0 1")
    max_turns = 8
    longest = 4

    def settings(self, rng: random.Random) -> dict[str, Any]:
        return {"size": 3}

    def show(self, engine: Any) -> str:
        grid = engine.state.game_state["grid"]
        return _numbered(["".join("O" if lit else "." for lit in row) for row in grid])

    def choices(self, engine: Any) -> Sequence[str]:
        return _cells(engine.size, engine.size)

    def won(self, engine: Any) -> bool:
        return bool(engine._is_solved(engine.state.game_state["grid"]))

    def solve(self, engine: Any) -> list[str] | None:
        return solvers.lights_out(engine.state.game_state["grid"])


class _GuessTheNumber(Solved):
    """One of sixteen consecutive numbers; halving finds it in five guesses."""

    entry = "GuessTheNumber.env:GuessTheNumberEnv"
    cue = "guess:"
    examples = ()  # any number would be taken for a guess
    max_turns = 6
    _WIDTH = 16

    def settings(self, rng: random.Random) -> dict[str, Any]:
        low = rng.randint(1, 84)
        return {"min_number": low, "max_number": low + self._WIDTH - 1}

    def introduce(self, engine: Any) -> str:
        return f"Guess the number from {engine.min_number} to {engine.max_number}.\n"

    def show(self, engine: Any) -> str:
        guesses = engine.state.game_state["guess_history"]
        return f"It is {guesses[-1][1]} than {guesses[-1][0]}." if guesses else ""

    def choices(self, engine: Any) -> Sequence[str]:
        return [str(number) for number in range(engine.min_number, engine.max_number + 1)]

    def won(self, engine: Any) -> bool:
        return engine.game_number in engine.guessed_numbers

    def hidden(self, engine: Any, seed: int) -> object:
        return engine.game_number

    def solve(self, engine: Any) -> list[str]:
        history = engine.state.game_state["guess_history"]
        low = max([engine.min_number, *(number + 1 for number, hint in history if hint == "higher")])
        high = min([engine.max_number, *(number - 1 for number, hint in history if hint == "lower")])
        return [str((low + high) // 2)]


class _Mastermind(Solved):
    """Three different digits out of the first four, five or six."""

    entry = "Mastermind.env:MastermindEnv"
    cue = "guess:"
    examples = ("2 1 3", "3 4 1")
    max_turns = 8
    max_new_tokens = 8

    def settings(self, rng: random.Random) -> dict[str, Any]:
        return {"code_length": 3, "num_numbers": rng.choice((4, 5, 6))}

    def introduce(self, engine: Any) -> str:
        return (
            f"Mastermind: find the code of 3 different digits from 1 to {engine.num_numbers}. A guess: 1 2 3. "
            "Black: right digit and place; white: right digit, wrong place.\n"
        )

    def show(self, engine: Any) -> str:
        history = engine.state.game_state["history"]
        return f"{history[-1]['black']} black, {history[-1]['white']} white" if history else ""

    def choices(self, engine: Any) -> Sequence[str]:
        digits = range(1, engine.num_numbers + 1)
        return [" ".join(map(str, code)) for code in itertools.permutations(digits, engine.code_length)]

    def won(self, engine: Any) -> bool:
        history = engine.state.game_state["history"]
        return bool(history and history[-1]["black"] == engine.code_length)

    def hidden(self, engine: Any, seed: int) -> object:
        return engine.state.game_state["secret_code"]

    def solve(self, engine: Any) -> list[str]:
        """The first code that agrees with every answer."""
        said = [
            (entry["guess"], (entry["black"], entry["white"])) for entry in engine.state.game_state["history"]
        ]
        codes = itertools.permutations(range(1, engine.num_numbers + 1), engine.code_length)
        code = next(
            code for code in codes if all(solvers.pegs(code, guess) == answer for guess, answer in said)
        )
        return [" ".join(map(str, code))]


class _Game2048(Rules):
    """Up to the tile 32 on three by three cells."""

    entry = "Game2048.env:Game2048Env"
    intro = "2048: slide the tiles, equal ones merge; make a 32. Moves: up, down, left, right.\n"
    max_turns = 24

    def settings(self, rng: random.Random) -> dict[str, Any]:
        return {"target_tile": 32, "board_size": 3}

    def show(self, engine: Any) -> str:
        return "\n".join(
            " ".join(str(tile) if tile else "." for tile in row) for row in engine.state.game_state["board"]
        )

    def won(self, engine: Any) -> bool:
        return bool(engine._max_tile() >= engine.target_tile)

    def hidden(self, engine: Any, seed: int) -> object:
        return seed  # the tiles to come


class _Minesweeper(Rules):
    """Three mines in four by four cells, with a first cell opened."""

    entry = "Minesweeper.env:MinesweeperEnv"
    intro = "Minesweeper: open every cell without a mine (3 mines); a number counts the mines around. A move: 1 2 (row, column).\n"
    examples = ("1 2", "0 1")
    max_turns = 10

    def settings(self, rng: random.Random) -> dict[str, Any]:
        return {"rows": 4, "cols": 4, "num_mines": 3}

    def prepare(self, engine: Any, rng: random.Random) -> None:
        engine.step(f"[{rng.randrange(4)} {rng.randrange(4)}]")

    def show(self, engine: Any) -> str:
        return _numbered(
            [
                "".join(str(cell) if seen else "." for cell, seen in zip(row, open_, strict=True))
                for row, open_ in zip(engine.grid, engine.revealed, strict=True)
            ]
        )

    def choices(self, engine: Any) -> Sequence[str]:
        return _cells(engine.rows, engine.cols)

    def won(self, engine: Any) -> bool:
        return bool(engine._is_solved())

    def hidden(self, engine: Any, seed: int) -> object:
        return engine.grid

    def fatal(self, engine: Any, action: str) -> bool:
        row, column = map(int, action.split())
        return bool(engine.grid[row][column] == -1)


GAMES: Mapping[str, Rules] = {
    "2048": _Game2048(),
    "FrozenLake": _FrozenLake(),
    "GuessTheNumber": _GuessTheNumber(),
    "LightsOut": _LightsOut(),
    "Mastermind": _Mastermind(),
    "Minesweeper": _Minesweeper(),
    "Sokoban": _Sokoban(),
    "TowerOfHanoi": _TowerOfHanoi(),
}


def make(game: str) -> TextArena:
    """The environment of one of `GAMES`."""
    rules = GAMES[game]
    return SolvedTextArena(game, rules) if isinstance(rules, Solved) else TextArena(game, rules)


@dataclass
class _Game:
    """A game in progress."""

    seed: int
    engine: Any
    choices: frozenset[str]
    turns: int = 0
    formatted: int = 0  # actions of the right form so far
    accepted: int = 0  # actions that were possible
    over: bool = False
    understood: bool = True  # the last action


class TextArena:
    """One game; see the module's docstring."""

    licence = "MIT"

    def __init__(self, game: str, rules: Rules) -> None:
        self.name = f"textarena/{game}"
        self.rules = rules
        self.version = f"1+textarena-{package_version('textarena')}"
        self.max_turns = rules.max_turns
        self.max_new_tokens = rules.max_new_tokens
        self._games: Games[_Game] = Games(self._begin, self._advance)

    def tasks(self, split: Split, n: int, seed: int) -> list[Task]:
        """See `Environment.tasks`."""
        return draw_tasks(self, self._candidates(seed), split, n, seed)

    def step(self, task: Task, actions: Sequence[str]) -> Step:
        """See `Environment.step`."""
        with self._games.after(task.payload["seed"], actions) as game:
            if not game.over:
                note = "" if game.understood else "not possible\n"
                return Step(note + self._ask(game.engine), done=False, valid=game.understood)
            success = float(self.rules.won(game.engine))
            components = {
                "valid_format": game.formatted / game.turns,
                "valid_action": game.accepted / game.turns,
                "success": success,
                "score": success or min(1.0, max(0.0, float(game.engine._get_percentage_completion()))),
            }
            return Step("", True, success, components, valid=game.understood)

    def choices(self, task: Task) -> Sequence[str]:
        """See `Listed.choices`."""
        with self._games.after(task.payload["seed"], ()) as game:
            return self.rules.choices(game.engine)

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
            try:
                game = self._begin(level)
            except ZeroDivisionError:  # textarena's own, of a level of LightsOut without a light
                continue
            if game.over or not self._suits(game.engine):
                continue
            hidden = self.rules.hidden(game.engine, level)
            name = "" if hidden is None else f"Level {_number(hidden)}. "
            examples = "".join(f"{self.rules.cue} {action}\n" for action in self.rules.examples)
            yield (
                f"{name}{self.rules.introduce(game.engine)}{examples}{self._ask(game.engine)}",
                {"seed": level},
            )

    def _suits(self, engine: Any) -> bool:
        return not self.rules.won(engine)

    def _ask(self, engine: Any) -> str:
        state = self.rules.show(engine)
        return f"{state}\n{self.rules.cue}" if state else self.rules.cue

    def _begin(self, seed: int) -> _Game:
        rng = random.Random(f"{self.name}/level/{seed}")
        module, _, kind = self.rules.entry.partition(":")
        engine_class = getattr(import_module(f"textarena.envs.{module}"), kind)
        with _generator(seed):
            engine = engine_class(**self.rules.settings(rng))
            engine.reset(num_players=1, seed=seed)
            self.rules.prepare(engine, rng)
        return _Game(seed, engine, frozenset(self.rules.choices(engine)), over=bool(engine.state.done))

    def _advance(self, game: _Game, action: str) -> None:
        if game.over:
            return
        action, engine = action.strip(), game.engine
        game.turns += 1
        game.understood = False
        if action in game.choices:
            game.formatted += 1
            if self.rules.fatal(engine, action):
                game.accepted += 1
                game.understood = game.over = True
                return
            with _generator(game.seed, game.turns):
                engine.step(f"[{action}]")
            engine.state.observations[0].clear()
            engine.state.logs.clear()
            game.understood = engine.state.error_count == 0
            engine.state.error_count = 0
            game.accepted += game.understood
        game.over = bool(engine.state.done) or game.turns == self.max_turns


class SolvedTextArena(TextArena):
    """A game with an expert."""

    rules: Solved

    def expert(self, task: Task, actions: Sequence[str]) -> str:
        """See `Expert.expert`."""
        with self._games.after(task.payload["seed"], actions) as game:
            solution = self.rules.solve(game.engine)
        if not solution:
            raise UsageError(
                f"The task {task.id} is over or cannot be solved any more after {len(actions)} actions."
            )
        return solution[0]

    def _suits(self, engine: Any) -> bool:
        if not self.rules.longest:
            return super()._suits(engine)
        solution = self.rules.solve(engine)
        return solution is not None and 0 < len(solution) <= self.rules.longest


_GENERATOR = RLock()


@contextmanager
def _generator(*seed: int) -> Iterator[None]:
    """Seed Python's global generator, which all games of textarena draw from, and put it back afterwards."""
    with _GENERATOR:
        before = random.getstate()
        random.seed(repr(seed))
        try:
            yield
        finally:
            random.setstate(before)


def _number(hidden: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(hidden).encode()).digest()[:8]) % 10**8


def _numbered(rows: Sequence[str]) -> str:
    """A board with the numbers of its rows and columns."""
    return "\n".join(
        ["  " + "".join(map(str, range(len(rows[0]))))] + [f"{i} {row}" for i, row in enumerate(rows)]
    )


def _cells(rows: int, columns: int) -> list[str]:
    return [f"{row} {column}" for row, column in itertools.product(range(rows), range(columns))]
