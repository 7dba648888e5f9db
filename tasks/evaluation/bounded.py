"""A mean of bounded values that covers near the ends of its support too, where Student's t does not.

Gaffke's bound: give the n clusters and one more, the worst that the support allows, random weights from the flat
Dirichlet distribution; the weighted mean is below the true mean except with probability alpha at its alpha quantile. It
is the Bayesian bootstrap with a pessimist in the sample. For right and wrong answers it *is* the exact bound of Clopper
and Pearson, for finely graded ones it comes close to Student's t. No law is assumed. That it covers for every law on the
support is proved for two values and a conjecture in general to which nobody knows an exception; `benchmarks/gate_errors.py`
looks for one. Bets (`tasks.evaluation.sequential`) are proved and allow any number of looks, and are far wider.

Weights E_i / sum(E) with exponential E_i make the bound's error at a margin m a probability of a sum:
P(sum E_i z_i <= 0) with z_i = sum of the cluster - m * its size. It is computed and not simulated, by the inversion
integral through the saddle point, so that the same values give the same digits.

Sources: Gaffke (2005), "Three test statistics for a nonparametric one-sided hypothesis on the mean of a nonnegative
variable"; Learned-Miller and Thomas (arXiv 1905.06208), "A new confidence interval for the mean of a bounded random
variable"; Rice (1980) for the integral.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from tasks.evaluation.sequential import Stream, cluster_stream
from tasks.evaluation.statistics import Estimate, clustered_mean

Floats = NDArray[np.float64]

_STEPS = 50  # of bisection: 2^-50 of the support
_STEP = 0.025  # of t in y = width * sinh(t): there the midpoint rule is exact to rounding
_FARTHEST = 40  # of t, where even a single term has fallen to nothing


def bounded_p(stream: Stream, margin: float) -> float:
    """Return the one-sided p-value against "the mean is at most `margin`".

    The order of the clusters does not matter. For the other side give the mirrored stream and margin.
    """
    low = stream.support[0]
    if margin < low:
        return 0.0
    z = np.append(stream.sums - margin * stream.shares, low - margin)
    return _below_zero(z)


def bounded_mean(
    values: ArrayLike,
    clusters: Sequence[str] | None = None,
    *,
    alpha: float,
    support: tuple[float, float],
    power: float = 0.8,
) -> Estimate:
    """Estimate a mean like `clustered_mean`, with bounds that do not rest on a normal law.

    Raises:
        ValueError: as `clustered_mean`.
    """
    plain = clustered_mean(values, clusters, alpha=alpha, support=support, power=power)
    stream = cluster_stream(values, clusters, support=support)
    low, high = _bound(stream, alpha, plain.estimate), -_bound(stream.mirrored(), alpha, -plain.estimate)
    mde = plain.estimate - low
    if plain.df > 0:
        mde += float(special.stdtrit(plain.df, power)) * plain.standard_error
    return replace(plain, low=low, high=high, mde=mde)


def _bound(stream: Stream, alpha: float, estimate: float) -> float:
    """The greatest margin that the p-value rejects at `alpha`; the least value possible if there is none."""
    below, above = stream.support[0], estimate
    for _ in range(_STEPS):
        middle = (below + above) / 2
        below, above = (middle, above) if bounded_p(stream, middle) <= alpha else (below, middle)
    return below


def _below_zero(z: Floats) -> float:
    """P(sum E_i z_i <= 0) for independent exponential E_i."""
    weight, count = np.unique(z[z != 0], return_counts=True)
    if not weight.size or weight[-1] < 0:
        return 1.0
    if weight[0] > 0:
        return 0.0
    if (count * weight).sum() < 0:  # the mean is on the wrong side: the other tail is the small one
        return 1 - _below_zero(-z)
    # log E exp(s sum) is -sum(count log(1 - s weight)); its least value on the negative axis is the saddle point.
    left = 1 / weight[0]
    below, above = left, 0.0
    for _ in range(60):
        middle = (below + above) / 2
        slope = (count * weight / (1 - middle * weight)).sum()
        below, above = (middle, above) if slope < 0 else (below, middle)
    width = 1 / np.sqrt((count * (weight / (1 - above * weight)) ** 2).sum())
    # Off the pole at 0, where a saddle may lie: any line between the poles gives the same integral.
    place = max(min(above, -0.3 * width), 0.9 * left)
    t = _nodes(width * weight / (1 - place * weight), count)
    s = place + 1j * width * np.sinh(t)
    log = -(count[:, None] * np.log(1 - s[None, :] * weight[:, None])).sum(axis=0)
    terms = (np.exp(log) / s).real * width * np.cosh(t)
    return float(min(max(-terms.sum() * _STEP / np.pi, 0.0), 1.0))


def _nodes(scale: Floats, count: NDArray[np.int64]) -> Floats:
    """The midpoints up to where prod (1 + (scale sinh t)^2)^(-count / 2), the size of the integrand, is below 1e-18."""
    t = np.arange(1, _FARTHEST + 1)
    size = t - (count[:, None] * np.log1p((scale[:, None] * np.sinh(t)) ** 2)).sum(axis=0) / 2
    end = t[size < -42][0] if (size < -42).any() else _FARTHEST
    return np.arange(0.5, end / _STEP) * _STEP
