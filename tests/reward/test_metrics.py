"""The numbers about a reward model against closed forms, brute force, and simulated coverage."""

from __future__ import annotations

from itertools import combinations
from math import comb, log

import numpy as np
import pytest
from scipy import stats

from tasks.evaluation.statistics import clopper_pearson
from tasks.reward.metrics import (
    Answers,
    answers_of,
    best_of_n,
    best_of_table,
    bounded_mean,
    calibration,
    calibration_error,
    concordance,
    drift,
    gamma,
    length_correlation,
    p_above,
    p_below,
    pair_accuracy,
    pair_length_correlation,
    reliability,
    slices,
    spread_within,
)
from tests.reward.report import make_report, make_samples, sure_margins


def answers(score, gold, length=None):
    score = np.asarray(score, dtype=float)
    return Answers("p", score, np.asarray(gold, dtype=float), np.ones_like(score) if length is None else np.asarray(length, dtype=float))  # fmt: skip


# ------------------------------------------------------------------------------------------------- intervals


def test_single_pairs_get_the_exact_interval_and_its_p_values():
    found = pair_accuracy([1.0] * 45 + [-1.0] * 5, [str(k) for k in range(50)], alpha=0.05)
    assert (found.low, found.high) == clopper_pearson(45, 50, alpha=0.05)
    names, values = [str(k) for k in range(50)], [1.0] * 45 + [0.0] * 5
    assert p_above(values, names, 0.8) == pytest.approx(stats.binomtest(45, 50, 0.8, "greater").pvalue)
    assert p_below(values, names, 0.95) == pytest.approx(stats.binomtest(45, 50, 0.95, "less").pvalue)
    assert p_above([0.0] * 3, list("abc"), 0.1) == 1.0


def test_pairs_of_one_prompt_and_ties_are_not_taken_for_independent_coins():
    margins = np.where(np.arange(100) < 80, 1.0, -1.0)
    alone = pair_accuracy(margins, [str(i) for i in range(100)], alpha=0.05)
    together = pair_accuracy(margins, [str(i // 10) for i in range(100)], alpha=0.05)
    assert alone.estimate == together.estimate == 0.8
    assert together.high - together.low > 2 * (alone.high - alone.low)
    assert pair_accuracy([0.0, 0.0], ["a", "b"], alpha=0.05).estimate == 0.5


@pytest.mark.parametrize("truth", [0.55, 0.9, 0.98])
def test_bounds_of_clustered_shares_cover_near_the_ends_where_t_does_not(truth):
    """Four pairs a prompt that hang together, 30 prompts: each bound errs at most 5 %."""
    rng, wrong = np.random.default_rng(7), np.zeros(2)
    names, runs = [str(k // 4) for k in range(120)], 400
    for _ in range(runs):
        skill = rng.beta(truth * 2, (1 - truth) * 2, 30) if truth < 1 else np.ones(30)
        values = (rng.random((30, 4)) < skill[:, None]).ravel()
        found = bounded_mean(values.astype(float), names, alpha=0.05)
        wrong += (found.low > truth, found.high < truth)
    assert (wrong <= stats.binom.ppf(0.999, runs, 0.05)).all()


# ----------------------------------------------------------------------------------------------- calibration


def test_calibration_worked_example():
    # sure at sigmoid(1.0986) = 0.75: right 3 of 4 is perfect, right 1 of 4 is off by one half
    margin = np.log(3)
    assert calibration_error(reliability([margin, margin, margin, -margin])) == pytest.approx(0, abs=1e-9)
    assert calibration_error(reliability([margin, -margin, -margin, -margin])) == pytest.approx(0.5, abs=1e-9)
    assert calibration_error(reliability([0.0, 0.0])) == pytest.approx(0)
    assert sum(bar.n for bar in reliability(np.linspace(-40, 40, 101))) == 101


def calibrated(rng, n):
    """Margins of a model that is exactly as often right as it is sure."""
    size = np.abs(rng.normal(0, 2, n))
    return np.where(rng.random(n) < 1 / (1 + np.exp(-size)), size, -size)


def test_sixty_calibrated_pairs_look_calibrated():
    """Noise alone makes the plain error of 60 pairs 0.09; without its part a third is left, and no bound is above 0.15."""
    rng = np.random.default_rng(0)
    found = [calibration(calibrated(rng, 60), [str(k) for k in range(60)], alpha=0.05) for _ in range(200)]
    assert np.mean([one.plain for one in found]) > 0.07
    assert np.mean([one.estimate for one in found]) < 0.045
    assert np.mean([one.estimate > 0.15 for one in found]) < 0.01
    assert max(one.low for one in found) < 0.15


@pytest.mark.parametrize(("stretch", "each"), [(1.0, 1), (3.0, 1), (0.2, 1), (3.0, 4)])
def test_the_bounds_of_the_calibration_error_cover(stretch, each):
    """Confidences on two values, so that the true binned error is known; clusters of `each` equal outcomes."""
    rng, runs, n, wrong = np.random.default_rng(3), 300, 120, np.zeros(2)
    size = np.repeat([0.6, 1.5], n // 2)
    right = 1 / (1 + np.exp(-size))
    truth = np.abs(1 / (1 + np.exp(-size * stretch)) - right).mean()
    for _ in range(runs):
        draw = np.repeat(rng.random(n // each), each)
        margins = np.where(draw < right, size, -size) * stretch
        found = calibration(margins, [str(k // each) for k in range(n)], alpha=0.05)
        wrong += (found.low > truth + 1e-9, found.high < truth - 1e-9)
        assert found.low <= found.estimate <= found.high
    assert (wrong <= stats.binom.ppf(0.999, runs, 0.05)).all()


# ------------------------------------------------------------------------------------------ ranking, best of n


def test_concordance_worked_example():
    # pairs (good, bad): 3 > 1, 3 > 2, 2 = 2 tie, 2 > 1: three right, one tie of four
    one = answers([3, 2, 1, 2], [1, 1, 0, 0])
    chance, tau = concordance(one)
    assert chance == pytest.approx(3.5 / 4)
    assert tau == pytest.approx(stats.kendalltau(one.score, one.gold).statistic)
    assert concordance(answers([1, 2], [1, 1])) is None
    assert concordance(answers([5, 5], [0, 1])) == (0.5, 0.0)


@pytest.mark.parametrize("ties", [False, True])
def test_best_of_n_is_the_mean_over_all_choices(ties):
    rng = np.random.default_rng(1)
    score = rng.integers(0, 3, 8).astype(float) if ties else rng.normal(size=8)
    gold = rng.random(8)
    numbers, proxy, found, best = best_of_table([answers(score, gold)])
    assert numbers == [1, 2, 4, 8]
    for place, n in enumerate(numbers):
        chosen = [list(c) for c in combinations(range(8), n)]
        top = [gold[c][score[c] == score[c].max()].mean() for c in chosen]
        assert proxy[0, place] == pytest.approx(np.mean([score[c].max() for c in chosen]))
        assert best[0, place] == pytest.approx(np.mean([gold[c].max() for c in chosen]))
        if not ties:
            assert found[0, place] == pytest.approx(np.mean(top))
    # ties are broken by a fair coin among all that tie, whichever are drawn
    assert found[0, 0] == pytest.approx(gold.mean())
    assert found[0, -1] == pytest.approx(gold[score == score.max()].mean())


def test_the_curve_of_a_perfect_and_of_a_useless_model():
    gold = [[1, 0, 0, 0]] * 20
    perfect = best_of_n({"samples": make_samples(gold, gold)})
    assert [point.gold for point in perfect] == [0.25, 0.5, 1.0]
    assert [point.kl for point in perfect] == pytest.approx([0, log(2) - 0.5, log(4) - 0.75])
    assert [point.best for point in perfect] == [point.gold for point in perfect]
    useless = best_of_n({"samples": make_samples([[0, 0, 0, 0]] * 20, gold)})
    assert [point.gold for point in useless] == [0.25] * 3
    prompts = answers_of(make_samples(gold, gold))
    spread = (spread_within(prompts, "score"), spread_within(prompts, "gold"))
    assert gamma(perfect, spread) == pytest.approx(0)
    inverse = best_of_n({"samples": make_samples([[0, 1, 1, 1]] * 20, gold)})
    assert gamma(inverse, spread) > 1
    assert best_of_n({"samples": []}) == []


def test_prompts_with_fewer_answers_are_left_out_of_the_curve():
    numbers, _, gold, _ = best_of_table([answers(range(8), range(8)) for _ in range(5)] + [answers([1], [1])])
    assert numbers[-1] == 8
    assert gold.shape == (5, 4)
    assert comb(64, 32) > 2**53  # the weights of 64 answers come from whole numbers


# ----------------------------------------------------------------------------------------------- length, drift


def test_length_within_equally_good_answers():
    rng = np.random.default_rng(2)
    biased, honest = [], []
    for _ in range(40):
        gold, length = rng.integers(0, 2, 16), rng.integers(5, 500, 16)
        biased.append(answers(gold + np.log1p(length), gold, length))
        # right answers are longer here, which is no bias of the score
        honest.append(answers(gold + rng.normal(0, 0.3, 16), gold, length + 400 * gold))
    r, low, _, count = length_correlation(biased, alpha=0.05)
    assert (r, count) == (pytest.approx(1), 40)
    assert low > 0.99
    r, low, high, _ = length_correlation(honest, alpha=0.05)
    assert low < 0 < high
    assert abs(r) < 0.15
    assert length_correlation([answers([1, 2], [0, 0])], alpha=0.05) is None


def test_length_over_pairs_is_the_plain_correlation_where_every_pair_is_alone():
    rng = np.random.default_rng(8)
    longer = rng.normal(size=60)
    margins = 0.5 * longer + rng.normal(1, 1, 60)
    r, low, high, count = pair_length_correlation(margins, longer, [str(k) for k in range(60)], alpha=0.05)
    assert (r, count) == (pytest.approx(np.corrcoef(margins, longer)[0, 1]), 60)
    fisher = stats.norm.ppf(0.95) / np.sqrt(57)
    assert np.arctanh([low, high]) == pytest.approx(np.arctanh(r) + np.array([-fisher, fisher]), abs=0.08)
    assert pair_length_correlation([1.0] * 9, longer[:9], ["a"] * 9, alpha=0.05) is None


def test_the_interval_of_the_length_correlation_covers():
    rng, runs, wrong, rho = np.random.default_rng(5), 300, np.zeros(2), 0.5
    for _ in range(runs):
        prompts = []
        for _ in range(25):
            x = rng.normal(size=8)
            y = rho * x + np.sqrt(1 - rho**2) * rng.normal(size=8)
            prompts.append(answers(y, np.zeros(8), np.expm1(5 + x)))
        _, low, high, _ = length_correlation(prompts, alpha=0.05)
        wrong += (low > rho, high < rho)
    assert (wrong <= stats.binom.ppf(0.999, runs, 0.055)).all()


def test_drift_is_the_kolmogorov_smirnov_distance_with_an_honest_p_value():
    rng = np.random.default_rng(4)
    now = [(f"p{k // 4}", x) for k, x in enumerate(rng.normal(0, 1, 80))]
    then = [(str(k), x) for k, x in enumerate(rng.normal(1, 1, 101))]
    distance, p = drift(now, then)
    expected = stats.ks_2samp([x for _, x in now], [x for _, x in then])
    assert distance == pytest.approx(expected.statistic)
    assert p < 0.01
    same = [drift([(str(k), x) for k, x in enumerate(rng.normal(size=40))], [(str(k), x) for k, x in enumerate(rng.normal(size=40))])[1] for _ in range(60)]  # fmt: skip
    assert np.mean(np.array(same) < 0.1) < 0.25
    assert drift([("a", 1.0)] * 5, [("b", 1.0)] * 7) == (0.0, 1.0)


# ------------------------------------------------------------------------------------------------ for the page


def test_slices_of_a_report():
    report = make_report(sure_margins(0.9, 20) + sure_margins(0.5, 10))
    for place, pair in enumerate(report["preferences"]):
        pair["slice"] = "sums" if place < 20 else "tools"
    found = slices(report)
    assert [(part.name, part.n, part.estimate) for part in found] == [("sums", 20, 0.9), ("tools", 10, 0.5)]
    assert found[0].low < 0.9 < found[0].high
