"""The ledger: one append-only, hash-chained table of every change of state. It is the authority.

MLflow aliases and files are its projections. Appending takes the database's write lock first, so a
`check` sees the last word and compare-and-set holds between processes (SQLite) and machines (PostgreSQL).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tasks.core.digest import canonical_json, sha256_bytes
from tasks.core.errors import Corrupt, Unavailable

GENESIS = "0" * 64
LOCK_SECONDS = 60.0  # how long to wait for another process that writes
_AT_ONCE = 500  # numbers in one SQL list

_metadata = sa.MetaData()
_table = sa.Table(
    "ledger",
    _metadata,
    sa.Column(
        "seq", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=False
    ),
    sa.Column("time", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False, index=True),
    sa.Column("subject", sa.Text, nullable=False, index=True),
    sa.Column("payload", sa.Text, nullable=False),
    sa.Column("prev", sa.Text, nullable=False),
    sa.Column("digest", sa.Text, nullable=False, unique=True),
)
_by_time = sa.Index("ix_ledger_time", _table.c.time, _table.c.seq)


@dataclass(frozen=True)
class Entry:
    """One line of the ledger. `digest` is the SHA-256 over everything else, `prev` included."""

    seq: int
    time: str
    kind: str
    subject: str
    payload: Mapping[str, Any]
    prev: str
    digest: str


@dataclass(frozen=True)
class Row:
    """One line of the ledger as it is stored; bytes that are no text are replaced by U+FFFD.

    Attributes:
        computed: the SHA-256 over everything but `digest`, which `digest` must be.
    """

    seq: int
    time: str
    kind: str
    subject: str
    payload: str
    prev: str
    digest: str
    computed: str


class LedgerView:
    """A consistent, read-only look at the ledger through one connection.

    Args:
        only: a condition on the rows that are seen; all by default.
    """

    def __init__(self, connection: sa.Connection, only: sa.ColumnElement[bool] | None = None) -> None:
        self._connection = connection
        self._only = sa.true() if only is None else only

    def entries(self, kind: str | None = None, subject: str | None = None) -> list[Entry]:
        """Return the entries in order, of one kind and subject where given."""
        return [
            _entry(row)
            for row in self._connection.execute(
                _select(kind, subject).where(self._only).order_by(_table.c.seq)
            )
        ]

    def last(self, kind: str | None = None, subject: str | None = None) -> Entry | None:
        """Return the newest entry of that kind and subject, or None."""
        newest = _select(kind, subject).where(self._only).order_by(_table.c.seq.desc()).limit(1)
        row = self._connection.execute(newest).first()
        return None if row is None else _entry(row)


class Ledger:
    """The ledger at a SQLAlchemy `url` (SQLite file or PostgreSQL)."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._only: sa.ColumnElement[bool] | None = None

    def without(self, seqs: Collection[int], after: int | None = None) -> Ledger:
        """Return the same ledger to read, in which the entries `seqs`, and those `after` one, are not seen.

        For verification: what a damaged entry says must not be taken for a fact. Not to be appended to.
        """
        seen = Ledger(self.url)
        seen.__dict__["_engine"] = self._engine
        seen._only = _table.c.seq.not_in(sorted(seqs))
        if after is not None:
            seen._only &= _table.c.seq <= after
        return seen

    def rows(self) -> Iterator[Row]:
        """Yield every row as it is stored, in order, whatever was done to it.

        Raises:
            Corrupt: the database itself is damaged; what it says is quoted.
        """
        columns = [_table.c.seq, *(self._raw(column) for column in list(_table.columns)[1:])]
        with self._reading() as connection:
            for found in connection.execute(sa.select(*columns).order_by(_table.c.seq)):
                values = {name: _text(cell) for name, cell in found._mapping.items()}
                yield Row(**values, computed=_digest(values))

    @cached_property
    def _engine(self) -> sa.Engine:
        url = sa.make_url(self.url)
        sqlite = url.get_backend_name() == "sqlite"
        if sqlite and url.database:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        engine = sa.create_engine(
            url,
            # AUTOCOMMIT hands BEGIN to us: SQLite must take its write lock before the first read of an append.
            isolation_level="AUTOCOMMIT" if sqlite else None,
            connect_args={"timeout": LOCK_SECONDS} if sqlite else {},
        )
        try:
            try:
                with engine.begin() as connection:
                    _metadata.create_all(connection)
            except sa.exc.DBAPIError:
                # Two processes may both see no table; the slower one fails, and finds the table when it looks again.
                if not sa.inspect(engine).has_table(_table.name):
                    raise
        except sa.exc.DBAPIError as error:
            reason = str(error.orig).strip().splitlines()[0]
            raise Unavailable(
                f"The ledger at {url.render_as_string()} cannot be opened: {reason}."
            ) from error
        with suppress(sa.exc.DBAPIError), engine.begin() as connection:  # one of an earlier release has none
            _by_time.create(connection, checkfirst=True)
        return engine

    def append(
        self,
        kind: str,
        subject: str,
        payload: Mapping[str, Any],
        check: Callable[[LedgerView], None] | None = None,
    ) -> Entry:
        """Add one entry and return it.

        Args:
            check: looks at the ledger under the write lock and raises to refuse (compare-and-set).

        Raises:
            Unavailable: the disk is full or the database cannot be written.
        """
        text = canonical_json(dict(payload)).decode()
        with self._engine.connect() as connection:
            try:
                self._lock(connection)
                view = LedgerView(connection)
                if check is not None:
                    check(view)
                last = view.last()
                seq, prev = (last.seq + 1, last.digest) if last else (1, GENESIS)
                time = datetime.now(UTC).isoformat(timespec="microseconds")
                row = {
                    "seq": seq,
                    "time": time,
                    "kind": kind,
                    "subject": subject,
                    "payload": text,
                    "prev": prev,
                }
                row["digest"] = _digest(row)
                connection.execute(_table.insert().values(**row))
                self._end(connection, "COMMIT")
            except sa.exc.OperationalError as error:
                self._end(connection, "ROLLBACK")
                reason = str(error.orig).strip().splitlines()[0]
                raise Unavailable(
                    f"The ledger could not be written ({reason}); nothing was recorded."
                ) from error
            except BaseException:
                self._end(connection, "ROLLBACK")
                raise
        return Entry(**{**row, "payload": json.loads(text)})

    def entries(self, kind: str | None = None, subject: str | None = None) -> list[Entry]:
        """Return the entries in order, of one kind and subject where given."""
        with self._reading() as connection:
            return LedgerView(connection, self._only).entries(kind, subject)

    def last(self, kind: str | None = None, subject: str | None = None) -> Entry | None:
        """Return the newest entry of that kind and subject, or None."""
        with self._reading() as connection:
            return LedgerView(connection, self._only).last(kind, subject)

    def since(self, seq: int, kinds: Sequence[str], until: int) -> Iterator[Entry]:
        """Yield the entries after number `seq`, up to `until`, that are of these kinds, in order, without holding them all.

        They are fetched in pages: a cursor left open would keep writers of a SQLite file waiting.
        """
        while True:
            query = sa.select(_table).where(
                _table.c.seq > seq, _table.c.seq <= until, _table.c.kind.in_(kinds)
            )
            if self._only is not None:
                query = query.where(self._only)
            with self._reading() as connection:
                page = [
                    _entry(row) for row in connection.execute(query.order_by(_table.c.seq).limit(_AT_ONCE))
                ]
            yield from page
            if len(page) < _AT_ONCE:
                return
            seq = page[-1].seq

    def at(self, numbers: Iterable[int]) -> dict[int, Entry]:
        """Return {number: entry} of those of `numbers` that there are."""
        wanted = sorted(numbers)
        found: dict[int, Entry] = {}
        with self._reading() as connection:
            for start in range(0, len(wanted), _AT_ONCE):
                query = sa.select(_table).where(_table.c.seq.in_(wanted[start : start + _AT_ONCE]))
                if self._only is not None:
                    query = query.where(self._only)
                found |= {row.seq: _entry(row) for row in connection.execute(query)}
        return found

    def last_before(self, time: str) -> tuple[int | None, bool]:
        """Return the number of the last entry written by `time` (ISO 8601, UTC), None where there is none, and whether
        an entry before it says a later time: some writer's clock ran backwards.
        """
        with self._reading() as connection:
            seq = connection.execute(
                sa.select(sa.func.max(_table.c.seq)).where(_table.c.time <= time)
            ).scalar()
            query = sa.select(_table.c.seq).where(_table.c.time > time, _table.c.seq < (seq or 0)).limit(1)
            return seq, connection.execute(query).first() is not None

    def digest_at(self, seq: int) -> str | None:
        """Return the digest that entry `seq` carries, None where there is no such entry."""
        with self._reading() as connection:
            wanted = sa.select(self._raw(_table.c.digest)).where(_table.c.seq == seq)
            return _text(connection.execute(wanted).scalar())

    def head(self) -> str:
        """Return the digest of the newest entry: the one value that pins the whole history."""
        last = self.last()
        return last.digest if last else GENESIS

    def verify_chain(self) -> int:
        """Re-hash every entry; return how many there are.

        Raises:
            Corrupt: an entry was changed, removed or put in between; its number is named.
        """
        prev, seq = GENESIS, 0
        with self._engine.connect() as connection:
            for row in connection.execute(sa.select(_table).order_by(_table.c.seq)):
                values = dict(row._mapping)
                seq += 1
                if values["seq"] != seq or values["prev"] != prev or values["digest"] != _digest(values):
                    raise Corrupt(
                        f"The ledger was altered at entry {seq}: its digest does not follow from entry {seq - 1}."
                    )
                prev = values["digest"]
        return seq

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.connect() as connection:
                yield connection
        except sa.exc.DBAPIError as error:
            reason = str(error.orig).strip().splitlines()[0]
            if "locked" in reason:
                raise Unavailable(f"The ledger is held by another process ({reason}); try again.") from error
            if self._engine.dialect.name != "sqlite":
                raise Unavailable(f"The ledger cannot be read ({reason}).") from error
            raise Corrupt(f"The ledger's database is damaged ({reason}); run `forebay verify`.") from error

    def _raw(self, column: sa.Column[Any]) -> sa.ColumnElement[Any]:
        """SQLite keeps bytes that are no text in a column of text, and fails at reading them as one."""
        if self._engine.dialect.name != "sqlite":
            return column
        return sa.cast(column, sa.LargeBinary).label(column.name)

    def _lock(self, connection: sa.Connection) -> None:
        if self._engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            connection.execute(sa.text("LOCK TABLE ledger IN EXCLUSIVE MODE"))

    def _end(self, connection: sa.Connection, word: str) -> None:
        if self._engine.dialect.name != "sqlite":
            connection.commit() if word == "COMMIT" else connection.rollback()
        elif connection.connection.dbapi_connection.in_transaction:  # type: ignore[union-attr]
            connection.exec_driver_sql(word)


def _select(kind: str | None, subject: str | None) -> sa.Select[Any]:
    query = sa.select(_table)
    if kind is not None:
        query = query.where(_table.c.kind == kind)
    if subject is not None:
        query = query.where(_table.c.subject == subject)
    return query


def _text(cell: Any) -> Any:
    return cell.decode(errors="replace") if isinstance(cell, bytes) else cell


def _entry(row: sa.Row[Any]) -> Entry:
    values = dict(row._mapping)
    try:
        return Entry(**{**values, "payload": json.loads(values["payload"])})
    except ValueError:
        raise Corrupt(f"Entry {values['seq']} of the ledger cannot be read; run `forebay verify`.") from None


def _digest(row: Mapping[str, Any]) -> str:
    return sha256_bytes(
        canonical_json({key: row[key] for key in ("seq", "time", "kind", "subject", "payload", "prev")})
    )
