"""Objectives of REINFORCE form: worked numbers (VESPO's agree with the authors' function), tables of
coefficients, limits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from models import objectives
from models.objectives import AGGREGATIONS
from tests.models.objectives.flat import (
    WORKED,
    D,
    batch_of,
    flat,
    loss_and_gradient,
    of_ratios,
    pushes,
    random_batch,
)

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
SURROGATE = [  # W, f for (2, 3), f for (3, 2): f' = phi / W, f(0) = 0
    (0.1, 0.082432, 0.002122),
    (0.25, 0.386889, 0.026578),
    (0.5, 0.986813, 0.148338),
    (2 / 3, 1.325632, 0.278256),
    (0.9, 1.676784, 0.497614),
    (1.0, 1.787282, 0.597264),
    (1.25, 1.982422, 0.842698),
    (1.5, 2.095369, 1.065520),
    (2.0, 2.193003, 1.407424),
    (3.0, 2.228972, 1.732791),
    (5.0, 2.231715, 1.842148),
    (math.exp(4), 2.231726, 1.847264),  # as far as infinity: phi is 0 from here on
]
VESPOS = ("vespo", "vespo_trl")


def phi(name, rows, behaviour, advantages, **options):
    return objectives.get(name).loss(batch_of(rows, behaviour, advantages), **options).phi.tolist()


def kernel(log_w: torch.Tensor, sign: float = 1.0, name: str = "vespo", **options: float) -> torch.Tensor:
    """phi of sequences of one token, by the sign of the advantage."""
    places = torch.arange(len(log_w))
    batch = objectives.Batch(
        log_w, torch.full_like(log_w, sign), places, len(log_w), behaviour_logprobs=torch.zeros_like(log_w)
    )
    return objectives.get(name).loss(batch, **options).phi


@pytest.mark.parametrize("name", VESPOS)
@pytest.mark.parametrize(("w", "positive", "negative"), KERNEL)
def test_vespo_kernel(name, w, positive, negative):
    found = phi(name, [[math.log(w) - 2]] * 2, [[-2.0]] * 2, [1.0, -1.0])
    assert found == pytest.approx([positive, negative], abs=1e-5)


@pytest.mark.parametrize("name", VESPOS)
@pytest.mark.parametrize(
    ("log_w", "positive", "negative"),
    [(-4.0, 6.378e-3, 4.377e-5), (math.log(5), 1.54e-4, 0.041933), (2.0, 2.6e-7, 1.138e-3)],
)
def test_vespo_kernel_where_it_is_small(name, log_w, positive, negative):
    found = [float(kernel(torch.tensor([log_w], dtype=D), sign, name)) for sign in (1.0, -1.0)]
    assert found[0] == pytest.approx(positive, rel=0.02 if positive < 1e-6 else 3e-3)
    assert found[1] == pytest.approx(negative, rel=5e-4)


@pytest.mark.parametrize(("sign", "column"), [(1.0, 1), (-1.0, 2)])
@pytest.mark.parametrize("row", SURROGATE, ids=lambda row: f"{row[0]:.3g}")
def test_the_area_under_the_vespo_kernel_is_its_surrogate(row, sign, column):
    """f(W) is the integral of phi over log W."""
    log_w = torch.linspace(-18, math.log(row[0]), 20_001, dtype=D)
    assert float(torch.trapezoid(kernel(log_w, sign), log_w)) == pytest.approx(row[column], abs=1e-6)


@pytest.mark.parametrize(
    ("c1", "c2", "most", "at", "steepest", "where"),
    [
        (2.0, 3.0, 1.208125, 2 / 3, 2.463019, 1 / 3),
        (3.0, 2.0, 1.241593, 1.5, 1.0, 1.0),
        (1.0, 3.0, math.exp(2) / 3, 1 / 3, math.exp(3), 0.0),
    ],
)
def test_bounds_of_the_vespo_kernel(c1, c2, most, at, steepest, where):
    """sup phi = (c1 / c2)^c1 e^(c2 - c1) at W = c1 / c2, and sup phi / W is the same of c1 - 1
    (arXiv 2602.10693v3, propositions 3.1 and C.1)."""
    log_w = torch.linspace(-14, 3, 200_001, dtype=D)
    found = kernel(log_w, c1_pos=c1, c2_pos=c2)
    for values, bound, place in ((found, most, at), (found / log_w.exp(), steepest, where)):
        assert float(values.max()) == pytest.approx(bound, rel=1e-5)
        assert float(log_w[values.argmax()].exp()) == pytest.approx(place, abs=1e-3)


@pytest.mark.parametrize(
    ("sign", "slope", "above_one", "above_half"),
    [(1.0, -1.0, [0.41719, 1.0], [0.2192, 1.5024]), (-1.0, 1.0, [1.0, 2.14403], [0.6134, 2.9890])],
)
def test_where_the_vespo_kernel_is_above_one_and_a_half(sign, slope, above_one, above_half):
    w = torch.linspace(1e-3, 6, 600_001, dtype=D)
    found = kernel(w.log(), sign)
    for level, edges, within in ((1.0, above_one, 2e-5), (0.5, above_half, 7e-5)):
        above = found > level
        assert w[1:][above[1:] != above[:-1]].tolist() == pytest.approx(edges, abs=within)
    step = torch.tensor([-1e-4, 1e-4], dtype=D)
    assert float(kernel(step, sign).log().diff() / step.diff()) == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("name", VESPOS)
@pytest.mark.parametrize(("c1", "c2"), [(0.0, 0.0), (1.0, 3.0), (2.5, 0.3), (7.0, 11.0)])
def test_vespo_on_policy_is_one_whatever_its_constants(name, c1, c2):
    rows, _, advantages = WORKED
    constants = {"c1_pos": c1, "c2_pos": c2, "c1_neg": c2, "c2_neg": c1}
    assert phi(name, rows, rows, advantages, **constants) == [1.0, 1.0]


@pytest.mark.parametrize("name", VESPOS)
@pytest.mark.parametrize(
    ("how", "loss", "first", "second"),
    [
        ("token-mean", 0.130138, -0.0637898, 0.0490141),
        ("seq-mean-token-mean", 0.0696451, -0.0531582, 0.0612677),
        ("seq-mean-token-sum", 0.325344, -0.1594746, 0.1225354),
    ],
)
def test_vespo_worked_batch(name, how, loss, first, second):
    assert phi(name, *WORKED) == pytest.approx([0.637898, 0.490141], abs=1e-6)
    total, gradient = loss_and_gradient(name, batch_of(*WORKED), how)
    assert total == pytest.approx(loss, abs=1e-6)
    assert gradient == pytest.approx([first] * 3 + [second] * 2, abs=1e-7)


@pytest.mark.parametrize("name", VESPOS)
def test_vespo_folds_the_correction_into_its_ratio(name):
    """Token weights [1.2, .9, 1] and [2, .8] of old against behaviour: log W = [.376961, -.029996]."""
    weights = [[1.2, 0.9, 1.0], [2.0, 0.8]]
    batch = replace(batch_of(*WORKED), correction=flat(weights))
    assert objectives.get(name).loss(batch).phi.tolist() == pytest.approx([0.53815, 0.96958], abs=1e-5)
    log_w = [0.3 + math.log(1.2 * 0.9), -0.5 + math.log(2 * 0.8)]
    assert log_w == pytest.approx([0.376961, -0.029996], abs=1e-6)
    direct = phi(name, [[log_w[0]], [log_w[1]]], [[0.0], [0.0]], [0.5, -0.5])
    assert objectives.get(name).loss(batch).phi.tolist() == pytest.approx(direct, rel=1e-12)


def test_a_rejected_token_drops_its_sequence_from_vespo():
    batch = replace(batch_of(*WORKED), correction=flat([[1.0, 0.0, 1.0], [1.0, 1.0]]))
    first, second = objectives.vespo(batch).phi.tolist()
    assert first == pytest.approx(2.0086e-15 * math.exp(2 * 0.3), rel=1e-4)  # 1e-8^2 e^3, and the others' W^2
    assert second == pytest.approx(0.490141, abs=1e-6)
    # A weight of 0 counts as 1e-8, as in the authors' code and TRL's, and no less.
    one = replace(batch_of([[-math.log(1e-8)]], [[0.0]], [1.0]), correction=flat([[0.0]]))
    assert objectives.vespo(one).phi.tolist() == pytest.approx([1.0])


@pytest.mark.parametrize("name", VESPOS)
def test_the_order_of_the_bounds_of_vespo(name):
    """Each token's log ratio to +-20, each log weight to at most 20, and their sum to +-20 at last."""
    assert phi(name, [[30.0, -20.0]], [[0.0, 0.0]], [1.0]) == [1.0]
    loss = objectives.get(name).loss
    heavy = replace(batch_of([[-20.0]], [[0.0]], [1.0]), correction=flat([[math.exp(30)]]))
    assert loss(heavy).phi.tolist() == [1.0]
    both = replace(batch_of([[-20.0] * 2], [[0.0] * 2], [1.0]), correction=flat([[math.exp(19)] * 2]))
    assert loss(both).phi.tolist() == pytest.approx([0.24512], abs=1e-5)  # log W = -40 + 38


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_vespo_on_policy_is_reinforce_to_the_bit(how):
    rows, _, advantages = WORKED
    batch = batch_of(rows, rows, advantages)
    assert loss_and_gradient("vespo", batch, how) == loss_and_gradient("reinforce", batch, how)


def test_vespo_surrogate_has_the_kernel_as_gradient():
    """f(W) = e^c2 c2^-c1 gamma_lower(c1, c2 W) with f'(W) = phi(W) / W, through every token of the product."""
    for c1, c2, want in ((2, 3, 0.637898), (3, 2, 1.221748)):
        log_w = torch.full((3,), 0.1, dtype=D, requires_grad=True)
        x = c2 * log_w.sum().exp()
        gamma = 1 - (1 + x) * torch.exp(-x) if c1 == 2 else 2 - (x**2 + 2 * x + 2) * torch.exp(-x)
        (gradient,) = torch.autograd.grad(math.exp(c2) * c2**-c1 * gamma, log_w)
        assert gradient.tolist() == pytest.approx([want] * 3, abs=1e-6)
        found = phi("vespo", [[-0.9] * 3], [[-1.0] * 3], [1.0], c1_pos=c1, c2_pos=c2)
        assert found == pytest.approx(gradient.tolist()[:1], rel=1e-12)


def test_vespo_limits_are_importance_sampling_and_reinforce():
    w = [math.exp(0.3), math.exp(-0.5)]
    importance = phi("vespo", *WORKED, c1_pos=1, c2_pos=0, c1_neg=1, c2_neg=0)
    assert importance == pytest.approx(w, rel=2e-4)
    floor = [x * math.exp(1e-4 * (1 - x)) for x in w]  # c2 is 1e-4 at least
    assert importance == pytest.approx(floor, rel=1e-12)
    assert phi("vespo", *WORKED, c1_pos=0, c2_pos=0, c1_neg=0, c2_neg=0) == pytest.approx([1, 1], rel=2e-4)


def test_vespo_sign_zero_and_length():
    rows, behaviour, _ = WORKED
    positive, negative, zero = (phi("vespo", rows[:1], behaviour[:1], [a])[0] for a in (0.5, -0.5, 0.0))
    assert zero == positive == pytest.approx(0.637898, abs=1e-6)
    assert negative == pytest.approx(1.221748, abs=1e-6)
    assert pushes("vespo", batch_of(rows, behaviour, [0.0, 0.0])) == [0.0] * 5
    symmetric = [
        phi("vespo", rows[:1], behaviour[:1], [a], c1_pos=2, c2_pos=2, c1_neg=2, c2_neg=2)
        for a in (1.0, -1.0)
    ]
    assert symmetric[0] == symmetric[1]
    once = objectives.sequence_log_ratio(batch_of(*WORKED))
    twice = batch_of([row * 2 for row in rows], [row * 2 for row in behaviour], [0.5, -0.5])
    assert objectives.sequence_log_ratio(twice).tolist() == pytest.approx((2 * once).tolist())
    squared = [float(kernel(2 * log_w[None], sign)) for log_w, sign in zip(once, (1.0, -1.0), strict=True)]
    assert objectives.vespo(twice).phi.tolist() == pytest.approx(squared, rel=1e-12)


def test_turns_of_opposite_sign_take_their_own_branch_of_vespo():
    rows, behaviour, _ = WORKED
    batch = batch_of(rows[:1], behaviour[:1], [[0.5, 0.5, -0.5]])
    assert pushes("vespo", batch) == pytest.approx([0.318949, 0.318949, -0.610874], abs=1e-6)


@pytest.mark.parametrize("name", VESPOS)
def test_vespo_extremes(name):
    for difference in (25.0, 100.0, 1e4):
        assert phi(name, [[difference]] * 2, [[0.0]] * 2, [1.0, -1.0]) == [0.0, 0.0]
    for difference in (-25.0, -100.0):
        # The floor of 1e-8 on W is above exp(-20), as in the released code.
        found = phi(name, [[difference]] * 2, [[0.0]] * 2, [1.0, -1.0])
        assert found == pytest.approx([2.0086e-15, 7.39e-24], rel=1e-3)


def test_the_two_vespos_differ_where_the_ratio_is_below_the_floor():
    """exp(-20) against 1e-8 in the linear term, visible where c2 is large."""
    found = [phi(name, [[-30.0]], [[0.0]], [1.0], c1_pos=0.0, c2_pos=1e7)[0] for name in VESPOS]
    assert found == [0.0, 0.0]  # e^c2 overflows and counts as nothing
    found = [phi(name, [[-30.0]], [[0.0]], [1.0], c1_pos=30.0, c2_pos=600.0)[0] for name in VESPOS]
    assert found[1] / found[0] == pytest.approx(math.exp(-600 * (1e-8 - math.exp(-20))), rel=1e-12)
    assert found[0] != found[1]


def test_vespo_second_moment_stays_within_its_bound():
    """E[phi^2] <= E[phi] K E_Q[W], log W ~ N(-1/2, 1) (so that E[W] = 1 and E[W^2] = e)."""
    g = torch.Generator().manual_seed(0)
    log_w = torch.randn(400_000, generator=g, dtype=D) - 0.5
    assert objectives.chi_square(log_w) + 1 == pytest.approx(math.e, abs=0.1)
    for sign, second, bound in ((1.0, 0.660, 1.184), (-1.0, 0.438, 0.616)):
        found = kernel(log_w, sign)
        steepest = 2.463019 if sign > 0 else 1.0
        moment, limit = float(found.square().mean()), float((found * log_w.exp()).mean()) * steepest
        assert moment == pytest.approx(second, abs=0.01)
        assert limit == pytest.approx(bound, abs=0.02)
        assert moment <= limit


@pytest.mark.parametrize(
    ("tokens", "drift", "spread", "positive", "negative", "dead", "within"),
    [
        (1000, 0.02, 0.63, 0.86, 0.71, 0.01, 0.01),
        (4000, 0.02, 1.26, 0.60, 0.40, 0.07, 0.01),
        (4000, 0.05, 3.16, 0.11, 0.06, 0.68, 0.01),
        (16_000, 0.05, 6.3, 0.001, 0.001, 0.995, 5e-4),
    ],
)
def test_vespo_stops_learning_from_long_drifted_sequences(
    tokens, drift, spread, positive, negative, dead, within
):
    """A token's log ratio ~ N(-drift^2 / 2, drift^2), so that log W ~ N(-T drift^2 / 2, T drift^2)."""
    variance = tokens * drift**2
    normal = torch.special.ndtri((torch.arange(100_000, dtype=D) + 0.5) / 100_000)  # its quantiles
    log_w = normal * variance**0.5 - variance / 2
    summary = objectives.summarise(log_w, kernel(log_w), {})
    assert summary["log_ratio_std"] == pytest.approx(spread, rel=0.01)
    assert summary["phi"] == pytest.approx(positive, abs=within)
    assert float(kernel(log_w, -1.0).mean()) == pytest.approx(negative, abs=within)
    assert summary["phi_dead"] == pytest.approx(dead, abs=within)


RATIOS = [0.25, 0.5, 0.79, 0.81, 1, 1.27, 1.29, 2, 3.5, 4.9, 5.1, 11]


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("name", "options", "coefficient"),
    [
        ("reinforce", {}, lambda r: 1.0),
        ("cispo", {}, lambda r: min(r, 1.28)),
        ("cispo", {"eps_lo": 0.2, "eps_hi": 0.2}, lambda r: min(max(r, 0.8), 1.2)),
        ("cispo_trl", {}, lambda r: min(r, 5.0)),
        ("tis", {}, lambda r: min(r, 2.0)),
        ("mis", {}, lambda r: r if 0.5 <= r <= 2 else 0.0),
        ("icepop", {}, lambda r: r if 0.5 <= r <= 5 else 0.0),
    ],
)
def test_token_coefficients(name, options, coefficient, sign):
    # A hair inwards, so that rounding in exp(log r) cannot cross a bound of a mask.
    ratios = [r * (1 - 1e-12) if r == 2 else r * (1 + 1e-12) for r in RATIOS]
    found = pushes(name, of_ratios(ratios, [sign]), **options)
    assert found == pytest.approx([sign * coefficient(r) for r in RATIOS], abs=1e-9)


@pytest.mark.parametrize(
    ("name", "options", "coefficient"),
    [
        ("topr", {}, lambda w, s, t: 1.0 if s > 0 else min(w, 1.0)),
        (
            "topr",
            {"neg_low": 0.5, "pos_high": 1.5},
            lambda w, s, t: min(max(w, 1), 1.5) if s > 0 else min(max(w, 0.5), 1),
        ),
        ("topr", {"length_normalised": True}, lambda w, s, t: 1.0 if s > 0 else min(w ** (1 / t), 1.0)),
        ("sequence_tis", {}, lambda w, s, t: min(w, 2.0)),
        ("sequence_mis", {}, lambda w, s, t: w if 0.5 <= w <= 2 else 0.0),
    ],
)
def test_sequence_coefficients(name, options, coefficient):
    """TOPR's own numbers: negatives keep .25 at W = .25 and 1 at W = 2; positives always 1."""
    weights = [0.25, 0.6, 1.9, 2.1]
    for sign in (1.0, -1.0):
        rows = [[math.log(w) / 4 - 1] * 4 for w in weights]
        batch = batch_of(rows, [[-1.0] * 4] * 4, [sign] * 4)
        want = [sign * coefficient(w, sign, 4) for w in weights for _ in range(4)]
        assert pushes(name, batch, **options) == pytest.approx(want, rel=1e-9)


def test_dppo_masks_by_probability_not_by_ratio():
    """(pi, sampler, A) -> c: a rare token may double, a common one may not move .21."""
    cases = [
        (0.5, 0.1, 1.0, 0.0),  # rose .4
        (0.5, 0.1, -1.0, 5.0),  # rose .4 against its advantage: may fall back
        (0.1, 0.5, -1.0, 0.0),  # fell .4
        (0.1, 0.5, 1.0, 0.2),
        (0.02, 0.01, 1.0, 2.0),  # ratio 2: PPO would clip
        (0.9, 0.71, 1.0, 0.9 / 0.71),
        (0.9, 0.69, 1.0, 0.0),
        (0.15, 0.001, 1.0, 20.0),  # ratio 150, capped
    ]
    pi, mu, advantages, want = zip(*cases, strict=True)
    batch = batch_of([[math.log(p) for p in pi]], [[math.log(p) for p in mu]], [list(advantages)])
    signed = [c * a for c, a in zip(want, advantages, strict=True)]
    assert pushes("dppo", batch) == pytest.approx(signed, rel=1e-9)


def test_standalone_weights_look_past_the_proximal_policy():
    batch = random_batch(3)
    alone = replace(batch, old_logprobs=None)
    for name in ("tis", "sequence_tis", "mis", "sequence_mis", "icepop"):
        assert pushes(name, batch) == pushes(name, alone)
    assert pushes("cispo", batch) != pushes("cispo", alone)
