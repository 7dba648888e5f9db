"""Objectives of REINFORCE form, -sg(c) A l: the weight c of a token says how much its sample still counts, and
the gradient flows through the log-probability alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.objectives.batch import (
    LOG_RATIO_BOUND,
    Batch,
    Losses,
    bounded_sum,
    log_ratio,
    per_sequence,
    sampler,
    sequence_mean,
    wide,
)
from models.objectives.registry import register

W_FLOOR = 1e-8
LAMBDA_FLOOR = 1e-4


@register("reinforce")
def reinforce(batch: Batch) -> Losses:
    """Plain policy gradient -A l; ignores who sampled the data, so it needs no behaviour
    log-probabilities."""
    return _reinforce(batch, torch.ones_like(wide(batch.logprobs)))


@register("vespo", needs=("behaviour_logprobs",), correction="inside")
def vespo(
    batch: Batch, *, c1_pos: float = 2.0, c2_pos: float = 3.0, c1_neg: float = 3.0, c2_neg: float = 2.0
) -> Losses:
    """VESPO (arXiv 2602.10693v3, equation 20, and the authors' code): c = W^c1 exp(c2 (1 - W)), W the product
    of a sequence's ratios.

    The constants go by the sign of the advantage (zero counts as positive); no clipping, no length
    normalisation. A correction of old against behaviour (`Batch.correction`) is multiplied into W and
    nowhere else. log W is clamped to +-20, and taken as log 1e-8 at least in its c1 term.
    """
    return _vespo(batch, -LOG_RATIO_BOUND, (c1_pos, c2_pos), (c1_neg, c2_neg))


@register("vespo_trl", needs=("behaviour_logprobs",), correction="inside")
def vespo_trl(
    batch: Batch, *, c1_pos: float = 2.0, c2_pos: float = 3.0, c1_neg: float = 3.0, c2_neg: float = 2.0
) -> Losses:
    """VESPO by TRL's convention (`GRPOTrainer.get_gamma_weights`): log W is at least log 1e-8 in both terms."""
    return _vespo(batch, math.log(W_FLOOR), (c1_pos, c2_pos), (c1_neg, c2_neg))


@register("cispo", needs=("behaviour_logprobs",))
def cispo(batch: Batch, *, eps_lo: float = 1.0, eps_hi: float = 0.28) -> Losses:
    """CISPO (MiniMax-M1, arXiv 2506.13585, equations 4-5): c = clip(rho, 1 - eps_lo, 1 + eps_hi), so that every
    token keeps a gradient; token-mean.

    The paper has no lower bound, hence eps_lo = 1, and does not give its eps_hi; 0.28 is ARLArena's for
    mathematics.
    """
    return _reinforce(batch, _token_weight(batch, sampler(batch)).clamp(1 - eps_lo, 1 + eps_hi))


@register("cispo_trl", needs=("behaviour_logprobs",))
def cispo_trl(batch: Batch, *, cap: float = 5.0) -> Losses:
    """CISPO by TRL's convention: c = min(rho, cap), an absolute cap (TRL's `epsilon_high`; 5 is ScaleRL's)."""
    return _reinforce(batch, _token_weight(batch, sampler(batch)).clamp(max=cap))


@register("topr", needs=("behaviour_logprobs",))
def topr(
    batch: Batch,
    *,
    pos_low: float = 1.0,
    pos_high: float = 1.0,
    neg_low: float = 0.0,
    neg_high: float = 1.0,
    length_normalised: bool = False,
) -> Losses:
    """TOPR (arXiv 2503.14286): c = clip(W, 1, 1) = 1 for positives, clip(W, 0, 1) for negatives.

    The sign is the advantage's (the paper has rewards of +-1 and no baseline). The paper divides the loss by
    the sequence's length: seq-mean-token-mean.

    Args:
        batch: tokens.
        pos_low: with `pos_high` the limits of W where A >= 0.
        pos_high: see `pos_low`.
        neg_low: with `neg_high` the limits of W where A < 0.
        neg_high: see `neg_low`.
        length_normalised: W^(1/T) in place of W, as in VESPO's comparison.
    """
    ratios = log_ratio(batch, sampler(batch)).detach()
    log_w = sequence_mean(ratios, batch) if length_normalised else bounded_sum(ratios, batch)
    weights = log_w.exp()[batch.sequence]
    positive, negative = weights.clamp(pos_low, pos_high), weights.clamp(neg_low, neg_high)
    return _reinforce(batch, torch.where(batch.advantages >= 0, positive, negative))


@register("tis", needs=("behaviour_logprobs",), correction="own")
def tis(batch: Batch, *, high: float = 2.0) -> Losses:
    """Truncated importance sampling of tokens: c = min(pi / behaviour, high)."""
    return _reinforce(batch, _token_weight(batch, batch.behaviour_logprobs).clamp(max=high))


@register("sequence_tis", needs=("behaviour_logprobs",), correction="own")
def sequence_tis(batch: Batch, *, high: float = 2.0) -> Losses:
    """Truncated importance sampling of sequences: c = min(W, high), W the product of pi / behaviour."""
    return _reinforce(batch, _sequence_weight(batch).clamp(max=high))


@register("mis", needs=("behaviour_logprobs",), correction="own")
def mis(batch: Batch, *, low: float = 0.5, high: float = 2.0) -> Losses:
    """Masked importance sampling of tokens: c = pi / behaviour where it lies in [low, high], else 0."""
    return _reinforce(batch, masked(_token_weight(batch, batch.behaviour_logprobs), low, high))


@register("sequence_mis", needs=("behaviour_logprobs",), correction="own")
def sequence_mis(batch: Batch, *, low: float = 0.5, high: float = 2.0) -> Losses:
    """Masked importance sampling of sequences: c = W where it lies in [low, high], else 0."""
    return _reinforce(batch, masked(_sequence_weight(batch), low, high))


@register("icepop", needs=("behaviour_logprobs",), correction="own")
def icepop(batch: Batch, *, low: float = 0.5, high: float = 5.0) -> Losses:
    """IcePop (Ring-1T, arXiv 2510.18855): `mis` with the wider band of its authors.

    They apply it to the train engine's log-probabilities against the inference engine's, beside PPO's clip; here
    it stands alone and takes in staleness as well. The correction `token-mis` is their use.
    """
    return _reinforce(batch, masked(_token_weight(batch, batch.behaviour_logprobs), low, high))


@register("dppo", needs=("behaviour_logprobs",))
def dppo(batch: Batch, *, delta_lo: float = 0.2, delta_hi: float = 0.2, cap: float = 20.0) -> Losses:
    """DPPO with the binary total variation (arXiv 2602.04879): c = min(rho, cap), 0 for a token whose
    probability moved too far already in the direction of its advantage.

    Masked are tokens with A > 0 and pi - sampler > delta_hi, or A < 0 and pi - sampler < -delta_lo: unlike a
    ratio, the difference of probabilities lets rare tokens move and holds common ones. Thresholds and cap are
    verl's (`dppo_tv`); prime-rl (`trainer/rl/loss.py`) masks alike, has no cap, and adds a penalty on
    (log rho)^2.
    """
    denominator = sampler(batch)
    assert denominator is not None  # of `needs`
    logprobs = wide(batch.logprobs.detach())
    moved = logprobs.clamp(max=0).exp() - denominator.to(logprobs.dtype).clamp(max=0).exp()
    outside = torch.where(batch.advantages > 0, moved > delta_hi, moved < -delta_lo)
    return _reinforce(batch, _token_weight(batch, denominator).clamp(max=cap).masked_fill(outside, 0.0))


def masked(weights: Tensor, low: float, high: float) -> Tensor:
    """`weights` where they lie in [low, high], else 0."""
    return weights * ((weights >= low) & (weights <= high))


def _reinforce(batch: Batch, coefficient: Tensor) -> Losses:
    """-c A l for a detached coefficient [N]."""
    tokens = -coefficient * batch.advantages.to(coefficient.dtype) * wide(batch.logprobs)
    return Losses(tokens, sequence_mean(coefficient, batch))


def _token_weight(batch: Batch, denominator: Tensor | None) -> Tensor:
    """[N] pi / denominator, detached."""
    return log_ratio(batch, denominator).detach().exp()


def _sequence_weight(batch: Batch) -> Tensor:
    """[N] product of pi / behaviour over the token's sequence, detached."""
    ratios = log_ratio(batch, batch.behaviour_logprobs).detach()
    return bounded_sum(ratios, batch).exp()[batch.sequence]


def _vespo(
    batch: Batch, floor: float, positive: tuple[float, float], negative: tuple[float, float]
) -> Losses:
    log_w = per_sequence(log_ratio(batch, sampler(batch)).detach(), batch)
    if batch.correction is not None:
        folded = batch.correction.to(log_w.dtype).clamp(min=W_FLOOR).log().clamp(max=LOG_RATIO_BOUND)
        log_w = log_w + per_sequence(folded, batch)
    log_w = log_w.clamp(floor, LOG_RATIO_BOUND)
    phi_pos, phi_neg = _kernel(log_w, *positive), _kernel(log_w, *negative)
    chosen = torch.where(batch.advantages >= 0, phi_pos[batch.sequence], phi_neg[batch.sequence])
    return _reinforce(batch, chosen)


def _kernel(log_w: Tensor, c1: float, c2: float) -> Tensor:
    c2 = max(c2, LAMBDA_FLOOR)
    log_phi = c2 + c1 * log_w.clamp(min=math.log(W_FLOOR)) - c2 * log_w.exp()
    return torch.nan_to_num(log_phi.exp(), nan=0.0, posinf=0.0, neginf=0.0)
