"""The lineage graph in a SQLite file: a projection of the ledger that makes questions cheap in both directions.

It is caught up entry by entry before each question, and holds nothing that the ledger does not say: it may be deleted
at any time, and is built anew when the ledger is not the one it was read from. A verification never rests on it: it
derives the graph again, in memory.
"""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from tasks.core.ledger import GENESIS, Entry, Ledger
from tasks.lineage import entries as reading
from tasks.lineage.entries import Role
from tasks.lineage.types import RELATIONS, SPOKEN, Kind, Ref, Relation

_SCHEMA = "5"
_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE node (id INTEGER PRIMARY KEY, kind TEXT NOT NULL, key TEXT NOT NULL, digest TEXT, facts TEXT, UNIQUE (kind, key));
CREATE TABLE said (node INTEGER NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (node, seq)) WITHOUT ROWID;
CREATE TABLE edge (source INTEGER NOT NULL, relation INTEGER NOT NULL, target INTEGER NOT NULL, place INTEGER NOT NULL,
                   PRIMARY KEY (source, relation, target)) WITHOUT ROWID;
CREATE INDEX edge_back ON edge (target, relation, source);
CREATE TABLE gone (version INTEGER NOT NULL, shard INTEGER NOT NULL, PRIMARY KEY (version, shard)) WITHOUT ROWID;
CREATE TABLE called (role TEXT NOT NULL, digest TEXT NOT NULL, node INTEGER NOT NULL, PRIMARY KEY (role, digest, node))
    WITHOUT ROWID;
CREATE INDEX called_digest ON called (digest);
CREATE TABLE change (seq INTEGER PRIMARY KEY, time TEXT NOT NULL, kind TEXT NOT NULL, subject TEXT NOT NULL, payload TEXT NOT NULL);
CREATE INDEX change_kind ON change (kind, seq);
CREATE TABLE broken (seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, subject TEXT NOT NULL, reason TEXT NOT NULL);
"""
_CHANGES = tuple(
    f"{word}.{end}" for word in ("promotion", "rollback") for end in ("intent", "committed", "dropped")
)
_REGISTERED = ("agent.registered", "reward.registered")
_BATCH = 400  # values in one SQL list
_PATIENCE_SECONDS = 20  # while another process catches up


class Index:
    """The graph of one ledger. Ids are numbers of this file alone; `ref` and `id` translate.

    Also the reading side of a ledger for changes of office, so that who is champion is told without parsing every
    registration.
    """

    def __init__(self, ledger: Ledger, connection: sqlite3.Connection) -> None:
        self.ledger = ledger
        self._db = connection
        self._place = 0

    # ------------------------------------------------------------------------------------------ making it

    @classmethod
    def open(cls, ledger: Ledger, path: Path) -> Self:
        """Return the index kept at `path`, caught up. Where that file cannot be used it is made anew; where it cannot
        be written either, the index is in memory.
        """
        for _ in range(2):
            connection: sqlite3.Connection | None = None
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                connection = sqlite3.connect(path, timeout=_PATIENCE_SECONDS, isolation_level=None)
                index = cls(ledger, connection)
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                index.catch_up()
                return index
            except (
                OSError,
                sqlite3.OperationalError,
            ):  # no place to write, or another process is at it for long
                _close(connection)
                break
            except sqlite3.DatabaseError:  # no database any more
                _close(connection)
                for suffix in ("", "-wal", "-shm"):
                    with suppress(OSError):
                        path.with_name(path.name + suffix).unlink()
        return cls.derive(ledger)

    @classmethod
    def derive(cls, ledger: Ledger) -> Self:
        """Return an index in memory, made from the ledger alone."""
        index = cls(ledger, sqlite3.connect(":memory:", isolation_level=None))
        index.catch_up()
        return index

    def catch_up(self) -> None:
        """Read the entries that were appended since."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            seq, last = (
                self._known(),
                self.ledger.last(),
            )  # what is appended from here on is for the next time
            if last is not None and last.seq > seq:
                for entry in self.ledger.since(seq, (*reading.KINDS, *_CHANGES), last.seq):
                    self._read(entry)
                self._note(last.seq, last.digest)
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise

    def _known(self) -> int:
        """Return the last entry that was read; 0 and no tables but empty ones if it was another ledger's."""
        with suppress(sqlite3.OperationalError):
            meta = dict(self._db.execute("SELECT name, value FROM meta"))
            seq = int(meta.get("seq", 0))
            digest = self.ledger.digest_at(seq) if seq else GENESIS
            if meta.get("schema") == _SCHEMA and meta.get("digest", GENESIS) == digest:
                self._place = int(meta.get("place", 0))
                return seq
        names = [row[0] for row in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for name in names:
            self._db.execute(f"DROP TABLE {name}")
        for statement in filter(None, map(str.strip, _TABLES.split(";"))):
            self._db.execute(statement)
        self._db.execute("INSERT INTO meta VALUES ('schema', ?)", (_SCHEMA,))
        self._place = 0
        return 0

    def _note(self, seq: int, digest: str) -> None:
        values = {"seq": seq, "digest": digest, "place": self._place}
        self._db.executemany(
            "INSERT OR REPLACE INTO meta VALUES (?, ?)", [(k, str(v)) for k, v in values.items()]
        )

    def _read(self, entry: Entry) -> None:
        if entry.kind in _CHANGES or entry.kind in _REGISTERED:
            self._change(entry)
        self._db.execute("SAVEPOINT entry")
        try:
            reading.read(entry, self)
        except (KeyError, TypeError, AttributeError) as error:
            self._db.execute("ROLLBACK TO entry")
            row = (entry.seq, entry.kind, entry.subject, str(error))
            self._db.execute("INSERT INTO broken VALUES (?, ?, ?, ?)", row)
        self._db.execute("RELEASE entry")

    def _change(self, entry: Entry) -> None:
        kept = {
            name: entry.payload[name] for name in ("to", "intent_seq", "version") if name in entry.payload
        }
        row = (entry.seq, entry.time, entry.kind, entry.subject, json.dumps(kept))
        self._db.execute("INSERT OR REPLACE INTO change VALUES (?, ?, ?, ?, ?)", row)

    # ------------------------------------------------------- what readers of entries write (`entries.Graph`)

    def node(
        self, ref: Ref, digest: str | None, said: Entry | None = None, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Note that there is `ref`, and that `said` speaks of it; see `entries.Graph`."""
        number = self._number(ref)
        self._db.execute(
            "UPDATE node SET digest = ? WHERE id = ? AND digest IS NOT ?", (digest, number, digest)
        )
        if facts is not None:
            self._db.execute("UPDATE node SET facts = ? WHERE id = ?", (json.dumps(dict(facts)), number))
        if said is not None:
            self._db.execute("INSERT OR IGNORE INTO said VALUES (?, ?)", (number, said.seq))

    def edge(self, source: Ref, relation: Relation, target: Ref) -> None:
        """Note that `source` follows from `target`."""
        self._place += 1
        row = (self._number(source), RELATIONS.index(relation), self._number(target), self._place)
        self._db.execute("INSERT OR IGNORE INTO edge VALUES (?, ?, ?, ?)", row)

    def drop(self, version: Ref, shard: Ref) -> None:
        """Note that a dataset version does not hold `shard` any more, which the one that it continues held."""
        row = (self._number(version), self._number(shard))
        self._db.execute("INSERT OR IGNORE INTO gone VALUES (?, ?)", row)

    def call(self, role: Role, digest: str, ref: Ref) -> None:
        """Let `digest` mean `ref`."""
        self._db.execute("INSERT OR IGNORE INTO called VALUES (?, ?, ?)", (role, digest, self._number(ref)))

    def called(self, role: Role, digest: str) -> Ref | None:
        """Return what `digest` means in that role: the first that was called so."""
        return next(iter(self.all_called(role, digest)), None)

    def all_called(self, role: Role, digest: str) -> list[Ref]:
        """Return all that `digest` means in that role, first recorded first."""
        query = "SELECT kind, key FROM called JOIN node ON node.id = called.node WHERE role = ? AND called.digest = ? ORDER BY id"
        return [(kind, key) for kind, key in self._db.execute(query, (role, digest))]

    def _number(self, ref: Ref) -> int:
        found = self.id(ref)
        if found is not None:
            return found
        made = self._db.execute("INSERT INTO node (kind, key) VALUES (?, ?)", ref).lastrowid
        assert made is not None
        return made

    # ------------------------------------------------------------------------------------------ questions

    def entries(self, kind: str | None = None, subject: str | None = None) -> list[Entry]:
        """Return entries of the ledger; of changes of office and registrations only what `standing` needs."""
        assert kind is not None
        if kind not in _CHANGES:
            return self.ledger.entries(kind, subject)
        return self._changes(
            "kind = ?" + (" AND subject = ?" if subject else ""), (kind, *filter(None, [subject]))
        )

    def last(self, kind: str | None = None, subject: str | None = None) -> Entry | None:
        """Return the newest entry of that kind and subject, or None."""
        if kind not in (*_CHANGES, *_REGISTERED):
            return self.ledger.last(kind, subject)
        where = "kind = ?" + (" AND subject = ?" if subject else "") + " ORDER BY seq DESC LIMIT 1"
        return next(iter(self._changes(where, (kind, *filter(None, [subject])))), None)

    def last_until(self, kind: str, seq: int) -> Entry | None:
        """Return the newest registration or change of office of that kind up to entry `seq`, None where there is none."""
        return next(iter(self._changes("kind = ? AND seq <= ? ORDER BY seq DESC LIMIT 1", (kind, seq))), None)

    def derived(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what `make` reads from the changes of office and registrations; it is kept until the next of them."""
        at = self._db.execute("SELECT coalesce(max(seq), 0) FROM change").fetchone()[0]  # before `make` looks
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        if row is not None:
            kept: dict[str, Any] = json.loads(row[0])
            if kept["at"] == at:
                found: dict[str, Any] = kept["found"]
                return found
        made = make()
        with suppress(sqlite3.OperationalError):  # another process writes: it is made again next time
            text = json.dumps({"at": at, "found": made})
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, text))
        return made

    def _changes(self, where: str, values: Sequence[Any]) -> list[Entry]:
        tail = "" if "ORDER" in where else " ORDER BY seq"
        rows = self._db.execute(
            f"SELECT seq, time, kind, subject, payload FROM change WHERE {where}{tail}", values
        )
        return [
            Entry(seq, time, kind, subject, json.loads(text), "", "")
            for seq, time, kind, subject, text in rows
        ]

    def id(self, ref: Ref) -> int | None:
        """Return the number of a node, None where there is none."""
        row = self._db.execute("SELECT id FROM node WHERE kind = ? AND key = ?", ref).fetchone()
        return None if row is None else int(row[0])

    def refs(self, ids: Iterable[int]) -> dict[int, tuple[Ref, str | None]]:
        """Return {number: (node, its digest)}, in the order of `ids`."""
        wanted = list(ids)
        found: dict[int, tuple[Ref, str | None]] = {}
        for part in _batched(wanted):
            query = f"SELECT id, kind, key, digest FROM node WHERE id IN ({_marks(part)})"
            found |= {
                number: ((kind, key), digest) for number, kind, key, digest in self._db.execute(query, part)
            }
        return {number: found[number] for number in wanted}

    def kept(self, ids: Iterable[int]) -> dict[int, dict[str, Any]]:
        """Return {number: facts} of the nodes whose facts are kept here."""
        found: dict[int, dict[str, Any]] = {}
        for part in _batched(ids):
            query = f"SELECT id, facts FROM node WHERE id IN ({_marks(part)}) AND facts IS NOT NULL"
            found |= {number: json.loads(facts) for number, facts in self._db.execute(query, part)}
        return found

    def said(self, ids: Iterable[int]) -> dict[int, list[Entry]]:
        """Return {number: the ledger's entries that speak of that node, in order}."""
        pairs: list[tuple[int, int]] = []
        for part in _batched(ids):
            pairs += self._db.execute(f"SELECT node, seq FROM said WHERE node IN ({_marks(part)})", part)
        entries = self.ledger.at({seq for _, seq in pairs})
        found: dict[int, list[Entry]] = defaultdict(list)
        for number, seq in sorted(pairs):
            if seq in entries:
                found[number].append(entries[seq])
        return found

    def settled(self, ids: Iterable[int]) -> dict[int, int]:
        """Return {number: the last entry that speaks of that node}; 0 where none does."""
        found = dict.fromkeys(ids, 0)
        for part in _batched(found):
            query = f"SELECT node, max(seq) FROM said WHERE node IN ({_marks(part)}) GROUP BY node"
            found |= dict(self._db.execute(query, part))
        return found

    def walk(
        self, start: Iterable[int], back: bool, relations: Collection[Relation] = RELATIONS
    ) -> list[int]:
        """Return the nodes that are reached from `start`, those first, nearest first.

        Args:
            back: against the edges, to what follows from `start`; else along them, to what it follows from.
        """
        here, there = ("target", "source") if back else ("source", "target")
        kinds = ", ".join(str(RELATIONS.index(relation)) for relation in relations)
        reached = dict.fromkeys(start)
        front = list(reached)
        while front:
            found: dict[int, None] = {}
            for part in _batched(front):
                query = f"SELECT {there} FROM edge WHERE {here} IN ({_marks(part)}) AND relation IN ({kinds})"
                found |= dict.fromkeys(number for (number,) in self._db.execute(query, part))
            front = [number for number in found if number not in reached]
            reached |= dict.fromkeys(front)
        return list(reached)

    def held(self, versions: Iterable[int], among: Set[int] | None = None) -> dict[int, Set[int]]:
        """Return {dataset version: the shards that it holds}, of `versions` and of those that they continue.

        Args:
            among: the only shards that are told of.
        """
        chain: tuple[Relation, ...] = ("continues",)
        numbers = self.walk(versions, back=False, relations=chain)
        earlier: dict[int, int] = {}
        new: dict[int, set[int]] = defaultdict(set)
        for source, relation, target in self.edges(numbers):
            if relation == "continues":
                earlier[source] = target
            elif relation == "holds" and (among is None or target in among):
                new[source].add(target)
        gone: dict[int, set[int]] = defaultdict(set)
        for part in _batched(numbers):
            query = f"SELECT version, shard FROM gone WHERE version IN ({_marks(part)})"
            for version, shard in self._db.execute(query, part):
                gone[version].add(shard)
        found: dict[int, Set[int]] = {}
        for version in sorted(numbers):  # what it continues was recorded before it
            before = found.get(earlier.get(version, 0), frozenset())
            changed = (
                version in new or version in gone
            )  # else both share one set: a long history would hold very many
            found[version] = (before | new[version]) - gone[version] if changed else before
        return found

    def shortest(self, start: int, end: int, relations: Collection[Relation]) -> list[int]:
        """Return a shortest way along edges of these relations, both ends included; empty where there is none."""
        kinds = ", ".join(str(RELATIONS.index(relation)) for relation in relations)
        came: dict[int, int] = {start: start}
        front = [start]
        while front and end not in came:
            found: dict[int, int] = {}
            for part in _batched(front):
                query = f"SELECT source, target FROM edge WHERE source IN ({_marks(part)}) AND relation IN ({kinds}) ORDER BY place"
                for source, target in self._db.execute(query, part):
                    if target not in came:
                        found.setdefault(target, source)
            came |= found
            front = list(found)
        way = [end] if end in came else []
        while way and way[-1] != start:
            way.append(came[way[-1]])
        return way[::-1]

    def edges(self, ids: Collection[int], back: bool = False) -> list[tuple[int, Relation, int]]:
        """Return the edges (source, relation, target) that leave each of `ids` (or enter it), in reading order."""
        here = "target" if back else "source"
        found: list[tuple[int, int, int, int]] = []
        for part in _batched(ids):
            query = f"SELECT source, relation, target, place FROM edge WHERE {here} IN ({_marks(part)})"
            found += self._db.execute(query, part)
        order = {number: at for at, number in enumerate(ids)}
        found.sort(key=lambda row: (order[row[2 if back else 0]], row[1], row[3]))
        return [(source, RELATIONS[relation], target) for source, relation, target, _ in found]

    def every_called(self, role: Role) -> dict[Ref, str]:
        """Return {node: digest} of all that is called in that role, first recorded first."""
        query = "SELECT kind, key, called.digest FROM called JOIN node ON node.id = called.node WHERE role = ? ORDER BY id"
        return {(kind, key): digest for kind, key, digest in self._db.execute(query, (role,))}

    def prefixed(self, digits: str, role: Role | None = None) -> dict[Ref, str]:
        """Return {node: digest} of the nodes that a digest, or another tool's id, with these first characters means."""
        query = (
            "SELECT kind, key, called.digest FROM called JOIN node ON node.id = called.node "
            "WHERE called.digest BETWEEN ? AND ?"
        )
        values = [digits, digits + "\uffff"]
        if role:
            query, values = f"{query} AND role = ?", [*values, role]
        return {(kind, key): digest for kind, key, digest in sorted(self._db.execute(query, values))}

    def keys(self, kind: Kind, most: int | None = None) -> list[str]:
        """Return the keys of the nodes of a kind that the ledger speaks of, newest first."""
        spoken = "AND EXISTS (SELECT 1 FROM said WHERE node = id)" if kind in SPOKEN else ""
        query = f"SELECT key FROM node WHERE kind = ? {spoken} ORDER BY id DESC LIMIT ?"
        return [key for (key,) in self._db.execute(query, (kind, -1 if most is None else most))]

    def newest_versions(self) -> dict[str, tuple[Ref, str | None]]:
        """Return {dataset's name: (its newest version, that one's root)}."""
        query = "SELECT called.digest, max(node) FROM called WHERE role = 'version' GROUP BY 1 ORDER BY 1"
        newest: dict[str, int] = dict(self._db.execute(query))
        named = self.refs(newest.values())
        return {name: named[number] for name, number in newest.items()}

    def broken(self, subject: str) -> tuple[int, str] | None:
        """Return (number, what is wrong) of an entry of that subject that could not be read, None where all could."""
        row = self._db.execute(
            "SELECT seq, reason FROM broken WHERE subject = ? LIMIT 1", (subject,)
        ).fetchone()
        return None if row is None else (int(row[0]), str(row[1]))


def _close(connection: sqlite3.Connection | None) -> None:
    if connection is not None:
        connection.close()


def _batched(values: Iterable[int]) -> Iterator[Sequence[int]]:
    everything = list(values)
    for start in range(0, len(everything), _BATCH):
        yield everything[start : start + _BATCH]


def _marks(values: Sequence[Any]) -> str:
    return ", ".join("?" * len(values))
