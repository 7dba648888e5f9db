"""Statistics against worked numbers, other programs and simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from tasks.evaluation.statistics import (
    clopper_pearson,
    clustered_mean,
    holm,
    judge,
    mcnemar,
    paired_difference,
    pass_at_k,
    wilson,
)


def test_without_clusters_it_is_the_ordinary_t_interval():
    values = np.array([0.1, 0.4, 0.35, 0.8, 0.2, 0.6])
    ours = clustered_mean(values, alpha=0.05, support=(-1, 1))
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.90)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)
    assert ours.df == pytest.approx(5)
    assert ours.p_above(0.1) == pytest.approx(
        stats.ttest_1samp(values, 0.1, alternative="greater").pvalue, rel=1e-12
    )
    assert ours.p_below(0.6) == pytest.approx(
        stats.ttest_1samp(values, 0.6, alternative="less").pvalue, rel=1e-12
    )


def test_equal_clusters_are_a_t_interval_over_cluster_means():
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 1, (7, 5))
    names = np.repeat([f"c{i}" for i in range(7)], 5)
    ours = clustered_mean(values.ravel(), names, alpha=0.025, support=(0, 1))
    theirs = stats.ttest_1samp(values.mean(1), 0).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)
    assert ours.df == pytest.approx(6)


def test_cr2_and_its_degrees_of_freedom_match_the_matrix_definition():
    """In full matrices: A_g = (I - H_gg)^(-1/2), df = tr(B)^2 / tr(B B) over residual makers."""
    rng = np.random.default_rng(1)
    sizes = [1, 2, 3, 7, 12]
    member = np.repeat(np.arange(5), sizes)
    x = rng.normal(0, 0.2, member.size).clip(-1, 1)
    n = member.size
    residual_maker = np.eye(n) - np.full((n, n), 1 / n)
    rows = []
    for g in range(5):
        select = np.eye(n)[member == g]
        w, v = np.linalg.eigh(select @ residual_maker @ select.T)
        rows.append(np.ones(len(select)) @ v @ np.diag(w**-0.5) @ v.T @ select @ residual_maker / n)
    b = np.array(rows)  # [clusters, n]: the variance estimate is |b x|^2
    ours = clustered_mean(x, [str(g) for g in member], alpha=0.05, support=(-1, 1))
    assert ours.standard_error == pytest.approx(np.linalg.norm(b @ x), rel=1e-10)
    gram = b @ b.T
    assert ours.df == pytest.approx(np.trace(gram) ** 2 / np.trace(gram @ gram), rel=1e-10)


def test_cluster_order_and_names_do_not_matter():
    rng = np.random.default_rng(2)
    x, names = rng.uniform(0, 1, 40), rng.integers(0, 9, 40).astype(str)
    shuffle = rng.permutation(40)
    first = clustered_mean(x, names, alpha=0.05, support=(0, 1))
    second = clustered_mean(x[shuffle], np.char.add("z", names[shuffle]), alpha=0.05, support=(0, 1))
    assert (first.low, first.high) == pytest.approx((second.low, second.high), rel=1e-12)


def test_a_worked_paired_example():
    # 100 tasks, 20 won, 8 lost: mean .12, variance (.28 - .0144) * 100/99, SE = .0517960
    champion = np.r_[np.zeros(20), np.ones(8), np.ones(72)]
    candidate = np.r_[np.ones(20), np.zeros(8), np.ones(72)]
    gain = paired_difference(candidate, champion, alpha=0.05)
    assert gain.estimate == pytest.approx(0.12)
    assert gain.standard_error == pytest.approx(0.0517960, abs=1e-7)
    assert gain.low == pytest.approx(0.12 - 1.660391 * 0.0517960, abs=1e-6)
    assert gain.mde == pytest.approx((1.660391 + 0.845336) * 0.0517960, abs=1e-5)
    assert mcnemar(candidate, champion) == pytest.approx(
        stats.binomtest(20, 28, alternative="greater").pvalue
    )


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_a_few_perfect_wins_do_not_pass(n):
    """All differences equal have no variance; a t interval would be [1, 1] and pass on two tasks."""
    gain = paired_difference(np.ones(n), np.zeros(n), alpha=0.0025)
    assert gain.df == 0
    assert judge(gain.low, gain.high, 0.0) == "INCONCLUSIVE"


def test_enough_perfect_wins_pass_on_exact_evidence():
    gain = paired_difference(np.ones(30), np.zeros(30), alpha=0.0025)
    assert judge(gain.low, gain.high, 0.0) == "PASS"
    assert gain.p_above(0.0) == pytest.approx(0.5**30)
    assert gain.low == pytest.approx(2 * 0.0025 ** (1 / 30) - 1)


def test_one_cluster_is_one_observation():
    gain = paired_difference(np.ones(500), np.zeros(500), ["same"] * 500, alpha=0.05)
    assert gain.clusters == 1
    assert judge(gain.low, gain.high, 0.0) == "INCONCLUSIVE"


def test_agents_that_answer_alike_are_inconclusive_and_not_inferior():
    same = np.tile([0.0, 1.0], 80)
    gain = paired_difference(same, same, alpha=0.05)
    assert gain.estimate == 0
    assert gain.low < 0 < gain.high
    assert judge(gain.low, gain.high, 0.0) == "INCONCLUSIVE"
    assert judge(gain.low, gain.high, -0.05) == "PASS"


def test_all_right_is_clopper_pearson():
    ours = clustered_mean(np.ones(25), alpha=0.05, support=(0, 1))
    assert (ours.low, ours.high) == pytest.approx(clopper_pearson(25, 25, alpha=0.05))


@pytest.mark.parametrize(("mean", "n"), [(0.0, 5), (0.1, 30), (-0.2, 12)])
def test_bounds_and_p_values_agree_without_variance(mean, n):
    ours = clustered_mean(np.full(n, mean), alpha=0.02, support=(-1, 1))
    assert ours.p_above(ours.low) == pytest.approx(0.02)
    assert ours.p_below(ours.high) == pytest.approx(0.02)


def test_intervals_for_proportions_match_scipy():
    for k, n in [(0, 10), (3, 10), (10, 10), (47, 160)]:
        exact = stats.binomtest(k, n).proportion_ci(0.90, method="exact")
        score = stats.binomtest(k, n).proportion_ci(0.90, method="wilson")
        assert clopper_pearson(k, n, alpha=0.05) == pytest.approx((exact.low, exact.high), abs=1e-9)
        assert wilson(k, n, alpha=0.05) == pytest.approx((score.low, score.high), abs=1e-9)
    assert clopper_pearson(0, 300, alpha=0.05)[1] == pytest.approx(3 / 300, rel=0.01)  # the rule of three


def test_holm_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_judge_needs_the_whole_interval():
    assert [judge(0.01, 0.2, 0.0), judge(-0.2, -0.01, 0.0), judge(-0.1, 0.1, 0.0)] == [
        "PASS",
        "FAIL",
        "INCONCLUSIVE",
    ]
    assert judge(0.0, 0.1, 0.0) == "INCONCLUSIVE"


@pytest.mark.parametrize(
    "call",
    [
        lambda: clustered_mean([], alpha=0.05, support=(0, 1)),
        lambda: clustered_mean([np.nan], alpha=0.05, support=(0, 1)),
        lambda: clustered_mean([2.0], alpha=0.05, support=(0, 1)),
        lambda: clustered_mean([0.5], ["a", "b"], alpha=0.05, support=(0, 1)),
        lambda: clustered_mean([0.5], alpha=0.7, support=(0, 1)),
        lambda: paired_difference([1.0], [1.0, 0.0], alpha=0.05),
        lambda: paired_difference([1.5], [1.0], alpha=0.05),
        lambda: wilson(1, 0, alpha=0.05),
    ],
)
def test_nonsense_is_refused(call):
    with pytest.raises(ValueError, match=r"value|differ|alpha|within|proportion"):
        call()


def test_graded_differences_are_rounded_with_their_mean_kept():
    noise = [0.3, 0.5, 0.7, 0.0, 0.2]
    rounded = mcnemar([0.6, 0.9, 1.0, 0.2, 0.0], [0.0, 0.5, 0.2, 0.2, 1.0], noise)
    assert rounded == mcnemar([1, 0, 1, 0, 0], [0, 0, 0, 0, 1])  # won, drawn, won, drawn, lost
    assert mcnemar([1, 0], [0, 0], [0.999, 0.999]) == mcnemar([1, 0], [0, 0])


def test_rare_great_losses_deceive_t_and_not_mcnemar():
    """A gain of 0.05 mostly, a loss of 0.95 one time in twenty: no gain on average."""
    rng = np.random.default_rng(9)
    wrong = {"t": 0, "both": 0}
    for _ in range(2000):
        difference = np.where(rng.uniform(size=270) < 0.05, -0.95, 0.05)
        candidate, champion = difference.clip(0, 1), (-difference).clip(0, 1)
        t = paired_difference(candidate, champion, alpha=0.01).low > 0
        wrong["t"] += t
        wrong["both"] += t and mcnemar(candidate, champion, rng.uniform(size=270)) <= 0.01
    assert wrong["t"] / 2000 > 0.025
    assert wrong["both"] / 2000 <= 0.01


def _equal_agents(rng, clusters, per_cluster):
    """An agent and its equal on clustered tasks; rewards 0 or 1, difficulty shared in a cluster."""
    difficulty = rng.beta(2, 2, (clusters, 1))
    tilt = rng.normal(
        0, 0.08, (clusters, 1)
    )  # how the two agents differ from cluster to cluster, zero on average
    shape = (clusters, per_cluster)
    candidate = rng.uniform(size=shape) < (difficulty + tilt).clip(0, 1)
    champion = rng.uniform(size=shape) < (difficulty - tilt).clip(0, 1)
    return (
        candidate.astype(float).ravel(),
        champion.astype(float).ravel(),
        np.repeat(np.arange(clusters), per_cluster),
    )


def test_false_promotions_against_point_thresholds():
    """300 tasks in 30 clusters, equal agents: what point thresholds promote, and what our two alphas do."""
    rng = np.random.default_rng(3)
    rounds = 2000
    wins = {"new > old": 0, "naive z 5%": 0, "5%": 0, "0.25%": 0}
    for _ in range(rounds):
        a, b, names = _equal_agents(rng, 30, 10)
        wins["new > old"] += a.mean() > b.mean()
        wins["naive z 5%"] += (a - b).mean() > 1.645 * (a - b).std(ddof=1) / np.sqrt(a.size)
        for name, alpha in (("5%", 0.05), ("0.25%", 0.0025)):
            gain = paired_difference(a, b, names, alpha=alpha)
            wins[name] += judge(gain.low, gain.high, 0.0) == "PASS"
    rate = {name: count / rounds for name, count in wins.items()}
    assert rate["new > old"] == pytest.approx(0.49, abs=0.04)
    assert rate["naive z 5%"] > 0.07
    assert rate["5%"] == pytest.approx(0.05, abs=0.015)
    assert rate["0.25%"] <= 0.006


@pytest.mark.parametrize("sizes", [[5] * 20, [1] * 60, [1, 1, 2, 2, 3, 4, 6, 9, 14, 22]])
def test_coverage_of_the_interval(sizes):
    rng = np.random.default_rng(4)
    names = np.repeat(np.arange(len(sizes)), sizes)
    hits = 0
    for _ in range(2000):
        values = 0.1 + rng.normal(0, 0.1, len(sizes))[names] + rng.normal(0, 0.15, names.size)
        interval = clustered_mean(values.clip(-1, 1), names, alpha=0.05, support=(-1, 1))
        hits += interval.low <= 0.1 <= interval.high
    assert hits / 2000 == pytest.approx(0.90, abs=0.025)


def test_the_minimum_detectable_effect_is_found_with_the_promised_power():
    rng = np.random.default_rng(5)

    def sample(shift):
        return (shift + rng.normal(0, 0.2, 160)).clip(-1, 1)

    mde = np.mean([clustered_mean(sample(0.0), alpha=0.0025, support=(-1, 1)).mde for _ in range(50)])
    found = 0
    for _ in range(2000):
        gain = clustered_mean(sample(mde), alpha=0.0025, support=(-1, 1))
        found += judge(gain.low, gain.high, 0.0) == "PASS"
    assert found / 2000 == pytest.approx(0.80, abs=0.03)


@pytest.mark.parametrize(
    ("k", "expected"),
    [(1, 0.046875), (2, 0.092262), (4, 0.178667), (8, 0.334677), (16, 0.584869), (32, 0.880952), (64, 1.0)],
)
def test_worked_pass_at_k(k, expected):
    assert pass_at_k(64, 3, k) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        answers = [True] * c + [False] * (n - c)
        subsets = [any(subset) for subset in itertools.combinations(answers, k)]
        assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-15)


def test_pass_at_k_keeps_a_chance_that_floats_would_lose():
    assert pass_at_k(10**6, 1, 1) == 1e-6
    assert 0 < pass_at_k(2000, 1, 1999) < 1 == pass_at_k(2000, 2, 1999)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (0, 0, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match=r"proportion|cannot be told"):
        pass_at_k(n, c, k)
