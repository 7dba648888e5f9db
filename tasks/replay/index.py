"""Where each episode and group of a dataset lies: a projection of the shards that makes the question cheap.

A SQLite file per dataset, caught up version by version from the newest shards only. It may be deleted at any
time: the next seal, or the next question, builds it again from the shards.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

from tasks.core.errors import Corrupt, Unavailable
from tasks.core.workspace import Workspace
from tasks.replay import shards
from tasks.replay.manifest import Manifest, Shard

_VERSION = 4  # of the tables
_TABLES = """
CREATE TABLE whole (root TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE shard (number INTEGER PRIMARY KEY, sha256 TEXT NOT NULL UNIQUE, path TEXT NOT NULL);
CREATE TABLE kind (number INTEGER PRIMARY KEY, env TEXT NOT NULL, source TEXT NOT NULL, licence TEXT NOT NULL,
                   samplers TEXT NOT NULL, rewarders TEXT NOT NULL, UNIQUE (env, source, licence, samplers, rewarders));
CREATE TABLE grp (number INTEGER PRIMARY KEY, group_id TEXT NOT NULL, prompt TEXT NOT NULL, shard INTEGER NOT NULL,
                  kind INTEGER NOT NULL);
CREATE INDEX grp_id ON grp (group_id);
CREATE INDEX grp_prompt ON grp (prompt);
CREATE INDEX grp_kind ON grp (kind, shard);
CREATE TABLE episode (episode_id TEXT PRIMARY KEY, grp INTEGER NOT NULL) WITHOUT ROWID;
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

By = Literal["episode", "group", "prompt", "source", "licence"]
"""What groups are looked for by: an episode's id, their own, the SHA-256 of the prompt's text, source or licence."""
_WHERE: dict[By, str] = {
    "episode": "grp.number = (SELECT grp FROM episode WHERE episode_id = ?)",
    "group": "group_id = ?",
    "prompt": "prompt = ?",
    "source": "grp.kind IN (SELECT number FROM kind WHERE source = ?)",
    "licence": "grp.kind IN (SELECT number FROM kind WHERE licence = ?)",
}
_JOINED = "grp JOIN shard ON shard.number = grp.shard JOIN kind ON kind.number = grp.kind"
_LISTED = "IN (SELECT value FROM json_each(?))"


@dataclass(frozen=True, slots=True)
class Place:
    """Where some groups of one kind lie: the dataset's name, the shard's path; what they are, and how many."""

    dataset: str
    shard: str
    env: str
    source: str
    licence: str
    groups: int


@dataclass(frozen=True, slots=True)
class KindOfRow:
    """What some groups of a dataset have in common; `samplers` and `rewarders` are digests of who answered and judged."""

    env: str
    source: str
    licence: str
    samplers: frozenset[str]
    rewarders: frozenset[str]


class RowIndex:
    """The open index of one dataset. Use `RowIndex.open`."""

    def __init__(self, workspace: Workspace, dataset: str, connection: sqlite3.Connection) -> None:
        self.dataset = dataset
        self._workspace = workspace
        self._db = connection

    @classmethod
    def open(cls, workspace: Workspace, dataset: str) -> Self:
        """Open the index of a dataset; one that is damaged, or of an earlier release, is begun anew.

        Raises:
            Unavailable: another process has it, or it cannot be written.
        """
        path = workspace.state / "replay" / f"{dataset}.db"
        path.parent.mkdir(parents=True, exist_ok=True)
        return cls(workspace, dataset, _connect(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    # ------------------------------------------------------------------------------------------ making it

    def catch_up(self, manifest: Manifest) -> None:
        """Add the shards of `manifest` that are not in yet; others are not read.

        Raises:
            Corrupt: a shard to add is missing or differs from its digest.
        """
        if self.whole(manifest.root):
            return
        with self._writing():
            for shard in self._unknown(manifest.shards):
                shards.verify(self._workspace, [shard])
                self._add(shard)
            self._db.execute("INSERT OR IGNORE INTO whole VALUES (?)", (manifest.root,))

    def add_present(self, wanted: Sequence[Shard], root: str | None = None) -> bool:
        """Add those of `wanted` that are there; return whether all of them are in now.

        Args:
            root: of the version that holds exactly these shards; it is noted that all of them are in.

        Raises:
            Corrupt: a shard to add differs from its digest.
        """
        if not self._unknown(wanted) and root is None:
            return True
        whole = True
        with self._writing():
            for shard in self._unknown(wanted):
                if not (self._workspace.root / shard.path).exists():
                    whole = False  # not fetched from the remote, or erased
                    continue
                shards.verify(self._workspace, [shard])
                try:
                    self._add(shard)
                except Corrupt:
                    whole = False  # as it was sealed, by a release that wrote no such table
            if whole and root is not None:
                self._db.execute("INSERT OR IGNORE INTO whole VALUES (?)", (root,))
        return whole

    def whole(self, root: str) -> bool:
        """Tell whether all rows of the version with that root are in."""
        return self._db.execute("SELECT 1 FROM whole WHERE root = ?", (root,)).fetchone() is not None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")  # so that two processes do not add one shard
            yield

    def _unknown(self, wanted: Sequence[Shard]) -> list[Shard]:
        known = {sha256 for (sha256,) in self._db.execute("SELECT sha256 FROM shard")}
        return [shard for shard in wanted if shard.sha256 not in known]

    def _add(self, shard: Shard) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(self._workspace.root / shard.path, columns=list(_COLUMNS))
        except (pa.ArrowException, KeyError) as error:
            raise Corrupt(
                f"Shard {shard.path} is as it was sealed, but no replay can be read from it: {error}."
            ) from error
        self.__dict__.pop("kinds", None)
        row = (shard.sha256, shard.path)
        number = self._db.execute("INSERT INTO shard (sha256, path) VALUES (?, ?)", row).lastrowid
        columns = [column.to_pylist() for column in table.itercolumns()]
        groups: dict[str, list[tuple[str, ...]]] = {}
        for episode, group, *rest in zip(*columns, strict=True):
            groups.setdefault(group, []).append((episode, *rest))
        start = self._db.execute("SELECT coalesce(max(number), 0) + 1 FROM grp").fetchone()[0]
        numbers = {group: start + at for at, group in enumerate(groups)}
        kinds: dict[tuple[str, ...], int] = {}
        for episodes in groups.values():
            kind = _kind(episodes)
            kinds[kind] = kinds.get(kind) or self._number(kind)
        self._db.executemany(
            "INSERT INTO grp VALUES (?, ?, ?, ?, ?)",
            (
                (numbers[group], group, episodes[0][1], number, kinds[_kind(episodes)])
                for group, episodes in groups.items()
            ),
        )
        self._db.executemany(
            "INSERT OR REPLACE INTO episode VALUES (?, ?)",
            sorted(
                (episode[0], numbers[group]) for group, episodes in groups.items() for episode in episodes
            ),
        )

    def _number(self, kind: tuple[str, ...]) -> int:
        self._db.execute(
            "INSERT OR IGNORE INTO kind (env, source, licence, samplers, rewarders) VALUES (?, ?, ?, ?, ?)",
            kind,
        )
        query = "SELECT number FROM kind WHERE (env, source, licence, samplers, rewarders) = (?, ?, ?, ?, ?)"
        return int(self._db.execute(query, kind).fetchone()[0])

    # ------------------------------------------------------------------------------------------ questions

    @cached_property
    def kinds(self) -> dict[int, KindOfRow]:
        """What kinds of rows there are, by number."""
        query = "SELECT number, env, source, licence, samplers, rewarders FROM kind"
        return {
            number: KindOfRow(env, source, licence, frozenset(by.split()), frozenset(judges.split()))
            for number, env, source, licence, by, judges in self._db.execute(query)
        }

    def places(self, by: By, value: str) -> list[Place]:
        """Return where the groups lie that `by` and `value` select, in the order in which they were sealed."""
        query = (
            f"SELECT path, env, source, licence, count(*) FROM {_JOINED} "
            f"WHERE {_WHERE[by]} GROUP BY 1, 2, 3, 4 ORDER BY min(grp.number)"
        )
        return [Place(self.dataset, *row) for row in self._db.execute(query, (value,))]

    def groups(self, by: By, value: str) -> list[str]:
        """Return the ids of the groups that `by` and `value` select."""
        query = f"SELECT DISTINCT group_id FROM grp WHERE {_WHERE[by]} ORDER BY 1"
        return [group for (group,) in self._db.execute(query, (value,))]

    def shard_numbers(self, paths: Collection[str]) -> set[int]:
        """Return the numbers of shards by their paths, of those that are in."""
        query = f"SELECT number FROM shard WHERE path {_LISTED}"
        return {number for (number,) in self._db.execute(query, (json.dumps(list(paths)),))}

    def any_of(self, groups: Collection[str], shards_: Collection[int], kinds: Collection[int]) -> bool:
        """Tell whether one of `groups` lies in one of these shards, or is of one of these kinds (numbers)."""
        if not shards_ and not kinds:
            return False
        query = f"SELECT shard, kind FROM grp WHERE group_id {_LISTED}"
        rows = self._db.execute(query, (json.dumps(list(groups)),))
        return any(shard in shards_ or kind in kinds for shard, kind in rows)

    def groups_of(self, episodes: Collection[str]) -> list[str]:
        """Return the groups of episodes, as far as the dataset holds them."""
        query = f"SELECT DISTINCT group_id FROM episode JOIN grp ON grp.number = episode.grp WHERE episode_id {_LISTED}"
        return sorted(group for (group,) in self._db.execute(query, (json.dumps(list(episodes)),)))

    def tally(self, groups: Collection[str]) -> dict[tuple[str, str, str, str], int]:
        """Return how many of `groups` lie where, and what they are: {(shard's path, env, source, licence): count}."""
        query = (
            f"SELECT path, env, source, licence, count(*) FROM {_JOINED} "
            f"WHERE group_id {_LISTED} GROUP BY 1, 2, 3, 4"
        )
        rows = self._db.execute(query, (json.dumps(list(groups)),))
        return {(path, env, source, licence): count for path, env, source, licence, count in rows}

    def sealed_among(self, episodes: Iterable[tuple[str, str]]) -> set[str]:
        """Return the ids of those (episode id, group id) whose episode or whole group is sealed already."""
        query = "SELECT EXISTS (SELECT 1 FROM episode WHERE episode_id = ?) OR EXISTS (SELECT 1 FROM grp WHERE group_id = ?)"
        return {pair[0] for pair in episodes if self._db.execute(query, pair).fetchone()[0]}

    def sealed_groups(self) -> set[str]:
        """Return the ids of all sealed groups."""
        return {group for (group,) in self._db.execute("SELECT DISTINCT group_id FROM grp")}


def _kind(episodes: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Return what a group is, from its rows (of `_COLUMNS`, without the group): env, source, licence, samplers, rewarders."""
    return (*episodes[0][2:5], _set(episodes, 5), _set(episodes, 6))


def _set(episodes: Sequence[tuple[str, ...]], column: int) -> str:
    """Different digests as one text; nearly always it is one."""
    return " ".join(sorted({episode[column] for episode in episodes}))


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
