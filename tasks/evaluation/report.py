"""What an agent is worth on tasks that it attempted several times: every figure with its interval, by slice.

Intervals are those of `statistics.clustered_mean` over families of tasks; pass@k is the unbiased estimate of each task (Chen
et al., arXiv 2107.03374), avg@k the mean reward of its attempts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from tasks.evaluation.statistics import clustered_mean, pass_at_k
from tasks.rollout.rollout import Outcome

ALPHA = 0.025  # of each bound, so that intervals are of 95 %


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean with its 95 % interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Slice:
    """The figures of some tasks.

    Attributes:
        tasks, samples: how many tasks, and how often each was attempted.
        figures: success (full reward), score (reward; with its k attempts avg@k), pass@1, pass@2, pass@4 … pass@k,
            turns, tokens (written by the policy), valid_format (share of the turns in the right form) and valid_action
            (of those whose action was possible too).
    """

    tasks: int
    samples: int
    figures: Mapping[str, Figure]

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json`."""
        return asdict(self)


def report(attempts: Sequence[Sequence[Outcome]], *, max_turns: int, max_tokens: int) -> Slice:
    """Return the figures of one slice.

    Args:
        attempts: for each task its outcomes, as many for each.
        max_turns, max_tokens: the most that an episode can have, for the bounds of the interval.

    Raises:
        ValueError: no tasks, or another number of attempts for some.
    """
    sizes = {len(outcomes) for outcomes in attempts}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError("every task needs the same number of attempts, at least one")
    (samples,) = sizes
    families = [outcomes[0].family for outcomes in attempts]

    def figure(value: Callable[[Sequence[Outcome]], float], most: float = 1.0) -> Figure:
        found = clustered_mean(
            [value(outcomes) for outcomes in attempts], families, alpha=ALPHA, support=(0.0, most)
        )
        return Figure(found.estimate, found.low, found.high)

    return Slice(
        len(attempts),
        samples,
        {
            "success": figure(lambda outcomes: _mean(map(succeeded, outcomes))),
            "score": figure(lambda outcomes: _mean(one.reward for one in outcomes)),
            **{f"pass@{k}": figure(partial(_passed, k)) for k in _ks(samples)},
            "turns": figure(lambda outcomes: _mean(one.turns for one in outcomes), max_turns),
            "tokens": figure(lambda outcomes: _mean(one.tokens for one in outcomes), max_tokens),
            "valid_format": figure(lambda outcomes: _mean(map(valid_format, outcomes))),
            "valid_action": figure(lambda outcomes: _mean(map(valid_action, outcomes))),
        },
    )


def succeeded(outcome: Outcome) -> bool:
    """Tell whether the episode earned the full reward."""
    return outcome.reward >= 1.0


def valid_action(outcome: Outcome) -> float:
    """Share of the turns whose action had the right form and was possible, which is what `Step.valid` says."""
    return 1 - outcome.invalid_turns / max(outcome.turns, 1)


def valid_format(outcome: Outcome) -> float:
    """Share of the turns in the right form, whether possible or not: the environment's component `valid_format`.

    An environment that does not tell the two apart has no such share; there it is `valid_action`.
    """
    told = outcome.components.get("valid_format", math.nan)
    return told if 0 <= told <= 1 else valid_action(outcome)


def _passed(k: int, outcomes: Sequence[Outcome]) -> float:
    return pass_at_k(len(outcomes), sum(map(succeeded, outcomes)), k)


def _ks(samples: int) -> list[int]:
    """1, 2, 4, … and the number of samples itself."""
    return sorted({1 << n for n in range(samples.bit_length()) if 1 << n <= samples} | {samples})


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
