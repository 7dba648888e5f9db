"""Worked numbers of VESPO and GRPO: computed with the authors' released function and by autograd in
float64."""

from __future__ import annotations

import math

import pytest
import torch

from models import objectives
from models.objectives import AGGREGATIONS, Batch, Counts, aggregate

D = torch.float64


def batch_of(rows, mu, advantages, dtype=D) -> tuple[Batch, torch.Tensor]:
    """Rows of equal or unequal length -> a flat batch and its leaf of log-probabilities."""
    lengths = [len(row) for row in rows]
    leaf = torch.tensor([x for row in rows for x in row], dtype=dtype, requires_grad=True)
    sequence = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)])
    return (
        Batch(
            leaf,
            torch.tensor([x for row in mu for x in row], dtype=dtype),
            torch.tensor(advantages, dtype=dtype)[sequence],
            sequence,
            len(rows),
        ),
        leaf,
    )


def loss_and_grad(name, batch, leaf, how, **options):
    losses = objectives.get(name).loss(batch, **options)
    total = aggregate(losses, batch, how, Counts(len(batch.logprobs), batch.sequences))
    (grad,) = torch.autograd.grad(total, leaf)
    return float(total.detach()), grad, losses


def worked() -> tuple[Batch, torch.Tensor]:
    return batch_of([[-1.0, -0.5, -2.0], [-0.7, -1.2]], [[-1.1, -0.4, -2.3], [-0.5, -0.9]], [0.5, -0.5])


KERNEL = [  # W, phi for A >= 0 with (2, 3), phi for A < 0 with (3, 2)
    (0.1, 0.148797, 0.006050),
    (0.25, 0.592983, 0.070026),
    (0.5, 1.120422, 0.339785),
    (2 / 3, 1.208125, 0.577106),
    (0.9, 1.093386, 0.890403),
    (1.0, 1.0, 1.0),
    (1.25, 0.738073, 1.184630),
    (1.5, 0.502043, 1.241593),
    (2.0, 0.199148, 1.082682),
    (3.0, 0.022309, 0.494522),
    (5.0, 0.000154, 0.041933),
    (math.exp(-4), 6.378e-3, 4.377e-5),
    (math.exp(-2), 0.24512, 0.013972),
    (math.exp(-1), 0.90155, 0.176266),
    (math.exp(1), 0.042645, 0.646253),
    (math.exp(2), 2.6e-7, 1.138e-3),
]


@pytest.mark.parametrize(("w", "positive", "negative"), KERNEL)
def test_vespo_kernel(w, positive, negative):
    batch, _ = batch_of([[math.log(w) - 2]] * 2, [[-2.0]] * 2, [1.0, -1.0])
    phi = objectives.vespo(batch).phi
    assert phi.tolist() == pytest.approx([positive, negative], abs=1e-5)
    assert not phi.requires_grad


@pytest.mark.parametrize(
    ("how", "loss", "first", "second"),
    [
        ("token-mean", 0.130138, -0.0637898, 0.0490141),
        ("seq-mean-token-mean", 0.0696451, -0.0531582, 0.0612677),
        ("seq-mean-token-sum", 0.325344, -0.1594746, 0.1225354),
    ],
)
def test_vespo_worked_batch(how, loss, first, second):
    total, grad, losses = loss_and_grad("vespo", *worked(), how)
    assert losses.phi.tolist() == pytest.approx([0.637898, 0.490141], abs=1e-6)
    assert total == pytest.approx(loss, abs=1e-6)
    assert grad.tolist() == pytest.approx([first] * 3 + [second] * 2, abs=1e-7)


@pytest.mark.parametrize(
    ("how", "loss", "grad"),
    [
        ("token-mean", -0.167128, [-0.110517, -0.090484, 0, 0.081873, 0]),
        ("seq-mean-token-mean", -0.071826, [-0.092098, -0.075403, 0, 0.102341, 0]),
    ],
)
def test_grpo_worked_batch(how, loss, grad):
    total, found, losses = loss_and_grad("grpo", *worked(), how)
    assert total == pytest.approx(loss, abs=1e-6)
    assert found.tolist() == pytest.approx(grad, abs=1e-6)
    assert losses.phi.tolist() == pytest.approx([2 / 3, 1 / 2])


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_grpo_coefficients(advantage):
    ratios = [0.25, 0.5, 0.79, 0.81, 1, 1.27, 1.29, 2, 3.5, 11]
    want = {
        1.0: [0.25, 0.5, 0.79, 0.81, 1, 1.27, 0, 0, 0, 0],
        -1.0: [0, 0, 0, 0.81, 1, 1.27, 1.29, 2, 3.5, 11],
    }[advantage]
    batch, leaf = batch_of([[math.log(r) - 3 for r in ratios]], [[-3.0] * len(ratios)], [advantage])
    _, grad, _ = loss_and_grad("grpo", batch, leaf, "token-mean")
    assert (-grad * len(ratios)).tolist() == pytest.approx([advantage * c for c in want], abs=1e-9)


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_on_the_sampling_policy_all_are_reinforce_with_baseline(how):
    rows, advantages = [[-1.0, -0.5, -2.0], [-0.7, -1.2]], [0.5, -0.5]
    grads = {}
    for name in ("vespo", "reinforce", "grpo"):
        batch, leaf = batch_of(rows, rows, advantages)
        grads[name] = loss_and_grad(name, batch, leaf, how)[1]
    assert torch.equal(grads["vespo"], grads["reinforce"])
    torch.testing.assert_close(grads["grpo"], grads["reinforce"], rtol=1e-14, atol=0)


def test_surrogate_has_the_kernel_as_gradient():
    """f(W) = e^c2 c2^-c1 gamma_lower(c1, c2 W) with f'(W) = phi(W) / W, through every token of the
    product."""
    for c1, c2, want in ((2, 3, 0.637898), (3, 2, 1.221748)):
        log_w = torch.full((3,), 0.1, dtype=D, requires_grad=True)
        x = c2 * log_w.sum().exp()
        gamma = 1 - (1 + x) * torch.exp(-x) if c1 == 2 else 2 - (x**2 + 2 * x + 2) * torch.exp(-x)
        (grad,) = torch.autograd.grad(math.exp(c2) * c2**-c1 * gamma, log_w)
        assert grad.tolist() == pytest.approx([want] * 3, abs=1e-6)
        batch, _ = batch_of([[-0.9] * 3], [[-1.0] * 3], [1.0])
        assert float(objectives.vespo(batch, c1_pos=c1, c2_pos=c2).phi) == pytest.approx(want, abs=1e-6)


def test_limits_of_the_kernel():
    batch, _ = worked()
    w = objectives.sequence_log_ratio(batch).exp()
    importance = objectives.vespo(batch, c1_pos=1, c2_pos=0, c1_neg=1, c2_neg=0).phi
    torch.testing.assert_close(importance, w, rtol=2e-4, atol=0)  # c2 has a floor of 1e-4
    torch.testing.assert_close(
        objectives.vespo(batch, c1_pos=0, c2_pos=0, c1_neg=0, c2_neg=0).phi,
        torch.ones(2, dtype=D),
        rtol=2e-4,
        atol=0,
    )


def test_sign_zero_and_order():
    rows, mu = [[-1.0, -0.5, -2.0]], [[-1.1, -0.4, -2.3]]
    phi = {a: float(objectives.vespo(batch_of(rows, mu, [a])[0]).phi) for a in (0.5, -0.5, 0.0)}
    assert phi[0.0] == phi[0.5] != phi[-0.5]
    assert phi[-0.5] == pytest.approx(1.221748, abs=1e-6)
    batch, leaf = batch_of(rows, mu, [0.0])
    assert not loss_and_grad("vespo", batch, leaf, "token-mean")[1].any()
    turned, _ = batch_of([rows[0][::-1]], [mu[0][::-1]], [0.5])
    assert float(objectives.vespo(turned).phi) == pytest.approx(phi[0.5], rel=1e-14)


def test_duplicating_tokens_squares_the_ratio():
    once, _ = worked()
    twice, _ = batch_of(
        [[-1.0, -0.5, -2.0] * 2, [-0.7, -1.2] * 2], [[-1.1, -0.4, -2.3] * 2, [-0.5, -0.9] * 2], [0.5, -0.5]
    )
    torch.testing.assert_close(objectives.sequence_log_ratio(twice), 2 * objectives.sequence_log_ratio(once))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bounded_and_finite_for_any_input(dtype):
    g = torch.Generator().manual_seed(0)
    rows = (torch.rand(200, 3, generator=g) * 2e3 - 1e3).tolist()
    mu = (torch.rand(200, 3, generator=g) * 2e3 - 1e3).tolist()
    for sign, bound in ((1.0, 1.208126), (-1.0, 1.241594)):
        batch, _ = batch_of(rows, mu, [sign] * 200, dtype)
        losses = objectives.vespo(batch)
        assert losses.phi.isfinite().all()
        assert (losses.phi >= 0).all()
        assert (losses.phi <= bound).all()
        assert losses.tokens.isfinite().all()


def test_extremes():
    for difference in (25.0, 100.0, 1e4):
        batch, _ = batch_of([[difference]] * 2, [[0.0]] * 2, [1.0, -1.0])
        assert objectives.vespo(batch).phi.tolist() == [0.0, 0.0]
    for difference in (-25.0, -100.0):
        batch, _ = batch_of([[difference]] * 2, [[0.0]] * 2, [1.0, -1.0])
        # The floor of 1e-8 on W is above exp(-20), as in the released code.
        assert objectives.vespo(batch).phi.tolist() == pytest.approx([2.0086e-15, 7.39e-24], rel=1e-3)


def test_second_moment_stays_within_its_bound():
    """E[phi^2] <= E[phi] K E_Q[W], log W ~ N(-1/2, 1) (so that E[W] = 1)."""
    g = torch.Generator().manual_seed(0)
    log_w = (torch.randn(400_000, generator=g, dtype=D) - 0.5)[:, None].tolist()
    zero = [[0.0]] * len(log_w)
    for sign, want in ((1.0, 0.660), (-1.0, 0.438)):
        phi = objectives.vespo(batch_of(log_w, zero, [sign] * len(log_w))[0]).phi
        assert float(phi.square().mean()) == pytest.approx(want, abs=0.01)


def test_summary_of_a_step():
    log_ratio = torch.tensor([0.0, 0.0, 0.0, 0.0])
    assert objectives.summarise(log_ratio, torch.ones(4), {})["ess"] == pytest.approx(1.0)
    one = objectives.summarise(torch.tensor([20.0, -20, -20, -20]), torch.tensor([1.0, 0, 0, 0]), {})
    assert one["ess"] == pytest.approx(0.25)
    assert one["phi_dead"] == 0.75
    w = torch.tensor([1.349859, 0.606531])
    assert objectives.summarise(w.log(), w, {})["ess"] == pytest.approx(
        float(w.sum() ** 2 / (2 * w.square().sum())), rel=1e-6
    )


def test_kl_estimates():
    batch, _ = batch_of([[-0.3, 0.2, 1.0]], [[0.0, 0.0, 0.0]], [1.0])
    found = objectives.token_statistics(batch, torch.zeros(3))
    assert found["kl_k3"].tolist() == pytest.approx([0.040818, 0.021403, 0.718282], abs=1e-6)
    assert found["kl_k1"].tolist() == pytest.approx([0.3, -0.2, -1.0])


def test_unknown_behaviour_counts_as_on_policy():
    batch, leaf = worked()
    unknown = Batch(batch.logprobs, None, batch.advantages, batch.sequence, batch.sequences)
    assert objectives.sequence_log_ratio(unknown).tolist() == [0.0, 0.0]
    _, grad, _ = loss_and_grad("reinforce", unknown, leaf, "token-mean")
    assert grad.tolist() == pytest.approx([-0.1] * 3 + [0.1] * 2)


def test_registry():
    assert objectives.names() == ("grpo", "reinforce", "vespo")
    assert objectives.get("vespo").needs == {"behaviour_logprobs"}
    assert not objectives.get("reinforce").needs
    with pytest.raises(ValueError, match="did you mean vespo"):
        objectives.get("vesppo")
    with pytest.raises(ValueError, match="registered already"):
        objectives.register("vespo")(objectives.reinforce)
    batch, _ = worked()
    with pytest.raises(ValueError, match="token-mean"):
        aggregate(objectives.reinforce(batch), batch, "mean", Counts(5, 2))
