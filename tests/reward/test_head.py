"""The head against other solvers, and packed features against one plain forward pass an episode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from transformers import AutoModelForCausalLM

from models.packing import Sample
from models.reward_head import episode_features, fit_head
from tests.tiny import make_tiny_model


def objective(w, x, l2):
    margin = x @ w
    return np.logaddexp(0, -margin).mean() + l2 / 2 * w @ w


@pytest.mark.parametrize(("pairs", "width"), [(200, 7), (12, 40)])
@pytest.mark.parametrize("l2", [1e-4, 1e-1])
def test_newton_finds_the_maximum_that_another_solver_finds(pairs, width, l2):
    rng = np.random.default_rng(0)
    x = rng.normal(0.2, 1.0, (pairs, width))
    ours = fit_head(torch.from_numpy(x), l2).numpy()
    theirs = minimize(objective, np.zeros(width), (x, l2), method="BFGS", options={"gtol": 1e-10})
    assert objective(ours, x, l2) <= theirs.fun + 1e-10
    assert ours == pytest.approx(theirs.x, abs=2e-3 * np.abs(theirs.x).max())


def test_one_feature_worked_by_hand():
    # 3 of 4 pairs right by one unit: without penalty sigmoid(w) = 3/4, so w = log 3
    x = torch.tensor([[1.0], [1.0], [1.0], [-1.0]], dtype=torch.float64)
    assert fit_head(x, 1e-12).item() == pytest.approx(np.log(3), rel=1e-6)


def test_separable_pairs_stay_finite_and_equal_input_gives_equal_bytes():
    x = torch.rand(50, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    first = fit_head(x, 1e-6)
    assert torch.isfinite(first).all()
    assert torch.equal(first, fit_head(x.clone(), 1e-6))


@pytest.mark.parametrize("bad", [torch.empty(0, 3), torch.tensor([[float("nan")]])])
def test_no_pairs_or_broken_features_are_refused(bad):
    with pytest.raises(ValueError, match="finite features"):
        fit_head(bad.double(), 1e-2)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("budget", [40, 4096])
def test_features_do_not_depend_on_packing(tmp_path, layer, budget):
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path))
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 90, (9,), generator=draw).tolist() for _ in range(3)]
    responses = [torch.randint(3, 90, (1 + k,), generator=draw).tolist() for k in range(6)]
    samples = [Sample(prompts[k % 3], ids, [True] * len(ids)) for k, ids in enumerate(responses)]
    samples.append(samples[0])  # the same answer twice
    told = []
    packed = episode_features(
        model, samples, layer, token_budget=budget, report=lambda done, total: told.append((done, total))
    )
    assert told[-1] == (7, 7)
    with torch.inference_mode():
        for sample, features in zip(samples, packed, strict=True):
            ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
            states = model(ids, output_hidden_states=True).hidden_states[layer][0, len(sample.prompt_ids) :]
            torch.testing.assert_close(features, states.double().mean(0), rtol=0, atol=1e-5)


def test_an_empty_response_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path))
    with pytest.raises(ValueError, match="without a response"):
        episode_features(model, [Sample([3], [], [])], 1)
