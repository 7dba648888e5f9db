"""How well scores tell right from wrong: worked numbers, counting by hand, and coverage of the bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.evaluation.discrimination import (
    auroc,
    auroc_within,
    binned_correlation,
    bootstrap_mean,
    point_biserial,
)

SCORES = [0.10, 0.12, 0.15, 0.16, 0.20, 0.22, 0.25, 0.27, 0.30, 0.35]
RIGHT = [0, 0, 1, 0, 0, 1, 1, 0, 1, 1]


def test_worked_correlations():
    assert binned_correlation(SCORES, RIGHT) == pytest.approx(0.8969, abs=5e-5)
    assert point_biserial(SCORES, RIGHT) == pytest.approx(0.5451, abs=5e-5)


def test_correlations_do_not_depend_on_the_order_of_different_scores():
    order = np.random.default_rng(0).permutation(10)
    scores, right = np.array(SCORES)[order], np.array(RIGHT)[order]
    assert binned_correlation(scores, right) == pytest.approx(0.8969, abs=5e-5)
    assert point_biserial(scores, right) == pytest.approx(0.5451, abs=5e-5)


def test_ties_do_not_make_the_binned_correlation_depend_on_the_order():
    draw = np.random.default_rng(0)
    scores = draw.integers(0, 3, 60)
    right = draw.random(60) < 0.3 + 0.2 * scores
    found = binned_correlation(scores, right)
    assert found is not None
    for _ in range(5):
        order = draw.permutation(60)
        assert binned_correlation(scores[order], right[order]) == pytest.approx(found)
    assert binned_correlation(-scores, right) == pytest.approx(-found)


def test_what_does_not_vary_has_no_correlation():
    assert point_biserial([1, 1, 1], [0, 1, 1]) is None
    assert binned_correlation(SCORES, [1] * 10) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_the_auroc_counts_pairs(answers):
    found = auroc([score for score, _ in answers], [right for _, right in answers])
    pairs = [(a > b) + (a == b) / 2 for a, good in answers for b, bad in answers if good and not bad]
    assert found == (pytest.approx(sum(pairs) / len(pairs)) if pairs else None)


def test_questions_count_alike_and_those_of_one_kind_not_at_all():
    questions = [
        ([1, 2, 3], [False, True, True]),
        ([3, 1], [False, True]),
        ([5, 6], [True, True]),
        ([0.5, 0.5, 0.5], [True, False, False]),
    ]
    found = auroc_within(questions, alpha=0.025)
    assert found is not None
    assert (found.estimate, found.n) == (0.5, 3)
    assert found.low <= 0.5 <= found.high
    assert auroc_within(questions[2:3], alpha=0.025) is None


def test_harder_questions_with_other_scores_do_not_look_like_skill():
    draw = np.random.default_rng(0)
    questions = []
    for _ in range(60):
        easy = draw.random()
        questions.append((easy + draw.normal(0, 0.1, 16), draw.random(16) < easy))
    found = auroc_within(questions, alpha=0.025)
    assert found is not None
    assert found.low < 0.5 < found.high
    scores, right = (np.concatenate([q[k] for q in questions]) for k in (0, 1))
    assert point_biserial(scores, right) > 0.4


def test_the_bootstrap_covers_about_as_often_as_it_says():
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        found = bootstrap_mean(draw.exponential(1.0, 50), alpha=0.05, draws=400)
        hits += found.low <= 1 <= found.high
    assert 0.83 < hits / 300 < 0.95


def test_equal_values_leave_no_doubt_and_the_same_values_give_the_same_bounds():
    assert bootstrap_mean([2.0] * 5, alpha=0.05) == bootstrap_mean([2.0] * 5, alpha=0.05)
    assert bootstrap_mean([2.0] * 5, alpha=0.05).low == 2.0


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: auroc([1, 2], [True]),
        lambda: auroc([math.nan, 2], [True, False]),
        lambda: binned_correlation([1, 2], [True, False]),
        lambda: bootstrap_mean([], alpha=0.05),
        lambda: bootstrap_mean([1], alpha=0.5),
    ],
)
def test_bad_input_is_told(wrong):
    with pytest.raises(ValueError, match=r"differ|number|bins|least|alpha"):
        wrong()
