"""Objectives that differentiate the ratio: worked numbers and tables of coefficients by float64 autograd."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from models import objectives
from tests.models.objectives.flat import (
    WORKED,
    D,
    aggregated,
    batch_of,
    loss_and_gradient,
    of_ratios,
    pushes,
    random_batch,
)

RATIOS = [0.25, 0.5, 0.79, 0.81, 1, 1.27, 1.29, 2, 3.5, 11]


@pytest.mark.parametrize(
    ("name", "options", "positive", "negative"),
    [
        (
            "dapo",
            {},
            [0.25, 0.5, 0.79, 0.81, 1, 1.27, 0, 0, 0, 0],
            [0, 0, 0, 0.81, 1, 1.27, 1.29, 2, 3.5, 11],
        ),
        (
            "grpo",
            {},
            [0.25, 0.5, 0.79, 0.81, 1, 0, 0, 0, 0, 0],
            [0, 0, 0, 0.81, 1, 1.27, 1.29, 2, 3.5, 11],
        ),
        (
            "ppo",
            {"dual_clip": 3.0},
            [0.25, 0.5, 0.79, 0.81, 1, 0, 0, 0, 0, 0],
            [0, 0, 0, 0.81, 1, 1.27, 1.29, 2, 0, 0],
        ),
        (
            "ppo",
            {"dual_clip": 10.0},
            [0.25, 0.5, 0.79, 0.81, 1, 0, 0, 0, 0, 0],
            [0, 0, 0, 0.81, 1, 1.27, 1.29, 2, 3.5, 0],
        ),
        (
            "ppo",
            {"eps": 0.3},
            [0.25, 0.5, 0.79, 0.81, 1, 1.27, 1.29, 0, 0, 0],
            [0, 0, 0.79, 0.81, 1, 1.27, 1.29, 2, 3.5, 11],
        ),
    ],
)
def test_clipping(name, options, positive, negative):
    for sign, want in ((1.0, positive), (-1.0, negative)):
        found = pushes(name, of_ratios(RATIOS, [sign]), **options)
        assert found == pytest.approx([sign * c for c in want], abs=1e-9)


def test_dual_clip_caps_the_loss():
    batch = of_ratios(RATIOS, [-2.0])
    losses = objectives.ppo(batch, dual_clip=3.0).tokens.tolist()
    assert losses == pytest.approx([2 * max(min(r, 3.0), 0.8) for r in RATIOS])


@pytest.mark.parametrize(
    ("sign", "want"),
    [
        (1.0, [0.217895, 0.470007, 0.781354, 1, 1.263253, 1.572895, 0.981452, 0.001997]),
        (-1.0, [0.214921, 0.467070, 0.780475, 1, 1.260554, 1.536220, 0.881778, 0.001212]),
    ],
)
def test_sapo_gate(sign, want):
    batch = of_ratios([0.25, 0.5, 0.79, 1, 1.29, 2, 3.5, 11], [sign])
    assert pushes("sapo", batch) == pytest.approx([sign * c for c in want], abs=1e-6)
    tau = 1.0 if sign > 0 else 1.05
    gates = objectives.sapo(of_ratios([1.0, math.exp(20)], [sign])).tokens.tolist()
    assert gates == pytest.approx([-sign * 2 / tau, -sign * 4 / tau], rel=1e-12)


@pytest.mark.parametrize("tau", [0.3, 1.0, 7.0])
def test_sapo_on_policy_is_reinforce_whatever_its_temperature(tau):
    assert pushes("sapo", of_ratios([1.0], [1.0]), tau_pos=tau) == pytest.approx([1.0])
    assert pushes("sapo", of_ratios([1.0], [-1.0]), tau_neg=tau) == pytest.approx([-1.0])


@pytest.mark.parametrize(("name", "bound"), [("grpo", 20), ("gspo", 20), ("gspo_token", 10), ("sampo", 10)])
def test_a_ratio_beyond_its_bound_has_no_gradient(name, bound):
    """verl's: log ratios within +-20, GSPO-token's mean at most 10."""
    rows, behaviour = [[bound - 0.1], [bound + 5.0]], [[0.0], [0.0]]
    batch = batch_of(rows, behaviour, [-1.0, -1.0])
    losses = objectives.get(name).loss(batch).tokens.tolist()
    assert losses == pytest.approx([math.exp(bound - 0.1), math.exp(bound)], rel=1e-12)
    assert pushes(name, batch) == pytest.approx([-math.exp(bound - 0.1), 0.0], rel=1e-12)
    assert pushes(name, batch_of([[-25.0]], [[0.0]], [1.0])) == ([0.0] if bound == 20 else [math.exp(-20)])


@pytest.mark.parametrize(
    ("name", "how", "options", "loss", "gradient"),
    [
        ("dapo", "token-mean", {}, -0.167128, [-0.110517, -0.090484, 0, 0.081873, 0]),
        ("dapo", "seq-mean-token-mean", {}, -0.071826, [-0.092098, -0.075403, 0, 0.102341, 0]),
        ("dr_grpo", "constant", {"eps_hi": 0.28}, -0.139273, [-0.092098, -0.075403, 0, 0.068228, 0]),
        ("gspo", "seq-mean-token-mean", {}, -0.000175, [0] * 5),
        (
            "gspo",
            "seq-mean-token-mean",
            {"eps_lo": 0.2, "eps_hi": 0.28},
            -0.0762927,
            [-0.0920976] * 3 + [0, 0],
        ),
    ],
)
def test_worked_batch(name, how, options, loss, gradient):
    batch = batch_of(*WORKED)
    losses = objectives.get(name).loss(batch, **options)
    total, found = aggregated(losses, batch, how, **({"constant": 3} if how == "constant" else {}))
    assert total == pytest.approx(loss, abs=1e-6)
    assert found == pytest.approx(gradient, abs=1e-6)


SAMPO = (  # mean log ratios [.0025, -.005]; the second is clipped, as A < 0
    [[0.001, -0.001, 0.004, 0.006], [-0.005, -0.005]],
    [[0.0] * 4, [0.0] * 2],
    [1.0, -1.0],
)


@pytest.mark.parametrize(
    ("how", "loss", "gradient"),
    [("token-mean", -0.336002, -0.167084), ("seq-mean-token-mean", -0.00275156, -0.125313)],
)
def test_sampo_worked_batch(how, loss, gradient):
    total, found = loss_and_gradient("sampo", batch_of(*SAMPO), how)
    assert total == pytest.approx(loss, abs=1e-6)
    assert found == pytest.approx([gradient] * 4 + [0, 0], abs=1e-6)


def test_the_sequence_ratios_of_sampo():
    batch = batch_of(*SAMPO)
    assert objectives.sampo(batch, eps_lo=0.1, eps_hi=0.1).phi.tolist() == pytest.approx(
        [1.002503, 0.995012], abs=1e-6
    )
    assert objectives.sampo(batch).phi.tolist() == pytest.approx([1.002503, 0], abs=1e-6)


@pytest.mark.parametrize(("name", "unit"), [("gspo", 1e-4), ("gspo_token", 1e-4), ("sampo", 1e-3)])
def test_bands_of_the_sequence_ratio(name, unit):
    """-3 and +4 units about 1."""
    ratios = [1 + unit * x for x in (-3.1, -2.9, 3.1, 3.9, 4.1)]
    rows = [[math.log(r) - 1] for r in ratios]
    for sign, alive in ((1.0, [1, 1, 1, 1, 0]), (-1.0, [0, 1, 1, 1, 1])):
        found = pushes(name, batch_of(rows, [[-1.0]] * 5, [sign] * 5))
        want = [sign * r * a for r, a in zip(ratios, alive, strict=True)]
        assert found == pytest.approx(want, rel=1e-9)


def test_the_token_form_does_not_lose_the_ratio_beside_a_large_log_probability():
    rows, behaviour = [[-3e4, -1.0]], [[-3e4, -1.2468]]
    batch = batch_of(rows, behaviour, [1.0], dtype=torch.float32)
    found = objectives.gspo_token(batch, eps_hi=1.0).tokens.tolist()
    assert found == pytest.approx([-math.exp(0.1234)] * 2, rel=1e-6)


@pytest.mark.parametrize("how", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("seed", range(4))
def test_the_two_forms_of_gspo_agree(how, seed):
    batch = random_batch(seed)
    band = {"eps_lo": 0.1, "eps_hi": 0.1}
    one, two = (loss_and_gradient(name, batch, how, **band) for name in ("gspo", "gspo_token"))
    assert one[0] == pytest.approx(two[0], rel=1e-12)
    assert one[1] == pytest.approx(two[1], rel=1e-12, abs=1e-15)
    assert pushes("sampo", batch, **band) == pushes("gspo_token", batch, **band)


def test_gspo_token_gives_each_turn_its_own_credit():
    rows, behaviour = [[-1.0, -1.0]], [[-1.1, -0.9]]
    batch = batch_of(rows, behaviour, [[1.0, -2.0]])
    assert pushes("gspo_token", batch) == pytest.approx([1.0, -2.0])
    assert pushes("gspo", batch) == pytest.approx([-0.5, -0.5])


def test_gspo_does_not_see_length():
    rows, behaviour, advantages = WORKED
    twice = batch_of([row * 2 for row in rows], [row * 2 for row in behaviour], advantages)
    band = {"eps_lo": 0.5, "eps_hi": 0.5}
    once = objectives.gspo(batch_of(*WORKED), **band).phi
    assert once.log().tolist() == pytest.approx([0.1, -0.25])
    assert objectives.gspo(twice, **band).phi.tolist() == pytest.approx(once.tolist(), rel=1e-12)


def decoupled(**changes):
    batch = batch_of([[-0.9, -1.0]], [[-1.3, -1.2]], [1.0], old_logprobs=[[-1.0, -1.4]])
    return replace(batch, **changes)


def test_decoupled_ppo_worked_numbers():
    losses = objectives.decoupled_ppo(decoupled())
    assert losses.tokens.tolist() == pytest.approx([-1.49182, -0.98248], abs=1e-5)
    total, gradient = loss_and_gradient("decoupled_ppo", decoupled(), "token-mean")
    assert total == pytest.approx(-1.237151, abs=1e-6)
    assert gradient == pytest.approx([-0.745912, 0], abs=1e-6)
    coupled = decoupled(old_logprobs=None)
    assert pushes("ppo", coupled) == [0.0, 0.0]


def test_decoupled_ppo_is_ppo_where_the_proximal_policy_sampled():
    batch = random_batch(1)
    batch = replace(batch, old_logprobs=batch.behaviour_logprobs)
    assert pushes("decoupled_ppo", batch) == pushes("ppo", batch)


def test_decoupled_ppo_drops_tokens_of_too_large_a_weight():
    assert pushes("decoupled_ppo", decoupled(), max_weight=1.3) == [0.0, 0.0]
    assert pushes("decoupled_ppo", decoupled(), max_weight=1.35)[0] == pytest.approx(1.491824, abs=1e-6)


M2_LOGS = [0.9, -0.5, 0.3, -0.2, 0.1, 0.05, 0.0, -0.01]
M2_SIGNS = [1.0, 1, -1, -1, 1, -1, 1, -1]


def test_m2po_masks_the_worst_token_and_counts_it():
    """T = {0, 3, 4, 7}, mean square .2150; without token 0 it is .0167, within .04."""
    batch = batch_of([[x - 2 for x in M2_LOGS]], [[-2.0] * 8], [M2_SIGNS])
    losses = objectives.m2po(batch)
    total, _ = aggregated(losses, batch, "token-mean")
    assert total == pytest.approx(0.187276, abs=1e-6)
    want = [0.0, *(math.exp(x) * a for x, a in zip(M2_LOGS[1:], M2_SIGNS[1:], strict=True))]
    assert pushes("m2po", batch) == pytest.approx(want, rel=1e-9)
    assert 0.0 not in pushes("m2po", batch, threshold=0.22)
    assert [i for i, c in enumerate(pushes("m2po", batch, threshold=0.0)) if c == 0] == [0, 3, 4, 7]


def dropped(name: str, batch: objectives.Batch, threshold: float) -> list[int]:
    found = pushes(name, batch, threshold=threshold)
    return [place for place, c in enumerate(found) if c == 0]


def test_the_means_that_m2po_compares_with_its_threshold():
    old = [x - 2 for x in M2_LOGS]
    batch = batch_of([old], [[-2.0] * 8], [M2_SIGNS])
    for threshold, want in ((0.2151, []), (0.2149, [0]), (0.01675, [0]), (0.01665, [0, 3])):
        assert dropped("m2po", batch, threshold) == want
    batch = replace(batch, old_logprobs=batch.logprobs.detach())
    for threshold, want in (
        (0.150326, []),
        (0.150324, [0]),
        (0.056087, [0]),
        (0.056085, [0, 1]),
        (0.023768, [0, 1]),
        (0.023766, [0, 1, 2]),
    ):
        assert dropped("m2po_areal", batch, threshold) == want


def test_areal_masks_by_the_age_of_the_sample_whatever_its_sign():
    """Suffix means .150325, .056086, .023767: tokens 0 and 1 go."""
    old = [x - 2 for x in M2_LOGS]
    batch = batch_of([old], [[-2.0] * 8], [M2_SIGNS], old_logprobs=[old])
    found = pushes("m2po_areal", batch)
    assert [i for i, c in enumerate(found) if c == 0] == [0, 1]
    assert found[2:] == pytest.approx(
        [math.exp(x) * a for x, a in zip(M2_LOGS[2:], M2_SIGNS[2:], strict=True)], rel=1e-9
    )
    assert [i for i, c in enumerate(pushes("m2po_areal", batch, threshold=0.1)) if c == 0] == [0]


def test_areal_drops_tokens_of_too_large_a_weight():
    rows = [[math.log(4.9) - 2, math.log(5.1) - 2]]
    batch = batch_of(rows, [[-2.0, -2.0]], [1.0], old_logprobs=rows)
    assert pushes("m2po_areal", batch, threshold=9.0) == pytest.approx([4.9, 0.0])


def test_areal_wants_less_than_the_threshold_and_the_paper_at_most():
    rows = [[-1.5, -2.5]]  # squares of exactly .25
    batch = batch_of(rows, [[-2.0, -2.0]], [[1.0, -1.0]], old_logprobs=rows)
    assert 0.0 not in pushes("m2po", replace(batch, old_logprobs=None), threshold=0.25)
    assert pushes("m2po_areal", batch, threshold=0.25) == [0.0, 0.0]


@pytest.mark.parametrize("seed", range(5))
def test_m2po_bounds_the_chi_square_of_what_it_keeps(seed):
    """chi^2 <= R^2 M2 for 1/R <= r <= R, over the tokens outside that it keeps."""
    batch = random_batch(seed, sequences=40, spread=0.4)
    batch = replace(batch, old_logprobs=None)
    logs = (batch.logprobs - batch.behaviour_logprobs).detach()
    kept = (torch.tensor(pushes("m2po", batch)) != 0) & (batch.advantages * logs > 0)
    assert 0 < int(kept.sum()) < int((batch.advantages * logs > 0).sum())
    assert float(logs[kept].square().mean()) <= 0.04
    largest = float(logs[kept].abs().exp().max())
    assert float((logs[kept].exp() - 1).square().mean()) <= largest**2 * 0.04


def test_bapo_moves_its_band_until_positives_weigh_enough():
    """At (.6, 1.2) positives weigh 3.4 and negatives 1.9; at (.8, 1.2) negatives weigh 2.4."""
    ratios, signs = [0.4, 0.5, 0.7, 1, 1.5, 2.5], [-1.0, -1, -1, 1, 1, 1]
    batch = of_ratios(ratios, [signs])

    def alive(target):
        return [bool(c) for c in pushes("bapo", batch, target=target)]

    assert alive(1.0) == [False, False, True, True, False, False]  # (.6, 1.2)
    assert alive(3.4 / 1.9 - 1e-9) == alive(1.0) != alive(3.4 / 1.9 + 1e-9)
    # From here on the lower bound is above .7, then at .8, and the upper one must follow.
    losses = objectives.bapo(batch, target=100.0).tokens.tolist()
    assert losses == pytest.approx([0.8, 0.8, 0.8, -1, -1.5, -2.0])
    assert alive(100.0) == [False, False, False, True, True, False]
    # At low = .8 negatives weigh 2.4; 1 + 1.5 + high is 1.8 times that from high = 1.82 on, the next step is 1.85.
    assert objectives.bapo(batch, target=1.8).tokens.tolist()[-1] == pytest.approx(-1.85)


def test_bapo_has_a_dual_clip():
    assert pushes("bapo", of_ratios([2.9, 3.1], [-1.0])) == pytest.approx([-2.9, 0.0])


def test_bapo_without_negatives_keeps_its_first_band():
    assert pushes("bapo", of_ratios([1.1, 1.3], [1.0]), target=9.0) == pytest.approx([1.1, 0.0])


@pytest.mark.parametrize(
    "name", ["ppo", "grpo", "dapo", "dr_grpo", "gspo", "sapo", "decoupled_ppo", "m2po", "m2po_areal", "bapo"]
)
def test_gradients_are_those_of_the_value(name):
    """Forms whose value is differentiated whole; the token forms and REINFORCE forms detach on purpose."""
    batch = random_batch(11)
    assert batch.logprobs.dtype == D

    def value(logprobs):
        return objectives.get(name).loss(replace(batch, logprobs=logprobs)).tokens

    assert torch.autograd.gradcheck(value, (batch.logprobs,))


SMALL = 1e-4


@pytest.mark.parametrize(
    ("name", "options", "want"),
    [
        ("grpo", {}, 0.0),
        ("gspo", {}, 0.0),
        ("sapo", {}, 0.768 * SMALL),
        ("sapo", {"tau_neg": 1.0}, 0.786 * SMALL),
        ("cispo", {}, SMALL),
        ("topr", {}, SMALL),
        ("vespo", {}, math.exp(2) * SMALL**3),
    ],
)
def test_a_negative_whose_ratio_vanishes(name, options, want):
    assert pushes(name, of_ratios([SMALL], [-1.0]), **options) == pytest.approx([-want], rel=1e-3, abs=1e-20)


@pytest.mark.parametrize(
    ("name", "want"), [("grpo", 0.0), ("sapo", 0.0), ("cispo", 1.28), ("topr", 1.0), ("vespo", 0.0)]
)
def test_a_positive_whose_ratio_explodes(name, want):
    assert pushes(name, of_ratios([1e4], [1.0])) == pytest.approx([want])
