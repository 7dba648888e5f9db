"""What an objective reads and what it gives back, and the sums over sequences that they share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""Log ratios are clamped to +-20 before exp, which keeps float32 finite; beyond it a ratio has no gradient."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Trained tokens of whole sequences; prompt, observation and padding tokens are not in it.

    The optional fields are None where nothing needs them, so that they need not be computed.
    """

    logprobs: Tensor  # [N], carries gradient
    advantages: Tensor  # [N], constant along a sequence unless an estimator gives turns their own
    sequence: Tensor  # [N] int64 in 0..sequences-1
    sequences: int
    behaviour_logprobs: Tensor | None = None  # [N], as sampled
    old_logprobs: Tensor | None = (
        None  # [N], of the proximal policy: the weights when the round of updates began
    )
    reference_logprobs: Tensor | None = None  # [N], of the frozen initial policy
    entropies: Tensor | None = None  # [N], carries gradient
    turn: Tensor | None = None  # [N] int64, turn of the episode that wrote the token
    group: Tensor | None = None  # [sequences] int64
    diversity: Tensor | None = None  # [sequences], DSDR's w: how much of the entropy term each sequence gets
    correction: Tensor | None = (
        None  # [N], weights of old against behaviour for an objective that folds them in
    )


@dataclass(frozen=True, slots=True)
class Losses:
    """Loss of each token [N], float32 or wider, to be minimised; and phi [sequences], detached: the mean over
    a sequence's tokens of the coefficient c in the token's gradient -c A grad l."""

    tokens: Tensor
    phi: Tensor


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens and sequences of the whole batch, over all its micro-batches."""

    tokens: int
    sequences: int


def wide(values: Tensor) -> Tensor:
    """`values` in float32 or wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def log_ratio(batch: Batch, denominator: Tensor | None) -> Tensor:
    """[N] l - denominator, float32 or wider, clamped to +-20; zeros where the denominator is not known."""
    logprobs = wide(batch.logprobs)
    if denominator is None:
        return torch.zeros_like(logprobs)
    return (logprobs - denominator.to(logprobs.dtype)).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def sampler(batch: Batch) -> Tensor | None:
    """[N] log-probabilities that a single importance ratio divides by: old if given, else behaviour."""
    return batch.behaviour_logprobs if batch.old_logprobs is None else batch.old_logprobs


def writer(batch: Batch) -> Tensor | None:
    """[N] log-probabilities of who wrote the tokens, which an expectation over them divides by: behaviour if given,
    else old."""
    return batch.old_logprobs if batch.behaviour_logprobs is None else batch.behaviour_logprobs


def sequence_log_ratio(batch: Batch) -> Tensor:
    """[sequences] log W of the policy against the behaviour policy, float64, detached. Zeros where the behaviour is
    not known.

    As it is, without a bound: were all sequences clamped to one number, a policy that has left the data would look
    like one that never moved.
    """
    if batch.behaviour_logprobs is None:
        return torch.zeros(batch.sequences, dtype=torch.float64, device=batch.logprobs.device)
    return per_sequence(batch.logprobs.detach().double() - batch.behaviour_logprobs.double(), batch)


def bounded_sum(log_ratios: Tensor, batch: Batch) -> Tensor:
    """[sequences] sum over each sequence of [N] log ratios, clamped to +-20."""
    return per_sequence(log_ratios, batch).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def per_sequence(values: Tensor, batch: Batch) -> Tensor:
    """[sequences] sum of [N] values over each sequence."""
    return values.new_zeros(batch.sequences).index_add_(0, batch.sequence, values)


def sequence_mean(values: Tensor, batch: Batch) -> Tensor:
    """[sequences] mean of [N] values over each sequence; 0 for one without tokens."""
    return per_sequence(values, batch) / lengths(batch).clamp(min=1)


def lengths(batch: Batch) -> Tensor:
    """[sequences] number of trained tokens of each sequence, float32 or wider."""
    counts = torch.bincount(batch.sequence, minlength=batch.sequences)
    return counts.to(torch.promote_types(batch.logprobs.dtype, torch.float32))


def scaled(losses: Losses, batch: Batch, weights: Tensor) -> Losses:
    """Losses times detached weights [N]; phi times the mean weight of the sequence."""
    weights = weights.detach()
    return Losses(losses.tokens * weights, losses.phi * sequence_mean(weights, batch))
