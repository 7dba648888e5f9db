"""Tree packing: many sequences in one row, every shared beginning computed once.

The samples of a step begin alike: one few-shot text for all tasks of a family, one prompt for a group, often
the same first words of an answer. Sorted lexicographically they are the leaves of a tree whose nodes are
tokens. Laid out in that order the tree is one row: a token sees itself and its ancestors, and its position is
its depth. The model's outputs on the row are the outputs it gives to each sequence alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from models import attention
from models.logprobs import tied_embedding, token_logprobs

# All but cuDNN's, which builds a plan for every new row length: 0.1-2.8 s each on an H100, where the others
# take 0.1 s.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# Pairs of a token and an ancestor whose attention costs as much as the linear layers cost a token: 6 x the hidden size
# in a usual decoder, here for 576 to 768. Larger models care less about pairs.
PAIRS_PER_TOKEN = 4096.0

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence to learn from. `trained` and `response_ids` have one entry per response token.

    `trained` is False on tokens that the policy read and did not write (a tool's answer): they are seen, not
    learnt.
    """

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    trained: Sequence[bool]
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
    index: Tensor  # [N] int64, place of the token among the trained tokens of all samples that were packed
    samples: tuple[int, ...]  # place of each sequence in the list that was packed

    @property
    def sequences(self) -> int:
        """Number of samples in the row."""
        return len(self.samples)

    def attention_mask(self) -> Tensor:
        """[1, 1, T, T] bool, True where row i may look at column j: j is i or an ancestor of i."""
        return attention.dense(self.subtree_end)

    def to(self, device: str | torch.device) -> MicroBatch:
        """The same row with its tensors on `device`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "samples"}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def pack(samples: Sequence[Sample], token_budget: int) -> list[MicroBatch]:
    """Pack samples into rows of at most `token_budget` tree nodes (a longer sample gets a row of its own).

    The lexicographic order of the samples is cut into as few rows as it can be and, among the ways to do that, into
    rows of about equal `cost`. The order of the samples does not matter. A sample is never split, so sums over a
    sequence are whole in its row.

    Raises:
        ValueError: a sample has an empty prompt, or lists of unequal length.
    """
    for number, sample in enumerate(samples):
        if not len(sample.prompt_ids) or len(sample.response_ids) != len(sample.trained):
            raise ValueError(f"sample {number} has an empty prompt or response lists of unequal length")
    paths = [np.array([*s.prompt_ids, *s.response_ids], dtype=np.int64) for s in samples]
    trained = [np.flatnonzero(np.array(s.trained, dtype=bool)) for s in samples]
    starts = list(accumulate(map(len, trained), initial=0))
    # Token ids are not negative, so that the order of big-endian bytes is the order of the sequences.
    order = sorted(
        range(len(samples)),
        key=lambda i: (paths[i].astype(">i8").tobytes(), trained[i].tobytes(), samples[i].temperature),
    )
    shared = [0, *(_shared(paths[a], paths[b]) for a, b in pairwise(order))]
    return [
        _row(samples, paths, trained, starts, order[start:end], shared[start:end])
        for start, end in _cuts([len(paths[i]) for i in order], shared, token_budget)
    ]


def cost(row: MicroBatch) -> float:
    """Work of a row in tokens: its nodes, and the pairs of its attention as tokens (see `PAIRS_PER_TOKEN`)."""
    return float(_cost(len(row.position_ids), int(row.position_ids.sum()) + len(row.position_ids)))


def partition(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Split the numbers 0..len(costs)-1 into `parts` lists of about equal cost, each ascending.

    The most costly goes first, to the part that has least so far (Graham's longest-processing-time rule, at most 4/3
    of the best). Some lists are empty when there are fewer numbers than parts.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    totals = [0.0] * parts
    for number in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = min(range(parts), key=lambda part: (totals[part], len(shares[part])))
        shares[least].append(number)
        totals[least] += costs[number]
    return [sorted(share) for share in shares]


def packed_logprobs(model: PreTrainedModel, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy ([N] each, nats) of every trained token of the row under `model`.

    `model` is a causal language model of the library, loaded with attn_implementation="sdpa", with or without adapters.
    The first call with a model, device and precision compares the fast way with the model's own forward pass on a few
    short sequences. If they disagree a warning says so, and rows are run sequence by sequence.
    """
    logprobs, entropies = _way(model, batch)(model, batch)
    # index_select, because its backward adds in a fixed order on the CPU; indexing by [] does not promise
    # that.
    return logprobs.index_select(0, batch.token), entropies.index_select(0, batch.token)


def packs(model: PreTrainedModel, batch: MicroBatch) -> bool:
    """Whether `packed_logprobs` runs rows of `model` whole, not sequence by sequence; checks it at the first use."""
    return _way(model, batch) is not _plain_way


Way = Callable[[PreTrainedModel, MicroBatch], tuple[Tensor, Tensor]]
"""How to get (log-probabilities [M], entropies [M]) of the scored tokens of a row."""

_ways: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Way]] = WeakKeyDictionary()


def _tree_way(tree: Callable[[Tensor], attention.Tree]) -> Way:
    """The whole row at once."""

    def run(model: PreTrainedModel, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        decoder = model.get_decoder()  # type: ignore[no-untyped-call]
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if not isinstance(head, nn.Linear) or head.bias is not None:
            raise NotImplementedError("the language-model head is not a plain matrix")
        attention.enable(decoder)
        table = model.get_input_embeddings()
        tied: list[Tensor] | None = None
        if type(table) is nn.Embedding and table.weight is head.weight and table.weight.requires_grad:
            tied = []
        with sdpa_kernel(_KERNELS):
            ids = batch.input_ids[None]
            hidden = decoder(
                inputs_embeds=table(ids)
                if tied is None
                else tied_embedding(ids, head.weight, tied, table.padding_idx),
                position_ids=batch.position_ids[None],
                # The library hands a mask of four dimensions on as it is, instead of making one.
                attention_mask=torch.empty(1, 1, 0, 0, device=batch.input_ids.device),
                tree=tree(batch.subtree_end),
                use_cache=False,
            ).last_hidden_state[0]
        scored = hidden.index_select(0, batch.predictors)
        return token_logprobs(scored, head.weight, batch.targets, batch.temperatures, tied=tied)

    return run


def _plain_way(model: PreTrainedModel, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Every leaf's path through the model's own forward pass: no shared beginnings, all logits in memory."""
    node = torch.arange(len(batch.input_ids), device=batch.input_ids.device)
    todo = torch.ones_like(batch.predictors, dtype=torch.bool)
    places, logprobs, entropies = [], [], []
    for leaf in torch.nonzero(batch.subtree_end == node + 1).flatten():
        path = torch.nonzero((node <= leaf) & (batch.subtree_end > leaf)).flatten()
        mine = torch.nonzero(todo & torch.isin(batch.predictors, path)).flatten()
        todo[mine] = False
        kept = torch.searchsorted(path, batch.predictors[mine])
        logits = model(input_ids=batch.input_ids[path][None], use_cache=False, logits_to_keep=kept).logits[0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logs = torch.log_softmax(logits / batch.temperatures[mine, None].to(logits.dtype), dim=-1)
        logprobs.append(logs.gather(1, batch.targets[mine, None]).squeeze(1))
        entropies.append(-(logs.exp() * logs).sum(-1))
        places.append(mine)
    order = torch.argsort(torch.cat(places))
    return torch.cat(logprobs)[order], torch.cat(entropies)[order]


_TILED, _BLOCKED, _DENSE = (_tree_way(tree) for tree in (attention.tiles, attention.blocks, attention.dense))


def _way(model: PreTrainedModel, batch: MicroBatch) -> Way:
    """The fastest way that agrees with the model's own forward pass; found at the first use."""
    device = batch.input_ids.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    known = _ways.setdefault(model, {})
    key = (device, model.dtype, autocast)
    if key not in known:
        known[key] = _checked(model, batch, (_TILED,) if device == "cpu" else (_BLOCKED, _DENSE))
    return known[key]


def _checked(model: PreTrainedModel, batch: MicroBatch, ways: Sequence[Way]) -> Way:
    """The first of `ways` whose numbers and gradients on a few sequences are those of the model's own passes.

    The allowance is small in full precision. In a lower one it is some times what that precision itself does to the
    model's own passes, so that rounding is not mistaken for an error, nor an error for rounding.
    """
    probe = _probe(model.config.get_text_config().vocab_size).to(batch.input_ids.device)
    with _no_dropout(model):
        # Compiled layers would be compiled anew for this alone; flex_attention, though, is of use compiled only.
        with torch.compiler.set_stance("force_eager"):
            with torch.autocast(probe.input_ids.device.type, enabled=False):
                exact = _measured(_plain_way, model, probe)
            low = torch.is_autocast_enabled(probe.input_ids.device.type)
            rounding = _errors(_measured(_plain_way, model, probe) if low else exact, exact)
        least = 1e-3 if torch.finfo(model.dtype).bits >= 32 else 0.25  # such weights have no exact passes
        for way in ways:
            try:
                with torch.compiler.set_stance("force_eager" if way is _TILED else "default"):
                    found = _measured(way, model, probe)
                errors = _errors(found, exact)
                right = [e <= least + 4 * r for e, r in zip(errors, rounding, strict=True)]
                if all(right):
                    return way
                problem = f"log-probabilities or entropies are off by up to {errors[0]:.2g} nats"
                if right[0]:
                    problem = f"gradients are off by up to {max(errors[1:]):.0%}"
            except Exception as error:  # whatever it is, the plain way does without
                problem = f"{type(error).__name__}: {error}"
            then = "the next slower way is tried" if way is not ways[-1] else "sequences are run one by one"
            warnings.warn(f"packed rows of {type(model).__name__}: {problem}; {then}.", stacklevel=5)
    return _plain_way


def _measured(way: Way, model: PreTrainedModel, probe: MicroBatch) -> list[Tensor]:
    """Log-probabilities and entropies [2, M], and gradients of a weighted sum of them.

    Of the first two trained parameters, which are the embedding and a projection of the first layer, or its adapter:
    their gradients have come through everything. Of none where the model is split over processes, whose parts are
    put together for whole passes only.
    """
    watched = [p for p in model.parameters() if p.requires_grad][:2]
    if any(isinstance(p, DTensor) for p in watched):
        watched = []
    with torch.set_grad_enabled(bool(watched)):
        numbers = torch.stack(way(model, probe))
        weights = torch.arange(numbers.numel(), device=numbers.device).cos().view_as(numbers)
        total = (numbers * weights).sum()
    slopes = torch.autograd.grad(total, watched, materialize_grads=True) if watched else ()
    return [numbers.detach(), *slopes]


def _errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """The largest difference of the numbers, and of each gradient the norm of the difference over the norm."""
    largest = (found[0] - exact[0]).abs().max()
    norms = [
        (a - b).norm() / b.norm().clamp(min=torch.finfo(b.dtype).tiny)
        for a, b in zip(found, exact, strict=True)
    ]
    return [float(error.nan_to_num(torch.inf)) for error in (largest, *norms[1:])]


def _probe(vocabulary: int) -> MicroBatch:
    """A row with shared, nested and separate beginnings, of 111 nodes and 4 leaves."""

    def ids(start: int, length: int) -> list[int]:
        return [(7919 * i + 13) % vocabulary for i in range(start, start + length)]

    def sample(prompt: list[int], response: list[int], temperature: float) -> Sample:
        return Sample(prompt, response, [True] * len(response), temperature)

    stem, branch = ids(0, 36), ids(50, 20)
    samples = [
        sample(stem, branch, 1.0),
        sample(stem, branch + ids(80, 9), 1.0),
        sample(stem, branch[:7] + ids(100, 11), 0.7),
        sample(stem, ids(120, 15), 1.0),
        sample(ids(140, 3), ids(150, 17), 1.3),
    ]
    (row,) = pack(samples, 10_000)
    return row


@contextmanager
def _no_dropout(model: nn.Module) -> Iterator[None]:
    active = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.training]
    for module in active:
        module.training = False
    try:
        yield
    finally:
        for module in active:
            module.training = True


def _cost(nodes: Any, pairs: Any) -> Any:
    return nodes + pairs / PAIRS_PER_TOKEN


def _cuts(lengths: Sequence[int], shared: Sequence[int], budget: int) -> list[tuple[int, int]]:
    """Stretches of the order whose trees fit the budget: fewest first, then least sum of squared costs.

    `shared` [n] is how many nodes each path has in common with the one before it. Exact, by dynamic programming over
    the end of the last stretch.
    """
    length, common = np.array(lengths, dtype=np.float64), np.array(shared, dtype=np.float64)
    # Totals over the paths so far, of the nodes and pairs that each adds to the ones before it.
    nodes = np.concatenate([[0.0], np.cumsum(length - common)])
    pairs = np.concatenate([[0.0], np.cumsum(_pairs(length) - _pairs(common))])
    count = len(lengths)
    rows, squares = np.zeros(count + 1), np.zeros(count + 1)
    begin = np.zeros(count + 1, dtype=np.int64)
    first = 0
    for end in range(1, count + 1):
        # A stretch from `start` has the shared part of its first path too. It only shrinks as `start` moves right.
        while first < end - 1 and nodes[end] - nodes[first] + common[first] > budget:
            first += 1
        start = slice(first, end)
        work = _cost(
            nodes[end] - nodes[start] + common[start], pairs[end] - pairs[start] + _pairs(common[start])
        )
        total = squares[start] + work**2
        best = first + int(np.lexsort((total, rows[start]))[0])
        begin[end], rows[end], squares[end] = best, rows[best] + 1, total[best - first]
    cuts = []
    end = count
    while end:
        cuts.append((int(begin[end]), end))
        end = int(begin[end])
    return cuts[::-1]


def _pairs(length: Any) -> Any:
    """Pairs of a token and itself or an ancestor along a path."""
    return length * (length + 1) / 2


def _row(
    samples: Sequence[Sample],
    paths: Sequence[Ids],
    trained: Sequence[Ids],
    starts: Sequence[int],
    members: Sequence[int],
    shared: Sequence[int],
) -> MicroBatch:
    """One row of the samples `members`, of which each has `shared` nodes in common with the one before it."""
    kept = [0, *shared[1:]]
    total = sum(len(paths[number]) - common for number, common in zip(members, kept, strict=True))
    ids, depth, end, parent = (np.empty(total, dtype=np.int64) for _ in range(4))
    nodes: list[Ids] = []  # of the trained tokens of each sample
    path = np.empty(0, dtype=np.int64)
    size = 0
    for number, common in zip(members, kept, strict=True):
        tokens = paths[number]
        end[path[common:]] = size
        new = slice(size, size + len(tokens) - common)
        path = np.concatenate([path[:common], np.arange(new.start, new.stop)])
        ids[new], depth[new] = tokens[common:], np.arange(common, len(tokens))
        parent[new] = np.concatenate([[-1], path])[common : len(tokens)]
        nodes.append(path[len(samples[number].prompt_ids) + trained[number]])
        size = new.stop
    end[path] = size
    counts = [len(trained[number]) for number in members]
    # A token is scored once for each temperature that its samples have.
    degrees, degree = np.unique([samples[number].temperature for number in members], return_inverse=True)
    keys = np.concatenate(nodes) * len(degrees) + np.repeat(degree, counts)
    scored, token = np.unique(keys, return_inverse=True)
    node = scored // len(degrees)
    index = [np.arange(starts[i], starts[i] + n) for i, n in zip(members, counts, strict=True)]
    return MicroBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(depth),
        subtree_end=torch.from_numpy(end),
        predictors=torch.from_numpy(parent[node]),
        targets=torch.from_numpy(ids[node]),
        temperatures=torch.from_numpy(degrees[scored % len(degrees)].astype(np.float64)),
        token=torch.from_numpy(token.astype(np.int64)),
        sequence=torch.from_numpy(np.repeat(np.arange(len(members)), counts)),
        index=torch.from_numpy(np.concatenate(index)),
        samples=tuple(members),
    )


def _shared(a: Ids, b: Ids) -> int:
    """Length of the common beginning."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length
