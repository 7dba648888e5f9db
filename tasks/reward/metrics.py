"""How good a reward model is at telling a right answer from a wrong one: pair accuracy and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from tasks.evaluation.statistics import Estimate, Verdict, clustered_mean, judge

BINS = 5  # with a hundred pairs more bins measure noise


@dataclass(frozen=True)
class Bin:
    """One bar of a reliability diagram: mean confidence and share right of the `n` pairs in (low, high]."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


def pair_accuracy(margins: ArrayLike, groups: Sequence[str], *, alpha: float) -> Estimate:
    """Estimate how often the right answer scores higher; pairs of one group (one prompt) are one cluster.

    Args:
        margins: [n] score of the right answer less that of the wrong one, in nats; a tie counts one half.
        groups: [n] names.
    """
    right = (np.sign(np.asarray(margins, dtype=np.float64)) + 1) / 2
    return clustered_mean(right, groups, alpha=alpha, support=(0.0, 1.0))


def reliability(margins: ArrayLike, bins: int = BINS) -> list[Bin]:
    """Return the reliability diagram of the probabilities sigmoid(|margin|) in [0.5, 1], without empty bins.

    A Bradley-Terry model says "this one is better" with a confidence in [0.5, 1] and is right where the
    margin is positive.
    """
    margin = np.asarray(margins, dtype=np.float64)
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    right = (np.sign(margin) + 1) / 2
    edges = np.linspace(0.5, 1.0, bins + 1)
    place = np.clip(np.ceil((confidence - 0.5) * 2 * bins).astype(int) - 1, 0, bins - 1)
    return [
        Bin(
            float(edges[b]),
            float(edges[b + 1]),
            int((place == b).sum()),
            float(confidence[place == b].mean()),
            float(right[place == b].mean()),
        )
        for b in range(bins)
        if (place == b).any()
    ]


def calibration_error(bars: Sequence[Bin]) -> float:
    """Return the expected calibration error: the mean gap of confidence and accuracy, weighted by pairs."""
    return sum(bar.n * abs(bar.confidence - bar.accuracy) for bar in bars) / sum(bar.n for bar in bars)


def judge_reward(accuracy: Estimate, ece: float, *, min_accuracy: float, max_ece: float) -> Verdict:
    """Return the verdict: accuracy surely above its floor, and calibration error within its ceiling."""
    if ece > max_ece:
        return "FAIL"
    return judge(accuracy.low, accuracy.high, min_accuracy)
