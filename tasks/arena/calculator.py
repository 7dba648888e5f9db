"""Tool use in two turns: the agent writes a calculator call, the tool runs it, the agent writes the answer.

The prompt is plain text with worked examples. The first action must be a call such as `calc(52 - 11)`; the
observation gives its value, or `error` for anything else; the second action is the answer, and it alone is
rewarded.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasks.arena.environment import Split, Step, Task, draw_tasks, is_number, most_common_share, require_some

NAMES = ("Ann", "Bob", "Eva", "Tom", "Mia", "Sam", "Zoe", "Max", "Lea", "Ben", "Kim", "Dan")
THINGS = ("pens", "cups", "coins", "books", "cards", "apples", "stamps", "shells", "keys", "stones")
FORMS: Mapping[str, str] = {
    "-": "{name} has {a} {thing} and loses {b}.",
    "+": "{name} has {a} {thing} and gets {b} more.",
    "*": "{name} has {a} boxes with {b} {thing} each.",
}
SHOTS = (
    ("Ann has 52 pens and loses 11.", "52 - 11", 41),
    ("Bob has 75 cups and gets 15 more.", "75 + 15", 90),
    ("Eva has 14 boxes with 16 coins each.", "14 * 16", 224),
)
PREFIX = "".join(
    f"{text}\ncall: calc({call})\nresult: {value}\nanswer: {value}\n\n" for text, call, value in SHOTS
)

# Limits of the tool: nothing an agent writes may cost noticeable time or memory.
_EXPRESSION = re.compile(r"\s*\d{1,6}(\s*[-+*]\s*\d{1,6}){1,7}\s*", re.ASCII)
_CALL = re.compile(r"calc\(([^()]{1,80})\)")


class CallError(ValueError):
    """What the agent wrote is not a call that the calculator accepts."""


def calculate(expression: str) -> int:
    """Value of two to eight whole numbers of at most six digits joined by + - *, with * binding tighter.

    Raises:
        CallError: the text is anything else.
    """
    if not _EXPRESSION.fullmatch(expression):
        raise CallError(expression)
    terms = re.findall(r"([-+]?)([\d\s*]+)", expression)
    return sum(
        (-1 if sign == "-" else 1) * math.prod(int(factor) for factor in term.split("*"))
        for sign, term in terms
    )


def run_call(action: str) -> int:
    """Run an action of the form `calc(<expression>)`; spaces around it are allowed, anything else is not.

    Raises:
        CallError: the action is not such a call.
    """
    call = _CALL.fullmatch(action.strip())
    if call is None:
        raise CallError(action)
    return calculate(call[1])


class Calculator:
    """Word problems with one operation; see the module's docstring."""

    name = "calculator"
    version = "1"
    licence = "Apache-2.0"
    max_turns = 2
    max_new_tokens = 12

    def tasks(self, split: Split, n: int, seed: int) -> list[Task]:
        """See `Environment.tasks`."""
        return draw_tasks(self, _candidates(seed), split, n, seed, _family)

    def step(self, task: Task, actions: Sequence[str]) -> Step:
        """Run the call, then judge the answer."""
        try:
            result: int | None = run_call(actions[0])
        except CallError:
            result = None
        if len(actions) == 1:
            said = "error" if result is None else result
            return Step(f"result: {said}\nanswer:", done=False, valid=result is not None)
        answer = actions[1].strip()
        correct = answer == str(task.payload["answer"])
        components = {
            "correct": float(correct),
            "valid_call": float(result is not None),
            "used_result": float(result is not None and answer == str(result)),
        }
        return Step("", True, float(correct), components, valid=is_number(answer))

    def expert(self, task: Task, actions: Sequence[str]) -> str:
        """The call of the sum, then its value."""
        a, operator, b = (task.payload[name] for name in ("a", "operator", "b"))
        return str(task.payload["answer"]) if actions else f"calc({a} {operator} {b})"

    def constant_baseline(self, tasks: Sequence[Task]) -> tuple[str, float]:
        """The most common answer, written whatever the tool says."""
        return most_common_share([str(task.payload["answer"]) for task in tasks])

    def random_baseline(self, tasks: Sequence[Task], seed: int) -> float:
        """Expected reward of calling the tool on the right numbers with an operator drawn at random."""
        require_some(tasks)
        hits: list[bool] = [
            calculate(f"{task.payload['a']} {operator} {task.payload['b']}") == task.payload["answer"]
            for task in tasks
            for operator in FORMS
        ]
        return sum(hits) / len(hits)


def _family(payload: Mapping[str, Any]) -> str:
    """The same sum told of other people and things."""
    return f"{payload['a']} {payload['operator']} {payload['b']}"


def _candidates(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    rng = random.Random(f"calculator/{seed}")
    while True:
        operator = rng.choice(tuple(FORMS))
        a, b = rng.randint(41, 99), rng.randint(10, 40)
        text = FORMS[operator].format(name=rng.choice(NAMES), thing=rng.choice(THINGS), a=a, b=b)
        answer = calculate(f"{a} {operator} {b}")
        yield f"{PREFIX}{text}\ncall:", {"a": a, "b": b, "operator": operator, "answer": answer}
