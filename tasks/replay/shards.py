"""Sealed shards: immutable Parquet files of whole groups, checked against their digest before use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.core.atomic import write_file_atomic
from tasks.core.digest import sha256_file
from tasks.core.errors import Corrupt
from tasks.core.workspace import Workspace
from tasks.replay import segments
from tasks.replay.manifest import Behaviour, Manifest, Shard
from tasks.replay.schema import arrow_schema
from tasks.replay.segments import Line

if TYPE_CHECKING:
    import pyarrow as pa


def folder_of(workspace: Workspace, name: str) -> Path:
    """Return the folder of the shards of dataset `name`."""
    return workspace.replay / name / "shards"


def write(
    workspace: Workspace, name: str, version: int, lines: Sequence[Line], shard_rows: int
) -> list[Shard]:
    """Write `lines` (sorted by group) as the shards of `version`, each whole or not at all.

    Raises:
        Unavailable: the disk is full; no shard is half-written.
        Corrupt: a segment changed since it was scanned.
    """
    folder = folder_of(workspace, name)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    shards = []
    for number, part in enumerate(_split(lines, shard_rows)):
        path = folder / f"v{version:05d}-{number:05d}.parquet"
        table = _table(part)
        write_file_atomic(path, partial(_write_parquet, table))
        groups = len({line.group_id for line in part})
        shards.append(
            Shard(workspace.relative(path), sha256_file(path), table.num_rows, groups, path.stat().st_size)
        )
    return shards


def rewrite(workspace: Workspace, shard: Shard, groups: Set[str], path: Path) -> Shard | None:
    """Write the rows of `shard` without some groups to `path`; return the new shard, None where nothing is left.

    Raises:
        Corrupt: the shard is missing or differs from its digest.
        Unavailable: the disk is full; nothing is half-written.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    verify(workspace, [shard])
    table = pq.read_table(workspace.root / shard.path)
    left = table.filter(pc.invert(pc.is_in(table["group_id"], pa.array(sorted(groups), pa.string()))))
    if not left.num_rows:
        return None
    write_file_atomic(path, partial(_write_parquet, left))
    counted = pc.count_distinct(left["group_id"]).as_py()
    return Shard(workspace.relative(path), sha256_file(path), left.num_rows, counted, path.stat().st_size)


def behaviours(workspace: Workspace, shards: Sequence[Shard]) -> set[Behaviour]:
    """Return the policies that the episodes of `shards` were sampled from."""
    import pyarrow.parquet as pq

    found: set[Behaviour] = set()
    for shard in shards:
        table = pq.read_table(workspace.root / shard.path, columns=["behaviour_version", "behaviour_digest"])
        pairs = table.group_by(table.column_names).aggregate([]).to_pylist()
        found |= {Behaviour(pair["behaviour_version"], pair["behaviour_digest"]) for pair in pairs}
    return found


def contents(workspace: Workspace, shards: Sequence[Shard]) -> list[dict[str, str | int]]:
    """Return what `shards` are made of: {env, env_version, source, licence, rows, groups} for each combination."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = ["env", "env_version", "source", "licence"]
    table = pa.concat_tables(
        pq.read_table(workspace.root / shard.path, columns=[*kinds, "group_id"]) for shard in shards
    )
    found = table.group_by(kinds).aggregate([("group_id", "count"), ("group_id", "count_distinct")])
    found = found.rename_columns([*kinds, "rows", "groups"]).sort_by([(kind, "ascending") for kind in kinds])
    parts: list[dict[str, str | int]] = found.to_pylist()
    return parts


def damaged(workspace: Workspace, shards: Sequence[Shard]) -> dict[Shard, str]:
    """Re-hash `shards`; return the missing and the changed ones, each with a sentence that says so."""
    found = {}
    for shard in shards:
        path = workspace.root / shard.path
        if not path.exists():
            found[shard] = f"Shard {shard.path} is missing; restore it from the remote."
        elif (digest := sha256_file(path)) != shard.sha256:
            found[shard] = (
                f"Shard {shard.path} is corrupt: its SHA-256 is {digest}, sealed was {shard.sha256}."
            )
    return found


def verify(workspace: Workspace, shards: Sequence[Shard]) -> None:
    """Re-hash `shards`.

    Raises:
        Corrupt: the first shard that is missing or differs is named.
    """
    for sentence in damaged(workspace, shards).values():
        raise Corrupt(sentence)


def read_rows(workspace: Workspace, manifest: Manifest, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the rows of a version, oldest shard first, after checking the digest of every shard.

    Raises:
        Corrupt: a shard is missing or differs from its digest.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    verify(workspace, manifest.shards)
    names = None if columns is None else list(columns)
    return pa.concat_tables(
        pq.read_table(workspace.root / shard.path, columns=names) for shard in manifest.shards
    )


def _split(lines: Sequence[Line], shard_rows: int) -> Iterator[list[Line]]:
    """Cut `lines` (sorted by group) into parts of at most `shard_rows`; a group is never split, a larger one
    stands alone.
    """
    part: list[Line] = []
    for _, members in groupby(lines, key=attrgetter("group_id")):
        group = list(members)
        if part and len(part) + len(group) > shard_rows:
            yield part
            part = []
        part += group
    yield part


def _table(lines: Sequence[Line]) -> pa.Table:
    import pyarrow as pa

    with ExitStack() as stack:
        handles = {
            path: stack.enter_context(path.open("rb")).fileno() for path in {line.path for line in lines}
        }
        rows = [segments.read_episode(handles[line.path], line) for line in lines]
    return pa.Table.from_pylist(rows, schema=arrow_schema())


def _write_parquet(table: pa.Table, path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table, path, compression="zstd")
