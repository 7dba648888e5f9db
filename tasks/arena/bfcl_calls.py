"""The stateful tasks of the Berkeley Function Calling Leaderboard: a file system, tickets, trades, travel, a car, messages.

The simulators, the users' messages, the first states and the gold calls are bfcl-eval's. A turn is one message of the user: the
agent answers it with one line of calls, `cd(folder='a'); ls()`, or `none`, and sees their results with the next message. The
reward is 1 if in the end all public state equals what the gold calls lead to; `score` is the share of turns after which it
did. (The leaderboard lets an agent call again and again in one turn, and compares results too.)

Calls are parsed as Python literals and never evaluated. Left out are tasks with the calculator API (no state, and numbers
without bounds), with a line of gold calls that is longer than an action may be, and those that doing nothing would solve.
"""

from __future__ import annotations

import ast
import inspect
import json
import random
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib import import_module
from importlib.metadata import version as package_version
from importlib.resources import files
from typing import Any

from tasks.arena.environment import Split, Step, Task, cut, draw_tasks
from tasks.arena.playing import Games, best_of, mean_reward
from tasks.core.errors import UsageError

CATEGORIES: Mapping[str, str] = {
    "base": "all that is needed is said and can be called",
    "miss_func": "a function that is needed comes a message later",
    "miss_param": "what a call needs comes a message later",
}
_NONE = "none"
_LONGEST = 320  # characters of a line of calls
_RESULT = 240  # characters of a result that are shown
_TRIED = 10  # gold lines that the constant baseline tries
_TYPES = {
    "string": "str",
    "integer": "int",
    "float": "float",
    "boolean": "bool",
    "array": "list",
    "dict": "dict",
}
_INTRO = "Answer each message with calls such as ls(a=True), joined by ; or with none. Functions:"


class LineError(ValueError):
    """What the agent wrote is no line of calls."""


@dataclass(frozen=True)
class Call:
    """A function's name with its arguments."""

    name: str
    positional: tuple[Any, ...]
    named: Mapping[str, Any]


def parse_line(line: str) -> list[Call]:
    """Read calls `name(1, key='text')` joined by ";", or `none`; arguments are literals.

    Raises:
        LineError: it is anything else.
    """
    if line.strip() == _NONE:
        return []
    try:
        with warnings.catch_warnings(action="ignore"):  # of what it takes for a slip in a program
            body = ast.parse(line.strip()).body if len(line) <= 2 * _LONGEST else []
        calls = [_call(statement) for statement in body]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        calls = []
    if not calls:
        raise LineError("not a line of calls")
    return calls


def _call(statement: ast.stmt) -> Call:
    match statement:
        case ast.Expr(ast.Call(ast.Name(name), positional, keywords)) if all(key.arg for key in keywords):
            named = {str(key.arg): ast.literal_eval(key.value) for key in keywords}
            return Call(name, tuple(map(ast.literal_eval, positional)), named)
    raise ValueError("no call")


@dataclass(frozen=True)
class _Row:
    """One task.

    Attributes:
        messages: of the user by turn; "" where functions are added instead.
        gold: calls by turn.
        later: {turn: functions that are added}.
    """

    config: Mapping[str, Any]
    classes: tuple[str, ...]
    messages: tuple[str, ...]
    gold: tuple[tuple[str, ...], ...]
    excluded: frozenset[str]
    later: Mapping[int, tuple[str, ...]]

    def signatures(self, turn: int) -> dict[str, str]:
        """{function: signature} of all that may be called at `turn`."""
        hidden = self.excluded.union(*(names for when, names in self.later.items() if when > turn))
        return {name: text for name, text in _signatures_of(self.classes).items() if name not in hidden}


@dataclass
class _Session:
    """An episode in progress; `gold` are the instances on which the gold calls run beside."""

    row: _Row
    ours: dict[str, Any]
    gold: dict[str, Any]
    turns: int = 0
    formed: int = 0  # lines of the right form so far
    matched: int = 0  # turns after which the states were equal
    valid: bool = True  # the last line: of the right form, and no call was refused
    results: list[str] = field(default_factory=list)  # of the last line


class Bfcl:
    """One category; see the module's docstring."""

    licence = "Apache-2.0"
    max_new_tokens = 128

    def __init__(self, category: str) -> None:
        self.category = category
        self.name = f"bfcl/{category}"
        self.version = f"1+bfcl-eval-{package_version('bfcl-eval')}"
        self.max_turns = 9
        self._games: Games[_Session] = Games(self._begin, self._advance)

    def __reduce__(self) -> tuple[Any, ...]:
        return Bfcl, (self.category,)

    def tasks(self, split: Split, n: int, seed: int) -> list[Task]:
        """See `Environment.tasks`; there are some 160 in all."""
        order = list(range(len(self._rows)))
        random.Random(f"{self.name}/{seed}").shuffle(order)
        candidates = ((self._prompt(row), {"row": row}) for row in order if self._counts(row))
        return draw_tasks(self, candidates, split, n, seed)

    def step(self, task: Task, actions: Sequence[str]) -> Step:
        """See `Environment.step`."""
        with self._games.after(task.payload["row"], actions) as session:
            if session.turns < len(session.row.messages):
                said = "".join(f"result: {result}\n" for result in session.results)
                return Step(f"{said}\n{_ask(session.row, session.turns)}", done=False, valid=session.valid)
            success = float(_equal(session))
            components = {
                "valid_format": session.formed / session.turns,
                "success": success,
                "score": session.matched / session.turns,
            }
            return Step("", True, success, components, session.valid)

    def expert(self, task: Task, actions: Sequence[str]) -> str:
        """See `Expert.expert`: the gold calls of this turn.

        Raises:
            UsageError: the task is over, or an earlier action left another state than the gold calls.
        """
        with self._games.after(task.payload["row"], actions) as session:
            if session.turns == len(session.row.messages) or not _equal(session):
                raise UsageError(
                    f"The task {task.id} is over or cannot be solved by the gold calls after {len(actions)} actions."
                )
            return _line(session.row.gold[session.turns])

    def constant_baseline(self, tasks: Sequence[Task]) -> tuple[str, float]:
        """The best of `none` and the most common gold lines, written in every turn."""
        lines = Counter(line for task in tasks for line in self._lines(task)).most_common(_TRIED)
        return best_of(self, tasks, dict.fromkeys([_NONE, *(line for line, _ in lines)]))

    def random_baseline(self, tasks: Sequence[Task], seed: int) -> float:
        """Mean reward of a gold line drawn at random from all tasks, whatever is asked, in every turn."""
        rng = random.Random(f"{self.name}/random/{seed}")
        return mean_reward(self, tasks, lambda task, actions: rng.choice(self._lines(rng.choice(tasks))))

    def _lines(self, task: Task) -> list[str]:
        return [_line(calls) for calls in self._rows[task.payload["row"]].gold]

    @cached_property
    def _rows(self) -> list[_Row]:
        questions = _read(f"BFCL_v4_multi_turn_{self.category}.json")
        answers = {
            row["id"]: row["ground_truth"]
            for row in _read("possible_answer", f"BFCL_v4_multi_turn_{self.category}.json")
        }
        return [
            _row(row, answers[row["id"]]) for row in questions if "MathAPI" not in row["involved_classes"]
        ]

    def _counts(self, number: int) -> bool:
        """Whether an expert's lines fit and something has to be done."""
        row = self._rows[number]
        if len(row.messages) > self.max_turns or any(len(_line(calls)) > _LONGEST for calls in row.gold):
            return False
        idle = self._begin(number)
        for _ in row.messages:
            self._advance(idle, _NONE)
        return not _equal(idle)

    def _prompt(self, number: int) -> str:
        row = self._rows[number]
        return "\n".join([_INTRO, *row.signatures(0).values(), "", _ask(row, 0)])

    def _begin(self, number: int) -> _Session:
        row = self._rows[number]
        ours, gold = ({name: _instance(name, row.config) for name in row.classes} for _ in range(2))
        return _Session(row, ours, gold)

    def _advance(self, session: _Session, action: str) -> None:
        row, turn = session.row, session.turns
        if turn == len(row.messages):
            return
        session.turns += 1
        try:
            calls = parse_line(action)
            session.formed += 1
            answers = [_run(session.ours, call, row.signatures(turn)) for call in calls]
            session.valid = all(fine for _, fine in answers)
            session.results = [text for text, _ in answers]
        except LineError as error:
            session.valid, session.results = False, [f"error: {error}"]
        for text in row.gold[turn]:
            for call in parse_line(text):
                _run(session.gold, call, _signatures_of(row.classes))
        session.matched += _equal(session)


def _line(calls: Sequence[str]) -> str:
    return "; ".join(calls) or _NONE


def _ask(row: _Row, turn: int) -> str:
    added = [row.signatures(turn)[name] for name in row.later.get(turn, ())]
    message = row.messages[turn] or "there is one more function now: " + ", ".join(added)
    return f"user: {' '.join(message.split())}\ncalls:"


def _run(instances: Mapping[str, Any], call: Call, allowed: Mapping[str, str]) -> tuple[str, bool]:
    """Call a function of the instances: what it returned as text, and whether it did not refuse."""
    owner = next((one for one in instances.values() if hasattr(one, call.name)), None)
    if call.name not in allowed or owner is None:
        return f"error: there is no {call.name}", False
    function = getattr(owner, call.name)
    try:
        inspect.signature(function).bind(*call.positional, **call.named)
        result = function(*call.positional, **call.named)
    except Exception as error:  # whatever a simulator does with arguments of other types
        return cut(f"error: {error}", _RESULT), False
    text = result if isinstance(result, str) else json.dumps(result, default=str)
    return cut(text, _RESULT), not (isinstance(result, Mapping) and "error" in result)


def _equal(session: _Session) -> bool:
    """Whether all public state is what the gold calls have led to."""

    def public(one: object) -> dict[str, object]:
        return {name: value for name, value in vars(one).items() if not name.startswith("_")}

    return all(public(session.ours[name]) == public(session.gold[name]) for name in session.row.classes)


def _instance(name: str, config: Mapping[str, Any]) -> Any:
    from bfcl_eval.constants.executable_backend_config import CLASS_FILE_PATH_MAPPING

    made = getattr(import_module(CLASS_FILE_PATH_MAPPING[name]), name)()
    made._load_scenario(deepcopy(config.get(name, {})))
    return made


@lru_cache
def _signatures(name: str) -> dict[str, str]:
    """{function: its signature} of an API class, as its documentation for models has it."""
    from bfcl_eval.constants.executable_backend_config import MULTI_TURN_FUNC_DOC_FILE_MAPPING

    found = {}
    for function in _read("multi_turn_func_doc", MULTI_TURN_FUNC_DOC_FILE_MAPPING[name]):
        given = function["parameters"]
        arguments = [
            f"{key}: {_TYPES.get(kind['type'], kind['type'])}" + ("" if key in given["required"] else " = …")
            for key, kind in given["properties"].items()
        ]
        found[function["name"]] = f"{function['name']}({', '.join(arguments)})"
    return found


def _signatures_of(classes: Sequence[str]) -> dict[str, str]:
    return {name: text for one in classes for name, text in _signatures(one).items()}


def _read(*path: str) -> list[Any]:
    """A JSONL file of the package's data."""
    return [json.loads(line) for line in files("bfcl_eval").joinpath("data", *path).read_text().splitlines()]


def _row(row: Mapping[str, Any], gold: Sequence[Sequence[str]]) -> _Row:
    return _Row(
        row["initial_config"],
        tuple(row["involved_classes"]),
        tuple(turn[0]["content"] if turn else "" for turn in row["question"]),
        tuple(map(tuple, gold)),
        frozenset(row.get("excluded_function", ())),
        {int(turn): tuple(names) for turn, names in row.get("missed_function", {}).items()},
    )
