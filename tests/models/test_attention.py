from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import attention

LAYER = torch.nn.Module()  # nothing of the layer is read where there is a tree


def _tree(length: int, seed: int, roots: float = 0.1) -> torch.Tensor:
    """A random tree in depth-first order as `subtree_end`; some nodes are roots."""
    rng = random.Random(seed)
    path: list[int] = []
    end = [length] * length
    for node in range(length):
        keep = 0 if rng.random() < roots else rng.choice([len(path)] * 4 + [rng.randrange(len(path) + 1)])
        for closed in path[keep:]:
            end[closed] = node
        path = [*path[:keep], node]
    return torch.tensor(end)


def _inputs(length: int, heads: int = 4, kv_heads: int = 2, width: int = 8, dtype=torch.float64):
    g = torch.Generator().manual_seed(length)
    shapes = [(1, n, length, width) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_() for s in shapes]


def _reference(query, key, value, end, scale):
    """Attention written out: [1, H, T, d], softmax over the visible columns of each row alone."""
    group = query.shape[1] // key.shape[1]
    rows = []
    for i in range(query.shape[2]):
        seen = torch.tensor([j for j in range(i + 1) if j == i or end[j] > i])
        k, v = (x[0].repeat_interleave(group, 0)[:, seen] for x in (key, value))
        weights = torch.softmax(scale * (k @ query[0, :, i, :, None])[..., 0], dim=-1)
        rows.append((weights[..., None] * v).sum(1))
    return torch.stack(rows)[None]  # [1, T, H, d]


def _run(query, key, value, tree, **kwargs):
    return attention.tree_attention(LAYER, query, key, value, None, tree=tree, **kwargs)[0]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(0, 10_000), st.integers(1, 70))
def test_tiles_are_the_dense_mask(length, seed, rows):
    end = _tree(length, seed)
    mask = torch.zeros(length, length, dtype=torch.bool)
    covered = []
    for tile in attention.tiles(end, rows).parts:
        columns = torch.cat([torch.arange(a, b) for a, b in tile.ranges])
        visible = torch.zeros(tile.end - tile.start, len(columns))
        visible[:, len(columns) - tile.mask.shape[1] :] = tile.mask
        mask[tile.start : tile.end, columns] = visible == 0
        assert set(tile.mask.unique().tolist()) <= {0.0, -math.inf}
        covered += range(tile.start, tile.end)
    assert covered == list(range(length))
    assert torch.equal(mask, attention.dense(end)[0, 0])


def test_tiles_by_hand():
    # 0 1 2 is a trunk, 3 4 and 5 6 are branches, 7 is a tree of its own.
    end = torch.tensor([7, 7, 7, 5, 5, 7, 7, 8])
    first, second, third, fourth = attention.tiles(end, 2).parts
    assert first.ranges == ((0, 2),)
    assert second.ranges == ((0, 4),)
    assert second.mask.tolist() == [[0.0, -math.inf], [0.0, 0.0]]
    assert third.ranges == ((0, 6),)  # 4 is still on the path of row 4
    assert third.mask.tolist() == [[0.0, 0.0, -math.inf], [-math.inf, -math.inf, 0.0]]
    assert fourth.ranges == ((0, 3), (5, 8))
    assert fourth.mask.shape == (2, 6)  # nothing but row 6 and 7's own lines is seen by both
    alone = attention.tiles(torch.tensor([2, 2, 4, 4]), 2).parts
    assert [tile.ranges for tile in alone] == [((0, 2),), ((2, 4),)]


@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("length", [1, attention.TILE, 2 * attention.TILE + 7])
def test_tiled_attention_equals_the_written_out_one(length, heads):
    end = _tree(length, seed=length)
    inputs = _inputs(length, *heads)
    got, want = _run(*inputs, attention.tiles(end), scaling=0.3), _reference(*inputs, end, 0.3)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    upstream = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(want, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_gradcheck():
    end = _tree(7, seed=3)
    inputs = _inputs(7, 2, 1, 3)
    tiles = attention.tiles(end, 3)
    assert torch.autograd.gradcheck(lambda q, k, v: _run(q, k, v, tiles), inputs)


@pytest.mark.parametrize("make", [attention.dense, attention.blocks])
@pytest.mark.filterwarnings("ignore:.*flex_attention.*")
def test_other_forms_of_the_tree_give_the_same(make):
    end = _tree(70, seed=5)
    inputs = [x.detach() for x in _inputs(70, width=16, dtype=torch.float32)]
    want = _run(*inputs, attention.tiles(end))
    torch.testing.assert_close(_run(*inputs, make(end)), want, rtol=1e-5, atol=1e-6)


def test_bits_repeat():
    end = _tree(300, seed=1)
    inputs = _inputs(300, width=64, dtype=torch.float32)
    tiles = attention.tiles(end)
    results = []
    for _ in range(2):
        out = _run(*inputs, tiles)
        results.append([out, *torch.autograd.grad(out, inputs, out.detach())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_low_precision_is_summed_in_single():
    end = _tree(64, seed=2)
    inputs = _inputs(64, dtype=torch.bfloat16)
    got = _run(*inputs, attention.tiles(end))
    assert got.dtype == torch.bfloat16
    want = _run(*(x.float() for x in inputs), attention.tiles(end)).bfloat16()
    assert torch.equal(got, want)
    got.sum().backward()
    assert inputs[0].grad.dtype == torch.bfloat16


def test_without_a_tree_it_is_the_librarys_attention():
    query, key, value = _inputs(9, 4, 4)
    got, _ = attention.tree_attention(LAYER, query, key, value, None)
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("extra", [{"sliding_window": 4}, {"softcap": 30.0}, {"dropout": 0.1}])
def test_what_has_no_tree_form_is_refused(extra):
    end = _tree(5, seed=0)
    with pytest.raises(NotImplementedError, match="no tree form"):
        _run(*_inputs(5), attention.tiles(end), **extra)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("make", [attention.dense, attention.blocks])
def test_on_a_gpu(make):
    end = _tree(700, seed=5, roots=0.01)
    inputs = _inputs(700, width=64, dtype=torch.float32)
    there = [x.detach().cuda().requires_grad_() for x in inputs]
    got, want = _run(*there, make(end.cuda())), _run(*inputs, attention.tiles(end))
    torch.testing.assert_close(got.cpu(), want, rtol=1e-2, atol=5e-3)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (
        torch.autograd.grad(got, there, upstream.cuda()),
        torch.autograd.grad(want, inputs, upstream),
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=2e-2, atol=2e-2)
