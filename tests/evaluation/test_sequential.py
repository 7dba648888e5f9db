"""E-processes and confidence sequences against closed forms, Ville's inequality and simulated coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate

from tasks.evaluation.sequential import (
    anytime_p,
    betting_mean,
    betting_sequence,
    cluster_stream,
    empirical_bernstein,
    wealth,
)

UNIT = (0.0, 1.0)
PAIRED = (-1.0, 1.0)


def arcsine_average(function):
    """The mean of function(t) for t = sin^2(u), u uniform on [0, pi/2]."""
    value, _ = integrate.quad(lambda u: function(math.sin(u) ** 2), 0, math.pi / 2, epsabs=0, epsrel=1e-12)
    return value / (math.pi / 2)


@pytest.mark.parametrize("n", [1, 2, 10, 127])
def test_the_least_values_lose_as_the_central_binomial(n):
    """Every factor is 1 - t; the mean of (1 - t)^n is C(2n, n) / 4^n."""
    found = wealth(cluster_stream(np.zeros(n), support=UNIT), 0.5)
    assert found[-1] == pytest.approx(math.comb(2 * n, n) / 4**n, rel=1e-9)


def test_wealth_is_the_product_of_factors_by_hand():
    values = np.array([0.5, -0.2, 1.0, 0.0, -1.0])
    found = wealth(cluster_stream(values, support=PAIRED), 0.1)
    for k in range(1, 6):
        by_hand = arcsine_average(lambda t, k=k: math.prod(1 + t * ((v + 1) / 1.1 - 1) for v in values[:k]))
        assert found[k - 1] == pytest.approx(by_hand, rel=1e-9)


def test_clusters_of_different_sizes_bet_their_sums():
    """Sizes 1 and 2: the factors are 1 + t ((sum + size) / 2 / 1 - size / 2) for margin 0 on [-1, 1]."""
    found = wealth(cluster_stream([0.4, 0.6, 0.2], ["a", "b", "b"], support=PAIRED), 0.0)
    assert found[1] == pytest.approx(arcsine_average(lambda t: (1 + t * 0.2) * (1 + t * 0.4)), rel=1e-12)
    assert found[0] == pytest.approx(1 + 0.5 * 0.2, rel=1e-12)


def test_equal_clusters_are_their_means():
    rng = np.random.default_rng(0)
    values = rng.uniform(-1, 1, (12, 5))
    names = [f"c{i}" for i in range(12) for _ in range(5)]
    ours = wealth(cluster_stream(values.ravel(), names, support=PAIRED), -0.1)
    means = wealth(cluster_stream(values.mean(1), support=PAIRED), -0.1)
    assert ours == pytest.approx(means, rel=1e-12)


def test_the_final_wealth_does_not_depend_on_the_order():
    values = np.random.default_rng(1).uniform(-1, 1, 40)
    ends = [wealth(cluster_stream(v, support=PAIRED), 0.0)[-1] for v in (values, values[::-1])]
    assert ends[0] == pytest.approx(ends[1], rel=1e-12)


def test_a_p_value_is_one_over_the_best_wealth_so_far():
    assert anytime_p([0.5, 4.0, 2.0, 10.0]).tolist() == [1.0, 0.25, 0.25, 0.1]


def test_the_bound_is_where_the_wealth_reaches_one_over_alpha():
    values = np.random.default_rng(2).uniform(0.3, 0.9, 60)
    stream = cluster_stream(values, support=UNIT)
    found = betting_sequence(stream, alpha=0.05)
    assert wealth(stream, found.low[-1]).max() == pytest.approx(20, rel=1e-6)
    assert wealth(stream.mirrored(), -found.high[-1]).max() == pytest.approx(20, rel=1e-6)
    assert found.low[-1] < values.mean() < found.high[-1]


def test_the_sequence_only_tightens_and_mirrors():
    values = np.random.default_rng(3).uniform(-1, 1, 80)
    for method in (betting_sequence, empirical_bernstein):
        ours = method(cluster_stream(values, support=PAIRED), alpha=0.05)
        other = method(cluster_stream(-values, support=PAIRED), alpha=0.05)
        assert (np.diff(ours.low) >= 0).all()
        assert (np.diff(ours.high) <= 0).all()
        assert ours.low == pytest.approx(-other.high, abs=1e-12)


def test_empirical_bernstein_is_its_closed_form():
    """Theorem 2 with one-sided log(1 / alpha), written out as in the paper for values on [0, 1]."""
    x = np.random.default_rng(4).beta(2, 5, 50)
    t, goal = np.arange(1, 51), math.log(1 / 0.05)
    mean = (0.5 + np.cumsum(x) - x) / t
    variance = (0.25 + np.cumsum((x - mean) ** 2) - (x - mean) ** 2) / t
    bets = np.minimum(np.sqrt(2 * goal / (variance * t * np.log1p(t))), 0.5)
    v, psi = 4 * (x - mean) ** 2, (-np.log1p(-bets) - bets) / 4
    lows = (np.cumsum(bets * x) - goal - np.cumsum(v * psi)) / np.cumsum(bets)
    ours = empirical_bernstein(cluster_stream(x, support=UNIT), alpha=0.05)
    assert ours.low == pytest.approx(np.maximum.accumulate(lows.clip(0, 1)), abs=1e-12)


@pytest.mark.parametrize("method", [betting_sequence, empirical_bernstein])
def test_degenerate_streams(method):
    empty = method(cluster_stream([], support=PAIRED), alpha=0.05)
    assert empty.low.size == empty.high.size == 0
    one = method(cluster_stream([1.0], support=PAIRED), alpha=0.05)
    # One value against m has the wealth (1 + 2 / (m + 1)) / 2, which is 20 at m + 1 = 2 / 39.
    assert one.low[0] == pytest.approx(-1 + 2 / 39 if method is betting_sequence else -1.0)
    assert one.high[0] == 1.0
    same = method(cluster_stream(np.full(400, 0.25), support=PAIRED), alpha=0.05)
    assert 0.1 < same.low[-1] < 0.25 < same.high[-1] < 0.4
    best = method(cluster_stream(np.ones(400), support=PAIRED), alpha=0.05)
    assert best.low[-1] > 0.9
    assert best.high[-1] == 1.0


def test_the_lowest_margin_is_refuted_by_one_better_value():
    assert wealth(cluster_stream([-1.0, -0.5], support=PAIRED), -1.0).tolist() == [1.0, math.inf]


@pytest.mark.parametrize(
    "call",
    [
        lambda: cluster_stream([1.5], support=PAIRED),
        lambda: cluster_stream([math.nan], support=PAIRED),
        lambda: cluster_stream([0.0, 0.0], ["a"], support=PAIRED),
        lambda: cluster_stream([0.0, 0.0], ["a", "a"], support=PAIRED, largest=1),
        lambda: betting_sequence(cluster_stream([0.0], support=PAIRED), alpha=0.0),
        lambda: empirical_bernstein(cluster_stream([0.0], support=PAIRED), alpha=0.7),
    ],
)
def test_nonsense_is_refused(call):
    with pytest.raises(ValueError, match=r"values|differ|alpha"):
        call()


def hostile_stream(rng, n):
    """Mean 0 exactly, skewed so that normal theory is most wrong: -0.05 mostly, +0.95 one time in twenty."""
    return np.where(rng.uniform(size=n) < 0.05, 0.95, -0.05)


def unequal_stream(rng):
    """Clusters of 1 to 8 with size and mean related, E[sum] = 0 though the mean of cluster means is not."""
    sizes = rng.choice([1, 8], 60)
    means = np.where(sizes == 8, 0.1, -0.8) * (rng.uniform(size=60) < 0.5)
    names = np.repeat(np.arange(60), sizes)
    return np.repeat(means, sizes), [str(name) for name in names]


def test_ville_holds_at_every_time():
    """Equal agents looked at after every one of 400 tasks; a test made for one look errs many times as often."""
    rng = np.random.default_rng(5)
    rounds, ours, naive = 1000, 0, 0
    for _ in range(rounds):
        x = rng.choice([-1.0, 0.0, 1.0], 400, p=[0.15, 0.7, 0.15])
        ours += wealth(cluster_stream(x, support=PAIRED), 0.0).max() >= 20
        n = np.arange(1, 401)
        z = np.cumsum(x) / np.sqrt(np.maximum(np.cumsum(x**2), 1))
        naive += bool((z[n >= 30] > 1.645).any())
    assert ours / rounds <= 0.05
    assert naive / rounds > 0.15


@pytest.mark.parametrize("kind", ["hostile", "unequal"])
def test_coverage_over_time(kind):
    """Each bound may ever be wrong 5 % of the time; counted over 600 streams, with room for chance."""
    rng = np.random.default_rng(6)
    rounds, wrong = 600, {"betting below": 0, "betting above": 0, "bernstein": 0}
    for _ in range(rounds):
        values, names = (hostile_stream(rng, 300), None) if kind == "hostile" else unequal_stream(rng)
        stream = cluster_stream(values, names, support=PAIRED, largest=None if names is None else 8)
        wrong["betting below"] += wealth(stream, 0.0).max() >= 20
        wrong["betting above"] += wealth(stream.mirrored(), 0.0).max() >= 20
        bounds = empirical_bernstein(stream, alpha=0.05)
        wrong["bernstein"] += bool(bounds.low[-1] > 0 or bounds.high[-1] < 0)
    assert all(count / rounds <= 0.05 + 0.02 for count in wrong.values()), wrong


@given(
    values=st.lists(st.floats(-1, 1), min_size=1, max_size=30),
    margins=st.tuples(st.floats(-0.99, 0.99), st.floats(-0.99, 0.99)),
)
def test_wealth_falls_with_the_margin(values, margins):
    stream = cluster_stream(values, support=PAIRED)
    easy, hard = (wealth(stream, m) for m in sorted(margins))
    assert (easy >= hard * (1 - 1e-9)).all()


def test_strata_of_fixed_sizes_are_safe_at_the_end_and_only_there():
    """One stratum gains 0.5, the next loses 0.5: in between the gambler is rich, in the end he must not be."""
    rng = np.random.default_rng(7)
    ends, peaks = [], []
    for _ in range(300):
        values = np.concatenate([rng.integers(0, 2, 60), -rng.integers(0, 2, 60)]).astype(float)
        path = wealth(cluster_stream(values, support=PAIRED), 0.0)
        ends.append(path[-1] >= 20)
        peaks.append(path.max() >= 20)
        assert (betting_mean(values, alpha=0.05, support=PAIRED).low > 0) == ends[-1]
    assert np.mean(ends) <= 0.05
    assert np.mean(peaks) > 0.9


def test_betting_mean_does_not_depend_on_the_order_and_ends_where_the_sequence_may():
    values = np.random.default_rng(8).uniform(-0.2, 0.6, 50)
    names = [f"{i % 17}" for i in range(50)]
    found = betting_mean(values, names, alpha=0.05, support=PAIRED)
    turned = betting_mean(values[::-1], names[::-1], alpha=0.05, support=PAIRED)
    assert (found.low, found.high) == pytest.approx((turned.low, turned.high), abs=1e-9)
    stream = cluster_stream(values, names, support=PAIRED)
    assert wealth(stream, found.low)[-1] == pytest.approx(20, rel=1e-6)
    assert betting_sequence(stream, alpha=0.05).low[-1] >= found.low - 1e-9
    assert found.estimate == pytest.approx(values.mean())
