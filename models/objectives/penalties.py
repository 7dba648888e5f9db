"""Terms beside the objective: the divergence from the reference policy, entropy, DSDR's local entropy.

With d = log reference - l at a token sampled from the policy, four estimates of KL(policy || reference). An
estimate whose value is unbiased need not have an unbiased gradient, and a loss is only ever used for its
gradient:

- k1 = -d: value unbiased; its gradient is grad l, whose mean is 0: it does not pull at all.
- k2 = d^2 / 2: value biased; gradient unbiased.
- k3 = exp(d) - 1 - d: value unbiased and never negative; gradient biased, that of KL(reference || policy).
- k3-unbiased = rho k3 with rho = policy / writer, not detached (DeepSeek-V3.2, arXiv 2512.02556): value and
  gradient unbiased, for tokens that another policy wrote too.

k1, k2 and k3 suppose that the policy itself sampled; on replay they are biased by as much as the two differ.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, Literal, get_args

from torch import Tensor

from models.objectives.batch import Batch, Losses, lengths, log_ratio, wide, writer

KLEstimator = Literal["k1", "k2", "k3", "k3-unbiased"]
KL_ESTIMATORS: Final[tuple[str, ...]] = get_args(KLEstimator)


def kl(batch: Batch, estimator: KLEstimator = "k3") -> Tensor:
    """[N] estimates of KL(policy || reference) in nats, with gradient; |d| is clamped to 20.

    Raises:
        ValueError: no such estimator; no reference log-probabilities, or for k3-unbiased none of who wrote.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"there is no KL estimator {estimator}; choose from {', '.join(KL_ESTIMATORS)}")
    if batch.reference_logprobs is None:
        raise ValueError("the KL penalty needs reference_logprobs; the batch has none")
    difference = -log_ratio(batch, batch.reference_logprobs)
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    k3 = difference.expm1() - difference
    if estimator == "k3":
        return k3
    if writer(batch) is None:
        raise ValueError("k3-unbiased needs behaviour_logprobs or old_logprobs; the batch has neither")
    return log_ratio(batch, writer(batch)).exp() * k3


def penalised(
    losses: Losses,
    batch: Batch,
    *,
    kl_coefficient: float = 0.0,
    estimator: KLEstimator = "k3",
    entropy_coefficient: float = 0.0,
) -> Losses:
    """Losses plus kl_coefficient * KL minus entropy_coefficient * entropy at every token, aggregated as the
    objective is. A coefficient of 0 leaves its term, and what it needs, out. Corrections come before.

    Raises:
        ValueError: what a term needs is missing; see `kl`.
    """
    tokens = losses.tokens
    if kl_coefficient:
        tokens = tokens + kl_coefficient * kl(batch, estimator)
    if entropy_coefficient:
        if batch.entropies is None:
            raise ValueError("the entropy bonus needs entropies; the batch has none")
        tokens = tokens - entropy_coefficient * batch.entropies.to(tokens.dtype)
    return replace(losses, tokens=tokens)


def local_entropy(batch: Batch, groups: int) -> Tensor:
    """DSDR's -J_local (arXiv 2602.19895, equations 12-15), a scalar to be minimised: the mean over groups of
    sum_i w_i (1 / T_i) sum_t rho l, rho = policy / writer.

    rho is not detached: with a detached rho the mean gradient is 0. The expectation of -J_local is the
    negative mean token entropy of the correct answers. Micro-batches add up to the whole.

    Args:
        batch: with `diversity`, the w of each sequence: 0 for wrong answers, summing to 1 in a group that has
            a correct one.
        groups: groups of the whole batch, over all its micro-batches.

    Raises:
        ValueError: diversity, or log-probabilities of who wrote, are missing.
    """
    if batch.diversity is None:
        raise ValueError("the local entropy term needs diversity; the batch has none")
    if writer(batch) is None:
        raise ValueError("the local entropy term needs behaviour_logprobs or old_logprobs")
    share = (batch.diversity / lengths(batch).clamp(min=1))[batch.sequence]
    logprobs = wide(batch.logprobs)
    return (share.to(logprobs.dtype) * log_ratio(batch, writer(batch)).exp() * logprobs).sum() / groups
