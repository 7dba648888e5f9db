"""Aggregation: by hand, and exact under any cut into micro-batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import objectives
from models.objectives import AGGREGATIONS, Batch, Counts, Losses, aggregate
from tests.models.objectives.flat import D, all_counts, part, random_batch

COUPLED = {name for name in objectives.names() if objectives.get(name).coupled}


def test_by_hand():
    batch = Batch(torch.zeros(5), torch.zeros(5), torch.tensor([0, 0, 0, 1, 1]), 2)
    losses = Losses(torch.tensor([1.0, 2, 3, 10, 20]), torch.ones(2))
    want = {"token-mean": 36 / 5, "seq-mean-token-mean": (2 + 15) / 2, "seq-mean-token-sum": 36 / 2}
    for how, value in want.items():
        assert float(aggregate(losses, batch, how, Counts(5, 2))) == pytest.approx(value)
    assert float(aggregate(losses, batch, "constant", Counts(5, 2), constant=9)) == pytest.approx(36 / 18)
    assert set(AGGREGATIONS) == {*want, "constant"}
    with pytest.raises(ValueError, match="token-mean"):
        aggregate(losses, batch, "mean", Counts(5, 2))


def test_sequences_without_tokens_do_not_hurt():
    batch = Batch(torch.zeros(2), torch.zeros(2), torch.tensor([0, 2]), 3)
    losses = Losses(torch.tensor([1.0, 3.0]), torch.ones(3))
    assert float(aggregate(losses, batch, "seq-mean-token-mean", Counts(2, 2))) == pytest.approx(2.0)


def test_all_agree_up_to_length_where_lengths_are_equal():
    batch = Batch(torch.zeros(6), torch.zeros(6), torch.tensor([0, 0, 0, 1, 1, 1]), 2)
    losses = Losses(torch.arange(6, dtype=D), torch.ones(2))
    found = {how: float(aggregate(losses, batch, how, Counts(6, 2), constant=3)) for how in AGGREGATIONS}
    assert found["token-mean"] == found["seq-mean-token-mean"] == found["constant"] == 2.5
    assert found["seq-mean-token-sum"] == 7.5


@pytest.mark.parametrize("name", sorted(set(objectives.names()) - COUPLED))
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31), cut=st.integers(1, 5), how=st.sampled_from(AGGREGATIONS))
def test_micro_batches_add_up(name, seed, cut, how):
    whole = random_batch(seed, sequences=6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed)).tolist()
    objective = objectives.get(name)
    gradients, values = [], []
    for parts in ([whole], [part(whole, sorted(order[:cut])), part(whole, sorted(order[cut:]))]):
        total = sum(
            aggregate(objective.loss(piece), piece, how, all_counts(whole), constant=11)
            + 0.1 * objectives.local_entropy(piece, 3)
            for piece in parts
        )
        (gradient,) = torch.autograd.grad(total, whole.logprobs)
        gradients.append(gradient)
        values.append(float(total.detach()))
    assert values[0] == pytest.approx(values[1], rel=1e-11, abs=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-11, atol=1e-13)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_m2po_keeps_its_budget_in_micro_batches(seed):
    whole = random_batch(seed, sequences=8, spread=0.5)
    for piece in (part(whole, [0, 1, 2]), part(whole, [3, 4, 5, 6, 7])):
        logs = (piece.logprobs - piece.old_logprobs).detach()
        alive = objectives.coefficients(objectives.m2po(piece), piece) != 0
        outside = alive & (piece.advantages * logs > 0)
        assert float(logs[outside].square().sum()) <= 0.04 * int(outside.sum()) + 1e-12


def test_the_coupled_are_those_that_do_not_add_up():
    for name in objectives.names():
        adds_up = []
        for seed in range(8):
            whole = random_batch(seed, sequences=8, spread=0.5)
            loss = objectives.get(name).loss
            parts = [loss(part(whole, keep)).tokens.sum() for keep in ([0, 1, 2], [3, 4, 5, 6, 7])]
            adds_up.append(torch.allclose(loss(whole).tokens.sum(), sum(parts), rtol=1e-10))
        assert all(adds_up) == (name not in COUPLED), name
