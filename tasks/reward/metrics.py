"""Numbers about a reward model: accuracy, calibration, ranking, best of n, drift; pure functions of plain data.

Every interval has one-sided error `alpha` on each side. Shares of independent prompts get the exact interval; means
of several values a prompt get bounds by betting, which assume nothing but independent prompts. Student's t
is not used: near 0 and 1, where good reward models live, it covers too rarely (docs/measurements.md).

Sources: Clopper and Pearson (1934); Waudby-Smith and Ramdas (arXiv 2010.09686); Guo et al. (arXiv 1706.04599) for
the calibration error, Kumar et al. (arXiv 1909.10155) for its bias; Kendall (1945); Nakano et al. (arXiv 2112.09332,
appendix I) for best of n from N answers; Gao et al. (arXiv 2210.10760) for over-optimisation against KL;
Kim et al. (arXiv 2505.12763) for gamma; Fisher (1921) and Efron (1981) for the correlation's interval.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from tasks.evaluation.sequential import betting_mean, cluster_stream, wealth
from tasks.evaluation.statistics import Estimate, clopper_pearson, clustered_mean

Floats = NDArray[np.float64]

BINS = 5  # with a hundred pairs more bins measure noise
_DRAWS = 2000  # of noise; quantiles of 5 % are then known to half a per cent
_SEED = 20240601  # the same report gives the same bytes


@dataclass(frozen=True)
class Bin:
    """One bar of a reliability diagram: mean confidence and share right of the `n` pairs in (low, high]."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Expected calibration error.

    Attributes:
        plain: the usual estimate, which noise alone makes positive.
        estimate: the same without the part that noise explains.
        low, high: bounds of the true error.
    """

    plain: float
    estimate: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class BestOfN:
    """The answer with the best proxy score of `n`: its mean scores over prompts, at `kl` nats from the policy.

    Attributes:
        proxy: mean score by the reward model.
        gold, low, high: mean verified reward with its bounds.
        best: mean verified reward had the verifier chosen: what can be reached.
    """

    n: int
    kl: float
    proxy: float
    gold: float
    low: float
    high: float
    best: float


@dataclass(frozen=True)
class Slice:
    """Accuracy on the held-out pairs of one slice."""

    name: str
    estimate: float
    low: float
    high: float
    n: int
    groups: int


# ------------------------------------------------------------------------------------ means of bounded values


def bounded_mean(
    values: ArrayLike, clusters: Sequence[str], *, alpha: float, support: tuple[float, float] = (0.0, 1.0)
) -> Estimate:
    """Estimate a mean of values within `support` that are independent between clusters.

    The exact (Clopper-Pearson) interval for zeros and ones with a cluster each, bounds by betting otherwise.
    """
    x = np.asarray(values, dtype=np.float64)
    if not _is_binomial(x, clusters, support):
        return betting_mean(x, clusters, alpha=alpha, support=support)
    low, high = clopper_pearson(int(x.sum()), x.size, alpha=alpha)
    plain = clustered_mean(x, clusters, alpha=alpha, support=support)
    return replace(plain, low=low, high=high, mde=plain.estimate - low)


def p_above(
    values: ArrayLike, clusters: Sequence[str], margin: float, support: tuple[float, float] = (0.0, 1.0)
) -> float:
    """Return the p-value against "the mean is at most `margin`": exact, or one over the wealth of the bets."""
    x = np.asarray(values, dtype=np.float64)
    if _is_binomial(x, clusters, support):
        right = int(x.sum())
        return float(special.betainc(right, x.size - right + 1, margin)) if right else 1.0
    capital = wealth(cluster_stream(x, clusters, support=support), margin)[-1]
    return float(min(1.0, 1 / max(capital, 1.0)))


def p_below(
    values: ArrayLike, clusters: Sequence[str], margin: float, support: tuple[float, float] = (0.0, 1.0)
) -> float:
    """Return the p-value against "the mean is at least `margin`"; see `p_above`."""
    low, high = support
    x = np.asarray(values, dtype=np.float64)
    if support == (0.0, 1.0):  # keep zeros and ones what they are
        return p_above(1 - x, clusters, 1 - margin)
    return p_above(-x, clusters, -margin, (-high, -low))


def _is_binomial(x: Floats, clusters: Sequence[str], support: tuple[float, float]) -> bool:
    return support == (0.0, 1.0) and bool(np.isin(x, (0.0, 1.0)).all()) and len(set(clusters)) == x.size


# -------------------------------------------------------------------------------------------------- preferences


def rights(margins: ArrayLike) -> Floats:
    """Return [n] 1.0 where the better answer scores higher, 0.5 for a tie, else 0.0."""
    return (np.sign(np.asarray(margins, dtype=np.float64)) + 1) / 2


def pair_accuracy(margins: ArrayLike, groups: Sequence[str], *, alpha: float) -> Estimate:
    """Estimate how often the right answer scores higher; pairs of one group (one prompt) are one cluster.

    Args:
        margins: [n] score of the right answer less that of the wrong one; a tie counts one half.
        groups: [n] names.
    """
    return bounded_mean(rights(margins), groups, alpha=alpha)


def slices(report: Mapping[str, Any], alpha: float = 0.05) -> list[Slice]:
    """Return the accuracy per slice of the held-out preferences of a report, by name."""
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for pair in report["preferences"]:
        found[pair["slice"]].append(pair)
    return [_slice(name, found[name], alpha) for name in sorted(found)]


def _slice(name: str, pairs: Sequence[Mapping[str, Any]], alpha: float) -> Slice:
    part = pair_accuracy([p["margin"] for p in pairs], [p["group"] for p in pairs], alpha=alpha)
    return Slice(name, part.estimate, part.low, part.high, part.n, part.clusters)


# -------------------------------------------------------------------------------------------------- calibration


def reliability(margins: ArrayLike, bins: int = BINS) -> list[Bin]:
    """Return the reliability diagram of the probabilities sigmoid(|margin|) in [0.5, 1], without empty bins.

    A Bradley-Terry model says "this one is better" with a confidence in [0.5, 1] and is right where the
    margin is positive.
    """
    confidence, right, place = _binned(margins, bins)
    edges = np.linspace(0.5, 1.0, bins + 1)
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


def calibration(margins: ArrayLike, groups: Sequence[str], *, alpha: float, bins: int = BINS) -> Calibration:
    """Estimate the calibration error without the inflation by noise, and bound it.

    The gap of a bin is its true gap plus noise of variance v, so that its square is too large by v on average: a
    bin counts sqrt(max(gap^2 - v, 0)) instead of |gap|. By the triangle inequality the plain error differs from the
    true one by at most the sum of the bins' noise; the bounds are the plain error -+ the quantile of that sum for
    Gaussian noise with the covariance that the clusters show, never less than what the confidences imply.

    Args:
        margins: [n] nats.
        groups: [n] names of the clusters.
    """
    confidence, right, place = _binned(margins, bins)
    used = np.unique(place)
    member = np.unique(np.asarray(groups), return_inverse=True)[1]
    inside = (place[:, None] == used[None, :]).astype(np.float64)  # [n, bins]
    gap = (confidence - right) @ inside / len(right)  # a bin's gap times its weight
    residual = ((confidence - right)[:, None] - gap * len(right) / inside.sum(0)) * inside
    sums = np.zeros((member.max() + 1, len(used)))
    np.add.at(sums, member, residual)
    count = len(sums)
    shown = sums.T @ sums / len(right) ** 2 * (count / max(count - 1, 1))
    implied = (confidence * (1 - confidence)) @ inside / len(right) ** 2
    covariance = shown + np.diag(np.maximum(implied - np.diag(shown), 0.0))
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    noise = np.abs(np.random.default_rng(_SEED).standard_normal((_DRAWS, len(used))) @ root.T).sum(1)
    reach = float(np.quantile(noise, 1 - alpha))
    plain = float(np.abs(gap).sum())
    estimate = float(np.sqrt(np.maximum(gap**2 - np.diag(covariance), 0.0)).sum())
    return Calibration(plain, estimate, max(0.0, plain - reach), min(1.0, plain + reach), len(right))


def _binned(margins: ArrayLike, bins: int) -> tuple[Floats, Floats, NDArray[np.intp]]:
    """Return confidence, whether right, and the bin of each pair."""
    margin = np.asarray(margins, dtype=np.float64)
    confidence = special.expit(np.abs(margin))
    place = np.clip(np.ceil((confidence - 0.5) * 2 * bins).astype(np.intp) - 1, 0, bins - 1)
    return confidence, rights(margin), place


# ------------------------------------------------------------------------------------- answers of the policy


@dataclass(frozen=True)
class Answers:
    """The policy's answers to one prompt: [N] scores by the reward model, verified rewards, lengths."""

    prompt: str
    score: Floats
    gold: Floats
    length: Floats


def answers_of(samples: Sequence[Mapping[str, Any]]) -> list[Answers]:
    """Gather the samples of a report by prompt, in the order in which prompts appear."""
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for sample in samples:
        found[sample["prompt"]].append(sample)

    def column(rows: Sequence[Mapping[str, Any]], name: str) -> Floats:
        return np.array([row[name] for row in rows], dtype=np.float64)

    return [
        Answers(prompt, column(rows, "score"), column(rows, "gold"), column(rows, "length"))
        for prompt, rows in found.items()
    ]


def concordance(answers: Answers) -> tuple[float, float] | None:
    """Return the chance that the better of two answers scores higher, and Kendall's tau-b; None without a difference.

    A tie of scores counts one half of the chance.
    """
    upper = np.triu_indices(answers.gold.size, 1)
    gold = np.sign(answers.gold[:, None] - answers.gold[None, :])[upper]
    score = np.sign(answers.score[:, None] - answers.score[None, :])[upper]
    different = int((gold != 0).sum())
    if not different:
        return None
    agreement = float((gold * score).sum())
    tau = agreement / math.sqrt(different * int((score != 0).sum())) if score.any() else 0.0
    return (agreement / different + 1) / 2, tau


def best_of_n(report: Mapping[str, Any], alpha: float = 0.05) -> list[BestOfN]:
    """Return the best-of-n curve of a report for n = 1, 2, 4, …; empty without samples. See `best_of_table`."""
    numbers, proxy, gold, best = best_of_table(answers_of(report["samples"]))
    curve = []
    for place, n in enumerate(numbers):
        mean = _mean_of(gold[:, place], alpha)
        kl = math.log(n) - (n - 1) / n
        curve.append(
            BestOfN(
                n,
                kl,
                float(proxy[:, place].mean()),
                mean.estimate,
                mean.low,
                mean.high,
                float(best[:, place].mean()),
            )
        )
    return curve


def best_of_table(prompts: Sequence[Answers]) -> tuple[list[int], Floats, Floats, Floats]:
    """Return n = 1, 2, 4, … and the expected proxy, gold, and best gold of the best of n, [prompts, n] each.

    Exact, over all sets of n of a prompt's N answers: the answer with rank i from below is the best of n with the
    chance C(i-1, n-1) / C(N, n); answers that tie share it. n goes up to the usual number of answers to a prompt; prompts
    with fewer are left out.
    """
    if not prompts:
        return [], np.empty((0, 0)), np.empty((0, 0)), np.empty((0, 0))
    usual = sorted(one.score.size for one in prompts)[(len(prompts) - 1) // 2]
    numbers = [2**k for k in range(usual.bit_length()) if 2**k <= usual]
    kept = [one for one in prompts if one.score.size >= numbers[-1]]
    weights = {size: _order_weights(size, numbers) for size in {one.score.size for one in kept}}
    tables = []
    for by, of in (("score", "score"), ("score", "gold"), ("gold", "gold")):
        rows = [
            weights[one.score.size] @ _ranked(getattr(one, by), getattr(one, of))
            for one in kept
        ]  # fmt: skip
        tables.append(np.array(rows))
    return numbers, tables[0], tables[1], tables[2]


def gamma(curve: Sequence[BestOfN], spread: tuple[float, float]) -> float:
    """Return the integral of |f - g| over that of f along KL: 0 where gold gains as the proxy does.

    f and g are the gains of proxy and gold over n = 1, each in standard deviations of the policy's own answers, so that
    they can be compared. (Kim et al. divide by the gold's integral; that may be 0 or less, the proxy's cannot.)

    Args:
        spread: standard deviation of proxy and of gold within a prompt.
    """
    if len(curve) < 2 or not all(spread):
        return 0.0
    kl = np.array([point.kl for point in curve])
    f = np.array([point.proxy - curve[0].proxy for point in curve]) / spread[0]
    g = np.array([point.gold - curve[0].gold for point in curve]) / spread[1]
    whole = float(np.trapezoid(f, kl))
    return float(np.trapezoid(np.abs(f - g), kl)) / whole if whole > 0 else 0.0


def spread_within(prompts: Sequence[Answers], name: str) -> float:
    """Return the standard deviation of `name` (score, gold) within prompts, pooled over them."""
    parts = [getattr(one, name) - getattr(one, name).mean() for one in prompts]
    freedom = sum(part.size - 1 for part in parts)
    return math.sqrt(sum(float((part**2).sum()) for part in parts) / freedom) if freedom else 0.0


def length_correlation(prompts: Sequence[Answers], *, alpha: float) -> tuple[float, float, float, int] | None:
    """Correlate score with log length among answers to one prompt that are equally good; None without variation.

    Returns:
        Correlation, its bounds, and the number of prompts. The bounds are Student's on Fisher's scale with the standard
        error of the jackknife over prompts.
    """
    rows = []
    for one in prompts:
        sums = np.zeros(3)
        for value in np.unique(one.gold):
            alike = one.gold == value
            score = one.score[alike] - one.score[alike].mean()
            length = np.log1p(one.length[alike])
            length = length - length.mean()
            sums += (float(score @ length), float(score @ score), float(length @ length))
        if sums[1] > 1e-12 and sums[2] > 1e-12:
            rows.append(sums)
    return _correlation(np.array(rows), alpha) if rows else None


def pair_length_correlation(
    margins: ArrayLike, longer: ArrayLike, groups: Sequence[str], *, alpha: float
) -> tuple[float, float, float, int] | None:
    """Correlate the margins of pairs with how much longer the better answer is; None without variation.

    Args:
        longer: [n] log length of the better answer less that of the worse.

    Returns:
        As `length_correlation`, with the number of groups.
    """
    margin, length = (np.asarray(x, dtype=np.float64) for x in (margins, longer))
    if margin.size < 3 or not margin.std() or not length.std():
        return None
    margin, length = margin - margin.mean(), length - length.mean()
    member = np.unique(np.asarray(groups), return_inverse=True)[1]
    products = (margin * length, margin**2, length**2)
    return _correlation(np.stack([np.bincount(member, weights=x) for x in products], axis=1), alpha)


def _correlation(table: Floats, alpha: float) -> tuple[float, float, float, int] | None:
    """A correlation from sums [clusters, 3] of xy, xx and yy, with the jackknife's interval on Fisher's scale."""
    count = len(table)
    if count < 3:
        return None

    def fisher(sums: Floats) -> Floats:
        r = sums[..., 0] / np.sqrt(sums[..., 1] * sums[..., 2])
        return np.asarray(np.arctanh(np.clip(r, -1 + 1e-9, 1 - 1e-9)))

    centre, left = float(fisher(table.sum(0))), fisher(table.sum(0) - table)
    error = math.sqrt((count - 1) / count * float(((left - left.mean()) ** 2).sum()))
    reach = float(special.stdtrit(count - 1, 1 - alpha)) * error
    return math.tanh(centre), math.tanh(centre - reach), math.tanh(centre + reach), count


def drift(now: Sequence[tuple[str, float]], then: Sequence[tuple[str, float]]) -> tuple[float, float]:
    """Return the Kolmogorov-Smirnov distance of two samples of (prompt, score), and its permutation p-value.

    The greatest difference of the two distribution functions has no bins to choose (as the population stability
    index has), no scale, and lies within [0, 1]. Whole prompts are exchanged between the samples, because scores
    of one prompt hang together.
    """
    prompts: dict[tuple[int, str], list[float]] = defaultdict(list)
    for side, sample in enumerate((now, then)):
        for prompt, score in sample:
            prompts[side, prompt].append(score)
    scores = np.array([score for found in prompts.values() for score in found])
    member = np.repeat(np.arange(len(prompts)), [len(found) for found in prompts.values()])
    order = np.argsort(scores, kind="stable")
    last = np.append(np.diff(scores[order]) > 0, True)  # a step is complete after the last of equal scores
    member = member[order]
    of_now = np.array([side == 0 for side, _ in prompts])

    def distance(chosen: NDArray[np.bool_]) -> float:
        inside = chosen[member]
        steps = np.cumsum(inside) / max(inside.sum(), 1) - np.cumsum(~inside) / max((~inside).sum(), 1)
        return float(np.abs(steps[last]).max())

    found = distance(of_now)
    draw = np.random.default_rng(_SEED)
    as_far = sum(distance(draw.permutation(of_now)) >= found - 1e-12 for _ in range(_PERMUTATIONS))
    return found, (as_far + 1) / (_PERMUTATIONS + 1)


_PERMUTATIONS = 500


def _mean_of(values: Floats, alpha: float) -> Estimate:
    """The mean over prompts of a reward, which is taken to lie within [0, 1] or within what was seen."""
    support = (min(0.0, float(values.min())), max(1.0, float(values.max())))
    return bounded_mean(values, [str(k) for k in range(values.size)], alpha=alpha, support=support)


def _order_weights(size: int, numbers: Sequence[int]) -> Floats:
    """[numbers, size]: the chance that the answer with rank i from below is the best of n."""
    return np.array(
        [[math.comb(i, n - 1) / math.comb(size, n) for i in range(size)] for n in numbers], dtype=np.float64
    )


def _ranked(by: Floats, values: Floats) -> Floats:
    """Return `values` sorted by `by`, those that tie replaced by their mean."""
    _, member = np.unique(by, return_inverse=True)
    mean = np.bincount(member, weights=values) / np.bincount(member)
    return np.asarray(mean[np.sort(member)])
