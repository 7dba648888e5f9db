"""The ledger, row by row: which entries are not what was written, and what is left to be believed.

A row is judged by two witnesses: its own digest, and the next row, which repeats it. So the row that was altered is
named, and not all that follow it. Signed heads are a third witness, outside the database: whoever makes the whole chain
anew contradicts them. What a damaged entry says is taken for nothing, or a file would be blamed for the ledger's fault.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import sqlalchemy as sa

from tasks.core.errors import Corrupt
from tasks.core.ledger import GENESIS, Ledger, Row
from tasks.lineage.report import Problem

_SET_ASIDE = 1000  # with more damage than this nothing in the ledger is worth following


@dataclass(frozen=True)
class Chain:
    """What the rows are worth.

    Attributes:
        entries: how many hold from the first one on.
        head: digest of the newest entry; empty where anything is wrong.
        faults: the entry each is about, and what is wrong, in the order of the ledger.
        damaged: entries whose content is not to be believed.
        broken: what is wrong with the database itself; empty where nothing is.
        past_reading: nothing can be followed: the database is damaged, or most of what it holds.
        notes: what is no fault.
    """

    entries: int
    head: str
    faults: tuple[tuple[int, str], ...] = ()
    damaged: frozenset[int] = frozenset()
    broken: str = ""
    past_reading: bool = False
    notes: tuple[str, ...] = ()

    def problems(self) -> Iterator[Problem]:
        """Name the altered entries, those in a row together."""
        if self.broken:
            yield Problem("changed", "ledger", self.broken, "", None)
        for seqs, says in _runs(self.faults):
            more = f", and so {_after(len(seqs) - 1)}" if len(seqs) > 1 else ""
            yield Problem(
                "changed", "ledger", f"The ledger was altered at entry {seqs[0]}: {says}{more}", "", None
            )


def written_anew(chain: Chain, signed: Iterable[int], contradicted: Iterable[int]) -> int | None:
    """Return the last entry that a signed head confirms, where a later one is contradicted; None where none is.

    A contradiction at an entry that is damaged by itself is explained by that.
    """
    odd = set(contradicted) - {seq for seq, _ in chain.faults}
    return max((seq for seq in signed if seq < min(odd)), default=0) if odd else None


def inspect_chain(ledger: Ledger) -> Chain:
    """Hash every row again and compare it with its neighbours."""
    walk, broken = _Walk(), ""
    try:
        for row in ledger.rows():
            walk.take(row)
        walk.end()
        broken = _integrity(ledger)
    except Corrupt as error:
        broken = str(error)
    odd = bool(walk.faults or broken)
    return Chain(
        entries=walk.held,
        head="" if odd else walk.last.digest if walk.last else GENESIS,
        faults=tuple(sorted(walk.faults.items())),
        damaged=frozenset(walk.damaged),
        broken=broken,
        past_reading=bool(broken) or len(walk.damaged) > _SET_ASIDE,
        notes=tuple(walk.notes),
    )


@dataclass
class _Walk:
    """Goes along the rows; a row is judged when its successor is seen."""

    faults: dict[int, str] = field(default_factory=dict)
    damaged: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    count: int = 0
    last: Row | None = None
    before: Row | None = None
    unlinked: int | None = None  # `last` does not follow from `before`, though both are whole

    @property
    def held(self) -> int:
        """How many entries hold from the first one on."""
        return max(min(self.faults) - 1, 0) if self.faults else self.count

    def take(self, row: Row) -> None:
        last = self.last
        seq, digest = (last.seq, last.digest) if last else (0, GENESIS)
        self.count += 1
        if row.seq != seq + 1:
            self._gap(seq, row.seq)
        elif self._whole(row) and (last is None or self._whole(last)) and row.prev != digest:
            self.unlinked = row.seq
        if last is not None:
            self._judge(last, row)
        if last is not None and self._whole(row) and self._whole(last) and row.time < last.time:
            self._backwards(row)
        self.before, self.last = last, row

    def end(self) -> None:
        last = self.last
        if last is None:
            return
        if not self._whole(last):
            self._damage(last.seq, "its digest does not follow from what it says")
        if self.unlinked == last.seq:  # no witness is left for the one or the other
            self._damage(last.seq, f"its digest does not follow from entry {last.seq - 1}")

    def _judge(self, last: Row, row: Row) -> None:
        if not self._whole(last):
            if row.seq == last.seq + 1 and row.prev == last.computed:
                self._damage(last.seq, "its digest was changed; what it says is confirmed by the next entry")
            else:
                self._damage(last.seq, "its digest does not follow from what it says")
        if self.unlinked == last.seq:
            # The next row confirms `last`: then the one before it was put in the place of another.
            if row.prev == last.digest and self.before is not None:
                self._damage(
                    self.before.seq, "another entry stands in its place, which the next one does not follow"
                )
            else:
                self._damage(last.seq, f"its digest does not follow from entry {last.seq - 1}")
            self.unlinked = None

    def _gap(self, last: int, seq: int) -> None:
        if seq <= last:  # before the first one
            self._damage(seq, "no entry has this number")
        elif seq > last + 1:
            missing = "it is missing" if seq == last + 2 else f"entries {last + 1} to {seq - 1} are missing"
            self.faults[last + 1] = missing

    def _backwards(self, row: Row) -> None:
        if not self.notes:
            assert self.last is not None
            self.notes.append(
                f"The ledger's times run backwards at entry {row.seq} ({row.time} after {self.last.time}): "
                "a clock was set back. The order of the entries is their number."
            )

    def _damage(self, seq: int, says: str) -> None:
        self.faults[seq] = says
        self.damaged.add(seq)

    def _whole(self, row: Row) -> bool:
        return row.digest == row.computed


def _runs(faults: tuple[tuple[int, str], ...]) -> Iterator[tuple[list[int], str]]:
    """Gather faults of the same kind in consecutive entries."""
    seqs: list[int] = []
    before = ""
    for seq, says in faults:
        if seqs and (seq != seqs[-1] + 1 or says != before):
            yield seqs, before
            seqs = []
        seqs.append(seq)
        before = says
    if seqs:
        yield seqs, before


def _integrity(ledger: Ledger) -> str:
    """Return what SQLite finds wrong with its own file: an index that lost a row hides entries of a kind."""
    engine = ledger._engine
    if engine.dialect.name != "sqlite":
        return ""
    with engine.connect() as connection:
        found = connection.execute(sa.text("PRAGMA integrity_check(1)")).scalar()
    return "" if found == "ok" else f"The ledger's database is damaged ({' '.join(str(found).split())})."


def _after(count: int) -> str:
    return "is the 1 entry after it" if count == 1 else f"are the {count} entries after it"
