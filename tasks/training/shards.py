"""Replay as the trainer reads it: bytes are checked before use, rows are checked against the policy, and what is
kept in memory is a few numbers a group; the tokens stay in mapped files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from models.packing import Sample
from models.turn_samples import turn_samples
from tasks.core.errors import Refused
from tasks.replay.schema import BROKEN
from tasks.training import decoded
from tasks.training.decoded import FOREIGN, Block, Ragged, Shard
from tasks.training.groups import GroupTable


@dataclass(frozen=True, slots=True)
class ShardRef:
    """One Parquet file of a dataset version: its path relative to the shard root, and the SHA-256 of its
    bytes."""

    path: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Policy:
    """What rows are compared with: the tokenizer's digest, the size of the vocabulary and the longest
    sequence."""

    tokenizer_digest: str
    vocabulary: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Passes:
    """What is run through the model to score the trained tokens of B episodes, in their order: each as a whole, or each of its
    turns with what it was written from (`models.turn_samples`)."""

    samples: tuple[Sample, ...]  # [P]
    episode: tuple[int, ...]  # [P] in 0..B-1, ascending


@dataclass(frozen=True, slots=True)
class Episodes:
    """The episodes of one or more groups: B samples with N trained tokens in all, in the order of the samples.

    Tokens are numpy arrays, copied from the mapped files. The lag counts registry versions behind the newest
    behaviour of the dataset, 0 for foreign policies.
    """

    samples: tuple[Sample, ...]
    rewards: tuple[float, ...]
    groups: tuple[int, ...]  # [B] index of each sample's group in `group_ids`
    lags: tuple[int, ...]
    turns: Tensor  # [N] int64, turn that wrote each trained token
    behaviour_logprobs: Tensor | None  # [N] float32; None if the dataset has rows without them
    group_ids: tuple[str, ...]
    texts: tuple[str, ...]  # [B] what was answered, observations included
    valid: Tensor | None = None  # [N] bool, `Step.valid` of the token's turn; None: all were valid
    deep_thinking: Tensor | None = None  # [B] float64, ratio of the response; None if one was not measured
    parts: Passes | None = None  # None: every episode is one pass, for the policy read all of it

    @property
    def passes(self) -> Passes:
        """How the policy read them."""
        return self.parts or Passes(self.samples, tuple(range(len(self.samples))))


def join(parts: Sequence[Episodes]) -> Episodes:
    """The episodes of all parts, in order; their log-probabilities are None if those of one part are."""
    offsets = accumulate((len(part.group_ids) for part in parts), initial=0)
    logprobs = [part.behaviour_logprobs for part in parts if part.behaviour_logprobs is not None]
    valid = None
    if any(part.valid is not None for part in parts):
        valid = torch.cat(
            [
                torch.ones_like(part.turns, dtype=torch.bool) if part.valid is None else part.valid
                for part in parts
            ]
        )
    ratios = [part.deep_thinking for part in parts if part.deep_thinking is not None]
    read = None
    if any(part.parts is not None for part in parts):
        firsts = accumulate((len(part.samples) for part in parts), initial=0)
        read = Passes(
            tuple(sample for part in parts for sample in part.passes.samples),
            tuple(first + n for first, part in zip(firsts, parts, strict=False) for n in part.passes.episode),
        )
    return Episodes(
        samples=tuple(sample for part in parts for sample in part.samples),
        rewards=tuple(reward for part in parts for reward in part.rewards),
        groups=tuple(
            offset + group for offset, part in zip(offsets, parts, strict=False) for group in part.groups
        ),
        lags=tuple(lag for part in parts for lag in part.lags),
        turns=torch.cat([part.turns for part in parts]),
        behaviour_logprobs=torch.cat(logprobs) if len(logprobs) == len(parts) else None,
        group_ids=tuple(name for part in parts for name in part.group_ids),
        texts=tuple(text for part in parts for text in part.texts),
        valid=valid,
        deep_thinking=torch.cat(ratios) if len(ratios) == len(parts) else None,
        parts=read,
    )


@dataclass(frozen=True, slots=True)
class Replay:
    """Checked rows in mapped files, found by group.

    The rows of group g are the spans `bounds[g] .. bounds[g + 1] - 1`, each of them rows that lie one after another
    in one block: one span a group in a dataset that was sealed, more where a group lies across shards.
    """

    table: GroupTable  # all groups that have a row, whether they teach anything or not
    newest: int  # registry version
    logprobs_known: bool
    mask_truncated: bool
    blocks: Sequence[Block]
    bounds: np.ndarray  # [G + 1] int64
    block: np.ndarray  # [spans] int32, where the span lies
    start: np.ndarray  # [spans] int32, its first row in the block
    stop: np.ndarray  # [spans] int32

    def episodes(self, groups: Sequence[str]) -> Episodes:
        """All episodes of `groups`, in their order and within a group by sample index.

        Raises:
            KeyError: a group is not in the table.
        """
        if not groups:
            none = torch.zeros(0) if self.logprobs_known else None
            return Episodes((), (), (), (), torch.zeros(0, dtype=torch.int64), none, (), ())
        spans = [
            (number, self.blocks[self.block[span]], int(self.start[span]), int(self.stop[span]))
            for number, place in enumerate(self._places(groups))
            for span in range(self.bounds[place], self.bounds[place + 1])
        ]

        def gather(column: Callable[[Block], Ragged], dtype: type | None = None) -> tuple[Any, list[int]]:
            parts = [column(block).rows(start, stop) for _, block, start, stop in spans]
            values = np.concatenate([values for values, _ in parts], dtype=dtype)
            lengths = np.concatenate([lengths for _, lengths in parts])
            return values, [0, *np.cumsum(lengths).tolist()]

        def plain(column: Callable[[Block], np.ndarray]) -> np.ndarray:
            return np.concatenate([column(block)[start:stop] for _, block, start, stop in spans])

        prompt, prompt_at = gather(lambda block: block.prompt_ids, np.int64)
        response, response_at = gather(lambda block: block.response_ids, np.int64)
        mask = gather(lambda block: block.loss_mask)[0].view(bool)
        if self.mask_truncated:
            mask = mask & ~np.repeat(plain(lambda block: block.truncated).view(bool), np.diff(response_at))
        turns = gather(lambda block: block.turn_ids, np.int64)[0]
        invalid, invalid_at = gather(lambda block: block.invalid_turns)
        valid = None
        if len(invalid):
            broken = _places(invalid, invalid_at)
            valid = torch.from_numpy(~np.isin(_places(turns, response_at), broken)[mask])
        text, text_at = gather(lambda block: block.response_text)
        utf8 = text.tobytes()
        ratios = plain(lambda block: block.deep_thinking)
        temperatures = plain(lambda block: block.temperature).tolist()
        versions = plain(lambda block: block.version)
        logprobs = None
        if self.logprobs_known:
            logprobs = torch.from_numpy(gather(lambda block: block.behaviour_logprobs)[0][mask])
        samples = tuple(
            Sample(prompt[a:b], response[c:d], mask[c:d], temperature)
            for a, b, c, d, temperature in zip(
                prompt_at, prompt_at[1:], response_at, response_at[1:], temperatures, strict=False
            )
        )
        memory = plain(lambda block: block.memory_turns).tolist()
        read = None
        if any(memory):
            read = _passes(samples, [turns[c:d] for c, d in pairwise(response_at)], memory)
        return Episodes(
            samples,
            tuple(plain(lambda block: block.reward).tolist()),
            tuple(number for number, _, start, stop in spans for _ in range(start, stop)),
            tuple(_lags(versions, self.newest).tolist()),
            torch.from_numpy(turns[mask]),
            logprobs,
            tuple(groups),
            tuple(utf8[a:b].decode() for a, b in pairwise(text_at)),
            valid,
            None if np.isnan(ratios).any() else torch.from_numpy(ratios),
            read,
        )

    def _places(self, groups: Sequence[str]) -> np.ndarray:
        ids = self.table.ids
        wanted = np.asarray(groups)
        places = np.searchsorted(ids, wanted).clip(max=len(ids) - 1)
        unknown = wanted[ids[places] != wanted]
        if len(unknown):
            raise KeyError(f"group {unknown[0]} is not in this replay")
        return places


def read_replay(
    shards: Sequence[Shard],
    root: Path,
    policy: Policy,
    needs: frozenset[str],
    oldest_behaviour: int = 0,
    cache: Path | None = None,
    *,
    mask_truncated: bool = False,
    left_out: Set[str] = frozenset(),
) -> Replay:
    """Open shards whose bytes have the digests given, and refuse rows that this policy or objective cannot
    learn from.

    Memory is needed for some numbers a row while this runs, and a group afterwards, whatever the number of tokens.

    Args:
        needs: what the settings need of rows, see `update.needs`. Rows that were imported
            without log-probabilities are passed over by objectives that need them.
        oldest_behaviour: rows of agents registered before this version are passed over; a growing dataset always
            holds some.
        cache: folder of the decoded shards, shared by all runs that are given it; those of other datasets are removed
            when nobody has opened them for a day. By default they are decoded to files without a name, whose space is
            free again when the replay is not used any more.
        mask_truncated: of answers that were cut off at their limit no token is trained; their reward still counts
            in their group.
        left_out: groups that nothing may learn from (revoked): they are passed over before anything is asked of them.

    Raises:
        NotFound: a shard is missing.
        Corrupt: a shard's bytes differ from its digest, or are no Parquet file.
        Refused: there are no shards, or a column does not fit; the sentence names it and how many rows.
        Unavailable: the disk of the cache is full.
    """
    if not shards:
        raise Refused(
            "The dataset has no shards, so there is nothing to train on; collect and seal experience first."
        )
    if cache is None:
        with tempfile.TemporaryDirectory(prefix="forebay-replay-") as folder:  # mapped files outlive it
            return read_replay(
                shards,
                root,
                policy,
                needs,
                oldest_behaviour,
                Path(folder),
                mask_truncated=mask_truncated,
                left_out=left_out,
            )
    paths = [decoded.decode(shard, root, cache) for shard in shards]
    decoded.prune(cache, shards)
    blocks = [block for path in paths for block in decoded.blocks(path)]
    facts = (batch for path in paths for batch in decoded.facts(path))
    return _index(blocks, facts, policy, needs, oldest_behaviour, mask_truncated, left_out)


_ROW = np.dtype(
    [
        ("group", np.int32),  # place among all ids met
        ("sample_index", np.int32),
        ("block", np.int32),
        ("row", np.int32),  # in the block
        ("tokens", np.int32),
        ("trained", np.int32),
        ("version", np.int64),
        ("created_at", np.int64),
        ("reward", np.float64),
        ("missing", np.bool_),
    ]
)


def _index(
    blocks: Sequence[Block],
    facts: Iterable[Mapping[str, Any]],
    policy: Policy,
    needs: frozenset[str],
    oldest_behaviour: int,
    mask_truncated: bool,
    left_out: Set[str] = frozenset(),
) -> Replay:
    """Check the rows block by block and sort those that are kept into groups."""
    rows = np.empty(sum(block.size for block in blocks), _ROW)
    filled, names = 0, 0
    ids: list[pa.Array] = []
    gone = pa.array(sorted(left_out), pa.string())
    broken: dict[tuple[str, str], np.ndarray] = {}  # rows that break a rule: all of them, those with logprobs
    for number, batch in enumerate(facts):
        # An environment that failed says nothing about the answer, and its reward of 0 would.
        fresh = (batch["version"] == FOREIGN) | (batch["version"] >= oldest_behaviour)
        keep = fresh & (batch["failed"] == 0)
        if left_out:
            keep &= ~np.asarray(pc.is_in(batch["group_id"], gone))
        keep = np.flatnonzero(keep)
        kept = {
            name: column.take(pa.array(keep)) if isinstance(column, pa.Array) else column[keep]
            for name, column in batch.items()
        }
        missing = kept["logprobs_missing"] > 0
        for column, bad, why in _rules(kept, policy, needs):
            count = np.array([np.count_nonzero(bad), np.count_nonzero(bad & ~missing)])
            broken[column, why] = broken.get((column, why), 0) + count
        encoded = kept["group_id"].dictionary_encode()
        part = rows[filled : filled + len(keep)]
        part["group"] = encoded.indices.to_numpy() + names
        part["block"], part["row"], part["missing"] = number, keep, missing
        part["tokens"] = kept["prompt_length"] + kept["response_length"]
        for name in ("sample_index", "version", "created_at", "reward", "trained"):
            part[name] = kept[name]
        if mask_truncated:
            part["trained"][kept["truncated"] > 0] = 0
        filled, names = filled + len(keep), names + len(encoded.dictionary)
        ids.append(encoded.dictionary)
    rows = rows[:filled]
    if left_out and not len(rows):
        raise Refused(
            "Every group that could be learnt from is revoked, or was sampled by an agent that learnt from revoked data; "
            "collect new experience with an agent that is not flagged, or train from a flagged one."
        )
    # If all are missing, the check says so.
    known_only = "behaviour_logprobs" in needs and not np.all(rows["missing"])
    if known_only and np.any(rows["missing"]):
        rows = rows[~rows["missing"]]
    for (column, why), counts in broken.items():
        if counts[int(known_only)]:
            raise Refused(f"Column {column}: {counts[int(known_only)]} of {len(rows)} rows {why}.")
    return _replay(rows, pa.chunked_array(ids, pa.string()), blocks, mask_truncated)


def _replay(rows: np.ndarray, ids: pa.ChunkedArray, blocks: Sequence[Block], mask_truncated: bool) -> Replay:
    unique = pc.unique(ids)
    ranked = unique.take(pc.sort_indices(unique))
    rows["group"] = pc.index_in(ids, ranked).to_numpy()[rows["group"]]
    order = np.lexsort((rows["sample_index"], rows["group"]))

    def column(name: str) -> np.ndarray:  # one at a time: all of them sorted would be all rows once more
        return rows[name][order]

    group, block, row, reward = (column(name) for name in ("group", "block", "row", "reward"))
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    sizes = np.diff(starts, append=len(rows))
    newest = int(max(rows["version"].max(initial=0), 0))
    lowest = np.minimum.reduceat(reward, starts)
    # Relative to the lowest, so that the spread of equal rewards is exactly 0.
    above = reward - np.repeat(lowest, sizes)
    mean = np.add.reduceat(above, starts) / sizes
    variance = np.add.reduceat((above - np.repeat(mean, sizes)) ** 2, starts) / sizes
    created = np.maximum.reduceat(column("created_at"), starts)
    age = np.empty(len(starts), np.int32)
    age[np.argsort(-created, kind="stable")] = np.arange(len(starts))
    table = GroupTable(
        ids=np.asarray(ranked.take(pa.array(group[starts])).to_pylist(), dtype=np.str_),
        episodes=sizes.astype(np.int32),
        tokens=np.add.reduceat(column("tokens"), starts, dtype=np.int64),
        trained=np.add.reduceat(column("trained"), starts, dtype=np.int64),
        reward_mean=lowest + mean,
        reward_std=np.sqrt(variance),
        lag=np.maximum.reduceat(_lags(column("version"), newest), starts).astype(np.int32),
        age=age,
    )
    follows = (np.diff(group) == 0) & (np.diff(block) == 0) & (np.diff(row) == 1)
    first = np.flatnonzero(np.r_[np.ones(min(len(rows), 1), bool), ~follows])
    return Replay(
        table=table,
        newest=newest,
        logprobs_known=not np.any(rows["missing"]),
        mask_truncated=mask_truncated,
        blocks=blocks,
        bounds=np.searchsorted(first, np.append(starts, len(rows))),
        block=block[first],
        start=row[first],
        stop=row[first] + np.diff(first, append=len(rows)).astype(np.int32),
    )


def _passes(samples: Sequence[Sample], turns: Sequence[Sequence[int]], memory: Sequence[int]) -> Passes:
    """`turns` are those of all response tokens of each sample; a memory of 0 turns is one of all."""
    parts = [
        turn_samples(sample, of, most) if most else [sample]
        for sample, of, most in zip(samples, turns, memory, strict=True)
    ]
    return Passes(
        tuple(one for part in parts for one in part),
        tuple(number for number, part in enumerate(parts) for _ in part),
    )


def _places(turns: np.ndarray, bounds: Sequence[int]) -> np.ndarray:
    """A number for each pair of a row and a turn; the turns of row i are `turns[bounds[i] : bounds[i + 1]]`."""
    return np.repeat(np.arange(len(bounds) - 1), np.diff(bounds)) << 16 | turns.astype(np.int64)


def _lags(versions: np.ndarray, newest: int) -> np.ndarray:
    return np.where(versions == FOREIGN, 0, newest - versions)


def _rules(
    facts: Mapping[str, Any], policy: Policy, needs: frozenset[str]
) -> Iterator[tuple[str, np.ndarray, str]]:
    """(column, rows that break the rule, what is wrong with them); see `decoded` for the facts."""
    prompt, response = facts["prompt_length"], facts["response_length"]
    yield (
        "tokenizer_digest",
        np.asarray(pc.not_equal(facts["tokenizer_digest"], policy.tokenizer_digest)),
        "were made with another tokenizer than the policy's; collect with an agent of the same base model",
    )
    temperature = facts["temperature"]
    yield (
        "temperature",
        ~((temperature > 0) & np.isfinite(temperature)),
        "have no sampling temperature above 0; greedy episodes have no probability to learn from",
    )
    yield "reward", ~np.isfinite(facts["reward"]), "have a reward that is no number"
    yield "prompt_ids", prompt == 0, "have an empty prompt"
    yield "loss_mask", facts["mask_length"] != response, "have a mask of another length than response_ids"
    yield (
        "behaviour_logprobs",
        facts["logprobs_length"] != response,
        "have another number of log-probabilities than response_ids",
    )
    yield (
        "response_ids",
        facts["longest_read"] > policy.max_tokens,
        f"are longer than the {policy.max_tokens} tokens the policy can read",
    )
    for name in ("prompt", "response"):
        yield (
            f"{name}_ids",
            facts[f"{name}_highest"] >= policy.vocabulary,
            f"hold token ids outside the policy's vocabulary of {policy.vocabulary}",
        )
    yield "turn_ids", facts["turns_length"] != response, "have another number of turns than response_ids"
    yield "turn_ids", facts["turns_descend"] > 0, "have turns whose numbers descend"
    # Whatever the objective, known log-probabilities are reported on and guarded by.
    yield (
        "behaviour_logprobs",
        (facts["logprobs_impossible"] > 0) & (facts["logprobs_missing"] == 0),
        "hold log-probabilities that are not finite numbers at or below 0",
    )
    yield (
        "reward_components",
        facts["memory_turns"] == BROKEN,
        "have a memory_turns that is no number of turns, so what the policy had read cannot be told",
    )
    if "deep_thinking" in needs:
        yield (
            "reward_components",
            np.isnan(facts["deep_thinking"]),
            "lack the deep-thinking ratio that training.deep_thinking.coefficient pays for; collect with "
            "collect.deep_thinking={}, or set the coefficient to 0",
        )
    if "behaviour_logprobs" not in needs:
        return
    yield (
        "logprob_source",
        facts["logprobs_missing"] > 0,
        "lack behaviour log-probabilities, which this objective needs; recompute them with the behaviour "
        "checkpoint or choose training.objective=reinforce",
    )
    yield (
        "top_p",
        facts["top_p"] != 1,
        "were sampled with top_p below 1, so their log-probabilities are not the policy's own",
    )
