"""Numbers that tell whether a batch can still teach: how stale it is, and what the objective leaves of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from models.objectives.batch import LOG_RATIO_BOUND, Batch, Losses, lengths, log_ratio, sequence_log_ratio

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
    return {"kl_k1": -difference, "kl_k3": difference.expm1() - difference, "entropy": entropies.detach()}


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


def staleness(batch: Batch, phi: Tensor, pushes: Tensor) -> dict[str, float]:
    """The report of a batch whose tokens and sequences have all been scored.

    Args:
        batch: the whole batch, with behaviour log-probabilities; no gradient is needed.
        phi: [sequences], from the objective's `Losses`.
        pushes: [N], from `coefficients`.

    Returns:
        ess, chi2 of sequences and ess_token, chi2_token of tokens; log_ratio_q01 .. _q99, quantiles of the
        tokens' log ratio, and log_w_q01 .. of the sequences'; phi_dead; mass_positive_above and three more,
        the share of sum |c A| from tokens with A > 0 or < 0 and pi / behaviour above 1 or at most 1; far_negative, the
        share from tokens with A < 0 of sequences with W < e^-2;
        clipped_positive, clipped_negative, the share of tokens of that sign that have no gradient. Shares of
        nothing are 0.

    Raises:
        ValueError: no behaviour log-probabilities, or no tokens.
    """
    if batch.behaviour_logprobs is None or not len(batch.logprobs):
        raise ValueError("a staleness report needs tokens with behaviour_logprobs")
    tokens = log_ratio(batch, batch.behaviour_logprobs).detach().double()
    taught = lengths(batch) > 0
    sequences = sequence_log_ratio(batch)[taught].double()
    signs = {"positive": batch.advantages > 0, "negative": batch.advantages < 0}
    sides = {"above": tokens > 0, "below": tokens <= 0}
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
        | {
            f"mass_{sign}_{side}": _share(mass[of_sign & of_side].sum(), mass.sum())
            for sign, of_sign in signs.items()
            for side, of_side in sides.items()
        }
        | {
            f"clipped_{sign}": _share((of_sign & (mass == 0)).sum(), of_sign.sum())
            for sign, of_sign in signs.items()
        }
    )


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
