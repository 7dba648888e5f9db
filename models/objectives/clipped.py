"""Objectives that differentiate the importance ratio and clip, gate or mask it.

Their coefficient c, the multiplier of -A grad l, is the ratio where the ratio still counts and 0 where it was
clipped.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from models.objectives.batch import Batch, Losses, log_ratio, sampler, sequence_mean, wide
from models.objectives.registry import register


@register("ppo", needs=("behaviour_logprobs",))
def ppo(batch: Batch, *, eps: float = 0.2, dual_clip: float = math.inf) -> Losses:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7): -min(rho A, clip(rho, 1 - eps, 1 + eps) A).

    Args:
        batch: tokens.
        eps: half width of the band.
        dual_clip: c > 1; the loss of a token with A < 0 is at most c |A| (arXiv 1912.09729; verl has 3).
    """
    return _surrogate(batch, _ratio(batch), 1 - eps, 1 + eps, dual_clip=dual_clip)


@register("grpo", needs=("behaviour_logprobs",))
def grpo(batch: Batch, *, eps_lo: float = 0.2, eps_hi: float = 0.2) -> Losses:
    """GRPO's clipped surrogate (arXiv 2402.03300, equation 3): PPO's with a bound on either side, token ratios.

    The paper aggregates by seq-mean-token-mean, verl and TRL by token-mean.
    """
    return _surrogate(batch, _ratio(batch), 1 - eps_lo, 1 + eps_hi)


@register("dapo", needs=("behaviour_logprobs",))
def dapo(batch: Batch, *, eps_lo: float = 0.2, eps_hi: float = 0.28) -> Losses:
    """DAPO's clip-higher (arXiv 2503.14476, section 3.1): GRPO's surrogate with more room above; token-mean."""
    return _surrogate(batch, _ratio(batch), 1 - eps_lo, 1 + eps_hi)


@register("dr_grpo", needs=("behaviour_logprobs",))
def dr_grpo(batch: Batch, *, eps_lo: float = 0.2, eps_hi: float = 0.2) -> Losses:
    """Dr.GRPO (arXiv 2503.20783): GRPO's surrogate; what differs is the aggregation, `constant`, and the
    advantage, which is not divided by the standard deviation."""
    return _surrogate(batch, _ratio(batch), 1 - eps_lo, 1 + eps_hi)


@register("gspo", needs=("behaviour_logprobs",))
def gspo(batch: Batch, *, eps_lo: float = 3e-4, eps_hi: float = 4e-4) -> Losses:
    """GSPO (arXiv 2507.18071): clipped surrogate of s = W^(1/T), one ratio a sequence, which every
    token of it carries. Aggregated by seq-mean-token-mean.

    The gradient of s spreads evenly over the sequence's tokens; where turns have advantages of their own, so
    does the credit. `gspo_token` keeps it apart.
    """
    mean = sequence_mean(log_ratio(batch, sampler(batch)), batch)
    return _surrogate(batch, mean.exp()[batch.sequence], 1 - eps_lo, 1 + eps_hi)


@register("gspo_token", needs=("behaviour_logprobs",))
def gspo_token(batch: Batch, *, eps_lo: float = 3e-4, eps_hi: float = 4e-4) -> Losses:
    """GSPO-token (arXiv 2507.18071): sg(s) pi / sg(pi), so that each token has the value of s and
    its own gradient.

    Where A is constant along a sequence it has the value and gradient of `gspo`, under every aggregation.
    """
    return _surrogate(batch, _sequence_ratio_by_token(batch), 1 - eps_lo, 1 + eps_hi)


@register("sampo", needs=("behaviour_logprobs",))
def sampo(batch: Batch, *, eps_lo: float = 3e-3, eps_hi: float = 4e-3) -> Losses:
    """SAMPO's loss (arXiv 2602.21534, equation 8): GSPO-token with a wider band, a turn as the sequence
    (`by_turn`), token-mean. (The authors' code aggregates by seq-mean-token-mean.)"""
    return _surrogate(batch, _sequence_ratio_by_token(batch), 1 - eps_lo, 1 + eps_hi)


@register("sapo", needs=("behaviour_logprobs",))
def sapo(batch: Batch, *, tau_pos: float = 1.0, tau_neg: float = 1.05) -> Losses:
    """SAPO (arXiv 2511.20347v2, equations 5-6): -A (4 / tau) sigmoid(tau (rho - 1)), tau by the sign of A.

    A soft gate in place of a clip: c = 4 p (1 - p) rho with p the sigmoid, 1 at rho = 1 whatever tau.
    seq-mean-token-mean.
    """
    ratio = _ratio(batch)
    tau = torch.full_like(ratio.detach(), tau_neg).masked_fill(batch.advantages > 0, tau_pos)
    gate = torch.sigmoid(tau * (ratio - 1))
    coefficient = (4 * gate * (1 - gate) * ratio).detach()
    tokens = -batch.advantages.to(ratio.dtype) * 4 / tau * gate
    return Losses(tokens, sequence_mean(coefficient, batch))


@register("decoupled_ppo", needs=("old_logprobs", "behaviour_logprobs"), correction="own")
def decoupled_ppo(batch: Batch, *, eps: float = 0.2, max_weight: float = math.inf) -> Losses:
    """Decoupled PPO (AReaL, arXiv 2505.24298): PPO around the proximal policy, times sg(old /
    behaviour).

    Args:
        batch: tokens.
        eps: half width of the band of pi / old.
        max_weight: AReaL's filter (its configurations have 5): tokens whose old / behaviour is above have no
            loss; they stay in the denominator.
    """
    weight = _staleness(batch).exp()
    return _surrogate(batch, _ratio(batch), 1 - eps, 1 + eps, weight=weight * (weight <= max_weight))


@register("m2po", needs=("behaviour_logprobs",), coupled=True)
def m2po(batch: Batch, *, threshold: float = 0.04) -> Losses:
    """M2PO (arXiv 2510.01161, section 4): -rho A without a clip; of the tokens outside the trust region, those
    that left it furthest are masked until the mean of (log rho)^2 over the rest is at most `threshold`.

    Outside are tokens with A > 0 and rho > 1 or A < 0 and rho < 1. Masked tokens stay in the denominator. The
    mean is over the batch given: in micro-batches the budget holds in each, hence in the whole, but masks
    other tokens.
    """
    log_rho = log_ratio(batch, sampler(batch)).detach()
    kept = _within_second_moment(log_rho.square(), batch.advantages * log_rho > 0, threshold)
    return _surrogate(batch, _ratio(batch), 0.0, math.inf, weight=kept)


@register("m2po_areal", needs=("old_logprobs", "behaviour_logprobs"), correction="own", coupled=True)
def m2po_areal(batch: Batch, *, threshold: float = 0.04, eps: float = 0.2, max_weight: float = 5.0) -> Losses:
    """M2PO as AReaL has it: `decoupled_ppo` over the tokens that a second moment of log(old / behaviour) keeps.

    Tokens of either sign count, wherever they moved, and the mean must be below the threshold, not at it.
    """
    staleness = _staleness(batch)
    everywhere = torch.ones_like(staleness, dtype=torch.bool)
    kept = _within_second_moment(staleness.square(), everywhere, math.nextafter(threshold, -math.inf))
    weight = staleness.exp()
    return _surrogate(batch, _ratio(batch), 1 - eps, 1 + eps, weight=weight * (weight <= max_weight) * kept)


@register("bapo", needs=("behaviour_logprobs",), coupled=True)
def bapo(
    batch: Batch,
    *,
    target: float = 1.0,
    low: float = 0.6,
    low_max: float = 0.8,
    high: float = 1.2,
    high_max: float = 2.0,
    step: float = 0.05,
    dual_clip: float = 3.0,
) -> Losses:
    """BAPO (arXiv 2510.18927 and its code): PPO whose band is moved until positive advantages weigh enough.

    While the contribution of tokens with A > 0 is below `target` times that of tokens with A < 0, the lower
    bound rises by `step` from `low` to `low_max`, then the upper one from `high` to `high_max`; that is the
    order of the code, the paper's algorithm raises the upper one first. The band is that of the batch given: in
    micro-batches each has its own.
    """
    ratio = _ratio(batch)
    low, high = _balanced_band(batch, ratio.detach(), target, (low, low_max), (high, high_max), step)
    return _surrogate(batch, ratio, low, high, dual_clip=dual_clip)


def _surrogate(
    batch: Batch,
    ratio: Tensor,
    low: float,
    high: float,
    *,
    dual_clip: float = math.inf,
    weight: Tensor | None = None,
) -> Losses:
    """-min(ratio A, clip(ratio, low, high) A) for a ratio [N] with gradient, times a detached weight [N]; at
    most dual_clip |A| where A < 0."""
    advantages = batch.advantages.to(ratio.dtype)
    negative = advantages < 0
    tokens = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    ceiling = torch.where(negative, dual_clip * advantages.abs(), math.inf)
    alive = torch.where(negative, (ratio >= low) & (ratio <= dual_clip), ratio <= high)
    weight = torch.ones_like(ratio.detach()) if weight is None else weight
    phi = sequence_mean(ratio.detach() * alive * weight, batch)
    return Losses(torch.minimum(tokens, ceiling) * weight, phi)


def _ratio(batch: Batch) -> Tensor:
    """[N] pi / sampler, with gradient."""
    return log_ratio(batch, sampler(batch)).exp()


def _sequence_ratio_by_token(batch: Batch) -> Tensor:
    """[N] W^(1/T) in value, with the gradient of each token's own log-probability; at most e^10, as in verl."""
    ratios = log_ratio(batch, sampler(batch))
    mean = sequence_mean(ratios.detach(), batch)[batch.sequence]
    own = wide(batch.logprobs)
    return (mean + (own - own.detach())).clamp(max=10.0).exp()


def _staleness(batch: Batch) -> Tensor:
    """[N] log(old / behaviour), detached and clamped."""
    assert batch.old_logprobs is not None  # of `needs`
    return log_ratio(replace(batch, logprobs=batch.old_logprobs), batch.behaviour_logprobs).detach()


def _within_second_moment(square: Tensor, among: Tensor, threshold: float) -> Tensor:
    """[N] 1 or 0: drop the largest of the squares `among` until the mean of those left is <= threshold; the
    others stay."""
    order = square.masked_fill(~among, math.inf).argsort(stable=True)
    running = square.masked_fill(~among, math.inf)[order].double().cumsum(0)
    means = running / torch.arange(1, len(order) + 1, device=order.device)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return (~among | (rank < (means <= threshold).sum())).to(square.dtype)


def _balanced_band(
    batch: Batch,
    ratio: Tensor,
    target: float,
    low: tuple[float, float],
    high: tuple[float, float],
    step: float,
) -> tuple[float, float]:
    """The first band of BAPO's search that gives positives `target` times the weight of negatives, or the last."""
    size = batch.advantages.to(ratio.dtype).abs()
    positive = batch.advantages > 0

    def enough(low: float, high: float) -> bool:
        gain = (ratio.clamp(max=high) * size)[positive].sum()
        pain = (ratio.clamp(min=low) * size)[~positive].sum()
        return bool(gain >= target * pain)

    lows = [min(low[0] + i * step, low[1]) for i in range(math.ceil((low[1] - low[0]) / step) + 1)]
    highs = [min(high[0] + i * step, high[1]) for i in range(math.ceil((high[1] - high[0]) / step) + 1)]
    bands = [(bound, high[0]) for bound in lows] + [(lows[-1], bound) for bound in highs[1:]]
    return next((band for band in bands if enough(*band)), bands[-1])
