"""KL, entropy, DSDR's local term: by hand, and in exact expectation over a small vocabulary."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from models import objectives
from models.objectives import KL_ESTIMATORS, Batch, kl, local_entropy, penalised
from tests.models.objectives.flat import D, batch_of, random_batch

LOGITS = torch.tensor([0.2, -0.3, 0.5], dtype=D)
OLD = torch.tensor([0.0, 0.4, -0.1], dtype=D).log_softmax(0)
REFERENCE = torch.tensor([-0.4, 0.3, 0.9], dtype=D).log_softmax(0)


def test_k3_by_hand():
    batch = batch_of([[0.0, 0.0, 0.0]], None, [1.0], reference_logprobs=[[-0.3, 0.2, 1.0]])
    assert kl(batch).tolist() == pytest.approx([0.040818, 0.021403, 0.718282], abs=1e-6)
    assert kl(batch, "k1").tolist() == pytest.approx([0.3, -0.2, -1.0])
    assert kl(batch, "k2").tolist() == pytest.approx([0.045, 0.02, 0.5])
    sampled = replace(batch, behaviour_logprobs=torch.tensor([0.1, 0.0, -0.5], dtype=D))
    weighed = [0.040818 * math.exp(-0.1), 0.021403, 0.718282 * math.exp(0.5)]
    assert kl(sampled, "k3-unbiased").tolist() == pytest.approx(weighed, abs=1e-6)


@pytest.mark.parametrize("spread", [1e-3, 0.3, 30.0])
def test_k3_is_never_negative(spread):
    batch = random_batch(0, sequences=200, spread=spread)
    assert bool((kl(batch) >= 0).all())
    assert bool((kl(batch, "k3-unbiased") >= 0).all())


def vocabulary(logits: torch.Tensor) -> Batch:
    """Every token of a vocabulary of three once, so that sums weighted by a policy are its expectations."""
    return Batch(
        logits.log_softmax(0), torch.ones(3, dtype=D), torch.arange(3), 3, OLD, reference_logprobs=REFERENCE
    )


@pytest.mark.parametrize(
    ("estimator", "sampler", "value_unbiased", "gradient_of"),
    [
        ("k1", "policy", True, "nothing"),
        ("k2", "policy", False, "KL(policy || reference)"),
        ("k3", "policy", True, "KL(reference || policy)"),
        ("k3-unbiased", "old", True, "KL(policy || reference)"),
    ],
)
def test_what_the_estimators_estimate(estimator, sampler, value_unbiased, gradient_of):
    logits = LOGITS.clone().requires_grad_()
    batch = vocabulary(logits)
    logs = batch.logprobs
    sampled = {"policy": logs.detach().exp(), "old": OLD.exp()}[sampler]
    expectation = (sampled * kl(batch, estimator)).sum()
    reverse = (logs.exp() * (logs - REFERENCE)).sum()
    forward = (REFERENCE.exp() * (REFERENCE - logs)).sum()
    assert torch.allclose(expectation, reverse, rtol=1e-10, atol=0) == value_unbiased
    targets = {
        "nothing": logits.sum() * 0,
        "KL(policy || reference)": reverse,
        "KL(reference || policy)": forward,
    }
    gradients = {
        name: torch.autograd.grad(target, logits, retain_graph=True)[0] for name, target in targets.items()
    }
    (found,) = torch.autograd.grad(expectation, logits)
    agrees = {name for name, want in gradients.items() if torch.allclose(found, want, rtol=1e-9, atol=1e-12)}
    assert agrees == {gradient_of}


def test_the_terms_are_added_to_the_token_losses():
    batch = random_batch(0)
    losses = objectives.grpo(batch)
    both = penalised(losses, batch, kl_coefficient=0.1, estimator="k2", entropy_coefficient=0.01)
    torch.testing.assert_close(both.tokens, losses.tokens + 0.1 * kl(batch, "k2") - 0.01 * batch.entropies)
    torch.testing.assert_close(both.phi, losses.phi)
    (gradient,) = torch.autograd.grad(both.tokens.sum(), batch.entropies)
    assert gradient.tolist() == [-0.01] * len(batch.entropies)
    assert torch.equal(penalised(losses, batch).tokens, losses.tokens)


def test_missing_fields_are_told():
    batch = random_batch(0)
    losses = objectives.grpo(batch)
    without = replace(batch, reference_logprobs=None, entropies=None, diversity=None)
    penalised(losses, without)
    with pytest.raises(ValueError, match="reference_logprobs"):
        penalised(losses, without, kl_coefficient=0.1)
    with pytest.raises(ValueError, match="needs entropies"):
        penalised(losses, without, entropy_coefficient=0.1)
    with pytest.raises(ValueError, match="needs diversity"):
        local_entropy(without, 1)
    unknown = replace(batch, old_logprobs=None, behaviour_logprobs=None)
    for refused in (lambda: kl(unknown, "k3-unbiased"), lambda: local_entropy(unknown, 1)):
        with pytest.raises(ValueError, match="behaviour_logprobs or old_logprobs"):
            refused()
    with pytest.raises(ValueError, match="no KL estimator k4; choose from k1, k2, k3, k3-unbiased"):
        kl(batch, "k4")
    assert len(KL_ESTIMATORS) == 4


DSDR_ROWS = ([[-0.2, -1.0, -0.5], [-0.7, -0.3]], [[-0.3, -0.9, -0.5], [-0.6, -0.4]])


def dsdr(rows=DSDR_ROWS[0], old=DSDR_ROWS[1], shares=(0.7, 0.3)) -> Batch:
    return replace(batch_of(rows, old, [1.0] * len(rows)), diversity=torch.tensor(shares, dtype=D))


def test_local_entropy_by_hand():
    batch = dsdr()
    loss = local_entropy(batch, 1)
    (gradient,) = torch.autograd.grad(loss, batch.logprobs)
    assert -float(loss.detach()) == pytest.approx(0.524111, abs=1e-6)
    assert (-gradient).tolist() == pytest.approx([-0.206299, 0, -0.116667, -0.040718, -0.116043], abs=1e-6)
    rho = (batch.logprobs - batch.behaviour_logprobs).detach().exp()
    share = torch.tensor([0.7 / 3] * 3 + [0.3 / 2] * 2, dtype=D)
    torch.testing.assert_close(gradient, share * rho * (batch.logprobs.detach() + 1))


def test_local_entropy_is_the_entropy_in_expectation():
    """Samples of old, three one-token answers of share old(v): the sum is the expectation."""
    logits = LOGITS.clone().requires_grad_()
    batch = replace(vocabulary(logits), diversity=OLD.exp())
    value = -local_entropy(batch, 1)
    (gradient,) = torch.autograd.grad(value, logits)
    assert float(value.detach()) == pytest.approx(1.049571, abs=1e-6)
    assert gradient.tolist() == pytest.approx([0.011635, 0.109637, -0.121272], abs=1e-6)
    logs = logits.log_softmax(0)
    (entropy_gradient,) = torch.autograd.grad(-(logs.exp() * logs).sum(), logits)
    torch.testing.assert_close(gradient, entropy_gradient)


def test_a_detached_ratio_would_teach_nothing():
    """Why rho carries gradient: without it the mean gradient is 0, and with it alone it is the entropy's."""
    logits = LOGITS.clone().requires_grad_()
    logs = logits.log_softmax(0)
    rho = (logs - OLD).exp()
    detached, alone = (
        torch.autograd.grad(-(OLD.exp() * term).sum(), logits, retain_graph=True)[0]
        for term in (rho.detach() * logs, rho * logs.detach())
    )
    assert detached.abs().max() < 1e-15
    assert alone.tolist() == pytest.approx([0.011635, 0.109637, -0.121272], abs=1e-6)


def test_local_entropy_does_not_see_length_or_wrong_answers():
    once = float(local_entropy(dsdr(), 1).detach())
    rows, old = ([row * 3 for row in part] for part in DSDR_ROWS)
    assert float(local_entropy(dsdr(rows, old), 1).detach()) == pytest.approx(once, rel=1e-12)
    batch = dsdr(shares=(1.0, 0.0))
    (gradient,) = torch.autograd.grad(local_entropy(batch, 1), batch.logprobs)
    assert gradient[3:].tolist() == [0.0, 0.0]
    assert float(local_entropy(dsdr(shares=(0.0, 0.0)), 1).detach()) == 0.0
    assert float(local_entropy(dsdr(), 4).detach()) == pytest.approx(once / 4)


@pytest.mark.parametrize(
    "proximal", [[0.1, 0.2, 0.3], [0.2, -0.3, 0.5]], ids=["between", "the policy itself"]
)
def test_the_ratio_is_to_who_wrote_whatever_the_proximal_policy_is(proximal):
    logits = LOGITS.clone().requires_grad_()
    old = torch.tensor(proximal, dtype=D).log_softmax(0)
    batch = replace(vocabulary(logits), old_logprobs=old, diversity=OLD.exp())
    logs = logits.log_softmax(0)
    wanted = {
        (OLD.exp() * kl(batch, "k3-unbiased")).sum(): (logs.exp() * (logs - REFERENCE)).sum(),
        -local_entropy(batch, 1): -(logs.exp() * logs).sum(),
    }
    for found, exact in wanted.items():
        assert float(found.detach()) == pytest.approx(float(exact.detach()))
        slopes = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (found, exact))
        torch.testing.assert_close(*slopes)


def test_without_a_behaviour_the_proximal_policy_wrote():
    batch = replace(dsdr(), old_logprobs=dsdr().behaviour_logprobs, behaviour_logprobs=None)
    assert -float(local_entropy(batch, 1).detach()) == pytest.approx(0.524111, abs=1e-6)


@pytest.mark.parametrize("term", [*KL_ESTIMATORS, "local entropy"])
def test_gradients_are_those_of_the_value(term):
    batch = random_batch(3)

    def value(logprobs):
        here = replace(batch, logprobs=logprobs)
        return local_entropy(here, 2) if term == "local entropy" else kl(here, term)

    assert torch.autograd.gradcheck(value, (batch.logprobs,))
