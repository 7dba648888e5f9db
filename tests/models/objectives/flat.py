"""Rows of numbers as flat batches, and gradients of aggregated losses."""

from __future__ import annotations

from dataclasses import replace

import torch

from models import objectives
from models.objectives import Batch, Counts, Losses, aggregate

D = torch.float64

WORKED = (  # the batch of two sequences that most worked numbers are about
    [[-1.0, -0.5, -2.0], [-0.7, -1.2]],
    [[-1.1, -0.4, -2.3], [-0.5, -0.9]],
    [0.5, -0.5],
)


def batch_of(rows, behaviour, advantages, dtype=D, **fields) -> Batch:
    """Rows of equal or unequal length -> a flat batch; its log-probabilities are a leaf. Advantages are one a row,
    or rows; further fields are rows."""
    sequence = torch.tensor([i for i, row in enumerate(rows) for _ in row])
    leaf = flat(rows, dtype).requires_grad_()
    spread = isinstance(advantages[0], list)
    return Batch(
        leaf,
        flat(advantages, dtype) if spread else torch.tensor(advantages, dtype=dtype)[sequence],
        sequence,
        len(rows),
        behaviour_logprobs=None if behaviour is None else flat(behaviour, dtype),
        **{name: flat(values, dtype) for name, values in fields.items()},
    )


def flat(rows, dtype=D) -> torch.Tensor:
    return torch.tensor([x for row in rows for x in row], dtype=dtype)


def of_ratios(ratios, advantages, **options) -> Batch:
    """One row of tokens with the given ratios to the behaviour policy."""
    logs = torch.tensor(ratios, dtype=D).log() - 3
    return batch_of([logs.tolist()], [[-3.0] * len(ratios)], advantages, **options)


def all_counts(batch: Batch) -> Counts:
    return Counts(len(batch.logprobs), batch.sequences)


def aggregated(losses: Losses, batch: Batch, how: str, **options) -> tuple[float, list[float]]:
    """Value, and gradient with respect to each token's log-probability."""
    total = aggregate(losses, batch, how, all_counts(batch), **options)
    (gradient,) = torch.autograd.grad(total, batch.logprobs, retain_graph=True)
    return float(total.detach()), gradient.tolist()


def loss_and_gradient(name: str, batch: Batch, how: str, **options) -> tuple[float, list[float]]:
    return aggregated(objectives.get(name).loss(batch, **options), batch, how)


def pushes(name: str, batch: Batch, **options) -> list[float]:
    """c A of each token."""
    return objectives.coefficients(objectives.get(name).loss(batch, **options), batch).tolist()


def random_batch(seed: int, *, sequences: int = 5, spread: float = 0.3, dtype=D) -> Batch:
    """Ragged rows with every optional field but `correction`; no advantage is 0."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 7, (sequences,), generator=g)
    sequence = torch.repeat_interleave(torch.arange(sequences), sizes)
    tokens = len(sequence)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=D)

    logs = -normal(tokens).abs() - 0.1
    fields = {
        "behaviour_logprobs": logs + spread * normal(tokens),
        "old_logprobs": logs + spread * normal(tokens),
        "reference_logprobs": logs + spread * normal(tokens),
    }
    return Batch(
        logs.to(dtype).requires_grad_(),
        (normal(sequences).sign() * (normal(sequences).abs() + 0.2))[sequence].to(dtype),
        sequence,
        sequences,
        **{name: values.to(dtype) for name, values in fields.items()},
        entropies=normal(tokens).abs().to(dtype).requires_grad_(),
        turn=torch.arange(tokens) // 2,
        group=torch.arange(sequences) // 2,
        diversity=torch.rand(sequences, generator=g, dtype=D).to(dtype),
    )


def part(batch: Batch, keep: list[int]) -> Batch:
    """The micro-batch of the sequences in `keep`; its tensors share the whole batch's leaf."""
    tokens = torch.isin(batch.sequence, torch.tensor(keep))
    places = torch.full((batch.sequences,), -1)
    places[keep] = torch.arange(len(keep))
    per_token = (
        "logprobs",
        "advantages",
        "behaviour_logprobs",
        "old_logprobs",
        "reference_logprobs",
        "entropies",
        "turn",
    )
    return replace(
        batch,
        sequence=places[batch.sequence[tokens]],
        sequences=len(keep),
        group=batch.group[keep],
        diversity=batch.diversity[keep],
        **{name: getattr(batch, name)[tokens] for name in per_token},
    )
