"""Choosing one answer from many: worked numbers, ties, costs, and the random control."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.arena.best_of import (
    Sample,
    best,
    cons_at_n,
    long_at_n,
    majority,
    mean_at_n,
    random_at_n,
    short_at_n,
    think_at_n,
)
from tasks.core.errors import UsageError

WORKED = [
    Sample("a", 100, 0.2),
    Sample("b", 300, 0.4, reward=1.0),
    Sample("a", 200, 0.1),
    Sample("c", 400, 0.3),
]
SAMPLES = st.lists(
    st.builds(
        Sample,
        answer=st.sampled_from(["1", "2", "3", None]),
        tokens=st.integers(1, 500),
        prefix_score=st.sampled_from([0.0, 0.1, 0.2]),
        reward=st.sampled_from([0.0, 1.0]),
    ),
    min_size=1,
    max_size=20,
)


def test_worked_costs():
    think = think_at_n(WORKED, eta=0.5, prefix=50)
    assert (think.kept, think.tokens) == ((1, 3), 800)
    assert 1 - think.tokens / cons_at_n(WORKED).tokens == pytest.approx(0.2)
    short = short_at_n(WORKED, eta=0.5)
    assert (short.kept, short.tokens) == ((0, 2), 700)


def test_the_prefixes_of_discarded_samples_are_what_is_paid_beside_the_kept():
    many = [Sample("a", 1000, prefix_score=k / 48) for k in range(48)]
    assert think_at_n(many, eta=0.25, prefix=50).tokens == 12 * 1000 + 1800
    short = [Sample("a", 10, 0.0), Sample("a", 100, 1.0)]
    assert think_at_n(short, eta=0.5, prefix=50).tokens == 110  # no more than it had


def test_each_method_asks_its_own_samples():
    assert cons_at_n(WORKED).answer == "a"
    assert cons_at_n(WORKED).kept == (0, 1, 2, 3)
    assert long_at_n(WORKED, eta=0.5).kept == (1, 3)
    assert long_at_n(WORKED, eta=0.5).answer == "c"  # a tie: the longest
    assert short_at_n(WORKED, eta=0.75).answer == "a"
    assert think_at_n(WORKED, eta=0.5, prefix=50).answer == "b"  # a tie: the best score
    assert think_at_n(WORKED, eta=0.5, prefix=50).reward == 1.0
    assert mean_at_n(WORKED).reward == 0.25
    for method in (cons_at_n, mean_at_n, lambda s: long_at_n(s, eta=0.5)):
        assert method(WORKED).tokens == 1000


def test_ties_are_settled_by_score_and_then_by_place():
    assert best([0.1, 0.3, 0.3, 0.3], 0.5) == (1, 2)
    assert best([0.0] * 5, 0.5) == (0, 1, 2)  # ceil
    assert best([1.0] * 100, 0.55) == tuple(range(55))  # 0.55 * 100 is above 55 in floats
    assert majority(["x", "y", "x", "y"], [0.1, 0.2, 0.1, 0.0]) == 1
    assert majority(["x", "y", "x", "y"], [0.1, 0.1, 0.1, 0.1]) == 0
    assert majority(["x", "y", "y"], [0.9, 0.1, 0.2]) == 2


def test_who_has_no_answer_has_no_vote():
    assert majority([None, None, "x"], [1.0, 1.0, 0.0]) == 2
    assert majority([None, None], [1.0, 1.0]) is None
    nobody = cons_at_n([Sample(None, 7, reward=1.0), Sample(None, 8)])
    assert (nobody.answer, nobody.reward, nobody.tokens) == (None, 0.0, 15)


@given(SAMPLES, st.floats(0.01, 1), st.integers(0, 100))
def test_think_at_n_never_costs_more_than_all(samples, eta, prefix):
    think = think_at_n(samples, eta=eta, prefix=prefix)
    everyone = cons_at_n(samples)
    assert think.tokens <= everyone.tokens == sum(sample.tokens for sample in samples)
    least = min((samples[place].prefix_score for place in think.kept), default=0)
    assert all(s.prefix_score <= least for place, s in enumerate(samples) if place not in think.kept)
    assert think_at_n(samples, eta=1.0, prefix=prefix).tokens == everyone.tokens
    votes = [samples[place].answer for place in think.kept]
    assert think.answer is None or votes.count(think.answer) == max(
        votes.count(answer) for answer in votes if answer
    )


def test_the_order_of_samples_with_different_scores_does_not_matter():
    found = {
        (outcome.answer, outcome.tokens)
        for order in permutations(WORKED)
        for outcome in [think_at_n(order, eta=0.5, prefix=50)]
    }
    assert found == {("b", 800)}


@given(SAMPLES, st.integers(0, 3000), st.integers(0, 99))
def test_a_random_subset_keeps_to_its_budget_and_looks_at_no_score(samples, budget, seed):
    found = random_at_n(samples, budget=budget, rng=random.Random(seed))
    assert found.tokens <= budget or len(found.kept) == 1
    assert found.tokens == sum(samples[place].tokens for place in found.kept)
    others = [replace(sample, prefix_score=-sample.prefix_score) for sample in samples]
    assert random_at_n(others, budget=budget, rng=random.Random(seed)) == found


def test_a_random_subset_with_tokens_for_all_is_the_vote_of_all():
    found = random_at_n(WORKED, budget=1000, rng=random.Random(0))
    assert (found.answer, found.kept, found.tokens) == ("a", (0, 1, 2, 3), 1000)


def test_random_subsets_are_drawn_evenly():
    equal = [Sample(str(place), 10) for place in range(4)]
    rng = random.Random(0)
    counts = [0] * 4
    for _ in range(2000):
        for place in random_at_n(equal, budget=20, rng=rng).kept:
            counts[place] += 1
    assert sum(counts) == 4000
    assert all(900 < count < 1100 for count in counts)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: cons_at_n([]),
        lambda: mean_at_n([]),
        lambda: random_at_n([], budget=10, rng=random.Random(0)),
        lambda: think_at_n([Sample("a", 1, float("nan"))], eta=0.5, prefix=1),
        lambda: think_at_n(WORKED, eta=0, prefix=1),
        lambda: short_at_n(WORKED, eta=1.5),
    ],
)
def test_what_cannot_be_chosen_from_is_told(wrong):
    with pytest.raises(UsageError):
        wrong()
