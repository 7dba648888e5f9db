"""What holds for every objective, whatever the numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import objectives
from models.objectives import Batch
from tests.models.objectives.flat import batch_of, random_batch

NAMES = objectives.names()
SEEDS = st.integers(0, 2**31)
BAND = {name: {"eps_lo": 0.2, "eps_hi": 0.2} for name in ("gspo", "gspo_token", "sampo")}


def pushed(name: str, batch: Batch) -> torch.Tensor:
    return objectives.coefficients(objectives.get(name).loss(batch, **BAND.get(name, {})), batch)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5, deadline=None)
@given(seed=SEEDS)
def test_on_policy_every_coefficient_is_one(name, seed):
    batch = random_batch(seed)
    same = batch.logprobs.detach()
    batch = replace(batch, behaviour_logprobs=same, old_logprobs=same)
    torch.testing.assert_close(pushed(name, batch), batch.advantages, rtol=1e-12, atol=0)
    losses = objectives.get(name).loss(batch)
    torch.testing.assert_close(losses.phi, torch.ones_like(losses.phi), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5, deadline=None)
@given(seed=SEEDS)
def test_phi_is_the_mean_coefficient_of_its_sequence(name, seed):
    batch = random_batch(seed, spread=0.6)
    losses = objectives.get(name).loss(batch, **BAND.get(name, {}))
    assert not losses.phi.requires_grad
    each = pushed(name, batch) / batch.advantages
    want = torch.stack([each[batch.sequence == i].mean() for i in range(batch.sequences)])
    torch.testing.assert_close(losses.phi, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5, deadline=None)
@given(seed=SEEDS)
def test_the_order_of_tokens_does_not_matter(name, seed):
    batch = random_batch(seed)
    places = torch.randperm(len(batch.logprobs), generator=torch.Generator().manual_seed(seed))
    per_token = ("logprobs", "advantages", "sequence", "behaviour_logprobs", "old_logprobs")
    turned = replace(batch, **{field: getattr(batch, field)[places] for field in per_token})
    torch.testing.assert_close(pushed(name, turned), pushed(name, batch)[places], rtol=1e-10, atol=1e-12)


PRODUCT = {"vespo", "vespo_trl", "topr", "sequence_tis", "sequence_mis"}
ROOT = {"gspo", "gspo_token", "sampo"}


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"reinforce"}))
def test_what_the_ratio_is_of(name):
    """The product over a sequence, its T-th root, or each token's own."""

    def coefficients(*log_ratios: float) -> list[float]:
        sampled = [[-1.0] * len(log_ratios)]
        batch = batch_of([[x - 1 for x in log_ratios]], sampled, [-1.0], old_logprobs=sampled)
        return (pushed(name, batch) / batch.advantages).tolist()

    own = coefficients(0.1, -0.1) != pytest.approx([1.0, 1.0])
    assert own == (name not in PRODUCT | ROOT)
    (once,), twice = coefficients(-0.1), coefficients(-0.1, -0.1)
    assert once < 1
    assert (twice != pytest.approx([once, once])) == (name in PRODUCT)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e3, 1e30])
def test_any_finite_input_gives_numbers(name, scale):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        gives_numbers(name, dtype, scale)


def gives_numbers(name, dtype, scale):
    g = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        return ((torch.rand(300, generator=g, dtype=torch.float64) * 2 - 1) * scale).to(dtype)

    batch = Batch(
        draw().requires_grad_(),
        torch.randint(-1, 2, (300,), generator=g).to(dtype),
        torch.arange(300) // 3,
        100,
        behaviour_logprobs=draw(),
        old_logprobs=draw(),
        reference_logprobs=draw(),
        diversity=torch.rand(100, generator=g).to(dtype),
    )
    losses = objectives.get(name).loss(batch)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert losses.tokens.dtype == losses.phi.dtype == wide
    assert not losses.tokens.isnan().any()
    assert losses.phi.isfinite().all()
    assert (losses.phi >= 0).all()
    gradient = objectives.coefficients(losses, batch)
    assert gradient.dtype == dtype
    assert not gradient.isnan().any()
    for estimator in objectives.KL_ESTIMATORS:
        assert objectives.kl(batch, estimator).isfinite().all()
    assert not objectives.local_entropy(batch, 10).isnan()


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_without_tokens_has_no_coefficient(name):
    batch = random_batch(0, sequences=3)
    gap = replace(batch, sequence=batch.sequence + (batch.sequence > 0), sequences=4)
    full, gapped = (objectives.get(name).loss(b) for b in (batch, gap))
    assert gapped.phi[1] == 0
    assert torch.equal(gapped.phi[[0, 2, 3]], full.phi)
    assert torch.equal(gapped.tokens, full.tokens)


BOUNDS = {  # largest coefficient for A > 0 and for A < 0
    "vespo": (1.208126, 1.241594),
    "vespo_trl": (1.208126, 1.241594),
    "ppo": (1.2, torch.inf),
    "dapo": (1.28, torch.inf),
    "cispo": (1.28, 1.28),
    "cispo_trl": (5.0, 5.0),
    "topr": (1.0, 1.0),
    "tis": (2.0, 2.0),
    "sequence_mis": (2.0, 2.0),
    "icepop": (5.0, 5.0),
    "sapo": (1.6, 1.6),
    "dppo": (20.0, 20.0),
}


@pytest.mark.parametrize("name", BOUNDS)
@settings(max_examples=6, deadline=None)
@given(seed=SEEDS, spread=st.sampled_from([0.5, 5.0, 500.0]))
def test_coefficients_are_bounded(name, seed, spread):
    batch = random_batch(seed, spread=spread)
    each = pushed(name, batch) / batch.advantages
    for sign, bound in zip((1, -1), BOUNDS[name], strict=True):
        mine = each[batch.advantages.sign() == sign]
        assert (mine >= 0).all()
        assert (mine <= bound * (1 + 1e-9)).all()


def test_half_precision_is_computed_wide():
    """bfloat16 holds 8 bits: ratios formed in it would be off by far more than a float32 rounding."""
    g = torch.Generator().manual_seed(0)
    half = (-torch.rand(400, generator=g) * 3).bfloat16()
    behaviour = (half.float() + 0.02 * torch.randn(400, generator=g)).bfloat16()
    fields = (torch.ones(400), torch.arange(400) // 100, 4)
    narrow = Batch(half, *fields, behaviour_logprobs=behaviour)
    exact = Batch(half.double(), *fields, behaviour_logprobs=behaviour.double())
    for name in ("vespo", "gspo", "topr"):
        got, want = (objectives.get(name).loss(b).phi for b in (narrow, exact))
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)


def test_a_ratio_beyond_float16_is_computed_wide():
    """float16 ends at 65,504, below e^12."""
    logs = torch.tensor([-1.0, -1.0], dtype=torch.float16)
    behaviour = torch.tensor([-13.0, -31.0], dtype=torch.float16)
    batch = Batch(logs, torch.ones_like(logs), torch.arange(2), 2, behaviour_logprobs=behaviour)
    want = torch.tensor([12.0, 20.0]).exp()
    for name in ("tis", "sequence_tis"):
        torch.testing.assert_close(objectives.get(name).loss(batch, high=torch.inf).phi, want)
    assert objectives.vespo(batch).phi.tolist() == [0.0, 0.0]
