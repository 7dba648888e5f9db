"""Log-probabilities and entropies of chosen tokens without a [T, V] tensor.

The head's logits of a long response are by far the largest tensor of a training step (T x 49,152 floats for
SmolLM2). Here they exist for one chunk of positions at a time: the forward pass keeps only the normaliser and
the entropy of each position, the backward pass makes each chunk's logits again. Peak memory is a few `chunk *
V` floats, whatever T is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 256


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor | float = 1.0, *, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution, softmax(hidden @ weight.T /
    temperature).

    Args:
        hidden: [T, D], the hidden state that predicts each target.
        weight: [V, D], of the language-model head (no bias).
        targets: [T], token ids.
        temperature: [T] or one number, > 0; constant, no gradient flows into it.
        chunk: positions whose logits exist at one time.

    Returns:
        (log-probabilities [T], entropies [T]) in nats, float32 or wider. Both carry gradient into hidden and
        weight. The same numbers as `torch.log_softmax` to rounding. Under autocast the products run in its
        lower precision and everything after them in float32.
    """
    if isinstance(temperature, int | float):
        temperature = torch.full(targets.shape, float(temperature))
    wide = torch.promote_types(hidden.dtype, torch.float32)
    inverse = temperature.to(device=hidden.device, dtype=wide).reciprocal()
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    logprobs, entropies = _TokenLogprobs.apply(hidden, weight, targets, inverse, chunk)  # type: ignore[no-untyped-call]
    return logprobs, entropies


def _scaled_logits(hidden: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    return (hidden @ weight.T).to(inverse.dtype).mul_(inverse[:, None])


class _TokenLogprobs(torch.autograd.Function):
    """With z = logits / temperature, p = softmax(z), L = log p[target], H = -sum p log p:
    dL/dz = onehot(target) - p  and  dH/dz = -p (log p + H)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, inverse: Tensor, chunk: int
    ) -> Any:
        cast = weight.to(hidden.dtype)
        normaliser, logprobs, entropies = (torch.empty_like(inverse) for _ in range(3))
        for part in _parts(len(targets), chunk):
            logits = _scaled_logits(hidden[part], cast, inverse[part])
            normaliser[part] = torch.logsumexp(logits, dim=-1)
            logprobs[part] = logits.gather(1, targets[part, None]).squeeze(1) - normaliser[part]
            logits -= normaliser[part, None]
            entropies[part] = -(logits.exp() * logits).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, inverse, normaliser, entropies)
        ctx.chunk = chunk
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_logprobs, grad_entropies = grads
        hidden, weight, targets, inverse, normaliser, entropies = ctx.saved_tensors
        cast = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        # Chunks are summed in the wide type: a bfloat16 accumulator would lose small contributions.
        grad_weight = torch.zeros_like(weight, dtype=inverse.dtype) if ctx.needs_input_grad[1] else None
        entropy_counts = bool(
            grad_entropies.count_nonzero()
        )  # no gradient arrives as zeros; then half the work is idle
        for part in _parts(len(targets), ctx.chunk):
            logs = _scaled_logits(hidden[part], cast, inverse[part]).sub_(normaliser[part, None])
            probabilities = logs.exp()
            if entropy_counts:
                slope = logs.add_(entropies[part, None]).mul_(grad_entropies[part, None])
                grad_logits = slope.add_(grad_logprobs[part, None]).mul_(probabilities).neg_()
            else:
                grad_logits = probabilities.mul_(-grad_logprobs[part, None])
            grad_logits.scatter_add_(1, targets[part, None], grad_logprobs[part, None])
            grad_logits = grad_logits.mul_(inverse[part, None]).to(hidden.dtype)
            grad_hidden[part] = grad_logits @ cast
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[part]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _parts(length: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, length, chunk)]
