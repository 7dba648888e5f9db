"""Numbers of a step: by hand, by closed forms, and against brute force."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from models import objectives
from models.objectives import Batch, chi_square, coefficients, diagnostics, effective_sample_size, staleness
from tests.models.objectives.flat import WORKED, D, batch_of, random_batch


def test_summary_of_a_step():
    assert objectives.summarise(torch.zeros(4), torch.ones(4), {})["ess"] == pytest.approx(1.0)
    one = objectives.summarise(torch.tensor([20.0, -20, -20, -20]), torch.tensor([1.0, 0, 0, 0]), {})
    assert one["ess"] == pytest.approx(0.25)
    assert one["phi_dead"] == 0.75
    w = torch.tensor([1.349859, 0.606531])
    summary = objectives.summarise(w.log(), w, {"entropy": torch.tensor([1.0, 2.0])})
    assert summary["ess"] == pytest.approx(float(w.sum() ** 2 / (2 * w.square().sum())), rel=1e-6)
    assert summary["entropy"] == 1.5
    assert summary["ratio_max"] == pytest.approx(1.349859)


def test_kl_estimates_against_the_behaviour():
    batch = batch_of([[-0.3, 0.2, 1.0]], [[0.0, 0.0, 0.0]], [1.0])
    found = objectives.token_statistics(batch, torch.zeros(3))
    assert found["kl_k3"].tolist() == pytest.approx([0.040818, 0.021403, 0.718282], abs=1e-6)
    assert found["kl_k1"].tolist() == pytest.approx([0.3, -0.2, -1.0])


def test_unknown_behaviour_counts_as_on_policy():
    batch = replace(batch_of(*WORKED), behaviour_logprobs=None)
    assert objectives.sequence_log_ratio(batch).tolist() == [0.0, 0.0]
    assert objectives.token_statistics(batch, torch.zeros(5))["kl_k3"].tolist() == [0.0] * 5


def test_statistics_are_of_the_behaviour_even_where_a_proximal_policy_is_given():
    batch = replace(batch_of(*WORKED), old_logprobs=batch_of(*WORKED).logprobs.detach())
    assert objectives.sequence_log_ratio(batch).tolist() == pytest.approx([0.3, -0.5])


def test_chi_square_and_ess_of_a_log_normal():
    """log W ~ N(-v/2, v): E W^2 = e^v, so that chi^2 = e^v - 1 and ess = e^-v."""
    g = torch.Generator().manual_seed(0)
    v = 0.25
    logs = torch.randn(200_000, generator=g, dtype=D) * v**0.5 - v / 2
    assert chi_square(logs) == pytest.approx(math.expm1(v), rel=0.02)
    assert effective_sample_size(logs) == pytest.approx(math.exp(-v), rel=0.01)
    assert chi_square(torch.zeros(3)) == 0.0


def test_report_by_hand():
    """Tokens: (log ratio, A, c) = (.1, +, live), (.3, +, clipped), (-.5, -, clipped), (-.1, -, live)."""
    batch = batch_of([[-0.9, -0.7], [-1.5, -1.1]], [[-1.0, -1.0]] * 2, [2.0, -1.0])
    losses = objectives.grpo(batch)
    report = staleness(batch, losses.phi, coefficients(losses, batch))
    rising, falling = 2 * math.exp(0.1), math.exp(-0.1)
    assert report["mass_positive_above"] == pytest.approx(rising / (rising + falling))
    assert report["mass_negative_below"] == pytest.approx(falling / (rising + falling))
    assert report["mass_positive_below"] == report["mass_negative_above"] == 0.0
    assert report["clipped_positive"] == report["clipped_negative"] == 0.5
    w = np.exp([0.4, -0.6])
    assert report["ess"] == pytest.approx(w.sum() ** 2 / (2 * (w**2).sum()))
    assert report["chi2"] == pytest.approx((w**2).mean() - 1)
    tokens = np.array([0.1, 0.3, -0.5, -0.1])
    assert report["chi2_token"] == pytest.approx(np.exp(2 * tokens).mean() - 1)
    assert report["ess_token"] == pytest.approx(np.exp(tokens).sum() ** 2 / (4 * np.exp(2 * tokens).sum()))
    for level in (1, 5, 25, 50, 75, 95, 99):
        assert report[f"log_ratio_q{level:02d}"] == pytest.approx(np.percentile(tokens, level))
        assert report[f"log_w_q{level:02d}"] == pytest.approx(np.percentile([0.4, -0.6], level))
    assert report["phi_dead"] == 0.0
    assert report["far_negative"] == 0.0


BINS = [f"{sign}_{side}" for sign in ("positive", "negative") for side in ("above", "below")]


def test_kl_mass_by_hand():
    """k3 of a log ratio of -0.3, 0.2, 1.0 is 0.040818, 0.021403, 0.718282; of 0 it is 0; of -1 it is 1/e."""
    logs = [[-0.3, 1.0], [0.2, -1.0], [0.0, 1.0]]
    entropies = [[0.1, 2.0], [0.3, 1.5], [0.2, 0.9]]  # median of torch: 0.3
    batch = batch_of(logs, [[0.0, 0.0]] * 3, [1.0, -1.0, 0.0], entropies=entropies)
    found = objectives.kl_mass(batch)
    whole = 0.040818 + 0.718282 + 0.021403 + math.exp(-1) + 0.0 + 0.718282
    assert found == pytest.approx(
        {
            "kl_mass_positive_above": 0.718282 / whole,
            "kl_mass_positive_below": 0.040818 / whole,
            "kl_mass_negative_above": 0.021403 / whole,
            "kl_mass_negative_below": math.exp(-1) / whole,
            "kl_mass_positive_above_high": 0.718282 / whole,
            "kl_mass_positive_below_high": 0.0,
            "kl_mass_negative_above_high": 0.0,
            "kl_mass_negative_below_high": math.exp(-1) / whole,
        },
        abs=1e-6,
    )
    assert sum(found[f"kl_mass_{name}"] for name in BINS) == pytest.approx(1 - 0.718282 / whole, abs=1e-6)
    bare = objectives.kl_mass(replace(batch, entropies=None))
    assert bare == {f"kl_mass_{name}": found[f"kl_mass_{name}"] for name in BINS}
    with pytest.raises(ValueError, match="behaviour_logprobs"):
        objectives.kl_mass(replace(batch, behaviour_logprobs=None))


@pytest.mark.parametrize("seed", range(3))
def test_kl_mass_against_a_loop_and_the_mean_that_it_divides(seed):
    batch = random_batch(seed, sequences=40, spread=1.0)
    found = objectives.kl_mass(batch)
    logs = (batch.logprobs - batch.behaviour_logprobs).tolist()
    middle = sorted(batch.entropies.tolist())[(len(logs) - 1) // 2]
    sums = dict.fromkeys(found, 0.0)
    for log, a, entropy in zip(logs, batch.advantages.tolist(), batch.entropies.tolist(), strict=True):
        name = f"kl_mass_{'positive' if a > 0 else 'negative'}_{'above' if log > 0 else 'below'}"
        k3 = math.exp(log) - 1 - log
        sums[name] += k3
        sums[f"{name}_high"] += k3 * (entropy > middle)
    mean = float(objectives.token_statistics(batch, batch.entropies)["kl_k3"].mean())
    assert found == pytest.approx({name: total / (mean * len(logs)) for name, total in sums.items()})


def test_the_kl_of_a_clipped_token_counts_though_nothing_pushes_it():
    batch = batch_of([[-0.9], [-2.0]], [[-1.0]] * 2, [1.0, -1.0])
    losses = objectives.grpo(batch)
    report = staleness(batch, losses.phi, coefficients(losses, batch))
    assert report["mass_negative_below"] == 0.0
    assert report["kl_mass_negative_below"] > 0.98
    assert report["clipped_negative"] == 1.0
    losses = objectives.cispo(batch)
    assert staleness(batch, losses.phi, coefficients(losses, batch))["clipped_negative"] == 0.0


def test_masked_sequences_are_counted_among_those_that_have_tokens():
    """The worked mask: mean log(behaviour / pi) = .35, -.15, .35 and A = -1, -1, 1 at delta .223."""
    rows = [[-0.4, -0.3], [0.1, 0.2], [-0.4, -0.3]]
    batch = batch_of(rows, [[0.0, 0.0]] * 3, [-1.0, -1.0, 1.0])
    kept = objectives.sequence_mask(batch, 0.223)
    assert objectives.masked_sequences(batch, kept) == pytest.approx(1 / 3)
    assert objectives.masked_sequences(replace(batch, sequences=5), kept) == pytest.approx(1 / 3)
    assert objectives.masked_sequences(batch, objectives.sequence_mask(batch, 0.36)) == 0.0


def test_the_push_on_bad_answers_that_are_nearly_given_up():
    """log W = (.2, -1, -3), A = (+, -, -), one token each: reinforce pushes W |A| or, without weights, |A|."""
    batch = batch_of([[-0.8], [-2.0], [-4.0]], [[-1.0]] * 3, [1.0, -1.0, -2.0])
    losses = objectives.reinforce(batch)
    pushes = coefficients(losses, batch)
    report = staleness(batch, losses.phi, pushes)
    assert report["far_negative"] == pytest.approx(float(pushes[2].abs() / pushes.abs().sum()))
    assert 0 < report["far_negative"] < 1


@pytest.mark.parametrize("seed", range(3))
def test_shares_add_up(seed):
    batch = random_batch(seed, sequences=30, spread=1.0)
    losses = objectives.dapo(batch)
    report = staleness(batch, losses.phi, coefficients(losses, batch))
    assert sum(value for name, value in report.items() if name.startswith("mass")) == pytest.approx(1.0)
    quantiles = [value for name, value in report.items() if name.startswith("log_ratio_q")]
    assert len(quantiles) == 7
    assert quantiles == sorted(quantiles)
    assert 0 < report["ess"] <= 1
    assert 0 < report["ess_token"] <= 1


def test_dead_sequences_are_counted_among_those_that_have_tokens():
    batch = Batch(
        torch.tensor([-1.0, -30.0], dtype=D).requires_grad_(),
        torch.ones(2, dtype=D),
        torch.tensor([0, 2]),
        3,
        behaviour_logprobs=torch.tensor([-1.0, -1.0], dtype=D),
    )
    losses = objectives.vespo(batch)
    report = staleness(batch, losses.phi, coefficients(losses, batch))
    assert report["phi_dead"] == 0.5
    assert report["log_w_q50"] == pytest.approx(-14.5)  # of 0 and -29, which no bound hides
    assert report["mass_positive_below"] == 1.0  # a ratio of exactly 1 is not above 1


def test_a_batch_that_teaches_nothing_has_no_shares():
    batch = batch_of(*WORKED[:2], [0.0, 0.0])
    losses = objectives.vespo(batch)
    report = staleness(batch, losses.phi, coefficients(losses, batch))
    assert all(v == 0 for k, v in report.items() if k.startswith(("mass", "clipped")))
    assert all(v == 0 for k, v in report.items() if k.startswith("kl_mass"))  # of tokens with A = 0
    with pytest.raises(ValueError, match="behaviour_logprobs"):
        staleness(replace(batch, behaviour_logprobs=None), losses.phi, batch.advantages)


def test_coefficients_need_no_knowledge_of_the_objective():
    batch = random_batch(0)

    def users(batch):
        ratio = (batch.logprobs - batch.behaviour_logprobs).exp()
        return objectives.Losses(-(ratio.sqrt() * batch.advantages), batch.logprobs.new_ones(batch.sequences))

    ratio = (batch.logprobs - batch.behaviour_logprobs).detach().exp()
    found = coefficients(users(batch), batch)
    torch.testing.assert_close(found, 0.5 * ratio.sqrt() * batch.advantages)
    constant = objectives.Losses(torch.zeros(len(ratio), dtype=D, requires_grad=True) * 1, ratio)
    assert coefficients(constant, batch).tolist() == [0.0] * len(ratio)


def test_quantiles_of_any_number_of_tokens():
    for size in (1, 2, 7, 1000):
        values = torch.randn(size, dtype=D)
        want = torch.quantile(values, torch.tensor(diagnostics.QUANTILES, dtype=D) / 100).tolist()
        assert list(diagnostics._quantiles("x", values).values()) == pytest.approx(want)
    many = torch.arange(2**24 + 1, dtype=torch.float32)  # more than torch.quantile takes
    assert diagnostics._quantiles("x", many)["x_q50"] == 2**23
