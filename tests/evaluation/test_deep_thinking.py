from __future__ import annotations

import random

import pytest

from tasks.core.errors import UsageError
from tasks.evaluation.deep_thinking import Rated, by_correctness


def test_a_worked_example() -> None:
    tasks = [
        [Rated(0.4, 10, 3.0, True), Rated(0.2, 12, 1.0, True), Rated(0.1, 20, 2.0, False)],
        [Rated(0.5, 8, 2.0, True), Rated(0.5, 8, 3.0, False)],
        [Rated(0.0, 30, 1.0, False), Rated(0.2, 40, 4.0, False)],
    ]
    found = by_correctness(tasks, alpha=0.025)
    assert found.answers == 7
    assert found.accuracy.estimate == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert found.ratio.estimate == pytest.approx((0.7 / 3 + 0.5 + 0.1) / 3)
    assert found.right is not None
    assert (found.right.estimate, found.right.n) == (pytest.approx(0.4), 2)
    assert found.wrong is not None
    assert (found.wrong.estimate, found.wrong.n) == (pytest.approx(0.7 / 3), 3)
    assert found.difference is not None
    assert (found.difference.estimate, found.difference.n) == (pytest.approx((0.2 + 0.0) / 2), 2)
    assert found.auroc is not None
    assert found.auroc.estimate == pytest.approx((1.0 + 0.5) / 2)
    assert found.auroc_shorter is not None
    assert found.auroc_shorter.estimate == pytest.approx((1.0 + 0.5) / 2)
    assert found.length.estimate == pytest.approx((14 + 8 + 35) / 3)
    assert found.certainty.estimate == pytest.approx((2.0 + 2.5 + 2.5) / 3)
    assert found.auroc_certainty is not None
    assert found.auroc_certainty.estimate == pytest.approx((0.5 + 0.0) / 2)


def test_where_all_are_right_nothing_is_compared() -> None:
    found = by_correctness([[Rated(0.4, 10, 1.0, True)], [Rated(0.2, 9, 1.0, True)]], alpha=0.025)
    assert found.accuracy.estimate == 1
    assert (
        found.wrong is found.difference is found.auroc is found.auroc_shorter is found.auroc_certainty is None
    )


@pytest.mark.parametrize("tasks", [[], [[]], [[Rated(0.1, 1, 1.0, True)], []]])
def test_no_answers(tasks: list[list[Rated]]) -> None:
    with pytest.raises(UsageError):
        by_correctness(tasks, alpha=0.025)


def test_the_interval_of_the_difference_holds_the_truth() -> None:
    draw = random.Random(0)
    inside = 0
    for _ in range(200):
        tasks = []
        for _ in range(40):
            level = draw.uniform(0.1, 0.5)  # of the task, which is no concern of the difference
            answers = [(draw.random() < 0.5, draw.gauss(level, 0.1)) for _ in range(8)]
            tasks.append([Rated(ratio + 0.05 * right, 10, 1.0, right) for right, ratio in answers])
        found = by_correctness(tasks, alpha=0.025).difference
        assert found is not None
        inside += found.low <= 0.05 <= found.high
    assert 180 <= inside <= 200
