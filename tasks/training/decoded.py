"""Shards as the trainer reads them: a verified Parquet file is decoded once into a file that is mapped, not loaded.

A decoded shard is an uncompressed Arrow IPC file of the columns that training needs and, per row, the facts that
the checks need, so that opening a dataset does not touch its tokens. It is named by the SHA-256 of the shard and
the version of this layout, and stands beside its own SHA-256: it is used if that agrees, and made anew if not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from models.turn_samples import spans
from tasks.core.atomic import write_atomic, write_file_atomic
from tasks.core.digest import sha256_file
from tasks.core.errors import Corrupt, NotFound, Refused
from tasks.core.locks import file_lock
from tasks.replay.schema import DEEP_THINKING, INVALID_TURNS, MOST_TURNS, arrow_schema, memory_of

LAYOUT = 5  # a change of the columns below, or of what they mean, raises it
FOREIGN = -1  # the version of a policy that is not ours
NO_TIME = -(1 << 62)
BLOCK_BYTES = 1 << 26  # decoded at once, about
IDLE_SECONDS = 24 * 3600  # a decoded shard that nobody opened for so long may be removed

_SOURCE = pa.schema(
    [
        arrow_schema().field(name)
        for name in (
            "group_id",
            "sample_index",
            "prompt_ids",
            "response_ids",
            "loss_mask",
            "turn_ids",
            "behaviour_logprobs",
            "logprob_source",
            "behaviour_version",
            "finish_reason",
            "temperature",
            "top_p",
            "tokenizer_digest",
            "reward",
            "reward_components",
            "response_text",
            "created_at",
        )
    ]
)
_FACTS = pa.schema(
    [
        ("group_id", pa.string()),
        ("sample_index", pa.int32()),
        ("tokenizer_digest", pa.string()),
        ("version", pa.int64()),  # the number in "agent/<number>", or FOREIGN
        ("created_at", pa.int64()),  # microseconds since 1970; a text that is no time counts as the oldest
        ("temperature", pa.float64()),
        ("top_p", pa.float64()),
        ("reward", pa.float64()),
        ("deep_thinking", pa.float64()),  # ratio of the response; NaN where it was not measured
        ("memory_turns", pa.int16()),  # read beside the prompt; 0: all, BROKEN: it cannot be told
        ("failed", pa.uint8()),  # the environment did
        ("truncated", pa.uint8()),  # the answer ended at its limit of tokens
        ("trained", pa.int32()),  # tokens that the policy wrote
        ("turns_descend", pa.uint8()),
        ("logprobs_missing", pa.uint8()),
        ("logprobs_impossible", pa.uint8()),  # one of them is no finite number at or below 0
        ("prompt_length", pa.int32()),
        ("response_length", pa.int32()),
        ("longest_read", pa.int32()),  # most tokens that the policy had read and written in one go
        ("mask_length", pa.int32()),
        ("turns_length", pa.int32()),
        ("logprobs_length", pa.int32()),
        ("prompt_highest", pa.uint32()),  # token id; a negative one wraps around and is above any vocabulary
        ("response_highest", pa.uint32()),
    ]
)
_TOKENS = pa.schema(
    [
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.uint8())),  # bytes, for bits cannot be mapped as an array
        ("turn_ids", pa.list_(pa.int16())),
        ("behaviour_logprobs", pa.list_(pa.float32())),
        ("invalid_turns", pa.list_(pa.int16())),  # whose action had a wrong form or was impossible
        ("response_text", pa.string()),
    ]
)
_SCHEMA = pa.schema([*_FACTS, *_TOKENS])


class Shard(Protocol):
    """What is needed of a manifest's entry."""

    @property
    def path(self) -> str:
        """Relative to the shard root."""

    @property
    def sha256(self) -> str:
        """Of the file's bytes, hexadecimal."""


@dataclass(frozen=True, slots=True)
class Ragged:
    """Lists of unequal length: row i is `values[offsets[i] : offsets[i + 1]]`."""

    values: np.ndarray
    offsets: np.ndarray

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The values of some rows, one after another, and the length of each row."""
        bounds = self.offsets[start : stop + 1]
        return self.values[bounds[0] : bounds[-1]], bounds[1:] - bounds[:-1]


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of a decoded shard. The arrays lie in the mapped file; reading them is what loads them."""

    size: int
    reward: np.ndarray
    deep_thinking: np.ndarray
    temperature: np.ndarray
    version: np.ndarray
    memory_turns: np.ndarray
    truncated: np.ndarray
    prompt_ids: Ragged
    response_ids: Ragged
    loss_mask: Ragged
    turn_ids: Ragged
    behaviour_logprobs: Ragged
    invalid_turns: Ragged
    response_text: Ragged  # UTF-8


def decode(shard: Shard, root: Path, cache: Path) -> Path:
    """The decoded file of `shard` in `cache`, made if it is not there whole. One process makes it, others wait.

    Raises:
        NotFound: it has to be made and the shard is missing.
        Corrupt: the shard's bytes differ from its digest, or are no Parquet file.
        Refused: the shard's columns are not those of the schema.
        Unavailable: the disk is full; nothing is left behind.
    """
    target = cache / f"{shard.sha256}.v{LAYOUT}.arrow"
    with suppress(FileNotFoundError):
        os.utime(target)  # in use: `prune` lets it be
    if not _intact(target):
        with file_lock(cache / ".lock", timeout=math.inf):
            for leftover in cache.glob(".*.tmp"):  # of writers that were killed: who writes holds the lock
                leftover.unlink()
            if not _intact(target):
                _make(shard, root / shard.path, target)
    return target


def prune(cache: Path, shards: Iterable[Shard]) -> None:
    """Remove the decoded files of other shards than these that have been idle for a day.

    Not at once, for another run may be about to map them, and runs of two datasets may take turns. Who has a file
    mapped keeps it until the end.
    """
    kept = {f"{shard.sha256}.v{LAYOUT}.arrow" for shard in shards}
    with file_lock(cache / ".lock", timeout=math.inf):
        for path in cache.glob("*.arrow"):
            if path.name not in kept and time.time() - path.stat().st_mtime > IDLE_SECONDS:
                path.unlink()
                _digest_file(path).unlink(missing_ok=True)


def facts(path: Path) -> Iterator[dict[str, Any]]:
    """Block by block, the facts of a decoded shard in memory: strings as Arrow arrays, all else as numpy arrays."""
    options = pa.ipc.IpcReadOptions(included_fields=list(range(len(_FACTS))))
    with pa.OSFile(str(path)) as source, pa.ipc.open_file(source, options=options) as reader:
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            yield {
                field.name: column if pa.types.is_string(field.type) else column.to_numpy()
                for field, column in zip(batch.schema, batch.columns, strict=True)
            }


def blocks(path: Path) -> list[Block]:
    """Map a decoded shard. The file may be removed afterwards."""
    # Python's and Arrow's mappings keep a file descriptor each, and a dataset may have more shards than a process
    # may have descriptors; PyTorch's closes it.
    storage = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
    data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()  # type: ignore[arg-type]
    data.flags.writeable = False
    reader = pa.ipc.open_file(pa.py_buffer(data))
    return [_block(reader.get_batch(number)) for number in range(reader.num_record_batches)]


def _block(batch: pa.RecordBatch) -> Block:
    def ragged(name: str) -> Ragged:
        return Ragged(batch[name].values.to_numpy(), batch[name].offsets.to_numpy())

    _, offsets, letters = batch["response_text"].buffers()
    return Block(
        size=batch.num_rows,
        reward=batch["reward"].to_numpy(),
        deep_thinking=batch["deep_thinking"].to_numpy(),
        temperature=batch["temperature"].to_numpy(),
        version=batch["version"].to_numpy(),
        memory_turns=batch["memory_turns"].to_numpy(),
        truncated=batch["truncated"].to_numpy(),
        prompt_ids=ragged("prompt_ids"),
        response_ids=ragged("response_ids"),
        loss_mask=ragged("loss_mask"),
        turn_ids=ragged("turn_ids"),
        behaviour_logprobs=ragged("behaviour_logprobs"),
        invalid_turns=ragged("invalid_turns"),
        response_text=Ragged(np.frombuffer(letters or b"", np.uint8), np.frombuffer(offsets, np.int32)),
    )


def _digest_file(target: Path) -> Path:
    return target.with_suffix(".sha256")


def _intact(target: Path) -> bool:
    """Read through a decoded shard and compare; the line beside it is one that `sha256sum --check` reads."""
    try:
        return _digest_file(target).read_text() == _digest_line(target)
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def _digest_line(target: Path) -> str:
    return f"{sha256_file(target)}  {target.name}\n"


def _make(shard: Shard, source: Path, target: Path) -> None:
    def fill(aside: Path) -> None:
        with (
            _verified(source, shard.sha256, target.parent) as copy,
            pa.OSFile(str(aside), "wb") as sink,
            pa.ipc.new_file(sink, _SCHEMA) as writer,
        ):
            for batch in _parquet(copy, source):
                writer.write_batch(_decoded(batch, source))

    write_file_atomic(target, fill)
    write_atomic(_digest_file(target), _digest_line(target).encode())


@contextmanager
def _verified(source: Path, digest: str, folder: Path) -> Iterator[IO[bytes]]:
    """A copy of the shard that has no name: it is hashed while it is made and nobody else can write to it
    afterwards, so that what was checked is what is parsed."""
    try:
        stream = source.open("rb")
    except FileNotFoundError:
        raise NotFound(f"Shard {source} is missing; run `dvc pull` or restore it from the remote.") from None
    with stream, tempfile.TemporaryFile(dir=folder) as copy:
        seen = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            seen.update(chunk)
            copy.write(chunk)
        if seen.hexdigest() != digest:
            raise Corrupt(
                f"Shard {source} differs from its digest {digest[:12]}…; restore it from the remote."
            )
        copy.seek(0)
        yield copy


def _parquet(stream: IO[bytes], source: Path) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file, about BLOCK_BYTES at a time."""
    try:
        file = pq.ParquetFile(stream, buffer_size=1 << 20)
        lacking = [name for name in _SOURCE.names if name not in file.schema_arrow.names]
        if lacking:
            raise Refused(
                f"Shard {source} lacks the column {lacking[0]}; seal the experience again with this version."
            )
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        bytes_of_rows = sum(group.total_byte_size for group in groups)
        rows = max(1, BLOCK_BYTES * file.metadata.num_rows // max(1, bytes_of_rows))
        yield from file.iter_batches(min(rows, 1 << 16), columns=_SOURCE.names)
    except (pa.ArrowInvalid, OSError) as error:  # damaged metadata raises a plain OSError
        if getattr(error, "errno", None):
            raise
        raise Corrupt(f"Shard {source} is not a Parquet file: {error}.") from error


def _decoded(batch: pa.RecordBatch, source: Path) -> pa.RecordBatch:
    rows = {field.name: _fitting(batch[field.name], field, source) for field in _SOURCE}
    prompt, response = (
        rows[name].flatten().to_numpy().view(np.uint32) for name in ("prompt_ids", "response_ids")
    )
    logprobs = rows["behaviour_logprobs"].flatten().to_numpy()
    lengths = {
        name: pc.list_value_length(rows[name]).to_numpy()
        for name in ("prompt_ids", "response_ids", "loss_mask", "turn_ids", "behaviour_logprobs")
    }
    made = {
        "version": _by_value(rows["behaviour_version"], _registry_version),
        "created_at": _by_value(rows["created_at"], _microseconds),
        "failed": _equal(rows["finish_reason"], "error"),
        "truncated": _equal(rows["finish_reason"], "length"),
        "trained": _sums(rows["loss_mask"].flatten().cast(pa.uint8()).to_numpy(), lengths["loss_mask"]),
        "turns_descend": _descends(rows["turn_ids"].flatten().to_numpy(), lengths["turn_ids"]),
        "logprobs_missing": _equal(rows["logprob_source"], "missing"),
        "logprobs_impossible": _highest(
            (~np.isfinite(logprobs) | (logprobs > 1e-6)).view(np.uint8), lengths["behaviour_logprobs"]
        ),
        "prompt_length": lengths["prompt_ids"],
        "response_length": lengths["response_ids"],
        "mask_length": lengths["loss_mask"],
        "turns_length": lengths["turn_ids"],
        "logprobs_length": lengths["behaviour_logprobs"],
        "prompt_highest": _highest(prompt, lengths["prompt_ids"]),
        "response_highest": _highest(response, lengths["response_ids"]),
    }
    components = rows["reward_components"].dictionary_encode()
    distinct = components.dictionary.to_pylist()
    lists = pa.array(map(_invalid_turns, distinct), pa.list_(pa.int16()))
    made["invalid_turns"] = lists.take(components.indices)
    made["memory_turns"] = pa.array(map(memory_of, distinct), pa.int16()).take(components.indices)
    made["longest_read"] = _longest_reads(rows, lengths, made["memory_turns"].to_numpy())
    made["deep_thinking"] = pa.array(map(_deep_thinking, distinct), pa.float64()).take(components.indices)
    columns = [pa.array(made[f.name]) if f.name in made else rows[f.name].cast(f.type) for f in _SCHEMA]
    return pa.record_batch(columns, schema=_SCHEMA)


def _fitting(column: pa.Array, field: pa.Field, source: Path) -> pa.Array:
    """The column in the type of the schema, without a missing value."""
    try:
        column = column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise Refused(
            f"Shard {source}: column {field.name} is not of the type {field.type}: {error}"
        ) from error
    if column.null_count or (pa.types.is_list(column.type) and column.flatten().null_count):
        raise Refused(f"Shard {source}: column {field.name} has missing values.")
    return column


def _highest(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The largest value of every row, 0 for an empty one; `values` are those of all rows, one after another."""
    found = np.zeros(len(lengths), values.dtype)
    filled = lengths > 0
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    if len(values):
        found[filled] = np.maximum.reduceat(values, starts[filled])
    return found


def _sums(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The sum of every row; `values` are those of all rows, one after another."""
    totals = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    ends = np.cumsum(lengths, dtype=np.int64)
    found: np.ndarray = (totals[ends] - totals[ends - lengths]).astype(np.int32)
    return found


def _descends(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Whether a row has a value below the one before it; `values` are those of all rows, one after another."""
    row = np.repeat(np.arange(len(lengths)), lengths)
    falls = (np.diff(values) < 0) & (np.diff(row) == 0)
    found = np.zeros(len(lengths), np.uint8)
    found[row[1:][falls]] = 1
    return found


def _equal(column: pa.Array, value: str) -> np.ndarray:
    return np.asarray(pc.equal(column, value)).view(np.uint8)


def _by_value(column: pa.Array, number: Callable[[str], int]) -> np.ndarray:
    """`number` of every text, worked out once for each that differs."""
    encoded = column.dictionary_encode()
    numbers = np.array([number(text) for text in encoded.dictionary.to_pylist()], np.int64)
    found: np.ndarray = numbers[encoded.indices.to_numpy()]
    return found


def _component(components: str, name: str) -> Any:
    """None where it is missing; experience that others recorded may hold anything."""
    if f'"{name}"' not in components:
        return None
    try:
        value = json.loads(components)
    except (ValueError, RecursionError):
        return None
    return value.get(name) if isinstance(value, dict) else None


def _invalid_turns(components: str) -> list[int]:
    found = _component(components, INVALID_TURNS)
    if not isinstance(found, list):
        return []
    return [turn for turn in found if type(turn) is int and 0 <= turn <= MOST_TURNS]


def _longest_reads(
    rows: Mapping[str, pa.Array], lengths: Mapping[str, np.ndarray], memory: np.ndarray
) -> np.ndarray:
    """The whole of a row, or of its turns with what each was written from the longest."""
    found: np.ndarray = lengths["prompt_ids"] + lengths["response_ids"]
    even = (lengths["turn_ids"] == lengths["response_ids"]) & (
        lengths["loss_mask"] == lengths["response_ids"]
    )
    for row in np.flatnonzero(even & (memory > 0)):
        mask, turns = (
            rows[name][row].values.to_numpy(zero_copy_only=False) for name in ("loss_mask", "turn_ids")
        )
        turned = spans(mask, turns, int(memory[row]))
        found[row] = lengths["prompt_ids"][row] + max((one.stop - one.read for one in turned), default=0)
    return found


def _deep_thinking(components: str) -> float:
    """NaN where it is missing or no ratio."""
    found = _component(components, DEEP_THINKING)
    return float(found) if type(found) in (int, float) and 0 <= found <= 1 else math.nan


def _registry_version(name: str) -> int:
    head, _, number = name.partition("/")
    return int(number) if head == "agent" and number.isdecimal() else FOREIGN


def _microseconds(text: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:  # of imported experience; its age is not worth refusing it for
        return NO_TIME
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - datetime.fromtimestamp(0, UTC)) // timedelta(microseconds=1)
