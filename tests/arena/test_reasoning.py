from __future__ import annotations

import pytest

from tasks.arena.environment import get
from tasks.core.errors import UsageError


def test_sums_have_a_compact_prompt() -> None:
    task = get("reasoning_gym/chain_sum").tasks("train", 1, seed=0)[0]
    *shots, question = task.prompt.split("\n")
    assert len(shots) == 3
    for shot in shots:
        left, right = shot.split(" = ")
        assert eval(left) == int(right)
    assert question.endswith(" =")
    assert str(eval(question.removesuffix(" ="))) == task.payload["answer"]


def test_a_family_without_settings_has_the_general_prompt() -> None:
    task = get("reasoning_gym/letter_counting").tasks("train", 1, seed=0)[0]
    assert task.prompt.count("Question: How many times") == 4
    assert task.prompt.count("\nAnswer: ") == 3
    assert task.prompt.endswith("\nAnswer:")


def test_families_with_two_possible_answers_work() -> None:
    env = get("reasoning_gym/prime_factorization")
    assert env.tasks("train", 2, seed=0)
    assert get("reasoning_gym/syllogism").tasks("train", 2, seed=0)


@pytest.mark.parametrize("dataset", ["graph_color", "sudoku"])
def test_families_whose_answers_do_not_fit_on_a_line_are_refused(dataset: str) -> None:
    with pytest.raises(UsageError, match="no short worked answers"):
        get(f"reasoning_gym/{dataset}").tasks("train", 1, seed=0)


def test_the_familys_own_scorer_judges() -> None:
    env = get("reasoning_gym/chain_sum")
    task = env.tasks("train", 1, seed=0)[0]
    truth = task.payload["answer"]
    assert env.step(task, [f" {truth}.0"]).reward == 1.0  # chain_sum tolerates trailing decimals
    assert env.step(task, [f" {truth} or so"]).components == {"correct": 0.0}
