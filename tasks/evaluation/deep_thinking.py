"""Deep-thinking ratios of right and of wrong answers, with tasks as what varies.

A mean over all answers would say mostly that easy tasks have other ratios than hard ones; so each task counts once, and
right and wrong are compared within tasks that have both. Shorter answers are often the right ones, and self-certainty needs no inner layers,
so both are judged beside the ratio: where one does as well, the ratio tells nothing that it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tasks.core.errors import UsageError
from tasks.evaluation.discrimination import Interval, auroc_within, bootstrap_mean


@dataclass(frozen=True, slots=True)
class Rated:
    """One answer: its deep-thinking ratio in [0, 1], its tokens, its self-certainty in nats, and whether it is right."""

    ratio: float
    tokens: int
    certainty: float
    right: bool


@dataclass(frozen=True)
class Report:
    """Each interval is over tasks, None where no task has such answers.

    Attributes:
        answers: in all.
        accuracy: share that is right.
        ratio: mean of all answers.
        right, wrong: mean of these.
        difference: right less wrong, of the tasks that have both.
        auroc: chance that a right answer has a larger ratio than a wrong one to the same task.
        length: mean tokens of all answers.
        auroc_shorter: chance that a right answer is shorter than a wrong one.
        certainty: mean self-certainty of all answers, nats.
        auroc_certainty: chance that a right answer is more certain than a wrong one.
    """

    answers: int
    accuracy: Interval
    ratio: Interval
    right: Interval | None
    wrong: Interval | None
    difference: Interval | None
    auroc: Interval | None
    length: Interval
    auroc_shorter: Interval | None
    certainty: Interval
    auroc_certainty: Interval | None


def by_correctness(tasks: Sequence[Sequence[Rated]], *, alpha: float) -> Report:
    """Return what the answers to each task tell; each bound of an interval has error `alpha`.

    Raises:
        UsageError: no tasks, or one without answers.
    """
    if not tasks or not all(tasks):
        raise UsageError("Ratios are compared over tasks with at least one answer each; there are none.")

    def mean(kind: bool, answers: Sequence[Rated]) -> float | None:
        chosen = [one.ratio for one in answers if one.right is kind]
        return float(np.mean(chosen)) if chosen else None

    def over(values: Sequence[float | None]) -> Interval | None:
        known = [value for value in values if value is not None]
        return bootstrap_mean(known, alpha=alpha) if known else None

    right, wrong = ([mean(kind, answers) for answers in tasks] for kind in (True, False))
    rights = [[one.right for one in answers] for answers in tasks]
    ratios = [[one.ratio for one in answers] for answers in tasks]
    lengths = [[float(one.tokens) for one in answers] for answers in tasks]
    shortness = [[-length for length in one] for one in lengths]
    certain = [[one.certainty for one in answers] for answers in tasks]
    return Report(
        answers=sum(map(len, tasks)),
        accuracy=bootstrap_mean([np.mean(one) for one in rights], alpha=alpha),
        ratio=bootstrap_mean([np.mean(one) for one in ratios], alpha=alpha),
        right=over(right),
        wrong=over(wrong),
        difference=over(
            [a - b for a, b in zip(right, wrong, strict=True) if a is not None and b is not None]
        ),
        auroc=auroc_within(list(zip(ratios, rights, strict=True)), alpha=alpha),
        length=bootstrap_mean([np.mean(one) for one in lengths], alpha=alpha),
        auroc_shorter=auroc_within(list(zip(shortness, rights, strict=True)), alpha=alpha),
        certainty=bootstrap_mean([np.mean(one) for one in certain], alpha=alpha),
        auroc_certainty=auroc_within(list(zip(certain, rights, strict=True)), alpha=alpha),
    )
