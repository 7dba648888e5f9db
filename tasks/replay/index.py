"""Which episodes and groups are sealed already: a projection of the shards that makes the question cheap.

A SQLite file per dataset, caught up version by version from the newest shards only. It may be deleted at any
time: the next seal builds it again from the shards.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tasks.core.workspace import Workspace
from tasks.replay import shards
from tasks.replay.manifest import Manifest

_TABLES = """
CREATE TABLE IF NOT EXISTS shard (sha256 TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS episode (episode_id TEXT PRIMARY KEY, group_id TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS episode_group ON episode (group_id);
"""


def catch_up(workspace: Workspace, manifest: Manifest) -> None:
    """Add the shards of `manifest` that the index does not hold yet; others are not read.

    Raises:
        Corrupt: a shard to add is missing or differs from its digest.
    """
    import pyarrow.parquet as pq

    with _open(workspace, manifest.name) as index:
        known = {sha256 for (sha256,) in index.execute("SELECT sha256 FROM shard")}
        for shard in manifest.shards:
            if shard.sha256 in known:
                continue
            shards.verify(workspace, [shard])
            ids = pq.read_table(workspace.root / shard.path, columns=["episode_id", "group_id"])
            rows = zip(ids["episode_id"].to_pylist(), ids["group_id"].to_pylist(), strict=True)
            index.executemany("INSERT OR REPLACE INTO episode VALUES (?, ?)", rows)
            index.execute("INSERT INTO shard VALUES (?)", (shard.sha256,))


def sealed_among(workspace: Workspace, dataset: str, episodes: Iterable[tuple[str, str]]) -> set[str]:
    """Return the ids of those (episode id, group id) whose episode or whole group is sealed already."""
    with _open(workspace, dataset) as index:
        return {
            episode
            for episode, group in episodes
            if index.execute("SELECT 1 FROM episode WHERE episode_id = ?", (episode,)).fetchone()
            or index.execute("SELECT 1 FROM episode WHERE group_id = ? LIMIT 1", (group,)).fetchone()
        }


def sealed_groups(workspace: Workspace, dataset: str) -> set[str]:
    """Return the ids of all sealed groups."""
    with _open(workspace, dataset) as index:
        return {group for (group,) in index.execute("SELECT DISTINCT group_id FROM episode")}


@contextmanager
def _open(workspace: Workspace, dataset: str) -> Iterator[sqlite3.Connection]:
    path: Path = workspace.state / "replay" / f"{dataset}.db"
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=60)) as connection, connection:
        connection.executescript(_TABLES)
        yield connection
