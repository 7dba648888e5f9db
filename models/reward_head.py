"""A reward model as a linear head on a frozen language model: Bradley-Terry on pairs, solved exactly.

The features of an episode are hidden states of the language model; a head w gives the score w . f, and the
probability that answer a beats answer b is sigmoid(w . (f_a - f_b)) (Bradley and Terry, 1952). With the
features fixed the penalised likelihood is strictly concave, so Newton's method in float64 finds its one
maximum: no learning rate, no seed, the same bytes every time on one machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.packing import MicroBatch, Sample, pack

_TOLERANCE = 1e-9
_MOST_STEPS = 100
_LEAST_CONFIDENCE = 1e-3


class _Enough(Exception):
    """Ends a forward pass whose later blocks nobody needs."""


@torch.inference_mode()
def episode_features(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    layer: int,
    *,
    token_budget: int = 2048,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Return [S, D] float64: the hidden state after `layer` blocks, averaged over each response's tokens.

    Args:
        model: a decoder whose `base_model.layers` are its blocks.
        layer: 0 is the embedding; less than the number of blocks. Later blocks are not computed.
        token_budget: tokens of one packed row; shared beginnings are computed once.
        report: told (samples done, samples in all) after each row.

    Raises:
        ValueError: a response is empty.
    """
    if not all(len(sample.response_ids) for sample in samples):
        raise ValueError("an episode without a response has no features")
    features: dict[int, Tensor] = {}
    for row in pack([_closed(sample) for sample in samples], token_budget):
        row = row.to(model.device)
        states = _states(model, row, layer)
        nodes = row.predictors[row.token]
        for place, number in enumerate(row.samples):
            of_response = nodes[row.sequence == place][1:]  # the first one is the prompt's last token
            features[number] = states[of_response].double().mean(0).cpu()
        report(len(features), len(samples))
    return torch.stack([features[number] for number in range(len(samples))])


def _states(model: PreTrainedModel, row: MicroBatch, layer: int) -> Tensor:
    """Return the hidden states [T, D] that enter block `layer`."""
    caught: list[Tensor] = []

    def catch(block: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught.append(inputs[0][0])
        raise _Enough

    blocks: Any = model.base_model.layers
    hook = blocks[layer].register_forward_pre_hook(catch)
    try:
        model.base_model(
            input_ids=row.input_ids[None],
            position_ids=row.position_ids[None],
            attention_mask=row.attention_mask(),
            use_cache=False,
        )
    except _Enough:
        pass
    finally:
        hook.remove()
    return caught[0]


def _closed(sample: Sample) -> Sample:
    """Add a token nobody looks at: a packed row names nodes that predict one, so now the last as well."""
    length = len(sample.response_ids) + 1
    ids = [*sample.response_ids, 0]
    return replace(sample, response_ids=ids, trained=[True] * length)


def fit_head(differences: Tensor, l2: float) -> Tensor:
    """Return the head w [F] that maximises mean log sigmoid(differences @ w) - l2 / 2 |w|^2.

    Args:
        differences: [N, F] float64, features of the better answer less those of the worse.
        l2: penalty, > 0.

    Raises:
        ValueError: no pairs, or numbers that are not finite.
    """
    if not len(differences) or not torch.isfinite(differences).all():
        raise ValueError("a reward head needs pairs with finite features")
    # The solution lies in the span of the differences: with N < F solve in their N coordinates instead of F.
    basis = torch.linalg.qr(differences.T).Q if differences.shape[0] < differences.shape[1] else None
    x = differences if basis is None else differences @ basis
    w = torch.zeros(x.shape[1], dtype=torch.float64)
    eye = torch.eye(x.shape[1], dtype=torch.float64)
    for _ in range(_MOST_STEPS):
        loss = torch.sigmoid(-(x @ w))
        gradient = x.T @ loss / len(x) - l2 * w
        if gradient.abs().max() <= _TOLERANCE:
            break
        curvature = (x * (loss * (1 - loss))[:, None]).T @ x / len(x) + l2 * eye
        step = torch.linalg.solve(curvature, gradient)
        w = w + _damped(x, w, step, gradient, l2) * step
    return w if basis is None else basis @ w


def confidence(margins: Tensor) -> float:
    """Return the factor that makes `margins` [n] (of pairs nobody trained on) as sure as they are right.

    It maximises the likelihood of the pairs under a weak penalty, which keeps it finite where every margin is
    right. Where they say nothing it is near 0, never 0 or below: what is left is the order.
    """
    if len(margins) < 2 or not (spread := margins.std()) > 0:
        return 1.0
    return max(float(fit_head(margins[:, None] / spread, 1e-3)) / float(spread), _LEAST_CONFIDENCE)


def _damped(x: Tensor, w: Tensor, step: Tensor, gradient: Tensor, l2: float) -> float:
    """Halve the Newton step until the objective rises (Armijo); a full step near the maximum."""

    def objective(at: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid(x @ at).mean() - l2 / 2 * at @ at

    start, slope, scale = objective(w), gradient @ step, 1.0
    while scale > 1e-6 and objective(w + scale * step) < start + 1e-4 * scale * slope:
        scale /= 2
    return scale
