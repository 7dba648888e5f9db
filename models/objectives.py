"""Policy-gradient objectives on flat tensors of trained tokens, and the numbers that tell whether they still
work.

Notation: l = log-probability of a token under the policy, mu = under the behaviour policy that sampled it, A
= advantage, W = exp(sum over a sequence of l - mu). Losses are minimised. Every objective gives one loss per
token; an aggregation then divides by counts of the *whole* batch, so that a batch cut into micro-batches has
the gradient of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final, Literal, get_args

import torch
from torch import Tensor

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]
AGGREGATIONS: Final[tuple[str, ...]] = get_args(Aggregation)

LOG_RATIO_BOUND = 20.0
W_FLOOR = 1e-8
LAMBDA_FLOOR = 1e-4


@dataclass(frozen=True, slots=True)
class Batch:
    """Trained tokens of whole sequences; prompt, observation and padding tokens are not in it.

    `behaviour_logprobs` may be None only for objectives that do not need it.
    """

    logprobs: Tensor  # [N], carries gradient
    behaviour_logprobs: Tensor | None  # [N]
    advantages: Tensor  # [N], constant along a sequence unless an objective says otherwise
    sequence: Tensor  # [N] int64 in 0..sequences-1
    sequences: int


@dataclass(frozen=True, slots=True)
class Losses:
    """Loss of each token [N], and the coefficient phi [sequences] that the objective gave each sequence
    (detached)."""

    tokens: Tensor
    phi: Tensor


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens and sequences of the whole batch, over all its micro-batches."""

    tokens: int
    sequences: int


LossFunction = Callable[..., Losses]
"""An objective: a pure function of a `Batch`; further arguments are its own constants, with defaults."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A registered objective. `needs` names the fields of `Batch` that must be there, beyond logprobs and
    advantages."""

    name: str
    loss: LossFunction
    needs: frozenset[str]


_REGISTRY: dict[str, Objective] = {}


def register(name: str, needs: tuple[str, ...] = ()) -> Callable[[LossFunction], LossFunction]:
    """Decorator: make a loss function known under `name`.

    Raises:
        ValueError: the name is taken.
    """

    def keep(loss: LossFunction) -> LossFunction:
        if name in _REGISTRY:
            raise ValueError(f"objective {name} is registered already")
        _REGISTRY[name] = Objective(name, loss, frozenset(needs))
        return loss

    return keep


def get(name: str) -> Objective:
    """The objective called `name`.

    Raises:
        ValueError: unknown; the message names the nearest known one.
    """
    if name not in _REGISTRY:
        near = get_close_matches(name, _REGISTRY, n=1) or sorted(_REGISTRY)
        raise ValueError(f"there is no objective {name}; did you mean {', '.join(near)}?")
    return _REGISTRY[name]


def names() -> tuple[str, ...]:
    """Names of all objectives, sorted."""
    return tuple(sorted(_REGISTRY))


@register("vespo", needs=("behaviour_logprobs",))
def vespo(
    batch: Batch,
    *,
    c1_pos: float = 2.0,
    c2_pos: float = 3.0,
    c1_neg: float = 3.0,
    c2_neg: float = 2.0,
) -> Losses:
    """VESPO (arXiv 2602.10693v3, section 3 and the authors' code): -sg(phi(W)) A l, phi(W) = W^c1 exp(c2 (1 -
    W)).

    One phi per sequence, by the sign of its advantage (zero counts as positive); no clipping, no length
    normalisation.
    """
    weights = sequence_log_ratio(batch).exp()
    positive = _per_sequence(batch.advantages.detach(), batch) >= 0
    phi = torch.where(positive, _kernel(weights, c1_pos, c2_pos), _kernel(weights, c1_neg, c2_neg))
    coefficient = phi.to(batch.logprobs.dtype)[batch.sequence]
    return Losses(-coefficient * batch.advantages * batch.logprobs, phi)


@register("grpo", needs=("behaviour_logprobs",))
def grpo(batch: Batch, *, eps_lo: float = 0.2, eps_hi: float = 0.28) -> Losses:
    """GRPO's clipped surrogate (arXiv 2402.03300; eps_hi > eps_lo is DAPO's clip-higher, 2503.14476): token
    ratios.

    phi is reported as the share of a sequence's tokens that still have a gradient.
    """
    ratio = _log_ratio(batch).exp()
    clipped = ratio.clamp(1 - eps_lo, 1 + eps_hi)
    tokens = -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    alive = (
        torch.where(batch.advantages >= 0, ratio <= 1 + eps_hi, ratio >= 1 - eps_lo).to(ratio.dtype).detach()
    )
    return Losses(tokens, _per_sequence(alive, batch) / lengths(batch).clamp(min=1))


@register("reinforce")
def reinforce(batch: Batch) -> Losses:
    """Plain policy gradient -A l; ignores who sampled the data, so it needs no behaviour
    log-probabilities."""
    return Losses(-batch.advantages * batch.logprobs, batch.logprobs.new_ones(batch.sequences))


def aggregate(losses: Losses, batch: Batch, how: Aggregation, whole: Counts) -> Tensor:
    """Scalar loss of (a micro-batch of) a batch whose totals are `whole`; the parts of a batch add up to the
    whole.

    token-mean: sum of all token losses / tokens. seq-mean-token-mean: mean over sequences of the mean over
    tokens.
    seq-mean-token-sum: mean over sequences of the sum over tokens.
    """
    if how == "token-mean":
        return losses.tokens.sum() / whole.tokens
    if how == "seq-mean-token-mean":
        return (losses.tokens / lengths(batch)[batch.sequence]).sum() / whole.sequences
    if how == "seq-mean-token-sum":
        return losses.tokens.sum() / whole.sequences
    raise ValueError(f"there is no aggregation {how}; choose from {', '.join(AGGREGATIONS)}")


def lengths(batch: Batch) -> Tensor:
    """[sequences] number of trained tokens of each sequence."""
    return _per_sequence(torch.ones_like(batch.logprobs.detach()), batch)


def sequence_log_ratio(batch: Batch) -> Tensor:
    """[sequences] log W, detached: token differences clamped to +-20, summed in float32 or wider, clamped
    again."""
    return _per_sequence(_log_ratio(batch).detach(), batch).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def token_statistics(batch: Batch, entropies: Tensor) -> dict[str, Tensor]:
    """Detached per-token numbers of a batch: [N] k1 and k3 estimates of KL(behaviour || policy), and entropy,
    nats.

    k1 = mu - l is unbiased and may be negative, k3 = exp(l - mu) - 1 - (l - mu) never is.
    """
    difference = _log_ratio(batch).detach()
    return {"kl_k1": -difference, "kl_k3": difference.expm1() - difference, "entropy": entropies.detach()}


def summarise(log_ratio: Tensor, phi: Tensor, tokens: Mapping[str, Tensor]) -> dict[str, float]:
    """Numbers of one step from all its sequences (log W and phi, [S]) and tokens ([N] each).

    ess is the normalised effective sample size (sum W)^2 / (S sum W^2) in (0, 1]; phi_dead the share of
    sequences with phi < 0.01, which no longer teach anything.
    """
    ratio = log_ratio.double()
    count = max(len(ratio), 1)
    ess = (2 * torch.logsumexp(ratio, 0) - torch.logsumexp(2 * ratio, 0)).exp() / count
    means = {name: float(values.double().mean()) for name, values in tokens.items()}
    return means | {
        "ess": float(ess),
        "phi": float(phi.double().mean()),
        "phi_dead": float((phi < 0.01).double().mean()),
        "ratio_mean": float(ratio.exp().mean()),
        "ratio_max": float(ratio.exp().max()),
        "log_ratio_mean": float(ratio.mean()),
        "log_ratio_std": float(ratio.std(correction=0)),
    }


def _kernel(weights: Tensor, c1: float, c2: float) -> Tensor:
    c2 = max(c2, LAMBDA_FLOOR)
    log_phi = c2 + c1 * weights.clamp(min=W_FLOOR).log() - c2 * weights
    return torch.nan_to_num(log_phi.exp(), nan=0.0, posinf=0.0, neginf=0.0)


def _log_ratio(batch: Batch) -> Tensor:
    """[N] l - mu in float32 or wider, clamped; zero where no behaviour log-probabilities are known."""
    wide = torch.promote_types(batch.logprobs.dtype, torch.float32)
    if batch.behaviour_logprobs is None:
        return torch.zeros_like(batch.logprobs, dtype=wide)
    difference = batch.logprobs.to(wide) - batch.behaviour_logprobs.to(wide)
    return difference.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def _per_sequence(values: Tensor, batch: Batch) -> Tensor:
    return values.new_zeros(batch.sequences).index_add_(0, batch.sequence, values)
