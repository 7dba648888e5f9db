"""Gaffke's bound: exact where exact answers are known, and never below its confidence where t is."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special

from tasks.evaluation.bounded import bounded_mean, bounded_p
from tasks.evaluation.sequential import cluster_stream
from tasks.evaluation.statistics import clopper_pearson, clustered_mean


@pytest.mark.parametrize(("right", "n"), [(0, 30), (1, 30), (7, 50), (49, 50), (120, 120), (135, 270)])
@pytest.mark.parametrize("alpha", [0.05, 0.0025])
def test_of_right_answers_it_is_clopper_pearson(right: int, n: int, alpha: float):
    found = bounded_mean(np.repeat([1.0, 0.0], [right, n - right]), alpha=alpha, support=(0, 1))
    low, high = clopper_pearson(right, n, alpha=alpha)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)
    assert found.estimate == right / n


def test_the_p_value_is_the_share_of_weighted_means_below_the_margin():
    """Against two million draws of the Dirichlet weights, for graded values in clusters of unequal size."""
    rng = np.random.default_rng(0)
    sizes = [1, 3, 2, 5, 1, 1, 4, 2]
    names = [f"{i}" for i in np.repeat(np.arange(len(sizes)), sizes)]
    values = rng.uniform(-0.6, 1, len(names))
    stream = cluster_stream(values, names, support=(-1, 1))
    draws = rng.exponential(size=(2_000_000, len(sizes) + 1))
    means = (draws @ np.append(stream.sums, -1.0)) / (draws @ np.append(stream.shares, 1.0))
    for margin in (-0.5, -0.2, 0.0, 0.15):
        share = (means <= margin).mean()
        assert bounded_p(stream, margin) == pytest.approx(share, abs=4 * np.sqrt(share / 2e6) + 1e-6)


def test_a_sum_of_two_exponentials_in_closed_form():
    """One value at c: the weight of the worst must exceed (c - m) / (c + 1), a beta probability."""
    stream = cluster_stream([0.5], support=(-1, 1))
    for margin in (-0.9, -0.3, 0.4):
        assert bounded_p(stream, margin) == pytest.approx((margin + 1) / 1.5, rel=1e-9)
    many = cluster_stream(
        np.full(40, 0.5), support=(-1, 1)
    )  # no variation: Markov's bound of `clustered_mean`
    assert bounded_p(many, 0.4) == pytest.approx((1.4 / 1.5) ** 40, rel=1e-9)
    assert bounded_p(many, 0.5) == 1.0
    assert bounded_p(many, -1.0) == 0.0


def test_three_values_against_a_gamma_sum():
    """20 wins, 60 ties, 10 losses: P(Gamma(20) <= Gamma(11)) is a beta probability at margin 0."""
    values = np.repeat([1.0, 0.0, -1.0], [20, 60, 10])
    p = bounded_p(cluster_stream(values, support=(-1, 1)), 0.0)
    assert p == pytest.approx(special.betainc(20, 11, 0.5), rel=1e-9)


def test_order_and_mirror_do_not_matter():
    rng = np.random.default_rng(1)
    values = rng.choice([-1.0, 0.0, 0.25, 1.0], 60)
    one = bounded_mean(values, alpha=0.05, support=(-1, 1))
    other = bounded_mean(-values[::-1], alpha=0.05, support=(-1, 1))
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), abs=1e-9)
    stream = cluster_stream(values, support=(-1, 1))
    assert bounded_p(stream, one.low) == pytest.approx(0.05, abs=1e-6)
    assert bounded_p(stream.mirrored(), -one.high) == pytest.approx(0.05, abs=1e-6)


@pytest.mark.parametrize("n", [50, 120])
@pytest.mark.parametrize(("loss", "win"), [(0.10, 0.0), (0.12, 0.02), (0.30, 0.20)])
def test_false_claims_at_the_guards_margin_stay_below_alpha_and_those_of_t_do_not(n, loss, win):
    """Exactly, over all outcomes of n tasks whose true mean difference is -0.10, by the trinomial law."""
    false, student = 0.0, 0.0
    for losses in range(n + 1):
        for wins in range(n + 1 - losses):
            chance = _trinomial(n, losses, wins, loss, win)
            mean = (wins - losses) / n
            if chance < 1e-7 or mean < -0.15:
                continue
            values = np.repeat([-1.0, 0.0, 1.0], [losses, n - losses - wins, wins])
            false += chance * (bounded_p(cluster_stream(values, support=(-1, 1)), -0.10) <= 0.05)
            student += chance * (clustered_mean(values, alpha=0.05, support=(-1, 1)).p_above(-0.10) <= 0.05)
    assert false <= 0.05
    if win == 0:
        assert student > 0.06


def test_graded_rewards_with_rare_great_losses_are_covered():
    rng = np.random.default_rng(2)
    false = student = 0
    for _ in range(600):
        values = np.where(rng.uniform(size=50) < 0.15, -0.95, 0.05)
        false += bounded_p(cluster_stream(values, support=(-1, 1)), -0.10) <= 0.05
        student += clustered_mean(values, alpha=0.05, support=(-1, 1)).p_above(-0.10) <= 0.05
    assert clopper_pearson(false, 600, alpha=0.01)[0] <= 0.05
    assert student / 600 > 0.08


def test_the_power_lost_to_student_is_small():
    """A gain of 0.1 with 30 % of the tasks answered otherwise, 100 tasks: both show no loss of 0.10 nearly always."""
    rng, found, student = np.random.default_rng(3), 0, 0
    for _ in range(300):
        values = rng.choice([-1.0, 0.0, 1.0], 100, p=[0.1, 0.7, 0.2])
        found += bounded_p(cluster_stream(values, support=(-1, 1)), -0.10) <= 0.05
        student += clustered_mean(values, alpha=0.05, support=(-1, 1)).p_above(-0.10) <= 0.05
    assert found >= student - 12
    assert found >= 280


def _trinomial(n: int, losses: int, wins: int, loss: float, win: float) -> float:
    ties = n - losses - wins
    logs = special.gammaln(n + 1) - sum(special.gammaln(k + 1) for k in (losses, wins, ties))
    return float(
        np.exp(
            logs
            + special.xlogy(losses, loss)
            + special.xlogy(wins, win)
            + special.xlogy(ties, 1 - loss - win)
        )
    )
