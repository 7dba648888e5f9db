"""Environments of verifiers in both of its forms, played as text."""

from __future__ import annotations

import asyncio

import pytest

from tasks.arena.environment import Environment, Step, Task, get, split_of, step_all
from tasks.arena.guarded import Guarded
from tasks.arena.playing import mean_reward
from tasks.core.errors import UsageError

OWN = "tests.arena.own_verifiers"


def first(name: str) -> tuple[Environment, Task, str]:
    """The environment, a task, and its true answer, which is the word in the prompt from its end."""
    env = get(f"{OWN}:{name}")
    task = env.tasks("train", 1, seed=0)[0]
    word = task.prompt.split("Reverse ")[-1].split(".")[0].split(" ")[0]
    return env, task, word[::-1]


def test_rows_become_tasks_split_by_their_prompt() -> None:
    env = get(f"{OWN}:single")
    train, heldout = env.tasks("train", 8, seed=0), env.tasks("heldout", 3, seed=0)
    assert train == env.tasks("train", 8, seed=0)
    assert train != env.tasks("train", 8, seed=1)
    assert {split_of(task.prompt) for task in heldout} == {"heldout"}
    assert {task.prompt.split("\n")[0] for task in train} == {"Be brief."}
    assert all(task.prompt.endswith("\nassistant:") for task in train)
    with pytest.raises(UsageError, match="distinct prompts"):
        env.tasks("train", 100, seed=0)
    assert env.version == get(f"{OWN}:single").version
    assert env.version != get(f"{OWN}:hints").version  # other prompts


def test_the_reward_is_the_weighted_sum_as_a_share_and_its_parts_are_components() -> None:
    env, task, answer = first("single")
    right = env.step(task, [f" {answer}"])
    assert right == Step("", True, 1.0, {"success": 1.0, "exact": 1.0, "length": 1.0})
    long = env.step(task, ["x" * len(answer)])
    assert long.reward == pytest.approx(0.5 / 1.5)
    assert env.step(task, [" "]) == Step(
        "", True, 0.0, {"success": 0.0, "exact": 0.0, "length": 0.0}, valid=False
    )
    assert env.max_turns == 1


@pytest.mark.parametrize("name", ["hints", "later_hints"])
def test_both_forms_of_several_turns_are_played_alike(name: str) -> None:
    env, task, answer = first(name)
    assert env.max_turns == 3
    hint = f"user: It begins with {answer[:1]}.\nassistant:"
    assert env.step(task, ["no"]) == Step(hint, done=False)
    assert f"It begins with {answer[:2]}." in env.step(task, ["no", "no"]).observation
    assert env.step(task, ["no", answer]).components == {"success": 1.0, "found": 1.0, "turns": 2.0}
    assert env.step(task, ["no", "no", "no"]) == Step(
        "", True, 0.0, {"success": 0.0, "found": 0.0, "turns": 3.0}
    )
    assert env.step(task, ["no"]) == Step(hint, done=False)  # played again from the beginning
    assert env.step(task, [answer]).reward == 1.0


def test_completions_are_text() -> None:
    env = get(f"{OWN}:completion")
    task = env.tasks("train", 1, seed=0)[0]
    word = task.prompt.split(" ")[0]
    assert task.prompt == f"{word} reversed:"
    assert env.step(task, [f" {word[::-1]}"]).reward == 1.0


def test_baselines_write_true_answers_blindly() -> None:
    env = get(f"{OWN}:single")
    tasks = env.tasks("train", 8, seed=0)
    action, constant = env.constant_baseline(tasks)
    assert mean_reward(env, tasks, lambda task, actions: action) == pytest.approx(constant)
    assert 1 / 8 <= constant < 1
    assert env.random_baseline(tasks, 3) == env.random_baseline(tasks, 3) < 1
    with pytest.raises(UsageError, match="at least one task"):
        env.constant_baseline([])


def test_it_works_where_a_loop_is_running() -> None:
    env, task, answer = first("later_hints")

    async def inside() -> Step:
        return env.step(task, ["no", answer])

    assert asyncio.run(inside()).reward == 1.0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("grouped", "best scores whole groups"),
        ("worthless", "nothing could be earned"),
        ("endless", "no limit of turns"),
    ],
)
def test_what_cannot_be_played_is_refused(name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        get(f"{OWN}:{name}")


def test_a_function_that_raises_costs_the_episode() -> None:
    env, task, answer = first("raising")
    (fault,) = step_all(env, [(task, [answer])])
    assert isinstance(fault, KeyError)


def test_a_worker_makes_it_anew_by_its_path() -> None:
    env, task, answer = first("hints")
    with Guarded(env) as guarded:
        assert guarded.step(task, ["no", answer]) == env.step(task, ["no", answer])
