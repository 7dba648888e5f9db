"""Turns as sequences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models import objectives
from models.objectives import Batch, by_turn, local_entropy, sequence_log_ratio, turns
from tests.models.objectives.flat import D, all_counts, loss_and_gradient, part, random_batch
from tests.models.objectives.test_clipped import SAMPO


def trajectories() -> Batch:
    """Two trajectories; the second has no trained token in its turn 1. Tokens of a turn need not be neighbours."""
    return Batch(
        logprobs=torch.tensor([-1.0, -2, -3, -4, -5, -6], dtype=D).requires_grad_(),
        advantages=torch.tensor([1.0, 2, 1, 2, 3, 3], dtype=D),
        sequence=torch.tensor([0, 0, 0, 1, 1, 1]),
        sequences=3,
        behaviour_logprobs=torch.tensor([-1.1, -2.2, -2.7, -4.4, -5.5, -5.4], dtype=D),
        turn=torch.tensor([0, 1, 0, 0, 2, 2]),
        group=torch.tensor([7, 8, 9]),
        diversity=torch.tensor([0.6, 0.4, 0.5], dtype=D),
    )


def test_turns_become_sequences():
    batch = trajectories()
    turned, owner = by_turn(batch)
    assert turned.sequence.tolist() == [0, 1, 0, 2, 3, 3]
    assert (turned.sequences, turns(batch.sequence, batch.turn)) == (4, 4)
    assert owner.tolist() == [0, 0, 1, 1]
    assert turned.group.tolist() == [7, 7, 8, 8]
    assert turned.diversity.tolist() == pytest.approx([0.4, 0.2, 0.4 / 3, 0.8 / 3])
    assert sequence_log_ratio(turned).tolist() == pytest.approx([0.1 - 0.3, 0.2, 0.4, 0.5 - 0.6])
    assert turned.logprobs is batch.logprobs
    with pytest.raises(ValueError, match="turn"):
        by_turn(replace(batch, turn=None))


def test_splitting_into_turns_leaves_the_local_entropy_alone():
    for batch in (trajectories(), random_batch(1)):
        split, _ = by_turn(batch)
        torch.testing.assert_close(local_entropy(split, 2), local_entropy(batch, 2))


def test_tokens_of_a_turn_share_a_coefficient_and_turns_differ():
    batch, _ = by_turn(trajectories())
    for name in ("sampo", "gspo", "vespo", "topr"):
        options = {} if name in ("vespo", "topr") else {"eps_lo": 0.9, "eps_hi": 0.9}
        losses = objectives.get(name).loss(batch, **options)
        each = objectives.coefficients(losses, batch) / batch.advantages
        assert float(each[0]) == pytest.approx(float(each[2]), rel=1e-12)
        assert float(each[4]) == pytest.approx(float(each[5]), rel=1e-12)
        if name != "topr":
            assert len({round(float(x), 6) for x in each}) == 4


def test_sampo_of_one_trajectory_of_two_turns_is_that_of_two_sequences():
    rows, _, advantages = SAMPO
    leaf = torch.tensor(rows[0] + rows[1], dtype=D, requires_grad=True)
    turn = torch.tensor([0] * 4 + [1] * 2)
    trajectory = Batch(
        leaf,
        torch.tensor(advantages, dtype=D)[turn],
        torch.zeros(6, dtype=torch.int64),
        1,
        torch.zeros(6),
        turn=turn,
    )
    total, gradient = loss_and_gradient("sampo", by_turn(trajectory)[0], "token-mean")
    assert total == pytest.approx(-0.336002, abs=1e-6)
    assert gradient == pytest.approx([-0.167084] * 4 + [0, 0], abs=1e-6)


def test_turns_of_one_token_have_the_ratio_of_grpo():
    """A token's ratio in place of the turn's is what GiGPO has."""
    batch = random_batch(4)
    single, _ = by_turn(replace(batch, turn=torch.arange(len(batch.logprobs))))
    for how in ("token-mean", "seq-mean-token-mean"):
        turned = loss_and_gradient("sampo", single, how, eps_lo=0.2, eps_hi=0.2)
        tokens = loss_and_gradient("grpo", batch, "token-mean")
        assert turned[0] == pytest.approx(tokens[0], rel=1e-12)
        assert turned[1] == pytest.approx(tokens[1], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("how", objectives.AGGREGATIONS)
def test_micro_batches_of_turns_add_up(how):
    whole = random_batch(9, sequences=6)
    counts = all_counts(by_turn(whole)[0])
    assert counts.sequences == turns(whole.sequence, whole.turn)
    gradients = []
    for parts in ([whole], [part(whole, [0, 3]), part(whole, [1, 2, 4, 5])]):
        pieces = [by_turn(piece)[0] for piece in parts]
        total = sum(objectives.aggregate(objectives.vespo(p), p, how, counts) for p in pieces)
        gradients.append(torch.autograd.grad(total, whole.logprobs)[0])
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-13)
