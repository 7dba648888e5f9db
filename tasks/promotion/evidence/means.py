"""Means of bounded values over answers, by bounds that hold for the way the answers came."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tasks.evaluation.bounded import bounded_mean, bounded_p
from tasks.evaluation.paired import PairedOutcomes
from tasks.evaluation.sequential import Stream, betting_mean, cluster_stream, final_p
from tasks.evaluation.statistics import Estimate

DIFFERENCE = (-1.0, 1.0)  # support of the difference of two rewards


def mean_of(
    outcomes: PairedOutcomes,
    values: ArrayLike,
    clusters: Sequence[str],
    *,
    alpha: float,
    support: tuple[float, float],
    power: float = 0.8,
    env: str | None = None,
) -> Estimate:
    """Estimate a mean over answers of `outcomes`: by Gaffke's bound, or by betting where the evaluation was watched."""
    if outcomes.plan is None:
        return bounded_mean(values, clusters, alpha=alpha, support=support, power=power)
    largest = outcomes.largest(env)
    return betting_mean(values, clusters, alpha=alpha, support=support, power=power, largest=largest)


def differences(
    outcomes: PairedOutcomes, env: str | None = None
) -> tuple[NDArray[np.float64], Sequence[str]]:
    """Return candidate less champion [n] and the clusters [n], of one environment or all."""
    candidate, champion, clusters = outcomes.rewards(env)
    return candidate - champion, clusters


def stream_of(outcomes: PairedOutcomes, env: str | None = None) -> Stream:
    """Return the differences as a stream of clusters, shares as planned."""
    values, clusters = differences(outcomes, env)
    return cluster_stream(values, clusters, support=DIFFERENCE, largest=outcomes.largest(env))


def p_above(outcomes: PairedOutcomes, stream: Stream, margin: float) -> float:
    """Return the one-sided p-value against "the mean is at most `margin`" by the test that `mean_of` inverts."""
    return (bounded_p if outcomes.plan is None else final_p)(stream, margin)
