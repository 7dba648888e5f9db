from __future__ import annotations

import operator
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.arena.calculator import FORMS, PREFIX, Calculator, CallError, calculate, run_call
from tasks.arena.environment import Task
from tasks.core.errors import UsageError

WORST = "999999" + " * 999999" * 7


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("52 - 11", 41),
        ("75+15", 90),
        ("14 * 16", 224),
        ("2 + 3 * 4 - 5", 9),
        ("1-2-3", -4),
        ("10 - 2 * 3 * 2", -2),
    ],
)
def test_calculate(expression: str, value: int) -> None:
    assert calculate(expression) == value


@given(st.lists(st.integers(0, 999_999), min_size=2, max_size=8), st.integers())
def test_calculate_agrees_with_python(numbers: list[int], seed: int) -> None:
    rng = random.Random(seed)
    expression = str(numbers[0]) + "".join(rng.choice([" + ", "-", "*"]) + str(n) for n in numbers[1:])
    # int(...) of each operand: Python reads no leading zeros, and str() writes none
    assert calculate(expression) == eval(expression)


@pytest.mark.parametrize(
    "action",
    [
        "",
        "52 - 11",
        "calc()",
        "calc(52)",
        "calc(52 -)",
        "calc(52 / 11)",
        "calc(52 ** 11)",
        "calc(52 - - 11)",
        "calc((52 - 11))",
        "calc(52 - 11) and more",
        "calc(__import__('os').getcwd() + 1)",
        "calc(1234567 + 1)",
        "calc(1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1)",
        "calc(٣ + ٤)",
        "call: calc(52 - 11)",
        "calc(" + "1" * 10_000 + " + 1)",
        "calc(" + " " * 10_000 + "1 + 1)",
    ],
)
def test_what_is_not_a_call_is_refused(action: str) -> None:
    with pytest.raises(CallError):
        run_call(action)


def test_no_action_costs_noticeable_time() -> None:
    began = time.process_time()
    assert run_call(f"calc({WORST})") == 999_999**8
    for hostile in ("calc(" + "1 " * 100_000, "calc(" * 50_000, "calc(1" + " +1" * 50_000 + ")"):
        with pytest.raises(CallError):
            run_call(hostile)
    assert time.process_time() - began < 2  # what it guards against takes minutes


def task(operator_sign: str = "-") -> Task:
    return next(t for t in Calculator().tasks("train", 50, seed=0) if t.payload["operator"] == operator_sign)


@pytest.mark.parametrize("sign", FORMS)
def test_the_truth_of_a_task_is_the_arithmetic_of_its_text(sign: str) -> None:
    chosen = task(sign)
    a, b = (
        int(word.strip("."))
        for word in chosen.prompt.removeprefix(PREFIX).split()
        if word.strip(".").isdigit()
    )
    apply = {"-": operator.sub, "+": operator.add, "*": operator.mul}[sign]
    assert chosen.payload["answer"] == apply(a, b)
    assert chosen.prompt.startswith(PREFIX)
    assert chosen.prompt.endswith("\ncall:")


def test_the_tool_runs_and_its_result_comes_back_in_the_form_of_the_examples() -> None:
    env = Calculator()
    step = env.step(task(), [" calc(52 - 11)"])
    assert (step.observation, step.done) == ("result: 41\nanswer:", False)
    assert "call: calc(52 - 11)\nresult: 41\nanswer: 41\n" in PREFIX
    assert env.step(task(), [" 52 take away 11"]).observation == "result: error\nanswer:"


@pytest.mark.parametrize(
    ("call", "answer", "components"),
    [
        ("calc({a} - {b})", "{truth}", {"correct": 1, "valid_call": 1, "used_result": 1}),
        ("calc({a} - {b})", "-1", {"correct": 0, "valid_call": 1, "used_result": 0}),
        ("calc({a} + {b})", "{sum}", {"correct": 0, "valid_call": 1, "used_result": 1}),
        ("no call", "{truth}", {"correct": 1, "valid_call": 0, "used_result": 0}),
        ("no call", "None", {"correct": 0, "valid_call": 0, "used_result": 0}),
        ("no call", "error", {"correct": 0, "valid_call": 0, "used_result": 0}),
    ],
)
def test_the_answer_is_rewarded_and_the_components_tell_how_it_came(
    call: str, answer: str, components: dict[str, float]
) -> None:
    chosen = task("-")
    a, b = chosen.payload["a"], chosen.payload["b"]
    fill = {"a": a, "b": b, "truth": a - b, "sum": a + b}
    step = Calculator().step(chosen, [call.format(**fill), answer.format(**fill)])
    assert step.done
    assert step.components == components
    assert step.reward == components["correct"]


def test_a_random_operator_is_right_once_in_three() -> None:
    env = Calculator()
    assert env.random_baseline(env.tasks("heldout", 60, seed=1), seed=0) == pytest.approx(1 / 3)
    with pytest.raises(UsageError):
        env.random_baseline([], seed=0)
