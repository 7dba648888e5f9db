from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from models import logprobs as logprobs_module
from models.logprobs import token_logprobs


def _problem(t: int = 11, d: int = 5, v: int = 17, dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(t, d, generator=g, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, d, generator=g, dtype=dtype, requires_grad=True)
    targets = torch.randint(v, (t,), generator=g)
    temperature = 0.5 + torch.rand(t, generator=g, dtype=dtype)
    return hidden, weight, targets, temperature


def _reference(hidden, weight, targets, temperature):
    logs = torch.log_softmax(hidden @ weight.T / temperature[:, None], dim=-1)
    return logs.gather(1, targets[:, None]).squeeze(1), -(logs.exp() * logs).sum(-1)


# A chunk of four rows of 17 doubles has 544 bytes: none, one, or all of the chunks are kept.
@pytest.mark.parametrize("kept_bytes", [0, 600, 2**20])
@pytest.mark.parametrize("chunk", [1, 4, 11, 256, None])
def test_equals_log_softmax_with_gradients(chunk, kept_bytes):
    hidden, weight, targets, temperature = _problem()
    upstream = torch.randn(2, len(targets), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = token_logprobs(hidden, weight, targets, temperature, chunk=chunk, kept_bytes=kept_bytes)
    want = _reference(hidden, weight, targets, temperature)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    grads = [
        torch.autograd.grad((out[0] * upstream[0] + out[1] * upstream[1]).sum(), (hidden, weight))
        for out in (got, want)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    hidden, weight, targets, temperature = _problem(t=5)
    assert torch.autograd.gradcheck(
        lambda h, w: token_logprobs(h, w, targets, temperature, chunk=2, kept_bytes=300), (hidden, weight)
    )


def test_the_backward_pass_may_be_repeated():
    hidden, weight, targets, temperature = _problem()
    logprobs, entropies = token_logprobs(hidden, weight, targets, temperature, chunk=4)
    loss = (logprobs + entropies).sum()
    first, second = (torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_blocks_of_a_chunk_are_put_together(monkeypatch):
    monkeypatch.setattr(logprobs_module, "_BLOCK_BYTES", 300)  # two rows
    test_equals_log_softmax_with_gradients(7, 600)


def test_memory_of_a_long_response_is_bounded():
    """Tensors of a forward and backward pass over 4,096 positions, logits of 128 MiB in all."""
    hidden, weight, targets, _ = _problem(t=4096, d=8, v=8192, dtype=torch.float32)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        logprobs, entropies = token_logprobs(hidden, weight, targets)
        (logprobs.sum() + entropies.sum()).backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    assert (
        logprobs_module.KEPT_BYTES < max(held) < logprobs_module.KEPT_BYTES + 3 * logprobs_module.CHUNK_BYTES
    )


def test_frozen_head_and_unused_entropy():
    hidden, weight, targets, _ = _problem()
    logprobs, _ = token_logprobs(hidden, weight.detach(), targets, chunk=3)
    (got,) = torch.autograd.grad(logprobs.sum(), hidden)
    (want,) = torch.autograd.grad(_reference(hidden, weight, targets, torch.ones(11))[0].sum(), hidden)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_no_positions():
    hidden, weight, _, _ = _problem()
    logprobs, entropies = token_logprobs(hidden[:0], weight, torch.zeros(0, dtype=torch.long))
    assert logprobs.shape == entropies.shape == (0,)


def test_entropy_of_uniform_is_log_v_and_large_logits_stay_finite():
    hidden = torch.zeros(3, 4)
    _, entropies = token_logprobs(hidden, torch.randn(32, 4), torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(entropies, torch.full((3,), 32.0).log())
    logprobs, entropies = token_logprobs(hidden + 1e4, torch.randn(32, 4), torch.zeros(3, dtype=torch.long))
    assert logprobs.isfinite().all()
    assert entropies.isfinite().all()


def test_autocast_products_are_low_precision_and_sums_are_wide():
    hidden, weight, targets, temperature = _problem(t=40, d=32, v=64, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, _ = token_logprobs(hidden, weight, targets, temperature, chunk=7)
    assert logprobs.dtype == torch.float32
    want, _ = _reference(hidden, weight, targets, temperature)
    assert 0 < (logprobs - want).abs().max() < 0.2
    logprobs.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
