"""What a verification reports: each difference with the object it is in, and apart from it what could not be looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Word = Literal[
    "missing", "changed", "unreadable", "added", "unsigned", "forged", "wrong key", "cycle", "erased but present"
]  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Something that is not what its digest says.

    Attributes:
        problem: "missing", "changed", "unreadable", or "added": in an agent's folder, but never registered. Of a
            signature: "unsigned" though the workspace had keys, "forged", or by a "wrong key". "cycle": something
            follows from itself. "erased but present": the ledger says that it was erased.
        path: relative to the workspace, or "ledger".
        owner: what it belongs to: "agent/3", "dataset main/v2", ….
        expected: the SHA-256 it must have; empty where there is none.
        found: the SHA-256 it has (for "unreadable" the system's reason); None where it is missing.
    """

    problem: Word
    path: str
    owner: str
    expected: str
    found: str | None


@dataclass(frozen=True)
class Unreachable:
    """A file that could not be looked at, so that nothing is known of it: its store does not answer."""

    path: str
    owner: str
    reason: str


@dataclass(frozen=True)
class Erased:
    """A file that is gone because somebody erased it on purpose; its digest and the record stay.

    Attributes:
        entry: the ledger's entry `data.erased` that says so.
    """

    path: str
    owner: str
    sha256: str
    reason: str
    entry: int


@dataclass(frozen=True)
class VerifyReport:
    """What a verification found.

    Attributes:
        ref: what was asked for.
        ok: nothing differs, and everything could be looked at.
        checked: how many digests were computed or taken from the cache and compared, ledger entries included.
        bytes: how much was read from files.
        entries: how long the ledger's chain is, as far as it holds.
        head: the digest of the ledger's last entry, empty where the chain is broken. Whoever keeps it
            elsewhere can tell later whether entries were cut off.
        problems: what differs, sorted by path.
        signatures: how many were verified: heads of the ledger, decisions, approvals and rejections.
        unsigned: what was recorded before the workspace had keys: no fault.
        unreachable: what could not be looked at, sorted by path.
        erased: what is gone on purpose: no fault.
        notes: what is no fault, and should be known.
        read: how many files were read.
        cached: how many were not read, because their stat is the one they were hashed with before.
    """

    ref: str
    ok: bool
    checked: int
    bytes: int
    entries: int
    head: str
    problems: tuple[Problem, ...]
    signatures: int = 0
    unsigned: tuple[str, ...] = ()
    unreachable: tuple[Unreachable, ...] = ()
    erased: tuple[Erased, ...] = ()
    notes: tuple[str, ...] = ()
    read: int = 0
    cached: int = 0

    @property
    def missing(self) -> tuple[Problem, ...]:
        """The files that are not there."""
        return self.of("missing")

    @property
    def changed(self) -> tuple[Problem, ...]:
        """The files and entries whose bytes differ."""
        return self.of("changed")

    def of(self, word: Word) -> tuple[Problem, ...]:
        """Return the problems of one kind."""
        return tuple(problem for problem in self.problems if problem.problem == word)

    def by_kind(self) -> dict[str, list[Any]]:
        """Return the problems of each kind, with all kinds named whether there are any or not."""
        return {word: list(self.of(word)) for word in get_args(Word)}
