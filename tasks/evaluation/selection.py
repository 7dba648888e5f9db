"""Think@n beside its rivals on the same samples: which gives the best answer for its tokens (arXiv 2602.13517v1, section 4).

A choice by prefix is worth its name only if it beats voters that are drawn at random at the same price: fewer votes often
cost little accuracy. So each method stands against the vote of all (Cons@n) and against that.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tasks.arena import best_of
from tasks.arena.best_of import Outcome, Sample
from tasks.core.errors import UsageError
from tasks.evaluation.discrimination import Interval, bootstrap_mean
from tasks.evaluation.statistics import Estimate, paired_difference

CONS, RANDOM = "Cons@n", "random, Think@n's tokens"
DRAWS = 100  # of voters at random


@dataclass(frozen=True)
class Row:
    """A method over all questions.

    Attributes:
        tokens: sampled for a question, mean.
        less_cons, less_random: its accuracy less that of the two to compare with, by question; None for itself.
    """

    method: str
    accuracy: Interval
    tokens: float
    less_cons: Estimate | None
    less_random: Estimate | None


def compare(
    questions: Mapping[str, Sequence[Sequence[Sample]]], *, eta: float, prefix: int, alpha: float
) -> list[Row]:
    """Return a row for each method.

    Args:
        questions: by the name of a score, the samples of every question with that score as `prefix_score`; the same samples
            in the same order under each name. Think@n's own stands first, and its price is the one that the voters at random
            get.
        eta: fraction that is finished. prefix: tokens that the scores have seen.

    Raises:
        UsageError: no questions, one without samples, a score that is no number, or `eta` outside (0, 1].
    """
    scored = dict(questions)
    if not scored or not next(iter(scored.values())):
        raise UsageError("Methods are compared over questions with samples; there are none.")
    given = next(iter(scored.values()))
    chosen = {
        name: [best_of.think_at_n(group, eta=eta, prefix=prefix) for group in groups]
        for name, groups in scored.items()
    }
    budgets = [outcome.tokens for outcome in next(iter(chosen.values()))]

    def each(method: Callable[[Sequence[Sample]], Outcome]) -> list[Outcome]:
        return [method(group) for group in given]

    methods = {
        CONS: each(best_of.cons_at_n),
        "Cons@n/2": each(lambda group: best_of.cons_at_n(group[: max(1, len(group) // 2)])),
        "Mean@n": each(best_of.mean_at_n),
        "Long@n": each(lambda group: best_of.long_at_n(group, eta=eta)),
        "Short@n": each(lambda group: best_of.short_at_n(group, eta=eta)),
        **chosen,
        RANDOM: [_drawn(group, budget, place) for place, (group, budget) in enumerate(zip(given, budgets, strict=True))],
    }  # fmt: skip
    rewards = {name: [outcome.reward for outcome in found] for name, found in methods.items()}

    def apart(name: str, other: str) -> Estimate | None:
        return None if name == other else paired_difference(rewards[name], rewards[other], alpha=alpha)

    return [
        Row(
            name,
            bootstrap_mean(rewards[name], alpha=alpha),
            float(np.mean([outcome.tokens for outcome in found])),
            apart(name, CONS),
            apart(name, RANDOM),
        )
        for name, found in methods.items()
    ]


def _drawn(group: Sequence[Sample], budget: int, place: int) -> Outcome:
    """The mean of voters at random, for a question at this place."""
    rng = random.Random(f"draws/{place}")
    draws = [best_of.random_at_n(group, budget=budget, rng=rng) for _ in range(DRAWS)]
    reward, tokens = (float(np.mean([getattr(one, of) for one in draws])) for of in ("reward", "tokens"))
    return Outcome(None, reward, round(tokens), ())
