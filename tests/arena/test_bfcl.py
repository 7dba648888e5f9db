"""The stateful tasks of BFCL: calls read safely, run on the real simulators, judged by the state they leave."""

from __future__ import annotations

import pickle
import sys
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.arena import environment
from tasks.arena.bfcl_calls import CATEGORIES, Bfcl, Call, LineError, parse_line
from tasks.arena.environment import get, split_of
from tasks.arena.guarded import Guarded
from tasks.arena.playing import expert_baseline, mean_reward, play
from tasks.core.errors import Unavailable, UsageError
from tasks.reward.verifier import replay

pytest.importorskip("bfcl_eval")


@pytest.fixture(params=CATEGORIES, scope="module")
def env(request: pytest.FixtureRequest) -> Bfcl:
    made = get(f"bfcl/{request.param}")
    assert isinstance(made, Bfcl)
    return made


# ------------------------------------------------------------------------------------------------- calls


def test_lines_of_calls_are_read() -> None:
    assert parse_line(" none ") == []
    assert parse_line("ls(a=True)") == [Call("ls", (), {"a": True})]
    assert parse_line(" cd('a'); mv(source='x', destination=\"y z\");") == [
        Call("cd", ("a",), {}),
        Call("mv", (), {"source": "x", "destination": "y z"}),
    ]
    assert parse_line("f(-1.5, [1, {'k': None}])") == [Call("f", (-1.5, [1, {"k": None}]), {})]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "ls",
        "none; none",
        "ls(a=True) and rm('x')",
        "__import__('os').system('true')",
        "open('/etc/passwd').read()",
        "ls(a=open('x'))",
        "f(*[1, 2])",
        "f(**{'a': 1})",
        "f(1)(2)",
        "a = f(1)",
        "lambda: f()",
        "f(x for x in [1])",
        "f('\\ud800'",
        "f(9 ** 9 ** 9)",
        "f(" + "[" * 500,
        "f('" + "x" * 10_000 + "')",
        "if True: f()",
        "f(1)\ng(2); import os",
    ],
)
def test_anything_else_is_not_and_runs_nothing(line: str) -> None:
    with pytest.raises(LineError):
        parse_line(line)


@given(st.text(max_size=200))
def test_no_text_breaks_the_reader(text: str) -> None:
    with suppress(LineError):
        assert all(isinstance(call, Call) for call in parse_line(text))


# ----------------------------------------------------------------------------------------------- episodes


def test_tasks_are_distinct_repeat_and_keep_to_their_split(env: Bfcl) -> None:
    tasks = env.tasks("heldout", 20, seed=3)
    assert tasks == get(env.name).tasks("heldout", 20, seed=3)
    assert {split_of(task.prompt) for task in tasks} == {"heldout"}
    assert all(len(task.prompt) < 2500 and task.prompt.endswith("\ncalls:") for task in tasks)
    assert len(env.tasks("train", 100, seed=0)) == 100


def test_gold_calls_solve_every_task_and_doing_nothing_solves_none(env: Bfcl) -> None:
    tasks = env.tasks("heldout", 25, seed=1) + env.tasks("train", 25, seed=1)
    assert expert_baseline(env, tasks) == 1.0
    assert mean_reward(env, tasks, lambda task, actions: "none") == 0.0
    action, constant = env.constant_baseline(tasks[:10])
    assert mean_reward(env, tasks[:10], lambda task, actions: action) == constant
    assert env.random_baseline(tasks, 0) < 0.1


def test_each_turn_is_a_message_and_the_last_judges_the_state() -> None:
    env = get("bfcl/base")
    assert isinstance(env, Bfcl)
    for task in env.tasks("train", 10, seed=0):
        steps = play(env, task, lambda actions, t=task: env.expert(t, actions))
        assert all(step.observation.count("user: ") == 1 for step in steps[:-1])
        assert steps[-1].components == {"valid_format": 1.0, "success": 1.0, "score": 1.0}
        wrong = play(env, task, lambda actions: "none")
        assert len(wrong) == len(steps)
        assert wrong[-1].components["score"] < 1
        assert all(step.valid for step in wrong)


def test_what_is_malformed_unknown_or_refused_is_not_valid() -> None:
    env = get("bfcl/base")
    tasks = env.tasks("train", 80, seed=0)
    task = next(t for t in tasks if "\ncd(folder: str)" in t.prompt)
    for line, said in {
        "please list the files": "result: error: not a line of calls",
        "reboot()": "result: error: there is no reboot",
        "_load_scenario({})": "result: error: there is no _load_scenario",
        "cd(7, 8)": "result: error: too many positional arguments",
        "cd(folder='nowhere at all')": '"error": ',
    }.items():
        step = env.step(task, [line])
        assert (step.valid, said in step.observation) == (False, True), step.observation
    fine = env.step(task, ["ls()"])
    assert fine.valid
    assert fine.observation.startswith('result: {"current_directory_content"')
    nothing = env.step(task, ["ls(); reboot("])
    assert "current_directory_content" not in nothing.observation  # a line is run whole or not at all


def test_excluded_functions_are_neither_told_nor_run() -> None:
    env = get("bfcl/base")
    assert isinstance(env, Bfcl)
    for task in env.tasks("train", 100, seed=0):
        for name in env._rows[task.payload["row"]].excluded:
            assert f"\n{name}(" not in task.prompt
            assert f"there is no {name}" in env.step(task, [f"{name}()"]).observation


def test_a_missing_function_comes_with_its_message() -> None:
    env = get("bfcl/miss_func")
    assert isinstance(env, Bfcl)
    task = env.tasks("train", 1, seed=0)[0]
    row = env._rows[task.payload["row"]]
    ((turn, (name, *_)),) = row.later.items()
    assert f"\n{name}(" not in task.prompt
    actions = []
    for _ in range(turn):
        assert f"there is no {name}" in env.step(task, [*actions, f"{name}()"]).observation
        actions.append(env.expert(task, actions))
    assert "there is one more function now: " in env.step(task, actions).observation
    assert f"there is no {name}" not in env.step(task, [*actions, f"{name}()"]).observation


def test_an_expert_whose_state_was_spoilt_says_so() -> None:
    env = get("bfcl/base")
    assert isinstance(env, Bfcl)
    task = env.tasks("train", 1, seed=0)[0]
    with pytest.raises(UsageError, match="cannot be solved by the gold calls"):
        env.expert(task, ["none"] * len(env._rows[task.payload["row"]].messages))


def test_an_episode_is_a_function_of_its_actions_wherever_it_runs(env: Bfcl) -> None:
    task = env.tasks("train", 1, seed=4)[0]
    actions: list[str] = []
    steps = play(env, task, lambda before: actions.append(env.expert(task, before)) or actions[-1])
    other = pickle.loads(pickle.dumps(env))
    assert other.step(task, actions) == steps[-1]
    assert [env.step(task, actions[: i + 1]) for i in range(len(actions))] == steps
    text = "".join(f"{action}\n{step.observation}" for action, step in zip(actions, steps, strict=True))
    assert replay(env, task, text) == 1.0
    with Guarded(env) as guarded:
        assert guarded.step(task, actions) == steps[-1]


def test_without_the_package_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment.find_spec
    monkeypatch.setattr(environment, "find_spec", lambda name: None if name == "bfcl_eval" else found(name))
    assert not any(name.startswith("bfcl/") for name in environment.names())
    with pytest.raises(Unavailable, match=r"pip install --no-deps bfcl-eval"):
        get("bfcl/base")


def test_nothing_of_the_leaderboard_s_clients_is_imported() -> None:
    env = get("bfcl/base")
    env.step(env.tasks("train", 1, 0)[0], ["none"])
    assert not any(name.startswith("bfcl_eval.model_handler") for name in sys.modules)
