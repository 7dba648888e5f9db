"""Attention over a packed row: a token looks at itself and its ancestors in the row's prefix tree.

A dense [T, T] mask makes a kernel compute all T^2 pairs. In the order of the row the tree has structure: the
descendants of a node follow it without a gap, and so the ancestors of a stretch of rows are few ranges of columns. On
the CPU a tile of `TILE` rows therefore multiplies with just those columns, and only the last of them need a mask. On a
GPU `flex_attention` skips the blocks that nobody looks at.

`enable(model)` puts `NAME` where the library looks for attention functions; a call of the decoder with the keyword
argument `tree` then uses it, and every other call is the library's own SDPA as before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "forebay_tree"
# Rows of a tile. Smaller tiles waste fewer pairs under the diagonal and stay in the cache, larger ones make larger
# products; between 32 and 64 little changes on two AVX-512 cores.
TILE = 48


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows start..end-1 and the columns that any of them sees, all of which lie before `end`."""

    start: int
    end: int
    ranges: tuple[tuple[int, int], ...]  # the columns, ascending; the last range ends at `end`
    mask: Tensor  # [rows, last columns] float32, 0 or -inf; all rows see the columns before these


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of a row, made once and used by all layers."""

    parts: tuple[Tile, ...]


Tree = Tiles | BlockMask | Tensor
"""What a layer needs to know of the tree: tiles, flex_attention's blocks, or a dense mask [1, 1, T, T] bool."""


def tiles(subtree_end: Tensor, rows: int = TILE) -> Tiles:
    """Tiles for the tree whose node j has the descendants j..subtree_end[j]-1."""
    end = subtree_end.cpu()
    parts = []
    for start in range(0, len(end), rows):
        stop = min(start + rows, len(end))
        # An ancestor, from before the tile, of any row of the tile is one of its first row: subtrees have no gaps.
        outside = torch.nonzero(end[:start] > start).squeeze(1)
        columns = torch.cat([outside, torch.arange(start, stop)])
        # Subtrees nest, so the ancestors that end within the tile are the last ones.
        whole = int((end[outside] >= stop).sum())
        row, column = torch.arange(start, stop)[:, None], columns[whole:][None]
        visible = (column <= row) & (row < end[column])
        mask = torch.zeros(visible.shape).masked_fill_(~visible, -math.inf)
        parts.append(Tile(start, stop, _ranges(columns), mask))
    return Tiles(tuple(parts))


def blocks(subtree_end: Tensor) -> BlockMask:
    """Blocks for `flex_attention`, for the same tree."""

    def visible(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column <= row) & (row < subtree_end[column])

    length = len(subtree_end)
    return create_block_mask(visible, None, None, length, length, device=str(subtree_end.device))


def dense(subtree_end: Tensor) -> Tensor:
    """[1, 1, T, T] bool, True where row i may look at column j: j is i or an ancestor of i."""
    index = torch.arange(len(subtree_end), device=subtree_end.device)
    return ((index <= index[:, None]) & (index[:, None] < subtree_end))[None, None]


def enable(model: PreTrainedModel) -> None:
    """Let `model` take the keyword `tree`. It stays so: under activation checkpointing the backward pass calls again.

    Raises:
        NotImplementedError: the model does not take its attention from the library's table, or was loaded with
            another implementation than "sdpa".
    """
    if model.config._attn_implementation == NAME:
        return
    if model.config._attn_implementation != "sdpa":
        raise NotImplementedError('the model was not loaded with attn_implementation="sdpa"')
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise NotImplementedError("the model has its own attention")


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the tiles are plain Python
def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    tree: Tree | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The library's interface of an attention function.

    Args:
        module: the attention layer.
        query: [1, H, T, d].
        key: [1, K, T, d], K divides H.
        value: like `key`.
        attention_mask: not used with a tree.
        dropout: of attention weights; must be 0 with a tree.
        scaling: factor of the scores; by default d ** -0.5.
        tree: without it this is the library's SDPA.
        kwargs: what else the layer passes.

    Returns:
        ([1, T, H, d], None).

    Raises:
        NotImplementedError: the layer wants more than plain causal attention.
    """
    if tree is None:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    extras = [
        name
        for name in ("sliding_window", "softcap", "s_aux", "position_bias")
        if kwargs.get(name) is not None
    ]
    if extras or dropout:
        raise NotImplementedError(f"attention with {', '.join(extras) or 'dropout'} has no tree form here")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(tree, Tiles):
        return _tiled(query, key, value, scale, tree), None
    # Under autocast the rotation has made them float32 again; the value is as the layer's product gave it.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if isinstance(tree, BlockMask):
        run: Any = _compiled_flex() if query.is_cuda else flex_attention
        found = run(
            query, key, value, block_mask=tree, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    else:
        key, value = (_repeated(x, query.shape[1]) for x in (key, value))
        found = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=tree, scale=scale)
    return found.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True)


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _ranges(columns: Tensor) -> tuple[tuple[int, int], ...]:
    """Ascending numbers as half-open ranges."""
    gaps = torch.nonzero(columns.diff() > 1).squeeze(1) + 1
    return tuple((int(part[0]), int(part[-1]) + 1) for part in columns.tensor_split(gaps))


def _tiled(query: Tensor, key: Tensor, value: Tensor, scale: float, tree: Tiles) -> Tensor:
    wide = torch.promote_types(torch.promote_types(query.dtype, value.dtype), torch.float32)
    grouped = query[0].reshape(key.shape[1], -1, *query.shape[2:])
    found = _TiledAttention.apply(  # type: ignore[no-untyped-call]
        grouped.to(wide), key[0].to(wide), value[0].to(wide), scale, tree.parts
    )
    return found.flatten(1, 2).to(value.dtype)[None]


class _TiledAttention(torch.autograd.Function):
    """With P = softmax(scale Q K^T + mask) and O = P V, tile by tile; the backward pass makes each P again.

    Q is [K, G, T, d]: the G query heads that share a key head are rows of one product, so keys are not repeated. O is
    [T, K, G, d]. Sums over tiles are made in their order, so the result is the same bits every time.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, parts: tuple[Tile, ...]
    ) -> Tensor:
        heads, group, length, width = query.shape
        output = query.new_empty(length, heads, group, width)
        with torch.autocast(query.device.type, enabled=False):
            for tile in parts:
                weights = _weights(_rows(query, tile) * scale, _columns(key, tile), tile)
                _put(output, tile, torch.bmm(weights, _columns(value, tile)))
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.parts = scale, parts
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        heads, group, length, width = query.shape
        # The layout of the projections that these gradients flow into: one token after the other.
        grad_query = query.new_empty(length, heads, group, width)
        grad_key, grad_value = (query.new_zeros(length, heads, width).transpose(0, 1) for _ in range(2))
        upstream = gradients[0].permute(1, 2, 0, 3)
        with torch.autocast(query.device.type, enabled=False):
            for tile in ctx.parts:
                rows, columns = _rows(query, tile) * ctx.scale, _columns(key, tile)
                weights = _weights(rows, columns, tile)
                grad_rows = _rows(upstream, tile)
                _add(grad_value, tile, weights, grad_rows)
                grad_weights = torch.bmm(grad_rows, _columns(value, tile).transpose(1, 2))
                grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
                _put(grad_query, tile, torch.bmm(grad_scores, columns).mul_(ctx.scale))
                _add(grad_key, tile, grad_scores, rows)
        return grad_query.permute(1, 2, 0, 3), grad_key, grad_value, None, None


def _rows(x: Tensor, tile: Tile) -> Tensor:
    """[K, G, T, d] -> the tile's rows [K, G * rows, d]."""
    return x[:, :, tile.start : tile.end].flatten(1, 2)


def _columns(x: Tensor, tile: Tile) -> Tensor:
    """[K, T, d] -> the tile's columns [K, columns, d]."""
    found = [x[:, start:end] for start, end in tile.ranges]
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _weights(rows: Tensor, columns: Tensor, tile: Tile) -> Tensor:
    """[K, G * rows, columns], attention weights."""
    scores = torch.bmm(rows, columns.transpose(1, 2))
    by_row = scores.view(len(scores), -1, tile.end - tile.start, scores.shape[2])
    by_row[..., by_row.shape[-1] - tile.mask.shape[1] :].add_(tile.mask)
    return torch.softmax(scores, dim=-1)


def _put(output: Tensor, tile: Tile, rows: Tensor) -> None:
    """Write [K, G * rows, d] to its place in [T, K, G, d]."""
    by_row = rows.view(len(rows), -1, tile.end - tile.start, rows.shape[2])
    output[tile.start : tile.end] = by_row.permute(2, 0, 1, 3)


def _add(gradient: Tensor, tile: Tile, weights: Tensor, rows: Tensor) -> None:
    """Add weights^T rows to the tile's columns of [K, T, d]."""
    update = torch.bmm(weights.transpose(1, 2), rows)
    done = 0
    for start, end in tile.ranges:
        gradient[:, start:end].add_(update[:, done : done + end - start])
        done += end - start
