"""Where each episode and group of a dataset lies: a projection of the shards that makes the question cheap.

A SQLite file per dataset, caught up version by version from the newest shards only. It may be deleted at any
time: the next seal, or the next question, builds it again from the shards.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tasks.core.errors import Corrupt, Unavailable
from tasks.core.workspace import Workspace
from tasks.replay import shards
from tasks.replay.manifest import Manifest, Shard

_VERSION = 3  # of the tables
_TABLES = """
CREATE TABLE shard (number INTEGER PRIMARY KEY, sha256 TEXT NOT NULL UNIQUE, path TEXT NOT NULL);
CREATE TABLE grp (number INTEGER PRIMARY KEY, group_id TEXT NOT NULL, shard INTEGER NOT NULL, prompt TEXT NOT NULL,
                  env TEXT NOT NULL, source TEXT NOT NULL, licence TEXT NOT NULL, episodes INTEGER NOT NULL,
                  samplers TEXT NOT NULL, rewarders TEXT NOT NULL);
CREATE INDEX grp_id ON grp (group_id);
CREATE INDEX grp_prompt ON grp (prompt);
CREATE INDEX grp_source ON grp (source);
CREATE INDEX grp_licence ON grp (licence);
CREATE TABLE episode (episode_id TEXT PRIMARY KEY, grp INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX episode_grp ON episode (grp);
"""
_COLUMNS = (
    "episode_id",
    "group_id",
    "prompt_sha256",
    "env",
    "source",
    "licence",
    "behaviour_digest",
    "reward_digest",
)
_BATCH = 400  # values in one SQL list

By = Literal["episode", "group", "prompt", "source", "licence"]
"""What groups are looked for by: an episode's id, their own, the SHA-256 of the prompt's text, source or licence."""
_WHERE: dict[By, str] = {
    "episode": "grp.number = (SELECT grp FROM episode WHERE episode_id = ?)",
    "group": "group_id = ?",
    "prompt": "prompt = ?",
    "source": "source = ?",
    "licence": "licence = ?",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where some groups of one kind lie: the dataset's name, the shard's path; what they are, and how many."""

    dataset: str
    shard: str
    env: str
    source: str
    licence: str
    groups: int


def catch_up(workspace: Workspace, manifest: Manifest) -> None:
    """Add the shards of `manifest` that the index does not hold yet; others are not read.

    Raises:
        Corrupt: a shard to add is missing or differs from its digest.
    """
    with _open(workspace, manifest.name) as index:
        for shard in _unknown(index, manifest.shards):
            shards.verify(workspace, [shard])
            _add(index, workspace.root / shard.path, shard)


def add_present(workspace: Workspace, dataset: str, wanted: Sequence[Shard]) -> bool:
    """Add those of `wanted` that are there; return whether the index holds all of them now.

    Raises:
        Corrupt: a shard to add differs from its digest.
    """
    whole = True
    with _open(workspace, dataset) as index:
        for shard in _unknown(index, wanted):
            path = workspace.root / shard.path
            if not path.exists():
                whole = False  # not fetched from the remote, or erased
                continue
            shards.verify(workspace, [shard])
            try:
                _add(index, path, shard)
            except Corrupt:
                whole = False  # as it was sealed, by a release that wrote no such table
    return whole


def _unknown(index: sqlite3.Connection, wanted: Sequence[Shard]) -> list[Shard]:
    known = {sha256 for (sha256,) in index.execute("SELECT sha256 FROM shard")}
    return [shard for shard in wanted if shard.sha256 not in known]


def _add(index: sqlite3.Connection, path: Path, shard: Shard) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=list(_COLUMNS))
    except (pa.ArrowException, KeyError) as error:
        raise Corrupt(
            f"Shard {shard.path} is as it was sealed, but no replay can be read from it: {error}."
        ) from error
    row = (shard.sha256, shard.path)
    number = index.execute("INSERT INTO shard (sha256, path) VALUES (?, ?)", row).lastrowid
    columns = [column.to_pylist() for column in table.itercolumns()]
    groups: dict[str, list[tuple[str, ...]]] = {}
    for episode, group, *rest in zip(*columns, strict=True):
        groups.setdefault(group, []).append((episode, *rest))
    start = index.execute("SELECT coalesce(max(number), 0) + 1 FROM grp").fetchone()[0]
    numbers = {group: start + at for at, group in enumerate(groups)}
    index.executemany(
        "INSERT INTO grp VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            (
                numbers[group],
                group,
                number,
                *episodes[0][1:5],
                len(episodes),
                _set(episodes, 5),
                _set(episodes, 6),
            )
            for group, episodes in groups.items()
        ),
    )
    index.executemany(
        "INSERT OR REPLACE INTO episode VALUES (?, ?)",
        sorted((episode[0], numbers[group]) for group, episodes in groups.items() for episode in episodes),
    )


def _set(episodes: Sequence[tuple[str, ...]], column: int) -> str:
    """Different digests as one text; nearly always it is one."""
    return " ".join(sorted({episode[column] for episode in episodes}))


def holds(workspace: Workspace, dataset: str, sha256: str) -> bool:
    """Tell whether the index of `dataset` holds the shard with that digest."""
    with _open(workspace, dataset) as index:
        return index.execute("SELECT 1 FROM shard WHERE sha256 = ?", (sha256,)).fetchone() is not None


def places(workspace: Workspace, dataset: str, by: By, value: str) -> list[Place]:
    """Return where the groups lie that `by` and `value` select, in the order in which they were sealed."""
    query = (
        "SELECT path, env, source, licence, count(*) FROM grp JOIN shard ON shard.number = grp.shard "
        f"WHERE {_WHERE[by]} GROUP BY 1, 2, 3, 4 ORDER BY min(grp.number)"
    )
    with _open(workspace, dataset) as index:
        return [Place(dataset, *row) for row in index.execute(query, (value,))]


def groups(workspace: Workspace, dataset: str, by: By, value: str) -> list[str]:
    """Return the ids of the groups that `by` and `value` select."""
    with _open(workspace, dataset) as index:
        query = f"SELECT DISTINCT group_id FROM grp WHERE {_WHERE[by]} ORDER BY 1"
        return [group for (group,) in index.execute(query, (value,))]


@dataclass(frozen=True, slots=True)
class About:
    """What some groups are, all together: where they lie, where they come from, who sampled and rewarded them."""

    shards: frozenset[str]
    sources: frozenset[str]
    licences: frozenset[str]
    samplers: frozenset[str]
    rewarders: frozenset[str]


def about(workspace: Workspace, dataset: str, groups: Collection[str]) -> About:
    """Return what `groups` are, as far as the dataset holds them; digests in `samplers` and `rewarders`."""
    names = list(groups)
    found: list[set[str]] = [set(), set(), set(), set(), set()]
    with _open(workspace, dataset) as index:
        for start in range(0, len(names), _BATCH):
            part = names[start : start + _BATCH]
            query = (
                "SELECT DISTINCT path, source, licence, samplers, rewarders FROM grp JOIN shard ON shard.number = grp.shard "
                f"WHERE group_id IN ({', '.join('?' * len(part))})"
            )
            for path, source, licence, samplers, rewarders in index.execute(query, part):
                told = ([path], [source], [licence], samplers.split(), rewarders.split())
                for kept, values in zip(found, told, strict=True):
                    kept.update(values)
    return About(*map(frozenset, found))


def groups_of(workspace: Workspace, dataset: str, episodes_: Collection[str]) -> list[str]:
    """Return the groups of episodes, as far as the dataset holds them."""
    names = list(episodes_)
    found: set[str] = set()
    with _open(workspace, dataset) as index:
        for start in range(0, len(names), _BATCH):
            part = names[start : start + _BATCH]
            marks = ", ".join("?" * len(part))
            query = f"SELECT group_id FROM episode JOIN grp ON grp.number = episode.grp WHERE episode_id IN ({marks})"
            found.update(group for (group,) in index.execute(query, part))
    return sorted(found)


def tally(
    workspace: Workspace, dataset: str, groups: Collection[str]
) -> dict[tuple[str, str, str, str], int]:
    """Return how many of `groups` lie where, and what they are: {(shard's path, env, source, licence): count}."""
    names = list(groups)
    found: dict[tuple[str, str, str, str], int] = {}
    with _open(workspace, dataset) as index:
        for start in range(0, len(names), _BATCH):
            part = names[start : start + _BATCH]
            query = (
                "SELECT path, env, source, licence, count(*) FROM grp JOIN shard ON shard.number = grp.shard "
                f"WHERE group_id IN ({', '.join('?' * len(part))}) GROUP BY 1, 2, 3, 4"
            )
            for *kind, count in index.execute(query, part):
                key = (kind[0], kind[1], kind[2], kind[3])
                found[key] = found.get(key, 0) + count
    return found


def sealed_among(workspace: Workspace, dataset: str, episodes: Iterable[tuple[str, str]]) -> set[str]:
    """Return the ids of those (episode id, group id) whose episode or whole group is sealed already."""
    with _open(workspace, dataset) as index:
        return {
            episode
            for episode, group in episodes
            if index.execute("SELECT 1 FROM episode WHERE episode_id = ?", (episode,)).fetchone()
            or index.execute("SELECT 1 FROM grp WHERE group_id = ? LIMIT 1", (group,)).fetchone()
        }


def sealed_groups(workspace: Workspace, dataset: str) -> set[str]:
    """Return the ids of all sealed groups."""
    with _open(workspace, dataset) as index:
        return {group for (group,) in index.execute("SELECT DISTINCT group_id FROM grp")}


@contextmanager
def _open(workspace: Workspace, dataset: str) -> Iterator[sqlite3.Connection]:
    path: Path = workspace.state / "replay" / f"{dataset}.db"
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(_connect(path)) as connection, connection:
        yield connection


def _connect(path: Path) -> sqlite3.Connection:
    for _ in range(2):
        connection = sqlite3.connect(path, timeout=60)
        try:
            if connection.execute("PRAGMA user_version").fetchone()[0] != _VERSION:
                with connection:
                    _make(connection)
            connection.execute("SELECT 1 FROM shard LIMIT 1")
            return connection
        except sqlite3.OperationalError as error:
            connection.close()
            if "no such table" not in str(error):
                raise Unavailable(
                    f"The row index {path} cannot be used ({error}); try again later."
                ) from error
            path.unlink(missing_ok=True)
        except sqlite3.DatabaseError:  # no database any more; the shards hold all that it held
            connection.close()
            path.unlink(missing_ok=True)
    raise Corrupt(f"The row index {path} cannot be made; remove it and try again.")


def _make(connection: sqlite3.Connection) -> None:
    """Lay the tables; those of an earlier release go, for the shards hold all that they held."""
    connection.execute("BEGIN IMMEDIATE")
    if connection.execute("PRAGMA user_version").fetchone()[0] == _VERSION:
        return  # another process was faster
    for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        connection.execute(f"DROP TABLE {name}")
    for statement in filter(None, map(str.strip, _TABLES.split(";"))):
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {_VERSION}")
