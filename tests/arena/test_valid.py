"""`Step.valid`: every environment says of every action, the last one too, whether it had the right form and was possible."""

from __future__ import annotations

import pytest

from tasks.arena.environment import Step, Task, get
from tasks.arena.playing import play
from tests.arena import sandboxed


def valid(name: str, *actions: str, task: Task | None = None) -> list[bool]:
    env = get(name)
    task = task or env.tasks("train", 1, seed=0)[0]
    return [env.step(task, actions[: i + 1]).valid for i in range(len(actions))]


@pytest.mark.parametrize(
    ("name", "actions", "expected"),
    [
        ("calculator", ("calc(1 + 1)", " 2"), [True, True]),
        ("calculator", ("calc(1 / 1)", "two"), [False, False]),
        ("largest", ("nonsense",), [False]),
        ("largest", (" 7 ",), [True]),
        ("largest", ("7 8",), [False]),
        ("reasoning_gym/gcd", ("anything",), [True]),
        ("reasoning_gym/gcd", (" ",), [False]),
    ],
)
def test_short_tasks(name: str, actions: tuple[str, ...], expected: list[bool]) -> None:
    assert valid(name, *actions) == expected


def test_a_line_of_python_has_to_end_well() -> None:
    if not sandboxed.isolation():
        pytest.skip("no sandbox starts here")
    assert valid("python_tool", "print(1)", "1") == [True, True]
    assert valid("python_tool", "print(1 / 0)", "none") == [False, False]
    assert valid("python_tool", "", "1") == [False, True]


def test_games_judge_each_action_and_not_the_episode() -> None:
    pytest.importorskip("textarena")
    assert valid("textarena/TowerOfHanoi", "A A", "up") == [False, False]
    env = get("textarena/Mastermind")
    task = env.tasks("train", 1, seed=0)[0]
    assert valid("textarena/Mastermind", "1 2 3", "1 1 1", "2 3 1", task=task) == [True, False, True]
    assert last(env.name, "nonsense") is False  # at the limit of turns


def test_a_mine_was_a_possible_choice() -> None:
    pytest.importorskip("textarena")
    env = get("textarena/Minesweeper")
    task = env.tasks("train", 1, seed=0)[0]
    ends = [env.step(task, [f"{row} {column}"]) for row in range(4) for column in range(4)]
    assert [step.valid for step in ends if step.done and not step.reward] == [True] * 3
    assert {step.valid for step in ends if step.observation.startswith("not possible")} == {False}


def test_rooms_call_possible_what_changes_anything() -> None:
    pytest.importorskip("minigrid")
    name = "minigrid/Fetch-5x5-N2"
    assert valid(name, "left", "jump", "left") == [True, False, True]
    assert False in valid(name, *["forward"] * 5)  # the wall, after four cells at most
    assert last(name, "left") is True
    assert last(name, "jump") is False


def last(name: str, action: str) -> bool:
    env = get(name)
    steps: list[Step] = play(env, env.tasks("train", 1, seed=0)[0], lambda actions: action)
    return steps[-1].valid
