"""Weights and masks of old against behaviour."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import objectives
from models.objectives import WEIGHTS, corrected, scaled, sequence_mask, weights
from tests.models.objectives.flat import aggregated, batch_of, random_batch

OLD = [[-1.0, -2.0, -0.5, -3.0]]
ROLLOUT = [[-1.1, -3.2, -0.4, -1.5]]


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("none", [1, 1, 1, 1]),
        ("token-tis", [1.10517, 2, 0.904837, 0.223130]),
        ("token-mis", [1.10517, 0, 0.904837, 0]),
        ("sequence-tis", [0.740818] * 4),
        ("sequence-mis", [0.740818] * 4),
        ("geometric-mis", [0.927743] * 4),
    ],
)
def test_weights_by_hand(kind, want):
    batch = batch_of(OLD, ROLLOUT, [1.0], old_logprobs=OLD)
    found = weights(batch, kind)
    assert found.tolist() == pytest.approx(want, abs=1e-5)
    assert not found.requires_grad


def test_bounds_of_the_weights():
    batch = batch_of(OLD, ROLLOUT, [1.0], old_logprobs=OLD)
    assert weights(batch, "sequence-tis", high=0.7).tolist() == [0.7] * 4
    assert weights(batch, "sequence-mis", low=0.75).tolist() == [0.0] * 4
    assert weights(batch, "geometric-mis", high=0.9).tolist() == [0.0] * 4
    icepop = weights(batch, "token-mis", low=0.5, high=5.0).tolist()
    assert icepop == pytest.approx([1.10517, 3.32012, 0.904837, 0], abs=1e-5)


@pytest.mark.parametrize("kind", WEIGHTS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**31), spread=st.sampled_from([0.1, 3.0, 1e4]))
def test_weights_stay_in_their_band(kind, seed, spread):
    batch = random_batch(seed, spread=spread)
    found = weights(batch, kind)
    assert found.isfinite().all()
    assert (found >= 0).all()
    assert (found <= 2).all()
    if kind.endswith("mis"):
        assert ((found == 0) | (found >= 0.5)).all()
    level = found.new_zeros(batch.sequences).index_copy(0, batch.sequence, found)[batch.sequence]
    assert kind.startswith("token") or torch.equal(level, found)
    same = replace(batch, behaviour_logprobs=batch.old_logprobs)
    assert weights(same, kind).tolist() == [1.0] * len(batch.logprobs)


def test_missing_log_probabilities_and_unknown_kinds_are_refused():
    batch = random_batch(0)
    for field in ("old_logprobs", "behaviour_logprobs"):
        with pytest.raises(ValueError, match="token-tis needs old_logprobs and behaviour_logprobs"):
            weights(replace(batch, **{field: None}), "token-tis")
    with pytest.raises(ValueError, match="no correction tis; choose from none, token-tis"):
        weights(batch, "tis")
    with pytest.raises(ValueError, match="sequence mask needs"):
        sequence_mask(replace(batch, old_logprobs=None, behaviour_logprobs=None), 0.1)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_correction_multiplies_the_token_losses(kind):
    batch = random_batch(5)
    objective = objectives.get("dapo")
    plain = objective.loss(batch, eps_hi=0.4)
    found = corrected(objective, batch, kind, options={"eps_hi": 0.4})
    torch.testing.assert_close(found.tokens, plain.tokens * weights(batch, kind))
    if not kind.startswith("token"):
        each = torch.stack([weights(batch, kind)[batch.sequence == i][0] for i in range(batch.sequences)])
        torch.testing.assert_close(found.phi, plain.phi * each)


@pytest.mark.parametrize("name", objectives.names())
@pytest.mark.parametrize("kind", [k for k in WEIGHTS if k != "none"])
def test_no_sample_is_corrected_twice(name, kind):
    batch, objective = random_batch(2), objectives.get(name)
    corrected(objective, batch, "none")
    if objective.correction == "own":
        with pytest.raises(ValueError, match=f"objective {name} weighs by the behaviour itself"):
            corrected(objective, batch, kind)
    elif objective.correction == "inside" and not kind.startswith("token"):
        with pytest.raises(ValueError, match="choose token-tis or token-mis"):
            corrected(objective, batch, kind)
    else:
        corrected(objective, batch, kind)


def test_objectives_that_weigh_by_the_behaviour_say_so():
    """Those whose losses still depend on the behaviour once the proximal policy is given."""
    batch = random_batch(4, spread=0.7)
    moved = replace(batch, behaviour_logprobs=batch.behaviour_logprobs - 0.4)
    for name in objectives.names():
        objective = objectives.get(name)
        options = {"max_weight": 1.5} if name == "m2po_areal" else {}
        same = torch.equal(objective.loss(batch, **options).tokens, objective.loss(moved, **options).tokens)
        assert same == (objective.correction != "own"), name


def test_vespo_takes_the_correction_in_its_ratio_and_nowhere_else():
    """With weights that nothing truncates, W is pi / behaviour whichever way it is put together."""
    batch = random_batch(6)
    folded = corrected(objectives.get("vespo"), batch, "token-tis", high=1e6)
    direct = objectives.vespo(replace(batch, old_logprobs=None))
    torch.testing.assert_close(folded.phi, direct.phi, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(folded.tokens, direct.tokens, rtol=1e-10, atol=1e-14)
    assert not torch.allclose(objectives.vespo(batch).phi, direct.phi)


MASK_ROWS = ([[-0.4, -0.3], [0.1, 0.2], [-0.4, -0.3]], [[0.0, 0.0]] * 3, [-1.0, -1.0, 1.0])


def test_sequence_mask_by_hand():
    """Drifts [.35, -.15, .35]: only a negative that drifted is dropped."""
    batch = batch_of(*MASK_ROWS)
    assert sequence_mask(batch, 0.223).tolist() == [0, 0, 1, 1, 1, 1]
    assert sequence_mask(batch, 0.36).tolist() == [1] * 6
    assert sequence_mask(batch, 0.34).tolist() == [0, 0, 1, 1, 1, 1]
    assert sequence_mask(batch, -0.14).tolist() == [0, 0, 1, 1, 1, 1]
    assert sequence_mask(batch, -0.16).tolist() == [0, 0, 0, 0, 1, 1]
    as_old = replace(batch, old_logprobs=batch.behaviour_logprobs, behaviour_logprobs=None)
    assert sequence_mask(as_old, 0.223).tolist() == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("how", ["token-mean", "seq-mean-token-mean"])
def test_masked_tokens_stay_in_the_denominator(how):
    batch = batch_of(*MASK_ROWS)
    mask = sequence_mask(batch, 0.223)
    losses = scaled(objectives.reinforce(batch), batch, mask)
    assert losses.phi.tolist() == [0, 1, 1]
    _, gradient = aggregated(losses, batch, how)
    assert gradient == pytest.approx([0, 0, 1 / 6, 1 / 6, -1 / 6, -1 / 6])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), delta=st.floats(0.003, 0.5))
def test_the_mask_drops_drifted_negatives_alone(seed, delta):
    batch = random_batch(seed)
    mask = sequence_mask(batch, delta)
    for i in range(batch.sequences):
        mine = batch.sequence == i
        drift = float((batch.behaviour_logprobs - batch.logprobs.detach())[mine].mean())
        dropped = float(batch.advantages[mine][0]) < 0 and drift > delta
        assert mask[mine].tolist() == [0.0 if dropped else 1.0] * int(mine.sum())
