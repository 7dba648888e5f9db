"""Tree packing: many sequences in one row, every shared beginning computed once.

The samples of a step begin alike: one few-shot text for all tasks of a family, one prompt for a group, often
the same first words of an answer. Sorted lexicographically they are the leaves of a tree whose nodes are
tokens. Laid out in that order the tree is one row: a token sees itself and its ancestors, and its position is
its depth. The model's outputs on the row are the outputs it gives to each sequence alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from models.logprobs import token_logprobs

# All but cuDNN's, which builds a plan for every new row length: 0.1-2.8 s each on an H100, where the others
# take 0.1 s.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence to learn from. `trained`, `behaviour_logprobs` and `response_ids` have one entry per
    response token.

    `trained` is False on tokens that the policy read and did not write (a tool's answer): they are seen, not
    learnt.
    """

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    trained: Sequence[bool]
    behaviour_logprobs: Sequence[float]
    advantage: float
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One packed row of T tokens (tree nodes), M scored tokens and N trained tokens of `sequences` samples.

    A token that several samples share is scored once: M <= N, and `token` maps the trained tokens to the
    scored ones.
    """

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64, depth in the tree
    subtree_end: Tensor  # [T] int64; the descendants of node j are the rows j..subtree_end[j]-1
    predictors: Tensor  # [M] int64, the node whose hidden state predicts the scored token
    targets: Tensor  # [M] int64, token ids
    temperatures: Tensor  # [M] float64
    token: Tensor  # [N] int64 in 0..M-1
    sequence: Tensor  # [N] int64 in 0..sequences-1, ascending
    behaviour_logprobs: Tensor  # [N] float32
    advantages: Tensor  # [N] float32
    samples: tuple[int, ...]  # place of each sequence in the list that was packed

    @property
    def sequences(self) -> int:
        """Number of samples in the row."""
        return len(self.samples)

    def attention_mask(self) -> Tensor:
        """[1, 1, T, T] bool, True where row i may look at column j: j is i or an ancestor of i."""
        index = torch.arange(len(self.input_ids), device=self.input_ids.device)
        return ((index[None, :] <= index[:, None]) & (index[:, None] < self.subtree_end[None, :]))[None, None]

    def to(self, device: str | torch.device) -> MicroBatch:
        """The same row with its tensors on `device`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "samples"}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def pack(samples: Sequence[Sample], token_budget: int) -> list[MicroBatch]:
    """Pack samples into rows of at most `token_budget` tree nodes (a longer sample gets a row of its own).

    The order of the samples does not matter. A sample is never split, so sums over a sequence are whole in
    its row.

    Raises:
        ValueError: a sample has an empty prompt, or lists of unequal length.
    """
    for number, sample in enumerate(samples):
        lengths = {len(sample.response_ids), len(sample.trained), len(sample.behaviour_logprobs)}
        if not len(sample.prompt_ids) or len(lengths) > 1:
            raise ValueError(f"sample {number} has an empty prompt or response lists of unequal length")
    return [_row(samples, members) for members in _rows(samples, token_budget)]


def packed_logprobs(model: PreTrainedModel, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy ([N] each, nats) of every trained token of the row under `model`."""
    with sdpa_kernel(_KERNELS):
        hidden = model.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            attention_mask=batch.attention_mask(),
            use_cache=False,
        ).last_hidden_state[0]
    # index_select, because its backward adds in a fixed order on the CPU; indexing by [] does not promise
    # that.
    scored = hidden.index_select(0, batch.predictors)
    head = model.get_output_embeddings().weight  # type: ignore[no-untyped-call]
    logprobs, entropies = token_logprobs(scored, head, batch.targets, batch.temperatures)
    return logprobs.index_select(0, batch.token), entropies.index_select(0, batch.token)


def _rows(samples: Sequence[Sample], budget: int) -> Iterator[list[int]]:
    """Cut the lexicographic order of the samples into stretches whose tree fits the budget."""
    paths = [(*sample.prompt_ids, *sample.response_ids) for sample in samples]
    members: list[int] = []
    nodes = 0
    for number in sorted(range(len(samples)), key=paths.__getitem__):
        grown = nodes + len(paths[number]) - (_shared(paths[members[-1]], paths[number]) if members else 0)
        if members and grown > budget:
            yield members
            members, grown = [], len(paths[number])
        members.append(number)
        nodes = grown
    if members:
        yield members


def _row(samples: Sequence[Sample], members: Sequence[int]) -> MicroBatch:
    ids: list[int] = []
    depth: list[int] = []
    end: list[int] = []
    scored: dict[tuple[int, float], int] = {}  # (node, temperature) -> place among the scored tokens
    predictors: list[int] = []
    token: list[int] = []
    sequence: list[int] = []
    behaviour: list[float] = []
    advantages: list[float] = []
    path: list[int] = []
    previous: tuple[int, ...] = ()
    for place, number in enumerate(members):
        sample = samples[number]
        current = (*sample.prompt_ids, *sample.response_ids)
        shared = _shared(previous, current)
        for node in path[shared:]:
            end[node] = len(ids)
        path = path[:shared] + list(range(len(ids), len(ids) + len(current) - shared))
        ids.extend(current[shared:])
        depth.extend(range(shared, len(current)))
        end.extend([0] * (len(current) - shared))
        previous = current
        start = len(sample.prompt_ids)
        for offset, trained in enumerate(sample.trained):
            if not trained:
                continue
            key = (path[start + offset], sample.temperature)
            if key not in scored:
                scored[key] = len(scored)
                predictors.append(path[start + offset - 1])
            token.append(scored[key])
            sequence.append(place)
            behaviour.append(sample.behaviour_logprobs[offset])
            advantages.append(sample.advantage)
    for node in path:
        end[node] = len(ids)
    return MicroBatch(
        input_ids=torch.tensor(ids),
        position_ids=torch.tensor(depth),
        subtree_end=torch.tensor(end),
        predictors=torch.tensor(predictors, dtype=torch.int64),
        targets=torch.tensor([ids[node] for node, _ in scored], dtype=torch.int64),
        temperatures=torch.tensor([temperature for _, temperature in scored], dtype=torch.float64),
        token=torch.tensor(token, dtype=torch.int64),
        sequence=torch.tensor(sequence, dtype=torch.int64),
        behaviour_logprobs=torch.tensor(behaviour, dtype=torch.float32),
        advantages=torch.tensor(advantages, dtype=torch.float32),
        samples=tuple(members),
    )


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
