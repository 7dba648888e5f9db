"""Detached weights and masks for samples of another policy than the proximal one that the objective assumes.

A weight has a level and a rule. Level: `token`, w = old / behaviour of the token; `sequence`, the product of
its sequence; `geometric`, the product to the power 1 / T. Rule: `tis` truncates, min(w, high); `mis` masks, w
where low <= w <= high, else 0. IcePop (arXiv 2510.18855) is `token-mis` with the band 0.5 to 5, TRL's
`token_mask`. verl's geometric rejection is a mask of 0 and 1 where `geometric-mis` keeps the weight, which
within the band is close to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from models.objectives.batch import (
    Batch,
    Losses,
    bounded_sum,
    log_ratio,
    scaled,
    sequence_mean,
    writer,
)
from models.objectives.registry import Objective
from models.objectives.weighted import masked

Weight = Literal["none", "token-tis", "sequence-tis", "token-mis", "sequence-mis", "geometric-mis"]
WEIGHTS: Final[tuple[str, ...]] = get_args(Weight)


def weights(batch: Batch, kind: Weight, *, low: float = 0.5, high: float = 2.0) -> Tensor:
    """[N] weights of old against behaviour, detached; ones for "none".

    Args:
        batch: with both log-probabilities, unless kind is "none".
        kind: level and rule, see above.
        low: smallest weight that `mis` keeps.
        high: cap of `tis`, largest weight that `mis` keeps.

    Raises:
        ValueError: there is no such kind, or a log-probability is missing.
    """
    if kind not in WEIGHTS:
        raise ValueError(f"there is no correction {kind}; choose from {', '.join(WEIGHTS)}")
    if kind == "none":
        return torch.ones_like(log_ratio(batch, None))
    if batch.old_logprobs is None or batch.behaviour_logprobs is None:
        raise ValueError(f"correction {kind} needs old_logprobs and behaviour_logprobs")
    level, rule = kind.split("-")
    ratios = log_ratio(replace(batch, logprobs=batch.old_logprobs.detach()), batch.behaviour_logprobs)
    if level == "sequence":
        ratios = bounded_sum(ratios, batch)[batch.sequence]
    elif level == "geometric":
        ratios = sequence_mean(ratios, batch)[batch.sequence]
    return ratios.exp().clamp(max=high) if rule == "tis" else masked(ratios.exp(), low, high)


def corrected(
    objective: Objective,
    batch: Batch,
    kind: Weight,
    *,
    low: float = 0.5,
    high: float = 2.0,
    options: Mapping[str, float] | None = None,
) -> Losses:
    """Losses of the objective with the correction applied once: to the token losses, or, for an objective that
    folds it into its own ratio (VESPO), there and nowhere else.

    Args:
        objective: from `get`.
        batch: with old and behaviour log-probabilities, unless kind is "none".
        kind: as for `weights`, with `low` and `high`.
        low: see `weights`.
        high: see `weights`.
        options: constants of the objective.

    Raises:
        ValueError: the objective weighs by the behaviour itself, so that a correction would count twice, or it
            folds in token weights alone; a field is missing; unknown option.
    """
    options = options or {}
    if kind == "none":
        return objective.loss(batch, **options)
    if objective.correction == "own":
        raise ValueError(
            f"objective {objective.name} weighs by the behaviour itself; correction {kind} would count it twice"
        )
    found = weights(batch, kind, low=low, high=high)
    if objective.correction == "outside":
        return scaled(objective.loss(batch, **options), batch, found)
    if not kind.startswith("token-"):
        raise ValueError(
            f"objective {objective.name} folds token weights into its sequence ratio; "
            f"choose token-tis or token-mis in place of {kind}"
        )
    return objective.loss(replace(batch, correction=found), **options)


def sequence_mask(batch: Batch, delta: float) -> Tensor:
    """DeepSeek-V3.2's off-policy mask (arXiv 2512.02556), [N] of 1 and 0: 0 for tokens with A < 0 in a sequence
    whose mean log(behaviour / pi) is above `delta` nats.

    Where no behaviour is given, old stands in for it. Apply it by `scaled`. The masked tokens stay in the denominators, as
    in TRL (ARL-Arena leaves them out).

    Raises:
        ValueError: the batch has neither behaviour nor old log-probabilities.
    """
    sampled = writer(batch)
    if sampled is None:
        raise ValueError("the sequence mask needs behaviour_logprobs or old_logprobs")
    drift = -sequence_mean(log_ratio(batch, sampled).detach(), batch)[batch.sequence]
    return ((batch.advantages >= 0) | (drift <= delta)).to(drift.dtype)
