"""Log-probabilities and entropies of chosen tokens without a [T, V] tensor.

The head's logits of a long response are by far the largest tensor of a training step (T x 49,152 floats for
SmolLM2). Here they exist for one chunk of positions at a time. The forward pass keeps the probabilities of the first
chunks, up to `KEPT_BYTES`, and of the others only the normaliser; the backward pass makes the chunks that were not
kept again. Peak memory is fixed, whatever T is, and a short answer costs no logits twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Logits that exist at one time. The product of a chunk reads the whole weight, so a chunk should have some hundred
# positions, also with a large vocabulary; a GPU wants more.
CHUNK_BYTES = 32 * 2**20
GPU_CHUNK_BYTES = 512 * 2**20
# Probabilities kept for the backward pass: 341 positions of SmolLM2's vocabulary.
KEPT_BYTES = 64 * 2**20
# Rows that a CPU does elementwise work on at one time, so that they are in its cache when they are read again.
_BLOCK_BYTES = 2 * 2**20


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor | float = 1.0,
    *,
    chunk: int | None = None,
    kept_bytes: int = KEPT_BYTES,
    tied: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution, softmax(hidden @ weight.T /
    temperature).

    Args:
        hidden: [T, D], the hidden state that predicts each target.
        weight: [V, D], of the language-model head (no bias).
        targets: [T], token ids.
        temperature: [T] or one number, > 0; constant, no gradient flows into it.
        chunk: positions whose logits exist at one time; by default as many as fit `CHUNK_BYTES` (`GPU_CHUNK_BYTES`).
        kept_bytes: most bytes of probabilities to keep for the backward pass.
        tied: the list given to `tied_embedding`, if `hidden` was made from its result with the same weight.

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
    row = inverse.element_size() * len(weight)
    most = CHUNK_BYTES if hidden.device.type == "cpu" else GPU_CHUNK_BYTES
    step = max(1, most // row) if chunk is None else chunk
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    keep = kept_bytes // (row * step) if learns else 0
    logprobs, entropies = _TokenLogprobs.apply(hidden, weight, targets, inverse, step, keep, tied)  # type: ignore[no-untyped-call]
    return logprobs, entropies


def tied_embedding(ids: Tensor, weight: Tensor, tied: list[Tensor], padding: int | None = None) -> Tensor:
    """weight[ids], [..., D], for a model whose head has the same weight [V, D].

    Of the two gradients of the weight the head's is there first. It is left in the list `tied`, empty at the start,
    and the look-up adds its few rows to it, instead of one more [V, D] tensor of which almost all is zero. The row `padding` gets nothing from the look-up, as
    with `torch.nn.Embedding(padding_idx=...)`.
    """
    return _TiedEmbedding.apply(ids, weight, tied, padding)  # type: ignore[no-untyped-call]


class _TiedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, tied: list[Tensor], padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.tied, ctx.padding = tied, padding
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        total: Tensor = ctx.tied.pop()
        rows = grads[0].flatten(0, -2).to(total.dtype)
        if ctx.padding is not None:
            rows = rows.masked_fill(ids.flatten()[:, None] == ctx.padding, 0)
        return None, total.index_add_(0, ids.flatten(), rows), None, None


class _TokenLogprobs(torch.autograd.Function):
    """With z = logits / temperature, p = softmax(z), L = log p[target], H = -sum p log p:
    dL/dz = onehot(target) - p  and  dH/dz = -p (log p + H)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        inverse: Tensor,
        step: int,
        keep: int,
        tied: list[Tensor] | None,
    ) -> Any:
        cast = weight.to(hidden.dtype)
        normaliser, logprobs, entropies = (torch.empty_like(inverse) for _ in range(3))
        kept = []
        for number, part in enumerate(_parts(len(targets), step)):
            scores = _scores(hidden[part], cast, inverse[part])
            chosen = scores.gather(1, targets[part, None]).squeeze(1)
            for rows, block in _blocks(scores, part.start):
                logs = torch.log_softmax(block, dim=-1)
                # Any entry gives the normaliser; the largest has the least rounding.
                normaliser[rows] = block.amax(-1) - logs.amax(-1)
                torch.exp(logs, out=block)
                entropies[rows] = -logs.mul_(block).sum(-1)
            logprobs[part] = chosen - normaliser[part]
            if number < keep:
                kept.append(scores)
        ctx.save_for_backward(hidden, weight, targets, inverse, normaliser, entropies, *kept)
        ctx.step, ctx.tied = step, tied
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_logprobs, grad_entropies = grads
        hidden, weight, targets, inverse, normaliser, entropies, *kept = ctx.saved_tensors
        cast = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        # Chunks are summed in the wide type: a bfloat16 accumulator would lose small contributions.
        grad_weight: Tensor | None = None
        # No gradient arrives as zeros; then half the work is idle.
        entropy_counts = bool(grad_entropies.count_nonzero())
        for number, part in enumerate(_parts(len(targets), ctx.step)):
            if number < len(kept):  # left as it is: the graph may be asked for gradients again
                probabilities, slopes = kept[number], torch.empty_like(kept[number])
            else:
                probabilities = slopes = _scores(hidden[part], cast, inverse[part])
                for rows, block in _blocks(slopes, part.start):
                    block.sub_(normaliser[rows, None]).exp_()
            for (rows, block), (_, slope) in zip(
                _blocks(probabilities, part.start), _blocks(slopes, part.start), strict=True
            ):
                factor = (-grad_logprobs[rows] * inverse[rows])[:, None]
                if entropy_counts:
                    share = (grad_entropies[rows] * inverse[rows])[:, None]
                    terms = torch.special.xlogy(block, block).mul_(share)
                    torch.mul(block, factor - share * entropies[rows, None], out=slope).sub_(terms)
                else:
                    torch.mul(block, factor, out=slope)
            slopes.scatter_add_(1, targets[part, None], (grad_logprobs[part] * inverse[part])[:, None])
            grad_scores = slopes.to(hidden.dtype)
            grad_hidden[part] = grad_scores @ cast
            if ctx.needs_input_grad[1]:
                grad_weight = _plus_product(grad_weight, grad_scores.T, hidden[part], inverse.dtype)
        if grad_weight is None and ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        if ctx.tied is not None and grad_weight is not None:
            ctx.tied.append(grad_weight)
            grad_weight = None
        return grad_hidden, grad_weight, None, None, None, None, None


def _scores(hidden: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Logits over temperature, [rows, V]. The small factor of the product is scaled, not the large result."""
    scaled = (hidden.to(inverse.dtype) * inverse[:, None]).to(hidden.dtype)
    return (scaled @ weight.T).to(inverse.dtype)


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + left @ right in `dtype`, in place: a [V, D] tensor is written no more often than it must be."""
    if total is None:
        return (left @ right).to(dtype)
    return total.addmm_(left, right) if left.dtype == dtype else total.add_(left @ right)


def _parts(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _blocks(chunk: Tensor, offset: int) -> list[tuple[slice, Tensor]]:
    """Views of a few rows of `chunk` each, with their places among all rows; `offset` is that of the chunk."""
    step = max(1, _BLOCK_BYTES // (chunk.element_size() * chunk.shape[1]))
    if chunk.device.type != "cpu":
        step = max(1, len(chunk))
    return [
        (slice(offset + part.start, offset + part.stop), chunk[part]) for part in _parts(len(chunk), step)
    ]
