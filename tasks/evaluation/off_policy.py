"""What a policy would have earned on the traffic that another policy wrote, and how far that can be trusted.

Episodes were written by a behaviour policy mu. With rho_t the product over turns 1..t of pi(a | h) / mu(a | h), the
value of pi is the mean of rho-weighted rewards. That is exact in the mean and useless where pi does what mu rarely
did, so each answer carries how much evidence there was, and is INCONCLUSIVE where there was too little.

Weights are cut at a ceiling, min(rho, c). What is cut, or was never logged at all, has not gone unnoticed: E rho is 1,
so 1 - E min(rho, c) is the share of pi's episodes that the log says nothing about (`missing`), and a reward within
[0, 1] bounds the bias: E[w r] <= v <= 1 - E[w (1 - r)] for w = min(rho, c). Intervals are widened by it.

Two kinds of bounds, each of one-sided error alpha:

* once: a t interval around the estimate, jackknifed over prompts; approximate, for a log looked at one time.
* any time: an empirical-Bernstein confidence sequence over the prompts in the order of their arrival, from the two
  sides of the inequality above. It holds for every length of the log at once, however rare and large the weights, and
  is some times wider.

Every prompt counts the same, and only prompts are taken to be independent. The log must be new to both policies: a
policy that was trained on these episodes has raised the odds of those that were rewarded, and looks better on them
than it is.

Sources: Precup, Sutton and Singh (2000), "Eligibility traces for off-policy policy evaluation", for IS, WIS, PDIS and
PDWIS; Jiang and Li (arXiv 1511.03722), equation 10, for DR; Thomas and Brunskill (arXiv 1604.00923), section 4, for
WDR; Ionides (2008), "Truncated importance sampling"; Karampatziakis, Mineiro and Ramdas (arXiv 2102.09540) for gating
by a sequence with the mirrored upper bound; Waudby-Smith et al. (arXiv 2210.10768), theorem 3, for the closed form
that needs pseudo-outcomes bounded below only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from tasks.evaluation.statistics import Verdict, judge

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

Estimator = Literal["is", "wis", "pdis", "pdwis", "dr", "wdr"]
ESTIMATORS: Final[tuple[Estimator, ...]] = get_args(Estimator)

LEAST_PROMPTS: Final = 10
"""Fewer prompts than these, counted by their weight, carry no conclusion."""

_LOG_WEIGHT_BOUND = 300.0  # squares of larger weights would not be numbers
_PRIOR = 2.0  # episodes of its environment that a prompt's baseline is shrunk by
_ROUNDING = 1e-4  # of the span: what float32 log-probabilities leave undecided
_BET = 0.75  # largest bet of the confidence sequence; below 1


@dataclass(frozen=True)
class Log:
    """B logged episodes of at most T turns.

    The confidence sequence takes prompts in the order they stand in, which must not have to do with what they earn: as
    they arrived, or shuffled, and not family by family.

    Attributes:
        rewards: [B, T] earned at each turn; 0 after an episode's last turn.
        turns: [B] how many turns each episode had, at least 1.
        prompts: [B] what was asked; episodes of one prompt share a cluster.
        environments: [B] the family of tasks, which tells the baseline what to expect of a new prompt.
        support: the least and greatest sum of rewards that an episode can have.
    """

    rewards: Floats
    turns: Ints
    prompts: tuple[str, ...]
    environments: tuple[str, ...]
    support: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Raises ValueError where the parts do not fit together."""
        if self.rewards.ndim != 2 or not self.rewards.size:
            raise ValueError("off-policy evaluation needs at least one episode with one turn")
        size, longest = self.rewards.shape
        if not len(self.turns) == len(self.prompts) == len(self.environments) == size:
            raise ValueError("rewards, turns, prompts and environments differ in length")
        if not ((self.turns >= 1) & (self.turns <= longest)).all():
            raise ValueError(f"an episode must have 1 to {longest} turns")
        if (self.rewards[~self.active] != 0).any():
            raise ValueError("rewards after an episode's last turn must be 0")
        low, high = self.support
        total = self.returns
        if not (low < high and np.isfinite(total).all() and (total >= low).all() and (total <= high).all()):
            raise ValueError(f"the rewards of an episode must be finite and sum to within [{low}, {high}]")

    @property
    def active(self) -> NDArray[np.bool_]:
        """[B, T], the turns that took place."""
        return np.arange(self.rewards.shape[1]) < self.turns[:, None]

    @property
    def returns(self) -> Floats:
        """[B], the sum of each episode's rewards."""
        return self.rewards.sum(1)

    @property
    def span(self) -> float:
        """The greatest sum of rewards less the least."""
        return self.support[1] - self.support[0]

    @cached_property
    def cluster(self) -> Ints:
        """[B], the number of each episode's prompt; prompts are numbered as they arrived."""
        first: dict[str, int] = {}
        return np.array([first.setdefault(prompt, len(first)) for prompt in self.prompts], dtype=np.int64)


def single_turn(
    rewards: ArrayLike,
    prompts: Sequence[str] | None = None,
    environments: Sequence[str] | None = None,
    *,
    support: tuple[float, float] = (0.0, 1.0),
) -> Log:
    """The log of B episodes of one turn; by default all prompts differ and there is one environment."""
    column = np.asarray(rewards, dtype=np.float64).reshape(-1, 1)
    names = tuple(map(str, range(len(column)))) if prompts is None else tuple(prompts)
    families = ("",) * len(column) if environments is None else tuple(environments)
    return Log(column, np.ones(len(column), dtype=np.int64), names, families, support)


@dataclass(frozen=True)
class Model:
    """What is expected to be earned from a turn on: q [B, T] knowing the action, v [B, T] before it.

    Both are 0 after an episode's last turn. The estimators are unbiased for whatever values that do not depend on the
    episode's own later course; good values take variance away. They make up for wrong weights as well only where q
    tells actions apart and v is its mean under the policy that is judged.
    """

    q: Floats
    v: Floats


@dataclass(frozen=True)
class Overlap:
    """How much of the log speaks for a policy. Weights here are whole, but for `missing`.

    Attributes:
        ess: effective number of episodes, (sum W)^2 / sum W^2.
        ess_share: the same over the number of episodes.
        prompts: effective number of prompts, as `ess` from the prompts' mean weights.
        top_share: share of all weight that the heaviest 1 % of the episodes have (one at least).
        max_share: share that the heaviest has.
        mean_weight: 1 in the mean; far below 1, the policy does what is not in the log.
        chi_square: mean W^2 - 1, which estimates chi^2(policy || behaviour).
        cut: share of the episodes whose weight is above the ceiling.
        missing: 1 - mean min(W, ceiling), at least 0: the share of the policy's episodes that is cut or not logged.
    """

    ess: float
    ess_share: float
    prompts: float
    top_share: float
    max_share: float
    mean_weight: float
    chi_square: float
    cut: float
    missing: float


@dataclass(frozen=True)
class Rule:
    """How evidence becomes a verdict; declare it before the log is looked at.

    Attributes:
        margin: what the value (or the difference) must be above.
        alpha: one-sided error of each bound.
        power: of the minimum detectable effect.
        estimator: of the estimate and the interval.
        ceiling: weights above it are cut to it.
        min_ess: smallest effective share of the episodes that carries a conclusion.
        looks: which bounds decide: "any time" the confidence sequence, "once" the interval.
    """

    margin: float = 0.0
    alpha: float = 0.025
    power: float = 0.8
    estimator: Estimator = "wdr"
    ceiling: float = 20.0
    min_ess: float = 0.1
    looks: Literal["any time", "once"] = "any time"

    def __post_init__(self) -> None:
        """Raises ValueError where a number makes no sense."""
        if not 0 < self.alpha < 0.5:
            raise ValueError("alpha is a one-sided error in (0, 0.5)")
        if not 0.5 < self.power < 1:
            raise ValueError("power is in (0.5, 1)")
        if not self.ceiling >= 1:
            raise ValueError("the ceiling of the weights is at least 1, the weight of an episode on policy")
        if not 0 <= self.min_ess <= 1:
            raise ValueError("min_ess is a share in [0, 1]")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"there is no estimator {self.estimator!r}; there are {', '.join(ESTIMATORS)}")


@dataclass(frozen=True)
class Evidence:
    """What the log says about a policy's value, or about the difference of two policies.

    Attributes:
        estimate: by the rule's estimator, with cut weights.
        low, high: the interval of one look, widened by `bias`, within what is possible.
        anytime_low, anytime_high: the confidence sequence after the last prompt.
        standard_error: jackknifed over prompts; infinite where one prompt carries everything.
        bias: bounds of (true value - what the estimate tends to), from the missing share.
        n, prompts: episodes and prompts in the log.
        overlap: of the policy; for a difference, of the candidate and the champion.
        mde: smallest true excess over the margin that the deciding bounds would find with the rule's power.
        verdict, reasons: against the rule's margin, and why, in words.
    """

    estimate: float
    low: float
    high: float
    anytime_low: float
    anytime_high: float
    standard_error: float
    bias: tuple[float, float]
    n: int
    prompts: int
    overlap: tuple[Overlap, ...]
    mde: float
    rule: Rule
    verdict: Verdict
    reasons: tuple[str, ...]


def evaluate(log: Log, log_ratios: ArrayLike, rule: Rule, model: Model | None = None) -> Evidence:
    """Judge the value of one policy.

    Args:
        log_ratios: [B, T], log pi / mu of all that the policy wrote in a turn; 0 after the last turn, -inf where the
            policy would never have written it.
        model: for dr and wdr; by default `baseline(log)`.

    Raises:
        ValueError: the ratios do not fit the log or are not numbers.
    """
    return _judged(log, (_log_weights(log, log_ratios),), rule, model)


def compare(
    log: Log, candidate: ArrayLike, champion: ArrayLike, rule: Rule, model: Model | None = None
) -> Evidence:
    """Judge the value of a candidate less that of a champion, on the same log.

    Args:
        candidate, champion: [B, T] log ratios of each against the policy that wrote the log, as in `evaluate`; zeros
            for the champion where it wrote the log itself.
        model: see `evaluate`; the same for both policies.

    Raises:
        ValueError: the ratios do not fit the log or are not numbers.
    """
    return _judged(log, (_log_weights(log, candidate), _log_weights(log, champion)), rule, model)


def estimate_value(
    log: Log,
    log_ratios: ArrayLike,
    estimator: Estimator,
    *,
    ceiling: float = math.inf,
    model: Model | None = None,
) -> float:
    """The bare estimate of a policy's value; see `evaluate`.

    Raises:
        ValueError: as `evaluate`, or a self-normalised estimator finds no weight at all.
    """
    terms = _terms(log, _cut(_log_weights(log, log_ratios), ceiling), estimator, model)
    value = _solve(*(_by_prompt(log, part) for part in (terms.above, terms.below))).estimate
    if math.isnan(value):
        raise ValueError("the policy gives no weight to any logged episode")
    return value


def overlap(log: Log, log_ratios: ArrayLike, ceiling: float = Rule.ceiling) -> Overlap:
    """Measure how much of the log speaks for a policy; see `evaluate` for the arguments."""
    return _overlap(log, _log_weights(log, log_ratios), ceiling)


def baseline(log: Log) -> Model:
    """What other episodes earned from the same turn on, cross-fitted: an episode's own rewards play no part in it.

    The mean of the prompt's other episodes, shrunk towards the mean of the environment's other prompts as if two of
    their episodes had been among them; the environment's towards all others', theirs towards the middle of the support.
    It does not look at actions (q is v), so it takes away the variance between prompts and leaves the rest.
    """
    middle = sum(log.support) / 2
    to_go = np.cumsum(log.rewards[:, ::-1], axis=1)[:, ::-1]
    active = log.active.astype(np.float64)
    prompt = log.cluster
    _, environment = np.unique(np.array(log.environments), return_inverse=True)
    everything = np.zeros_like(prompt)

    def others(inner: Ints | None, outer: Ints) -> tuple[Floats, Floats]:
        """Sums [B, T] of rewards and of episodes over `outer`, without those of `inner` (None: of itself)."""
        parts = [
            _totals(x, outer)[outer] - (x if inner is None else _totals(x, inner)[inner])
            for x in (to_go * active, active)
        ]
        return parts[0], parts[1]

    value = np.full_like(to_go, middle)
    for inner, outer in ((prompt, everything), (prompt, environment), (None, prompt)):
        total, count = others(inner, outer)
        value = (total + _PRIOR * value) / (count + _PRIOR)
    value = np.where(log.active, value, 0.0)
    return Model(value, value)


def confidence_sequence(values: ArrayLike, alpha: float) -> Floats:
    """Lower bounds [n] of a mean, one after each of `values`, which hold all at once with probability 1 - alpha.

    The values are at least 0 and come one after another with means at most the one that is bounded. They need no upper
    bound, since the bets are on the mean being larger: exp(sum l (x - m) - psi(l) (x - xhat)^2) is a supermartingale
    for xhat in [0, 1] known before x, l < 1 and psi(l) = -log(1 - l) - l. Each bound is the best so far.

    Raises:
        ValueError: a value is below 0 or not a number.
    """
    x = np.asarray(values, dtype=np.float64)
    if not (np.isfinite(x).all() and (x >= 0).all()):
        raise ValueError("the values of a confidence sequence must be finite and at least 0")
    count = np.arange(1, len(x) + 1)
    mean = np.minimum((0.5 + np.cumsum(x)) / (count + 1), 1.0)
    spread = (0.25 + np.cumsum((x - mean) ** 2)) / (count + 1)
    guess = np.concatenate([[0.5], mean[:-1]])
    variance = np.concatenate([[0.25], spread[:-1]])
    bet = np.minimum(np.sqrt(2 * math.log(1 / alpha) / (variance * count * np.log1p(count))), _BET)
    psi = -np.log1p(-bet) - bet
    bound = (np.cumsum(bet * x) - math.log(1 / alpha) - np.cumsum(psi * (x - guess) ** 2)) / np.cumsum(bet)
    return np.maximum.accumulate(bound)


def sequence_of_value(log: Log, log_ratios: ArrayLike, rule: Rule) -> tuple[Floats, Floats]:
    """Lower and upper bounds of a policy's value after each prompt, in the order of arrival."""
    return _sequence(log, (_log_weights(log, log_ratios),), rule)


def sequence_of_difference(
    log: Log, candidate: ArrayLike, champion: ArrayLike, rule: Rule
) -> tuple[Floats, Floats]:
    """Lower and upper bounds of candidate less champion after each prompt, in the order of arrival.

    A log that grows keeps its bounds only if new episodes come with new prompts.
    """
    return _sequence(log, (_log_weights(log, candidate), _log_weights(log, champion)), rule)


@dataclass(frozen=True)
class _Terms:
    """An estimate as a sum of K ratios of means, above / below ([B, K] each, per episode).

    `lost` [K] is the missing share of each ratio's weights, `least` and `most` bound what these weights multiply.
    """

    above: Floats
    below: Floats
    lost: Floats
    least: Floats
    most: Floats


@dataclass(frozen=True)
class _Solved:
    estimate: float  # nan where nothing has weight
    ratios: Floats  # [K]
    deleted: Floats  # [G], the estimate without each prompt; nan where the others have no weight


def _log_weights(log: Log, log_ratios: ArrayLike) -> Floats:
    """[B, T] log rho_t, the turns up to t; bounded above so that squares are numbers."""
    ratios = np.asarray(log_ratios, dtype=np.float64)
    if ratios.shape != log.rewards.shape:
        raise ValueError(f"log ratios of shape {ratios.shape} do not fit a log of shape {log.rewards.shape}")
    if np.isnan(ratios).any() or (ratios == np.inf).any():
        raise ValueError("log ratios must be numbers below infinity")
    if (ratios[~log.active] != 0).any():
        raise ValueError("log ratios after an episode's last turn must be 0")
    return np.minimum(np.cumsum(ratios, axis=1), _LOG_WEIGHT_BOUND)


def _cut(log_weights: Floats, ceiling: float) -> Floats:
    return np.minimum(np.exp(log_weights), ceiling)


def _totals(values: Floats, member: Ints) -> Floats:
    """[members, T], the sum of each member's rows."""
    totals = np.zeros((int(member.max()) + 1, values.shape[1]))
    np.add.at(totals, member, values)
    return totals


def _by_prompt(log: Log, values: Floats) -> Floats:
    """[G, K] means over the episodes of each prompt, in the order of the log."""
    return _totals(values, log.cluster) / np.bincount(log.cluster)[:, None]


def _mean(log: Log, values: Floats) -> Floats:
    """[K] over prompts of the means over their episodes."""
    return _by_prompt(log, values).mean(0)


def _missing(log: Log, weights: Floats) -> Floats:
    return np.maximum(0.0, 1 - _mean(log, weights))


def _terms(log: Log, weights: Floats, estimator: Estimator, model: Model | None) -> _Terms:
    low, high = log.support
    if estimator in ("is", "wis"):
        last = weights[:, -1:]
        below = last if estimator == "wis" else np.ones_like(last)
        bounds = np.array([low]), np.array([high])
        return _Terms(last * log.returns[:, None], below, _missing(log, last), *bounds)
    pays = (np.arange(1, log.rewards.shape[1] + 1) == log.turns[:, None]) | (log.rewards != 0)
    least, most = (pays.any(0) * bound for bound in (min(low, 0.0), max(high, 0.0)))
    lost = _missing(log, weights)
    if estimator in ("pdis", "pdwis"):
        below = weights if estimator == "pdwis" else np.ones_like(weights)
        return _Terms(weights * log.rewards, below, lost, least, most)
    found = model or baseline(log)
    if not (found.q.shape == found.v.shape == log.rewards.shape):
        raise ValueError("the model's values do not fit the log")
    if not (np.isfinite(found.q).all() and np.isfinite(found.v).all()):
        raise ValueError("the model's values must be finite")
    if (found.q[~log.active] != 0).any() or (found.v[~log.active] != 0).any():
        raise ValueError("the model's values after an episode's last turn must be 0")
    # One ratio for each turn: its weights multiply what the action was worth over what was expected of it. v_{t + 1}
    # has the weights of turn t too. The first v has none.
    following = np.pad(found.v[:, 1:], ((0, 0), (0, 1)))
    step = log.rewards - found.q + following
    expected = following - found.q
    below = weights if estimator == "wdr" else np.ones_like(weights)
    ones = np.ones((len(weights), 1))
    return _Terms(
        np.hstack([found.v[:, :1], weights * step]),
        np.hstack([ones, below]),
        np.concatenate([[0.0], lost]),
        np.concatenate([[0.0], least + expected.min(0)]),
        np.concatenate([[0.0], most + expected.max(0)]),
    )


def _solve(above: Floats, below: Floats) -> _Solved:
    """Sum of ratios from prompts' means, [G, K] each, and the same without each prompt."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = above.sum(0) / below.sum(0)
        # Summed anew and not by subtraction, which would leave rounding where one prompt outweighs all.
        without = [_all_but_one(part) for part in (above, below)]
        deleted = (without[0] / without[1]).sum(1)
    return _Solved(float(ratios.sum()), ratios, deleted)


def _all_but_one(values: Floats) -> Floats:
    """[G, K], the sum over all rows but each."""
    none = np.zeros((1, values.shape[1]))
    before = np.vstack([none, np.cumsum(values, axis=0)[:-1]])
    after = np.vstack([np.cumsum(values[::-1], axis=0)[::-1][1:], none])
    return before + after


def _bias(terms: _Terms, solved: _Solved) -> tuple[float, float]:
    """Bounds of (true value - limit of the estimate): missing weights, times what they can multiply.

    A self-normalised ratio has given the missing share its own mean, which counts against the bounds.
    """
    normalised = ~(terms.below == 1).all(0)
    given = np.where(normalised, solved.ratios, 0.0)
    return (
        float((terms.lost * (terms.least - given)).sum()),
        float((terms.lost * (terms.most - given)).sum()),
    )


def _overlap(log: Log, log_weights: Floats, ceiling: float) -> Overlap:
    last = log_weights[:, -1]
    size = len(last)
    weights = np.exp(last)
    missing = float(_missing(log, np.minimum(weights, ceiling)[:, None])[0])
    if not weights.any():
        return Overlap(0.0, 0.0, 0.0, 1.0, 1.0, 0.0, -1.0, 0.0, missing)
    share = np.sort(weights / weights.sum())[::-1]
    ess = float(1 / (share**2).sum())
    means = _by_prompt(log, weights[:, None])[:, 0]
    prompts = float(1 / ((means / means.sum()) ** 2).sum())
    return Overlap(
        ess=ess,
        ess_share=ess / size,
        prompts=prompts,
        top_share=float(share[: math.ceil(size / 100)].sum()),
        max_share=float(share[0]),
        mean_weight=float(weights.mean()),
        chi_square=float((weights**2).mean() - 1),
        cut=float((weights > ceiling).mean()),
        missing=missing,
    )


def _sequence(log: Log, policies: Sequence[Floats], rule: Rule) -> tuple[Floats, Floats]:
    """Bounds after each prompt. Values are bounded by w r from below and, mirrored, by 1 - w (1 - r) from above."""
    reward = ((log.returns - log.support[0]) / log.span).clip(0, 1)[:, None]
    weight = _cut(policies[0][:, -1:], rule.ceiling)
    up, down, start, least = weight * reward, weight * (1 - reward), log.support[0], 0.0
    if len(policies) == 2:
        other = _cut(policies[1][:, -1:], rule.ceiling)
        up, down = up + other * (1 - reward), down + other * reward
        start, least = 0.0, -1.0
    above, below = (confidence_sequence(_by_prompt(log, side)[:, 0], rule.alpha) for side in (up, down))
    return (
        start + log.span * (above + least).clip(least, 1),
        start + log.span * (1 - below).clip(least, 1),
    )


def _judged(log: Log, policies: Sequence[Floats], rule: Rule, model: Model | None) -> Evidence:
    single = len(policies) == 1
    limits = log.support if single else (-log.span, log.span)
    if model is None and rule.estimator in ("dr", "wdr"):
        model = baseline(log)
    found = [_terms(log, _cut(policy, rule.ceiling), rule.estimator, model) for policy in policies]
    sums = [_solve(_by_prompt(log, one.above), _by_prompt(log, one.below)) for one in found]
    sides = [_bias(*pair) for pair in zip(found, sums, strict=True)]
    estimate, deleted, bias = sums[0].estimate, sums[0].deleted, sides[0]
    if not single:
        estimate, deleted = estimate - sums[1].estimate, deleted - sums[1].deleted
        bias = bias[0] - sides[1][1], bias[1] - sides[1][0]
    overlaps = tuple(_overlap(log, policy, rule.ceiling) for policy in policies)
    count = len(deleted)
    error = math.inf
    if math.isnan(estimate):
        estimate, bias = sum(limits) / 2, (0.0, 0.0)
    elif count > 1 and np.isfinite(deleted).all():
        error = math.sqrt((count - 1) / count * float(((deleted - deleted.mean()) ** 2).sum()))
    # As many degrees of freedom as prompts that carry the estimate.
    df = max(1.0, min(one.prompts for one in overlaps) - 1)
    reach, more = (float(special.stdtrit(df, p)) * error for p in (1 - rule.alpha, rule.power))
    low, high = (
        min(max(bound, limits[0]), limits[1])
        for bound in (estimate - reach + bias[0], estimate + reach + bias[1])
    )
    after = _sequence(log, policies, rule)
    anytime = float(after[0][-1]), float(after[1][-1])
    bounds = (low, high) if rule.looks == "once" else anytime
    verdict, reasons = _verdict(bounds, _ROUNDING * log.span, overlaps, rule)
    return Evidence(
        estimate=estimate,
        low=low,
        high=high,
        anytime_low=anytime[0],
        anytime_high=anytime[1],
        standard_error=error,
        bias=bias,
        n=len(log.prompts),
        prompts=count,
        overlap=overlaps,
        mde=min(max(0.0, estimate - bounds[0]) + more, limits[1] - limits[0]),
        rule=rule,
        verdict=verdict,
        reasons=reasons,
    )


def _verdict(
    bounds: tuple[float, float], rounding: float, overlaps: Sequence[Overlap], rule: Rule
) -> tuple[Verdict, tuple[str, ...]]:
    names = ("policy",) if len(overlaps) == 1 else ("candidate", "champion")
    poor = []
    for name, one in zip(names, overlaps, strict=True):
        if one.ess_share < rule.min_ess:
            poor.append(
                f"The log is worth {one.ess:.1f} episodes of the {name}, {one.ess_share:.1%} of all and below the "
                f"floor of {rule.min_ess:.1%}; the heaviest has {one.max_share:.0%} of the weight."
            )
        if one.prompts < LEAST_PROMPTS:
            poor.append(
                f"The weight of the {name} lies on {one.prompts:.1f} prompts, fewer than {LEAST_PROMPTS}."
            )
    if poor:
        return "INCONCLUSIVE", tuple(poor)
    verdict = judge(bounds[0] - rounding, bounds[1] + rounding, rule.margin)
    place = {"PASS": "above", "FAIL": "below", "INCONCLUSIVE": "on both sides of"}[verdict]
    reasons = [f"[{bounds[0]:+.3f}, {bounds[1]:+.3f}] is {place} the margin of {rule.margin:+.3f}."]
    if verdict == "INCONCLUSIVE":
        reasons += [
            f"{one.missing:.1%} of what the {name} would write is not in the log or above the ceiling of the weights."
            for name, one in zip(names, overlaps, strict=True)
            if one.missing >= 0.01
        ]
    return verdict, tuple(reasons)
