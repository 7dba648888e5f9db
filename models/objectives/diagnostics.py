"""Numbers that tell whether a batch can still teach: how stale it is, and what the objective leaves of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from models.objectives.batch import (
    LOG_RATIO_BOUND,
    Batch,
    Losses,
    lengths,
    log_ratio,
    per_sequence,
    sequence_log_ratio,
)

QUANTILES: Final = (1, 5, 25, 50, 75, 95, 99)
"""Per cent."""

DEAD = 0.01
"""A sequence with a smaller phi teaches nothing to speak of."""

FAR = -2.0
"""log W of a sequence that the policy has nearly given up."""


def token_statistics(batch: Batch, entropies: Tensor) -> dict[str, Tensor]:
    """Detached per-token numbers of a batch: [N] k1 and k3 estimates of KL(behaviour || policy), and entropy,
    nats.

    k1 = mu - l is unbiased and may be negative, k3 = exp(l - mu) - 1 - (l - mu) never is.
    """
    difference = log_ratio(batch, batch.behaviour_logprobs).detach()
    return {"kl_k1": -difference, "kl_k3": _k3(difference), "entropy": entropies.detach()}


def summarise(log_ratio: Tensor, phi: Tensor, tokens: Mapping[str, Tensor]) -> dict[str, float]:
    """Numbers of one step from all its sequences (log W and phi, [S]) and tokens ([N] each).

    ess is the normalised effective sample size (sum W)^2 / (S sum W^2) in (0, 1]; phi_dead the share of
    sequences with phi < 0.01, which no longer teach anything; ratio_mean and ratio_max are of W bounded to e^+-20.
    """
    ratio = log_ratio.double()
    bounded = _bounded(ratio).exp()
    means = {name: float(values.double().mean()) for name, values in tokens.items()}
    return means | {
        "ess": effective_sample_size(ratio),
        "phi": float(phi.double().mean()),
        "phi_dead": float((phi < DEAD).double().mean()),
        "ratio_mean": float(bounded.mean()),
        "ratio_max": float(bounded.max()),
        "log_ratio_mean": float(ratio.mean()),
        "log_ratio_std": float(ratio.std(correction=0)),
    }


def effective_sample_size(log_ratios: Tensor) -> float:
    """(sum W)^2 / (S sum W^2) of S log ratios, in (0, 1]: 1 on policy, 1 / S where one sample outweighs all."""
    ratio = log_ratios.double()
    size = (2 * torch.logsumexp(ratio, 0) - torch.logsumexp(2 * ratio, 0)).exp()
    return float(size / max(len(ratio), 1))


def chi_square(log_ratios: Tensor) -> float:
    """mean W^2 - 1 of S log ratios: estimates chi^2(policy || behaviour), the variance of W; unbiased, and
    from samples it may fall below 0. Ratios are bounded to e^+-20, so that it is a number."""
    return float((2 * _bounded(log_ratios.double())).exp().mean() - 1)


def coefficients(losses: Losses, batch: Batch) -> Tensor:
    """[N] what each token's log-probability is pushed by, -d(sum of token losses)/dl = c A, detached.

    Exact for any objective, the user's own included. Call it before the backward pass frees the graph.
    """
    (gradient,) = torch.autograd.grad(
        losses.tokens.sum(), batch.logprobs, retain_graph=True, materialize_grads=True
    )
    return -gradient


def kl_mass(batch: Batch) -> dict[str, float]:
    """Where the policy has left its behaviour: shares of sum k3, the KL estimate whose mean is `kl_k3`, by sign of
    the advantage and side of the ratio pi / behaviour (ARLArena, arXiv 2602.21534, tells a collapse by them).

    Unlike the push this does not ask what the objective makes of a token: one that a clip or a mask leaves without
    gradient counts too.

    Args:
        batch: with behaviour log-probabilities, and entropies [N] or none; no gradient is needed.

    Returns:
        kl_mass_positive_above and three more, of tokens with A > 0 or < 0 and a ratio above 1 or at most 1; where
        there are entropies also kl_mass_positive_above_high and three more, the part of each that lies on
        tokens whose entropy is above the batch's median. What is missing to 1 lies on tokens with A = 0. Shares of
        nothing are 0.

    Raises:
        ValueError: no behaviour log-probabilities.
    """
    if batch.behaviour_logprobs is None:
        raise ValueError("the KL mass needs behaviour_logprobs")
    tokens = log_ratio(batch, batch.behaviour_logprobs).detach().double()
    found = _by_bin("kl_mass", _k3(tokens), batch.advantages, tokens)
    if batch.entropies is None:
        return found
    entropies = batch.entropies.detach()
    high = entropies > entropies.median()
    parts = _by_bin("kl_mass", _k3(tokens), batch.advantages, tokens, high)
    return found | {f"{name}_high": share for name, share in parts.items()}


def masked_sequences(batch: Batch, kept: Tensor) -> float:
    """The share of sequences of which `corrections.sequence_mask` ([N] of 1 and 0) removes a token; 0 of none."""
    removed = per_sequence(1 - kept, batch)[lengths(batch) > 0] > 0
    return _share(removed.sum(), torch.tensor(len(removed)))


def staleness(batch: Batch, phi: Tensor, pushes: Tensor) -> dict[str, float]:
    """The report of a batch whose tokens and sequences have all been scored.

    Args:
        batch: the whole batch, with behaviour log-probabilities, and entropies or none; no gradient is needed.
        phi: [sequences], from the objective's `Losses`.
        pushes: [N], from `coefficients`.

    Returns:
        ess, chi2 of sequences and ess_token, chi2_token of tokens; log_ratio_q01 .. _q99, quantiles of the
        tokens' log ratio, and log_w_q01 .. of the sequences'; phi_dead; the push by bin: mass_positive_above and three more,
        the share of sum |c A| from tokens with A > 0 or < 0 and pi / behaviour above 1 or at most 1; the KL by the
        same bins, see `kl_mass`; far_negative, the share of the push from tokens with A < 0 of sequences with W < e^-2;
        clipped_positive, clipped_negative, the share of tokens of that sign that have no gradient: outside the
        objective's band, or masked. An objective that only bounds its weights (CISPO, TIS, TOPR) leaves every token
        some, however far it is outside, and one that lets them fade (SAPO, VESPO) nearly every: only a mask brings
        these off 0 there. Shares of nothing are 0.

    Raises:
        ValueError: no behaviour log-probabilities, or no tokens.
    """
    if batch.behaviour_logprobs is None or not len(batch.logprobs):
        raise ValueError("a staleness report needs tokens with behaviour_logprobs")
    tokens = log_ratio(batch, batch.behaviour_logprobs).detach().double()
    taught = lengths(batch) > 0
    sequences = sequence_log_ratio(batch)[taught].double()
    signs = _signs(batch.advantages)
    mass = pushes.detach().double().abs()
    given_up = (sequence_log_ratio(batch) < FAR)[batch.sequence]
    return (
        {
            "ess": effective_sample_size(sequences),
            "ess_token": effective_sample_size(tokens),
            "chi2": chi_square(sequences),
            "chi2_token": chi_square(tokens),
            "phi_dead": float((phi[taught] < DEAD).double().mean()),
            "far_negative": _share(mass[signs["negative"] & given_up].sum(), mass.sum()),
        }
        | _quantiles("log_ratio", tokens)
        | _quantiles("log_w", sequences)
        | _by_bin("mass", mass, batch.advantages, tokens)
        | kl_mass(batch)
        | {
            f"clipped_{sign}": _share((of_sign & (mass == 0)).sum(), of_sign.sum())
            for sign, of_sign in signs.items()
        }
    )


def _k3(log_ratios: Tensor) -> Tensor:
    return log_ratios.expm1() - log_ratios


def _signs(advantages: Tensor) -> dict[str, Tensor]:
    return {"positive": advantages > 0, "negative": advantages < 0}


def _by_bin(
    name: str, mass: Tensor, advantages: Tensor, log_ratios: Tensor, where: Tensor | None = None
) -> dict[str, float]:
    """Shares of all `mass` by sign of the advantage and side of the ratio, of the tokens `where` (None: of all)."""
    counted = mass if where is None else mass * where
    sides = {"above": log_ratios > 0, "below": log_ratios <= 0}
    return {
        f"{name}_{sign}_{side}": _share(counted[of_sign & of_side].sum(), mass.sum())
        for sign, of_sign in _signs(advantages).items()
        for side, of_side in sides.items()
    }


def _bounded(log_ratios: Tensor) -> Tensor:
    return log_ratios.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def _quantiles(name: str, values: Tensor) -> dict[str, float]:
    # torch.quantile takes 2^24 values at most, and an update may have more tokens.
    ordered = values.sort().values
    places = torch.tensor(QUANTILES, dtype=torch.float64, device=values.device) / 100 * (len(values) - 1)
    below = places.long()
    found = torch.lerp(
        ordered[below], ordered[(below + 1).clamp(max=len(values) - 1)], (places - below).to(values)
    )
    return {f"{name}_q{level:02d}": value for level, value in zip(QUANTILES, found.tolist(), strict=True)}


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if whole > 0 else 0.0
