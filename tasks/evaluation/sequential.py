"""Means that may be looked at any time: e-processes by betting, and confidence sequences.

A gambler who starts with 1 and bets against "the mean is at most m" has on average no more than 1 as long as that
is true, whenever he stops; by Ville's inequality he ever reaches 1 / alpha with probability at most alpha. So one
may look after every answer and stop at the first look that convinces. An interval made for a fixed number of
answers (`tasks.evaluation.statistics`) is shorter, and wrong far more often when looked at repeatedly.

What is assumed: clusters are independent draws of (size, sum of values), values lie within the support, and the mean
is that over values, E[sum] / E[size]. Within a cluster anything may depend on anything. The units are therefore
clusters, however many values they have: bets are made on a cluster's sum less m times its size, divided by the size
of the largest cluster, which has to be known before the first value is seen. Nothing else is assumed, in particular
no normal distribution; that is also why few clusters prove little: G clusters of the best values possible multiply
the wealth against the middle of the support by less than 2^G.

Every bound has one-sided error `alpha`, over all times together.

Sources: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting" (arXiv 2010.09686):
capital process (18), mixtures of constant bets (section 5.7 "diversified" bets), empirical Bernstein (theorem 2);
Cover and Ordentlich (1996) and Orabona and Jun (arXiv 2110.14099) for the arcsine mixture; Ville (1939);
Fan, Grama and Liu (2015) for the inequality behind the empirical Bernstein bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from tasks.evaluation.statistics import Estimate, clustered_mean

Floats = NDArray[np.float64]

_NODES = 64
FRACTIONS: Floats = np.sin(np.pi * (2 * np.arange(1, _NODES + 1) - 1) / (4 * _NODES)) ** 2
"""The fractions of the wealth that are bet: Chebyshev nodes of the arcsine distribution on (0, 1)."""

_TRUNCATION = 0.5  # of the empirical Bernstein bets, as in the paper
_STEPS = 50  # of bisection: 2^-50 of the support


@dataclass(frozen=True)
class Stream:
    """Clusters in the order in which they were seen.

    Attributes:
        sums: [n] sum of each cluster's values, divided by the size of the largest cluster.
        shares: [n] size of each cluster, divided likewise; within (0, 1].
        support: the least and greatest value possible.
    """

    sums: Floats
    shares: Floats
    support: tuple[float, float]

    def mirrored(self) -> Stream:
        """Return the stream of the negated values."""
        low, high = self.support
        return Stream(-self.sums, self.shares, (-high, -low))


@dataclass(frozen=True)
class ConfidenceSequence:
    """A confidence sequence: at every time the mean is within [low, high], each bound erring `alpha` in all.

    `low` and `high` are [n], after each cluster; bounds only ever tighten.
    """

    low: Floats
    high: Floats
    alpha: float


def cluster_stream(
    values: ArrayLike,
    clusters: Sequence[str] | None = None,
    *,
    support: tuple[float, float],
    largest: int | None = None,
) -> Stream:
    """Gather values into clusters, in the order of their first values.

    Args:
        values: [n] numbers within `support`.
        clusters: [n] names; None makes each value its own cluster.
        largest: the size of the largest cluster that the design allows; by default that of those given, which is
            right where all tasks were chosen before the first answer.

    Raises:
        ValueError: a value is outside the support or not finite, lengths differ, or a cluster exceeds `largest`.
    """
    x = np.asarray(values, dtype=np.float64)
    low, high = support
    if x.ndim != 1 or not (np.isfinite(x).all() and (x >= low).all() and (x <= high).all()):
        raise ValueError(f"values must be finite, in one dimension and within [{low}, {high}]")
    if clusters is None:
        return Stream(x / (largest or 1), np.full(x.size, 1 / (largest or 1)), support)
    if len(clusters) != x.size:
        raise ValueError("values and clusters differ in length")
    order: dict[str, int] = {}
    member = np.array([order.setdefault(name, len(order)) for name in clusters], dtype=np.intp)
    size = np.bincount(member, minlength=len(order)).astype(np.float64)
    top = float(largest or (size.max() if size.size else 1))
    if size.size and size.max() > top:
        raise ValueError(f"a cluster has {size.max():.0f} values, more than {top:.0f}")
    sums = np.bincount(member, weights=x, minlength=len(order))
    return Stream(sums / top, size / top, support)


def wealth(stream: Stream, margin: float) -> Floats:
    """Return the e-process against "the mean is at most `margin`": the wealth after each cluster, [n].

    With r = (sum - lowest * size) / (margin - lowest), the bet of the fraction t multiplies the wealth by
    1 + t (r - size), whose mean is at most 1. The wealth is the average over t from the arcsine distribution, taken
    at 64 Chebyshev nodes: exact up to 127 clusters, and valid for any number. Constant
    bets need no guess about the variance, and the final wealth does not depend on the order of the clusters.
    """
    low = stream.support[0]
    excess = stream.sums - low * stream.shares
    if margin <= low:
        return np.where(np.cumsum(excess) > 0, np.inf, 1.0)
    gain = excess / (margin - low) - stream.shares
    logs = np.cumsum(np.log1p(FRACTIONS[:, None] * gain[None, :]), axis=1)
    top = logs.max(axis=0)
    with np.errstate(over="ignore"):  # beyond all floats the wealth is infinite, which is what it says
        return np.exp(top) * np.exp(logs - top).mean(axis=0)


def final_p(stream: Stream, margin: float) -> float:
    """Return the p-value against "the mean is at most `margin`" of the wealth after the last cluster, whenever it came."""
    if margin <= stream.support[0]:
        return 0.0 if margin < stream.support[0] else float((stream.sums <= margin * stream.shares).all())
    logs = _log_wealth(stream, margin)
    return float(min(1.0, np.exp(-logs)))


def anytime_p(capital: ArrayLike) -> Floats:
    """Return the p-value after each cluster, [n]: one over the greatest wealth so far; valid at any stopping time."""
    best = np.maximum.accumulate(np.maximum(np.asarray(capital, dtype=np.float64), 1.0))
    return 1 / best


def betting_sequence(stream: Stream, *, alpha: float) -> ConfidenceSequence:
    """Return the confidence sequence of all means that the betting e-process does not reject.

    The wealth falls with the margin, so that each bound is found by bisection.
    """
    _check_alpha(alpha)
    high = -_betting_lows(stream.mirrored(), alpha)
    return ConfidenceSequence(_betting_lows(stream, alpha), high, alpha)


def betting_mean(
    values: ArrayLike,
    clusters: Sequence[str] | None = None,
    *,
    alpha: float,
    support: tuple[float, float],
    power: float = 0.8,
    largest: int | None = None,
) -> Estimate:
    """Estimate a mean like `clustered_mean`, with the bounds of the e-process after the last cluster.

    No law is assumed, so that rare great losses cannot hide; the price is a wider interval. The bets are constant, so
    the bounds do not depend on the order, and hold as well for tasks drawn by strata of fixed sizes: the product of
    1 + t (mean of its stratum - m) over all tasks is at most that with the mean over all tasks, by concavity of log.
    They hold whenever one stops, if `largest` is the size of the largest cluster that might have come.

    Raises:
        ValueError: as `clustered_mean`.
    """
    plain = clustered_mean(values, clusters, alpha=alpha, support=support, power=power)
    stream = cluster_stream(values, clusters, support=support, largest=largest)
    goal = np.log(1 / alpha)
    low, high = _bound(stream, goal, support[0]), -_bound(stream.mirrored(), goal, -support[1])
    mde = plain.estimate - low
    if plain.df > 0:
        mde += float(special.stdtrit(plain.df, power)) * plain.standard_error
    return replace(plain, low=low, high=high, mde=mde)


def empirical_bernstein(stream: Stream, *, alpha: float) -> ConfidenceSequence:
    """Return the predictable plug-in empirical Bernstein confidence sequence; closed form, wider than by betting.

    Theorem 2 of the paper with one-sided bounds, for z = sum - m * size scaled to a range of 1. With clusters
    of one size the bound is sum(lambda x) / sum(lambda) -+ (log(1 / alpha) + sum(v psi(lambda))) / sum(lambda);
    else m enters the variance too, and the bound is the root of a quadratic.
    """
    _check_alpha(alpha)
    high = -_bernstein_lows(stream.mirrored(), alpha)
    return ConfidenceSequence(_bernstein_lows(stream, alpha), high, alpha)


def _betting_lows(stream: Stream, alpha: float) -> Floats:
    goal, bound = np.log(1 / alpha), stream.support[0]
    bounds = np.empty(stream.sums.size)
    for t in range(1, bounds.size + 1):
        seen = Stream(stream.sums[:t], stream.shares[:t], stream.support)
        bounds[t - 1] = bound = _bound(seen, goal, bound)
    return bounds


def _bound(stream: Stream, goal: float, bound: float) -> float:
    """The greatest margin from `bound` on against which the final log wealth reaches `goal`; `bound` if none."""
    low, high = stream.support
    excess = stream.sums - low * stream.shares

    def rejected(margin: float) -> bool:
        if margin <= low:
            return bool(excess.sum() > 0)
        return _log_wealth(stream, margin) >= goal

    if not rejected(bound):
        return bound
    below, above = bound, high
    for _ in range(_STEPS):
        middle = (below + above) / 2
        below, above = (middle, above) if rejected(middle) else (below, middle)
    return below


def _log_wealth(stream: Stream, margin: float) -> float:
    """The log of the wealth after the last cluster, for a margin above the least value possible."""
    low = stream.support[0]
    gain = (stream.sums - low * stream.shares) / (margin - low) - stream.shares
    logs = np.log1p(np.outer(FRACTIONS, gain)).sum(axis=1)
    top = logs.max()
    return float(top + np.log(np.exp(logs - top).mean()))


def _bernstein_lows(stream: Stream, alpha: float) -> Floats:
    low, high = stream.support
    width, goal = high - low, np.log(1 / alpha)
    y, s = (stream.sums - low * stream.shares) / width, stream.shares
    t = np.arange(1, y.size + 1)
    # Estimates from the past alone, with one full cluster at the middle of the support before the first.
    mean_y = (0.5 + np.cumsum(y) - y) / t
    mean_s = (1.0 + np.cumsum(s) - s) / t
    spread = (y - mean_y) ** 2
    variance = (0.25 + np.cumsum(spread) - spread) / t
    bets = np.minimum(np.sqrt(2 * goal / (variance * t * np.log1p(t))), _TRUNCATION)
    psi = -np.log1p(-bets) - bets
    # m is rejected where sum(bets (y - m s)) - sum(psi (dy - m ds)^2) >= goal, that is a m^2 + b m + c <= 0.
    dy, ds = y - mean_y, s - mean_s
    a = np.cumsum(psi * ds**2)
    b = np.cumsum(bets * s - 2 * psi * dy * ds)
    c = goal - np.cumsum(bets * y - psi * dy**2)
    return low + width * np.maximum.accumulate(_end_of_rejection(a, b, c))


def _end_of_rejection(a: Floats, b: Floats, c: Floats) -> Floats:
    """Where a m^2 + b m + c <= 0 ends on [0, 1], for a >= 0, if it holds from 0 on; else 0.

    Written as -2 c / (b + root), which is the root of the linear equation where a is 0.
    """
    below = b + np.sqrt(np.maximum(b**2 - 4 * a * c, 0.0))
    root = np.divide(-2 * c, below, out=np.ones(a.size), where=below > 1e-300)
    return np.where(c > 0, 0.0, np.minimum(root, 1.0))


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < 0.5:
        raise ValueError("alpha is a one-sided error in (0, 0.5)")
