"""Means with honest error bars: cluster-robust, small-sample, and never sure by accident.

Every interval here is two-sided and made of two one-sided bounds of error `alpha` each, so its confidence is
1 - 2 alpha. A claim "the mean is above m" is accepted when the lower bound is above m, and is then wrong with
probability `alpha`: for a promotion gate that is the false promotion rate of one cycle.

Sources: Miller, "Adding Error Bars to Evals" (arXiv 2411.00640) for paired, clustered comparison; Bell and
McCaffrey (2002) for CR2 and its degrees of freedom; McNemar (1947); Wilson (1927); Clopper and Pearson
(1934); Holm (1979); Chen et al. (2021) for pass@k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    Attributes:
        estimate, low, high: the mean and its bounds, in the units of the values, within `support`.
        standard_error: CR2 cluster-robust; 0.0 where the clusters show no variation.
        n, clusters: how many values, in how many independent clusters.
        df: Bell-McCaffrey degrees of freedom; 0.0 where the interval comes from the support alone.
        alpha: one-sided error of each bound.
        power, mde: the smallest true difference from a margin that would be found with probability `power`.
        support: the least and greatest value possible.
    """

    estimate: float
    low: float
    high: float
    standard_error: float
    n: int
    clusters: int
    df: float
    alpha: float
    power: float
    mde: float
    support: tuple[float, float]

    def p_above(self, margin: float) -> float:
        """Return the one-sided p-value against "the mean is at most `margin`"."""
        if self.df > 0:
            return float(special.stdtr(self.df, (margin - self.estimate) / self.standard_error))
        return _markov(self.estimate, margin, self.support[0], self.clusters)

    def p_below(self, margin: float) -> float:
        """Return the one-sided p-value against "the mean is at least `margin`"."""
        if self.df > 0:
            return float(special.stdtr(self.df, (self.estimate - margin) / self.standard_error))
        return _markov(-self.estimate, -margin, -self.support[1], self.clusters)


def clustered_mean(
    values: ArrayLike,
    clusters: Sequence[str] | None = None,
    *,
    alpha: float,
    support: tuple[float, float],
    power: float = 0.8,
) -> Estimate:
    """Estimate a mean from values that are independent between clusters only.

    The standard error is CR2 (for an intercept: each cluster's residual sum, divided by 1 - its share of the
    values), the quantile Student's t with Bell-McCaffrey degrees of freedom; with clusters of one this is the
    ordinary t interval. Where the clusters do not vary (all alike, or only one) the sample says nothing about
    variance, and the interval follows from `support` alone: if the mean were m, G independent clusters would
    all reach c with probability at most ((m - lowest) / (c - lowest))^G by Markov's inequality. For all-right
    answers this is the Clopper-Pearson bound alpha^(1/G).

    Args:
        values: [n] numbers within `support`.
        clusters: [n] names; None makes each value its own cluster.
        alpha: one-sided error, in (0, 0.5).

    Raises:
        ValueError: no values, a value outside the support or not finite, or lengths that differ.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError("a mean needs at least one value, in one dimension")
    low, high = support
    if not (np.isfinite(x).all() and (x >= low).all() and (x <= high).all()):
        raise ValueError(f"values must be finite and within [{low}, {high}]")
    if not 0 < alpha < 0.5:
        raise ValueError("alpha is a one-sided error in (0, 0.5)")
    names = np.arange(x.size) if clusters is None else np.asarray(clusters)
    if names.shape != x.shape:
        raise ValueError("values and clusters differ in length")
    _, member = np.unique(names, return_inverse=True)
    size = np.bincount(member).astype(np.float64)
    count = size.size
    mean = float(x.mean())
    residual = np.bincount(member, weights=x - mean)
    error = 0.0
    if count > 1:
        share = size / x.size
        error = float(np.sqrt((residual**2 / (1 - share)).sum()) / x.size)
    if error > 1e-12 * (high - low):
        df = _bell_mccaffrey(share)
        reach = float(special.stdtrit(df, 1 - alpha)) * error
        bounds = (max(low, mean - reach), min(high, mean + reach))
        mde = reach + float(special.stdtrit(df, power)) * error
    else:
        error, df = 0.0, 0.0
        shrink = alpha ** (1 / count)
        bounds = (low + (mean - low) * shrink, high - (high - mean) * shrink)
        mde = max(mean - bounds[0], bounds[1] - mean)
    return Estimate(mean, *bounds, error, int(x.size), int(count), df, alpha, power, mde, support)


def paired_difference(
    candidate: ArrayLike,
    champion: ArrayLike,
    clusters: Sequence[str] | None = None,
    *,
    alpha: float,
    power: float = 0.8,
) -> Estimate:
    """Estimate mean(candidate - champion) from rewards in [0, 1] on the same tasks, [n] each, in one order.

    Raises:
        ValueError: as `clustered_mean`, or rewards outside [0, 1].
    """
    a, b = (np.asarray(side, dtype=np.float64) for side in (candidate, champion))
    if a.shape != b.shape:
        raise ValueError("candidate and champion differ in length")
    if not all(((side >= 0) & (side <= 1)).all() for side in (a, b)):
        raise ValueError("rewards must be within [0, 1]")
    return clustered_mean(a - b, clusters, alpha=alpha, support=(-1.0, 1.0), power=power)


def judge(low: float, high: float, margin: float) -> Verdict:
    """Return PASS where the whole interval is above `margin`, FAIL where it is below, else INCONCLUSIVE."""
    if low > margin:
        return "PASS"
    return "FAIL" if high < margin else "INCONCLUSIVE"


def mcnemar(candidate: ArrayLike, champion: ArrayLike, noise: ArrayLike = 0.0) -> float:
    """Return the exact one-sided McNemar p-value against "the candidate is no better".

    Under that hypothesis each task on which the two differ is won with probability at most 1/2. That is so for rewards
    of 0 and 1. Graded rewards are made so by rounding the difference d at random to its sign with probability |d| and
    to 0 otherwise, which keeps its mean.

    Args:
        candidate, champion: [n] rewards within [0, 1].
        noise: [n] uniform on [0, 1), fixed without a look at the rewards; a difference counts where |d| exceeds it.
            Without it every difference counts, as is right for rewards of 0 and 1.
    """
    difference = np.asarray(candidate, dtype=np.float64) - np.asarray(champion, dtype=np.float64)
    counted = np.abs(difference) > np.asarray(noise, dtype=np.float64)
    wins, losses = int((counted & (difference > 0)).sum()), int((counted & (difference < 0)).sum())
    return float(special.betainc(wins, losses + 1, 0.5)) if wins else 1.0


def wilson(successes: int, n: int, *, alpha: float) -> tuple[float, float]:
    """Return Wilson's score interval for a proportion; good on average, also near 0 and 1."""
    _check_counts(successes, n)
    z = float(special.ndtri(1 - alpha))
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
    return max(0.0, centre - half), min(1.0, centre + half)


def clopper_pearson(successes: int, n: int, *, alpha: float) -> tuple[float, float]:
    """Return the exact interval for a proportion; never below its confidence (0 of n: about 3/n at 5 %)."""
    _check_counts(successes, n)
    low = 0.0 if successes == 0 else float(special.betaincinv(successes, n - successes + 1, alpha))
    high = 1.0 if successes == n else float(special.betaincinv(successes + 1, n - successes, 1 - alpha))
    return low, high


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate of the chance that at least one of k answers is right: 1 - C(n-c, k) / C(n, k).

    From n answers of which c were right (Chen et al., arXiv 2107.03374, section 2.1), in whole numbers until the
    end, so that it is exact for any n.

    Raises:
        ValueError: not 0 <= c <= n, or not 1 <= k <= n.
    """
    _check_counts(c, n)
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} cannot be told from {n} answers")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values in the given order: rejecting those <= alpha errs alpha in all."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted


def _bell_mccaffrey(share: np.ndarray) -> float:
    """Degrees of freedom of the CR2 variance of a mean under equal variances; G - 1 for G equal clusters."""
    ratio = share**2 / (1 - share)
    return float(1 / ((share**2).sum() + ratio.sum() ** 2 - (ratio**2).sum()))


def _markov(value: float, margin: float, lowest: float, count: int) -> float:
    if value <= margin:
        return 1.0
    return float(((margin - lowest) / (value - lowest)) ** count) if margin > lowest else 0.0


def _check_counts(successes: int, n: int) -> None:
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n} is no proportion")
