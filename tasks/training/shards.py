"""Replay as the trainer reads it: bytes are checked before use, rows are checked against the policy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from models.packing import Sample
from tasks.core.errors import Corrupt, NotFound, Refused

COLUMNS = (
    "group_id",
    "sample_index",
    "prompt_ids",
    "response_ids",
    "loss_mask",
    "behaviour_logprobs",
    "logprob_source",
    "behaviour_version",
    "finish_reason",
    "temperature",
    "top_p",
    "tokenizer_digest",
    "reward",
)


class Shard(Protocol):
    """What is needed of a manifest's entry."""

    @property
    def path(self) -> str:
        """Relative to the shard root."""

    @property
    def sha256(self) -> str:
        """Of the file's bytes, hexadecimal."""


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
class Episodes:
    """The episodes of one or more groups: samples without advantages, rewards [B], group index [B] and policy
    lag [B].

    The lag counts registry versions behind the newest behaviour of the dataset, 0 for foreign policies.
    `logprobs_known` is False if the dataset has rows without behaviour log-probabilities.
    """

    samples: tuple[Sample, ...]
    rewards: tuple[float, ...]
    groups: tuple[int, ...]
    lags: tuple[int, ...]
    logprobs_known: bool


class Replay:
    """Checked rows in memory, found by group. Only groups whose rewards differ are offered: others teach
    nothing."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table.sort_by(
            [("group_id", "ascending"), ("sample_index", "ascending")]
        ).combine_chunks()
        ids = np.asarray(self._table["group_id"].to_pylist())
        rewards = self._table["reward"].to_numpy()
        starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]]) if len(ids) else np.zeros(0, dtype=int)
        stops = np.r_[starts[1:], len(ids)] if len(ids) else starts
        rows = {str(ids[a]): range(int(a), int(b)) for a, b in zip(starts, stops, strict=True)}
        self._rows = {
            name: span for name, span in rows.items() if np.ptp(rewards[span.start : span.stop]) > 0
        }
        self.groups_seen = len(rows)
        names = pc.unique(self._table["behaviour_version"]).to_pylist()
        versions = {name: _registry_version(name) for name in names}
        newest = max((v for v in versions.values() if v is not None), default=0)
        self._lags = {name: 0 if v is None else newest - v for name, v in versions.items()}
        self._logprobs_known = "missing" not in pc.unique(self._table["logprob_source"]).to_pylist()

    @property
    def groups(self) -> tuple[str, ...]:
        """Ids of the groups with a signal, sorted."""
        return tuple(sorted(self._rows))

    def episodes(self, groups: Sequence[str]) -> Episodes:
        """All episodes of `groups`, in order; advantages are left at 0."""
        spans = [self._rows[name] for name in groups]
        table = self._table.take(pa.array(np.concatenate([np.arange(s.start, s.stop) for s in spans])))
        rows = table.to_pylist()
        samples = tuple(
            Sample(
                r["prompt_ids"],
                r["response_ids"],
                r["loss_mask"],
                r["behaviour_logprobs"],
                0.0,
                r["temperature"],
            )
            for r in rows
        )
        return Episodes(
            samples,
            tuple(r["reward"] for r in rows),
            tuple(number for number, span in enumerate(spans) for _ in span),
            tuple(self._lags[r["behaviour_version"]] for r in rows),
            self._logprobs_known,
        )


def read_replay(
    shards: Sequence[Shard], root: Path, policy: Policy, needs: frozenset[str], oldest_behaviour: int = 0
) -> Replay:
    """Read shards whose bytes have the digests given, and refuse rows that this policy or objective cannot
    learn from.

    Args:
        needs: fields that the objective needs, as in `models.objectives.Objective.needs`. Rows that were imported
            without log-probabilities are passed over by objectives that need them.
        oldest_behaviour: rows of agents registered before this version are passed over; a growing dataset always
            holds some.

    Raises:
        NotFound: a shard is missing.
        Corrupt: a shard's bytes differ from its digest, or are no Parquet file.
        Refused: a column does not fit, or no group has a signal; the sentence names the column.
    """
    if not shards:
        raise Refused(
            "The dataset has no shards, so there is nothing to train on; collect and seal experience first."
        )
    table = pa.concat_tables([_read_shard(root / shard.path, shard.sha256) for shard in shards])
    # An environment that failed says nothing about the answer, and its reward of 0 would.
    table = table.filter(pc.not_equal(table["finish_reason"], "error"))
    versions = [_registry_version(name) for name in table["behaviour_version"].to_pylist()]
    table = table.filter(pa.array([v is None or v >= oldest_behaviour for v in versions], pa.bool_()))
    if "behaviour_logprobs" in needs:
        known = pc.not_equal(table["logprob_source"], "missing")
        if pc.any(known).as_py():  # else the check below says what is wrong with all of them
            table = table.filter(known)
    check_rows(table, policy, needs)
    replay = Replay(table)
    if not replay.groups:
        raise Refused(
            f"Column reward: in each of the {replay.groups_seen} groups all rewards are equal, so there is "
            "nothing to learn; collect on harder or easier tasks."
        )
    return replay


def check_rows(table: pa.Table, policy: Policy, needs: frozenset[str]) -> None:
    """Compare the columns with the policy and the objective; see `read_replay`.

    Raises:
        Refused: names the first column that does not fit, and how many rows.
    """
    for column, bad, why in _rules(table, policy, needs):
        count = int(np.count_nonzero(bad))
        if count:
            raise Refused(f"Column {column}: {count} of {table.num_rows} rows {why}.")


def _rules(table: pa.Table, policy: Policy, needs: frozenset[str]) -> Iterator[tuple[str, np.ndarray, str]]:
    """(column, rows that break the rule, what is wrong with them); a rule may rely on the ones before it."""
    prompt, response = _lengths(table, "prompt_ids"), _lengths(table, "response_ids")
    yield (
        "tokenizer_digest",
        np.asarray(pc.not_equal(table["tokenizer_digest"], policy.tokenizer_digest)),
        "were made with another tokenizer than the policy's; collect with an agent of the same base model",
    )
    temperature = table["temperature"].to_numpy()
    yield (
        "temperature",
        ~((temperature > 0) & np.isfinite(temperature)),
        "have no sampling temperature above 0; greedy episodes have no probability to learn from",
    )
    yield "reward", ~np.isfinite(table["reward"].to_numpy()), "have a reward that is no number"
    yield "prompt_ids", prompt == 0, "have an empty prompt"
    yield (
        "loss_mask",
        _lengths(table, "loss_mask") != response,
        "have a mask of another length than response_ids",
    )
    yield (
        "behaviour_logprobs",
        _lengths(table, "behaviour_logprobs") != response,
        "have another number of log-probabilities than response_ids",
    )
    yield (
        "response_ids",
        prompt + response > policy.max_tokens,
        f"are longer than the {policy.max_tokens} tokens the policy can read",
    )
    for name in ("prompt_ids", "response_ids"):
        yield (
            name,
            _any_in_row(table, name, lambda ids: (ids < 0) | (ids >= policy.vocabulary)),
            f"hold token ids outside the policy's vocabulary of {policy.vocabulary}",
        )
    if "behaviour_logprobs" not in needs:
        return
    yield (
        "logprob_source",
        np.asarray(pc.equal(table["logprob_source"], "missing")),
        "lack behaviour log-probabilities, which this objective needs; recompute them with the behaviour "
        "checkpoint or choose training.objective=reinforce",
    )
    yield (
        "top_p",
        table["top_p"].to_numpy() != 1,
        "were sampled with top_p below 1, so their log-probabilities are not the policy's own",
    )
    yield (
        "behaviour_logprobs",
        _any_in_row(table, "behaviour_logprobs", lambda logs: ~np.isfinite(logs) | (logs > 1e-6)),
        "hold log-probabilities that are not finite numbers at or below 0",
    )


def _read_shard(path: Path, digest: str) -> pa.Table:
    """Bytes are read once, hashed, then parsed from memory: what was checked is what is used."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"Shard {path} is missing; run `dvc pull` or restore it from the remote.") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise Corrupt(f"Shard {path} differs from its digest {digest[:12]}…; restore it from the remote.")
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
    except pa.ArrowInvalid as error:
        raise Corrupt(f"Shard {path} is not a Parquet file: {error}.") from error
    lacking = [name for name in COLUMNS if name not in file.schema_arrow.names]
    if lacking:
        raise Refused(
            f"Shard {path} lacks the column {lacking[0]}; seal the experience again with this version."
        )
    return file.read(columns=list(COLUMNS))


def _registry_version(name: str) -> int | None:
    """The number in "agent/<number>"; None for a policy that is not ours."""
    head, _, number = name.partition("/")
    return int(number) if head == "agent" and number.isdigit() else None


def _lengths(table: pa.Table, name: str) -> np.ndarray:
    lengths: np.ndarray = pc.list_value_length(table[name]).to_numpy()
    return lengths


def _any_in_row(table: pa.Table, name: str, test: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Rows whose list has an element for which `test` is true."""
    lengths = _lengths(table, name)
    bad = test(pc.list_flatten(table[name]).to_numpy())
    owner = np.repeat(np.arange(len(lengths)), lengths)
    return np.asarray(np.bincount(owner[bad], minlength=len(lengths)) > 0)
