from __future__ import annotations

import sys

import pytest

from tasks.arena.environment import Task
from tasks.arena.guarded import Guarded
from tasks.arena.python_tool import FORMS, PREFIX, PythonTool, run_line
from tasks.core.errors import Unavailable, UsageError
from tests.arena import sandboxed

if not sandboxed.isolation():
    pytest.skip("no sandbox starts here", allow_module_level=True)
ENV = PythonTool()
TASKS = ENV.tasks("train", 40, seed=0)


def task(form: str) -> Task:
    return next(t for t in TASKS if t.payload["form"] == form)


@pytest.mark.parametrize("form", FORMS)
def test_the_code_of_each_form_gives_its_answer(form: str) -> None:
    chosen = task(form)
    a, b, answer = (chosen.payload[key] for key in ("a", "b", "answer"))
    line = " " + FORMS[form].code.format(a=a, b=b)
    assert ENV.step(chosen, [line]).observation == f"output: {answer}\nanswer:"
    end = ENV.step(chosen, [line, f" {answer}"])
    assert (end.done, end.reward) == (True, 1.0)
    assert end.components == {"correct": 1.0, "ran": 1.0, "used_output": 1.0}
    assert f"{a}" in chosen.prompt.removeprefix(PREFIX)
    assert f"{b}" in chosen.prompt.removeprefix(PREFIX)


def test_the_examples_of_the_prompt_are_true() -> None:
    shots = PREFIX.strip().split("\n\n")
    assert len(shots) == len(FORMS)
    for shot in shots:
        _, code, output, answer = shot.split("\n")
        assert run_line(code.removeprefix("python:")) == (output.removeprefix("output: "), True)
        assert answer == output.replace("output", "answer")
    assert TASKS[0].prompt.startswith(PREFIX)


@pytest.mark.parametrize(
    ("line", "observation"),
    [
        ("1 / 0", "error: ZeroDivisionError: division by zero"),
        ("print(", "error: SyntaxError: '(' was never closed"),
        ("sorry", "error: NameError: name 'sorry' is not defined"),
        ("", "output: "),
        ("1 + 1", "output: "),
        ("print(1); print(2)", "output: 1 2"),
        ("while True: pass", "error: limit of cpu"),
        ("while True: print(1)", "error: limit of output"),
        ("x = [0] * 10**9", "error: limit of memory"),
        ("import os; os._exit(3)", "error: "),
        ("print('x' * 200)", f"output: {'x' * 30}[200 characters, cut]{'x' * 29}"),
    ],
)
def test_what_else_a_line_may_give(line: str, observation: str) -> None:
    step = ENV.step(TASKS[0], [line])
    assert (step.observation, step.done) == (f"{observation}\nanswer:", False)


def test_the_answer_alone_is_rewarded_and_the_components_tell_how_it_came() -> None:
    chosen = task("product")
    truth = str(chosen.payload["answer"])
    assert ENV.step(chosen, ["nonsense", truth]).components == {
        "correct": 1.0,
        "ran": 0.0,
        "used_output": 0.0,
    }
    wrong = ENV.step(chosen, ["print(5)", "5"])
    assert (wrong.reward, wrong.components) == (0.0, {"correct": 0.0, "ran": 1.0, "used_output": 1.0})


def test_the_same_computation_in_other_words_is_one_family() -> None:
    many = ENV.tasks("train", 3000, seed=1)
    families: dict[str, set[str]] = {}
    for t in many:
        families.setdefault(t.family, set()).add(t.prompt)
    pairs = [prompts for prompts in families.values() if len(prompts) > 1]
    assert pairs
    assert max(map(len, pairs)) == 2
    assert {t.payload["form"] for t in many} == set(FORMS)


def test_it_works_behind_a_guard() -> None:
    with Guarded(ENV, workers=2) as guarded:
        turns = [(t, [FORMS[t.payload["form"]].code.format(**t.payload)]) for t in TASKS[:6]]
        assert guarded.steps(turns) == [ENV.step(*turn) for turn in turns]


def test_without_a_sandbox_no_task_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    run_line.cache_clear()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(Unavailable, match="did not start"):
        ENV.tasks("train", 1, 0)


def test_a_form_drawn_at_random_is_seldom_right() -> None:
    share = ENV.random_baseline(TASKS, seed=0)
    assert 1 / len(FORMS) <= share < 0.5  # its own form is right always, another one seldom
    with pytest.raises(UsageError):
        ENV.random_baseline([], seed=0)
