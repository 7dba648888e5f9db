"""Tool use in two turns: the agent writes a line of Python, a sandbox runs it, the agent writes the answer.

The prompt is plain text with one worked example of each form. The first action is the line; the observation is what it
printed, or the last line of its error; the second action is the answer, and it alone is rewarded. See
`tasks.arena.sandbox` for what the line may do.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tasks.arena.environment import (
    Split,
    Step,
    Task,
    cut,
    draw_tasks,
    is_number,
    most_common_share,
    require_some,
)
from tasks.arena.sandbox import Limits, run_python

LIMITS = Limits(seconds=3.0, cpu_seconds=1, memory=128 << 20, files=1 << 20, output=4096)
LONGEST = 80  # characters of an observation's text


@dataclass(frozen=True)
class Form:
    """One kind of question about whole numbers a and b.

    Attributes:
        wordings: the question, told in more than one way.
        code: a line that answers it; `{a}` and `{b}` are the numbers.
        answer: what that line prints.
        a: range of a, both ends included; so is b.
    """

    wordings: tuple[str, ...]
    code: str
    answer: Callable[[int, int], int]
    a: tuple[int, int]
    b: tuple[int, int]


FORMS: Mapping[str, Form] = {
    "product": Form(
        (
            "There are {a} boxes with {b} pens each. How many pens?",
            "A card costs {a} coins. What do {b} cost?",
        ),
        "print({a} * {b})",
        lambda a, b: a * b,
        a=(12, 99),
        b=(12, 99),
    ),
    "remainder": Form(
        (
            "Put {a} eggs into boxes of {b}. How many are left over?",
            "What is the remainder of {a} divided by {b}?",
        ),
        "print({a} % {b})",
        lambda a, b: a % b,
        a=(100, 999),
        b=(7, 60),
    ),
    "sum": Form(
        ("What is the sum of the numbers from {a} to {b}?", "Add all numbers from {a} to {b}."),
        "print(sum(range({a}, {b} + 1)))",
        lambda a, b: (a + b) * (b - a + 1) // 2,
        a=(1, 20),
        b=(30, 99),
    ),
}
SHOTS = (("product", 24, 13), ("remainder", 230, 12), ("sum", 3, 40))


def _show(form: str, a: int, b: int) -> str:
    chosen = FORMS[form]
    code, answer = chosen.code.format(a=a, b=b), chosen.answer(a, b)
    question = chosen.wordings[0].format(a=a, b=b)
    return f"{question}\npython: {code}\noutput: {answer}\nanswer: {answer}\n\n"


PREFIX = "".join(_show(*shot) for shot in SHOTS)


@lru_cache(maxsize=1024)  # the second turn asks for what the first line printed
def run_line(line: str) -> tuple[str, bool]:
    """What the line printed, as one line, or the last line of its error; and whether it ended well.

    Raises:
        Unavailable: the sandbox did not start.
    """
    result = run_python(line.strip(), LIMITS)
    if result.reason == "exit" and result.exit == 0:
        return cut(" ".join(result.stdout.split()), LONGEST), True
    return cut(result.error if result.reason == "exit" else f"limit of {result.reason}", LONGEST), False


class PythonTool:
    """Small computations for which the agent may write one line of Python; see the module's docstring."""

    name = "python_tool"
    version = f"1+python-{sys.version_info.major}.{sys.version_info.minor}"
    licence = "Apache-2.0"
    max_turns = 2
    max_new_tokens = 24

    def tasks(self, split: Split, n: int, seed: int) -> list[Task]:
        """See `Environment.tasks`.

        Raises:
            UsageError: there are fewer tasks.
            Unavailable: there is no sandbox here, so every step would fail.
        """
        run_line("")
        return draw_tasks(self, _candidates(seed), split, n, seed, _family)

    def step(self, task: Task, actions: Sequence[str]) -> Step:
        """Run the line, then judge the answer."""
        output, ran = run_line(actions[0])
        if len(actions) == 1:
            said = f"{'output' if ran else 'error'}: {output}\nanswer:"
            return Step(said, done=False, valid=ran and bool(actions[0].strip()))
        answer = actions[1].strip()
        correct = answer == str(task.payload["answer"])
        components = {
            "correct": float(correct),
            "ran": float(ran),
            "used_output": float(ran and answer == output),
        }
        return Step("", True, float(correct), components, valid=is_number(answer))

    def expert(self, task: Task, actions: Sequence[str]) -> str:
        """The line of the examples, then what it prints."""
        form, a, b = (task.payload[name] for name in ("form", "a", "b"))
        return str(task.payload["answer"]) if actions else FORMS[form].code.format(a=a, b=b)

    def constant_baseline(self, tasks: Sequence[Task]) -> tuple[str, float]:
        """The most common answer, written whatever the tool says."""
        return most_common_share([str(task.payload["answer"]) for task in tasks])

    def random_baseline(self, tasks: Sequence[Task], seed: int) -> float:
        """Expected reward of the code of another form, drawn at random, with the right numbers in it."""
        require_some(tasks)
        hits: list[bool] = [
            form.answer(task.payload["a"], task.payload["b"]) == task.payload["answer"]
            for task in tasks
            for form in FORMS.values()
        ]
        return sum(hits) / len(hits)


def _family(payload: Mapping[str, Any]) -> str:
    """The same computation in other words."""
    return f"{payload['form']} {payload['a']} {payload['b']}"


def _candidates(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    rng = random.Random(f"python_tool/{seed}")
    while True:
        name = rng.choice(tuple(FORMS))
        form = FORMS[name]
        a, b = rng.randint(*form.a), rng.randint(*form.b)
        question = rng.choice(form.wordings).format(a=a, b=b)
        if (name, a, b) not in SHOTS:
            payload = {"form": name, "a": a, "b": b, "answer": form.answer(a, b)}
            yield f"{PREFIX}{question}\npython:", payload
