"""How well a score tells right answers from wrong ones.

Within a question the area under the ROC curve (AUROC) asks what a choice among samples needs: does a right answer
score higher than a wrong one to the same question? A correlation over all samples also counts that easy questions
have other scores than hard ones. The paper of the deep-thinking ratio (arXiv 2602.13517v1, section 3) averages in
five bins first, which makes a correlation larger whatever the score is, so both are here.

Sources: Mann and Whitney (1947) for the AUROC as a chance; Efron (1979) for the bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]
_SEED = 20260213  # the same values give the same interval


@dataclass(frozen=True)
class Interval:
    """A mean over `n` questions and its percentile bounds, each with error `alpha`."""

    estimate: float
    low: float
    high: float
    n: int
    alpha: float


def auroc(scores: ArrayLike, right: ArrayLike) -> float | None:
    """Chance that a right answer scores higher than a wrong one, a tie counting one half; None without both kinds.

    Args:
        scores: [n] numbers.
        right: [n] bool.

    Raises:
        ValueError: lengths that differ, or a score that is not a number.
    """
    x, y = _pairs(scores, right)
    hits, misses = int(y.sum()), int((1 - y).sum())
    if not hits or not misses:
        return None
    ranks = stats.rankdata(x)
    return float((ranks[y > 0].sum() - hits * (hits + 1) / 2) / (hits * misses))


def auroc_within(
    questions: Sequence[tuple[ArrayLike, ArrayLike]], *, alpha: float, draws: int = 2000
) -> Interval | None:
    """Mean AUROC over the questions that have both right and wrong answers; None if there is no such question.

    Args:
        questions: scores and rights of each question's answers, see `auroc`.
        alpha: error of each bound.
        draws: of the bootstrap over questions.

    Raises:
        ValueError: as `auroc`.
    """
    found = [auroc(scores, right) for scores, right in questions]
    told = [area for area in found if area is not None]
    return bootstrap_mean(told, alpha=alpha, draws=draws) if told else None


def bootstrap_mean(values: ArrayLike, *, alpha: float, draws: int = 2000) -> Interval:
    """Mean of one value a question, with percentile bounds from questions drawn with replacement.

    With few questions the bounds are too narrow; `tasks.evaluation.statistics` has those to decide by.

    Raises:
        ValueError: no values, or alpha outside (0, 0.5).
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not x.size:
        raise ValueError("a mean needs at least one value, in one dimension")
    if not 0 < alpha < 0.5:
        raise ValueError("alpha is a one-sided error in (0, 0.5)")
    places = np.random.default_rng(_SEED).integers(x.size, size=(draws, x.size))
    low, high = np.quantile(x[places].mean(1), [alpha, 1 - alpha])
    return Interval(float(x.mean()), float(low), float(high), int(x.size), alpha)


def point_biserial(scores: ArrayLike, right: ArrayLike) -> float | None:
    """Pearson correlation of scores with right (1) and wrong (0); None where either does not vary.

    Raises:
        ValueError: lengths that differ, or a score that is not a number.
    """
    return _pearson(*_pairs(scores, right))


def binned_correlation(scores: ArrayLike, right: ArrayLike, bins: int = 5) -> float | None:
    """Pearson correlation of the mean score of quantile bins with their share right; None where either does not vary.

    Answers are sorted by score and cut into `bins` parts of sizes that differ by one at most. Answers that tie count as
    their mean, so that it does not matter in which order they came; the paper does not say what it does with them.
    Larger than `point_biserial` of the same numbers as a rule: the mean over a bin takes noise away.

    Raises:
        ValueError: lengths that differ, a score that is not a number, or fewer answers than bins.
    """
    x, y = _pairs(scores, right)
    if len(x) < bins:
        raise ValueError(f"{len(x)} answers do not fill {bins} bins")
    _, member = np.unique(x, return_inverse=True)
    y = (np.bincount(member, weights=y) / np.bincount(member))[member]
    parts = np.array_split(np.argsort(x, kind="stable"), bins)
    return _pearson(
        np.array([x[part].mean() for part in parts]), np.array([y[part].mean() for part in parts])
    )


def _pairs(scores: ArrayLike, right: ArrayLike) -> tuple[Floats, Floats]:
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(right, dtype=bool).astype(np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError("scores and rights differ in length")
    if np.isnan(x).any():
        raise ValueError("a score is not a number")
    return x, y


def _pearson(x: Floats, y: Floats) -> float | None:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])
