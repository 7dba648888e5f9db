"""One answer from n samples of a question, and the tokens that it costs: Think@n and its rivals.

Think@n (arXiv 2602.13517v1, section 4) samples n responses up to a short prefix, scores the prefixes, finishes the
best fraction eta of them and lets these vote. Here the samples are given whole, so that all methods can be compared
on the same ones. Tokens are the sampled ones of a question; the forward passes that score prefixes are not counted.

pass@k of the same samples is `tasks.evaluation.statistics.pass_at_k`; avg@k is what `mean_at_n` gives for any k.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from tasks.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished response to a question.

    Attributes:
        answer: what was read from it, in the form in which equal answers are equal; None if there is no answer, and
            then it has no vote.
        tokens: its length.
        prefix_score: what its prefix promises: the deep-thinking ratio for Think@n, self-certainty for
            Self-Certainty@n; larger is better.
        reward: what its answer earns.
    """

    answer: str | None
    tokens: int
    prefix_score: float = 0.0
    reward: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a method makes of a question.

    Attributes:
        answer: the one given; None where no sample has one, and for a mean.
        reward: what it earns.
        tokens: sampled in all.
        kept: places of the samples that were asked, ascending.
    """

    answer: str | None
    reward: float
    tokens: int
    kept: tuple[int, ...]


def best(scores: Sequence[float], fraction: float) -> tuple[int, ...]:
    """Places of the best ceil(fraction n) of n scores, ascending; of equal ones the first.

    Raises:
        UsageError: no scores, one that is not a number, or a fraction outside (0, 1].
    """
    if not scores or any(math.isnan(score) for score in scores):
        raise UsageError("Samples can be chosen by their scores only if there are some and all are numbers.")
    if not 0 < fraction <= 1:
        raise UsageError(f"The fraction of samples to keep is {fraction}; give one above 0 and at most 1.")
    count = math.ceil(Fraction(str(fraction)) * len(scores))
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    return tuple(sorted(order[:count]))


def majority(answers: Sequence[str | None], scores: Sequence[float]) -> int | None:
    """Place of the voter whose answer wins: the most votes, then the best score, then the first place.

    None where nobody votes.
    """
    votes = Counter(answers)
    voters = [place for place, answer in enumerate(answers) if answer is not None]
    return min(voters, key=lambda place: (-votes[answers[place]], -scores[place], place), default=None)


def think_at_n(samples: Sequence[Sample], *, eta: float, prefix: int) -> Outcome:
    """Finish the best fraction `eta` by prefix score and let them vote; ties go to the best-scoring voter.

    The kept samples cost their length and each discarded one the `prefix` tokens that were scored, or its length
    if that is less: (1 - eta) n l in all. (The paper prints eta n l, the same at its eta of 1/2.) With the
    self-certainty of the prefix as score this is Self-Certainty@n.

    Raises:
        UsageError: no samples, a score that is not a number, or a fraction outside (0, 1].
    """
    scores = [sample.prefix_score for sample in samples]
    return _vote(samples, best(scores, eta), scores, run=prefix)


def cons_at_n(samples: Sequence[Sample]) -> Outcome:
    """Let all samples vote (self-consistency); ties go to the first voter.

    Raises:
        UsageError: no samples.
    """
    return _vote(samples, best([0.0] * len(samples), 1.0), [0.0] * len(samples))


def mean_at_n(samples: Sequence[Sample]) -> Outcome:
    """The mean reward of a sample drawn at random, at the price of all.

    Raises:
        UsageError: no samples.
    """
    everyone = best([0.0] * len(samples), 1.0)
    return Outcome(None, sum(s.reward for s in samples) / len(samples), _tokens(samples), everyone)


def long_at_n(samples: Sequence[Sample], *, eta: float) -> Outcome:
    """Let the longest fraction `eta` vote, which is known only when all are finished; ties go to the longest voter.

    Raises:
        UsageError: no samples, or a fraction outside (0, 1].
    """
    lengths = [float(sample.tokens) for sample in samples]
    outcome = _vote(samples, best(lengths, eta), lengths)
    return Outcome(outcome.answer, outcome.reward, _tokens(samples), outcome.kept)


def short_at_n(samples: Sequence[Sample], *, eta: float) -> Outcome:
    """Let the shortest fraction `eta` vote; all run side by side until the longest of these is finished.

    Ties go to the shortest voter.

    Raises:
        UsageError: no samples, or a fraction outside (0, 1].
    """
    lengths = [-float(sample.tokens) for sample in samples]
    kept = best(lengths, eta)
    return _vote(samples, kept, lengths, run=max(samples[place].tokens for place in kept))


def random_at_n(samples: Sequence[Sample], *, budget: int, rng: random.Random) -> Outcome:
    """Let samples vote that are drawn one by one, without a look at any score, as long as `budget` tokens last.

    The first sample that does not fit ends the drawing; one is taken in any case. This is what any choice by prefix
    has to beat at the same price, because fewer votes often cost little accuracy. Ties go to the first voter drawn.

    Raises:
        UsageError: no samples.
    """
    order = list(best([0.0] * len(samples), 1.0))
    rng.shuffle(order)
    taken, spent = order[:1], samples[order[0]].tokens
    for place in order[1:]:
        spent += samples[place].tokens
        if spent > budget:
            break
        taken.append(place)
    rank = {place: -float(turn) for turn, place in enumerate(taken)}
    return _vote(samples, tuple(sorted(taken)), [rank.get(place, -math.inf) for place in range(len(samples))])


def _vote(samples: Sequence[Sample], kept: Sequence[int], scores: Sequence[float], run: int = 0) -> Outcome:
    """The vote of `kept`, every other sample having been stopped after `run` tokens."""
    winner = majority([samples[place].answer for place in kept], [scores[place] for place in kept])
    chosen = Sample(None, 0) if winner is None else samples[kept[winner]]
    stopped = sum(min(run, sample.tokens) for place, sample in enumerate(samples) if place not in kept)
    tokens = _tokens([samples[place] for place in kept]) + stopped
    return Outcome(chosen.answer, chosen.reward, tokens, tuple(kept))


def _tokens(samples: Sequence[Sample]) -> int:
    return sum(sample.tokens for sample in samples)
