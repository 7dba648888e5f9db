"""Batched decoding with a shared prompt and exact log-probabilities, on any causal transformers model.

All rows of a batch live in one KV cache. Where a row has nothing to say at some column (a shorter prompt, a
finished turn, a shorter observation) there is a hole: its attention mask is 0 there and its position does not
advance, so a row's numbers are those of its own tokens alone. Holes stand before the tokens of a chunk, hence
the last column always holds the newest token of every row that took part.

Rows of one prompt share its computation: the longest common prefix of all prompts is run once, the rest of
each prompt once, and the cache is then repeated for the samples. Models with sliding-window attention would
count holes as part of the window; they are exact only while everything fits into it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from transformers.cache_utils import Cache, DynamicLayer

from tasks.core.errors import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Noise = Iterator[float]
"""Numbers in [0, 1), one for each token that a row samples."""


@dataclass(frozen=True)
class Action:
    """Tokens of one turn, the stopping token included, with the log-probability (nats) of each."""

    ids: list[int]
    logprobs: list[float]


class Batch(Protocol):
    """Token sequences that grow together, one a row."""

    def act(
        self,
        noise: Sequence[Noise] | None,
        temperature: float,
        stop: frozenset[int],
        max_new_tokens: int,
        last: bool = False,
    ) -> list[Action]:
        """Write one action in every row: tokens up to the first of `stop`, `max_new_tokens` at most.

        Sampled at `temperature` from what `noise` says, or without noise the most probable tokens. The last token of
        an action belongs to the next chunk that is fed; after the `last` action no chunk follows.
        """

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but `rows`, in that order."""

    def feed(self, chunks: Sequence[Sequence[int]]) -> None:
        """Append `chunks[i]` to row i."""


@runtime_checkable
class Engine(Protocol):
    """What generates: a model in this process, or a server."""

    def start(self, prompts: Sequence[Sequence[int]], copies: int) -> Batch:
        """Begin `copies` rows with each of `prompts` (none empty), the copies of a prompt together."""


@dataclass(frozen=True)
class Local:
    """The engine of this module, on a model in this process."""

    model: PreTrainedModel

    def start(self, prompts: Sequence[Sequence[int]], copies: int) -> Rows:
        """See `start`."""
        return start(self.model, prompts, copies)


_BLOCK = 256  # tokens; see `invert`


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A cache layer that writes new columns into spare room; `DynamicLayer` copies the old ones each time."""

    SPARE = 32  # columns

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None  # [rows, heads, capacity, size] each

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object) -> Any:
        """Append [rows, heads, new, size] columns; returns all keys and values so far, as views."""
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        if self._buffers is None or new > self._buffers[0].shape[-2]:
            keys = key_states[:, :, :0] if self.keys is None else self.keys
            values = value_states[:, :, :0] if self.values is None else self.values
            self._buffers = (_with_room(keys, new + self.SPARE), _with_room(values, new + self.SPARE))
            self.is_initialized = True
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, old:new] = states
        self.keys, self.values = (buffer[:, :, :new] for buffer in self._buffers)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self._buffers = None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        super().batch_select_indices(indices)
        self._buffers = None


def _with_room(held: torch.Tensor, capacity: int) -> torch.Tensor:
    buffer = held.new_empty(*held.shape[:2], capacity, held.shape[3])
    buffer[:, :, : held.shape[2]] = held
    return buffer


class Rows:
    """A batch of token sequences that grow together; `start` makes one."""

    def __init__(self, model: PreTrainedModel) -> None:
        """One empty row."""
        self.model = model
        self._cache = Cache(layer_class_to_replicate=GrowingLayer)
        self._mask = torch.zeros(1, 0, dtype=torch.long, device=model.device)  # [rows, columns] of 0 and 1
        # [rows, V], what follows the last chunk; meaningless in rows that got no token in it
        self.logits = torch.zeros(1, 0, device=model.device)

    def __len__(self) -> int:
        return self._mask.shape[0]

    @torch.inference_mode()
    def feed(self, chunks: Sequence[Sequence[int]]) -> None:
        """Append `chunks[i]` (any number of tokens, also none) to row i and find the logits that follow."""
        width = max(map(len, chunks))
        device = self.model.device
        ids = torch.tensor([[0] * (width - len(chunk)) + list(chunk) for chunk in chunks], device=device)
        new = torch.tensor([[0] * (width - len(chunk)) + [1] * len(chunk) for chunk in chunks], device=device)
        length = self._mask.sum(dim=1, keepdim=True)
        self._mask = torch.cat([self._mask, new], dim=1)
        output = self.model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=(length + new.cumsum(dim=1) - 1).clamp(min=0),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = output.logits[:, -1]

    @torch.inference_mode()
    def repeat(self, copies: int) -> None:
        """Replace every row by `copies` equal rows that stand together."""
        self._cache.batch_repeat_interleave(copies)
        self._mask = self._mask.repeat_interleave(copies, dim=0)
        self.logits = self.logits.repeat_interleave(copies, dim=0)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but `rows`, in that order."""
        if list(rows) == list(range(len(self))):
            return
        index = torch.tensor(rows, device=self.model.device)
        self._cache.batch_select_indices(index)
        self._mask, self.logits = self._mask[index], self.logits[index]

    @torch.inference_mode()
    def act(
        self,
        noise: Sequence[Noise] | None,
        temperature: float,
        stop: frozenset[int],
        max_new_tokens: int,
        last: bool = False,
    ) -> list[Action]:
        """Write one action in every row: tokens up to the first of `stop`, `max_new_tokens` at most.

        Tokens are drawn from softmax(logits / temperature) with the noise of their row; without noise the
        most probable one is taken (the lowest id wins a tie). The log-probabilities are those of that
        distribution, in float32 or better. The last token of an action is not yet in the cache: it belongs to
        the next chunk that is fed. If no chunk will follow (`last`), rows are dropped as their actions end,
        and none can be used afterwards.
        """
        actions = [Action([], []) for _ in range(len(self))]
        owner = list(range(len(self)))  # of each row: the action that it writes
        going = list(owner)  # rows whose action goes on
        for step in range(max_new_tokens):
            if step:
                if last and 2 * len(going) <= len(self):
                    self.keep(going)
                    owner, going = [owner[row] for row in going], list(range(len(going)))
                newest = {row: actions[owner[row]].ids[-1:] for row in going}
                self.feed([newest.get(row, []) for row in range(len(self))])
            logits = self.logits if len(going) == len(self) else self.logits[going]
            logprobs = log_distribution(logits, temperature)
            if noise is None:
                tokens = logprobs.argmax(dim=-1)
            else:
                tokens = invert(logprobs, [next(noise[owner[row]]) for row in going])
            picked = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
            for row, token, logprob in zip(going, tokens.tolist(), picked, strict=True):
                actions[owner[row]].ids.append(token)
                actions[owner[row]].logprobs.append(logprob)
            going = [row for row in going if actions[owner[row]].ids[-1] not in stop]
            if not going:
                break
        return actions


def start(model: PreTrainedModel, prompts: Sequence[Sequence[int]], copies: int) -> Rows:
    """Run `prompts` (none empty), each once: len(prompts) * copies rows, the copies of a prompt together."""
    # What the first and the last in sorted order share is shared by all. Every prompt keeps at least one
    # token for itself, because the logits after it are where its answer starts.
    in_order = sorted(map(list, prompts))
    room = min(map(len, prompts)) - 1
    common = next((i for i in range(room) if in_order[0][i] != in_order[-1][i]), room)
    rows = Rows(model)
    if common:
        rows.feed([prompts[0][:common]])
    rows.repeat(len(prompts))
    rows.feed([prompt[common:] for prompt in prompts])
    rows.repeat(copies)
    return rows


def log_distribution(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logarithm of softmax(logits / temperature) over the last axis of [rows, V], in float32 or wider.

    Raises:
        Refused: the logits are not numbers.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logprobs = torch.log_softmax(wide / temperature, dim=-1)
    if logprobs[:, 0].isnan().any():  # one bad logit spoils its whole row
        raise Refused(
            "The model's logits are not numbers: its weights are damaged or have diverged; use another agent."
        )
    return logprobs


def invert(logprobs: torch.Tensor, uniforms: Sequence[float]) -> torch.Tensor:
    """Draw a token per row of [rows, V] by inverting its cumulative distribution at `uniforms` in [0, 1).

    One number decides a token, so the noise of a token can be named by which token it is (see `uniform`),
    costs nothing, and is the same on every device. A block of tokens is found first, then the token in it,
    because running sums over a whole vocabulary in float64 would cost as much as several layers of a small
    model.
    """
    padding = -logprobs.shape[1] % _BLOCK
    blocks = torch.nn.functional.pad(logprobs.exp(), (0, padding)).view(len(logprobs), -1, _BLOCK)
    mass = blocks.sum(dim=-1).double()
    target = torch.tensor(uniforms, dtype=torch.float64, device=logprobs.device) * mass.sum(dim=-1)
    block, rest = _locate(mass, target)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block].double()
    token, _ = _locate(inside, rest)
    return block * _BLOCK + token


def _locate(weights: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the running sum of `weights` [rows, n] passes `target` [rows]: the index, and how far into it."""
    sums = weights.cumsum(dim=-1)
    almost_all = sums[:, -1:] * (1 - 2**-40)  # rounding may put the target on the very end
    target = torch.minimum(target[:, None], almost_all)
    index = torch.searchsorted(sums, target, right=True)
    rest = target - (sums - weights).gather(1, index)
    return index[:, 0], rest[:, 0].clamp(min=0)


def uniform(*key: object) -> float:
    """A number in [0, 1) that depends on `key` alone: the first 53 bits of the SHA-256 of its parts."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return (int.from_bytes(digest[:8]) >> 11) * 2.0**-53
