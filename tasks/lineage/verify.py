"""Verification: everything behind an agent or a dataset is hashed again. Not even the ledger is trusted.

Signatures are checked too: of the ledger's heads, of the decisions behind the agent, of people's answers to them.
What was recorded before the workspace had keys is unsigned, which is told and is no fault. So is what was erased on
purpose; what a store that does not answer holds is unreachable, which is neither verified nor a fault of the bytes.

Each difference is reported at the object that differs. What only follows from it is left out: a damaged ledger entry is
not followed, and a key that `keys.yaml` has lost is taken from the ledger.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import sqlalchemy as sa

from tasks.core.digest import digest_files
from tasks.core.errors import Corrupt, ForebayError
from tasks.core.heads import signed_seqs
from tasks.core.ledger import Entry, Ledger
from tasks.core.workspace import Workspace
from tasks.lineage.chain import Chain, inspect_chain, written_anew
from tasks.lineage.claims import Claims, Tree, gather, misjudged, owner_of
from tasks.lineage.graph import Circle, lineage
from tasks.lineage.hashing import DigestCache, Progress, Reading, hash_files, hash_streams
from tasks.lineage.index import Index
from tasks.lineage.report import Erased, Problem, Unreachable, VerifyReport
from tasks.lineage.signatures import find_trust, verify_heads, verify_signatures
from tasks.lineage.stores import Store
from tasks.lineage.types import File

__all__ = ["DigestCache", "Erased", "Problem", "Progress", "Unreachable", "VerifyReport", "verify"]


def verify(
    ledger: Ledger,
    workspace: Workspace,
    ref: str,
    progress: Progress = lambda done, total, note: None,
    *,
    cache: DigestCache | None = None,
    stores: Sequence[Store] = (),
) -> VerifyReport:
    """Hash the ledger's chain and every file behind `ref`, and compute again every digest over digests.

    Args:
        cache: files that it knows by their stat are not read. None: every byte is read again; what acts on the result
            (the gate, a promotion) must not trust a cache.
        stores: what they hold is read there instead of in the workspace.

    Raises:
        NotFound, UsageError: `ref` names nothing, or several things; see `lineage`.
        Corrupt: the ledger is gone, or no database any more. Unavailable: it cannot be read now.
    """
    require_ledger(ledger)
    chain = inspect_chain(ledger)
    problems, notes = list(chain.problems()), list(chain.notes)
    if chain.past_reading:
        notes.append(f"Nothing behind {ref} was looked at: the ledger is past reading.")
        return _report(ref, chain, problems, notes=notes)
    trusted = find_trust(ledger.without(chain.damaged), workspace)
    problems += trusted.problems
    notes += trusted.notes
    heads, anew, believed = 0, None, ledger.without(chain.damaged)
    if trusted.trust is not None:
        heads, contradicted, found_wrong = verify_heads(ledger, workspace, trusted.trust)
        problems += found_wrong
        odd = [problem.seq for problem in contradicted if problem.problem == "changed"]
        anew = written_anew(chain, signed_seqs(workspace.heads), odd)
        believed = ledger.without(chain.damaged, anew)
    doubted = bool(chain.faults) or anew is not None
    if doubted:
        notes.append(
            "What cannot be believed in the ledger was not followed; verify again when it is restored."
        )
    try:
        found = lineage(
            believed, workspace, ref, Index.derive(believed)
        )  # no index that lies about is trusted
    except Circle as error:
        problems.append(Problem("cycle", "ledger", str(error), "", None))
        notes.append(f"Nothing behind {ref} was looked at: the ledger leads in a circle.")
        return _report(ref, chain, problems, signatures=heads, notes=notes)
    except (ForebayError, ValueError, KeyError, TypeError):
        if not problems:
            raise
        notes.append(f"Nothing behind {ref} was looked at: the ledger does not lead there.")
        return _report(ref, chain, problems, signatures=heads, notes=notes)
    claims = gather(believed, workspace, found)
    for store in stores:
        problems += store.prepare(found)
    readings = _read(workspace, claims, cache, stores, progress)
    erasures = _erasures(ledger, believed)
    wrong, unreachable, erased = _compare(claims, readings, erasures)
    problems += wrong
    problems += misjudged(workspace, claims.looks)
    problems += (check for check in claims.checks if check.expected != check.found)
    if not doubted:
        problems += (
            Problem("missing", "ledger", f"the entry of {owner_of(node)}", node.digest or "", None)
            for node in found.nodes.values()
            if not node.known
        )
    signed, wrong, unsigned = verify_signatures(believed, workspace, found, trusted)
    problems += wrong
    return _report(
        ref,
        chain,
        problems,
        checked=len(claims.files) + len(claims.trees) + len(claims.checks),
        readings=readings.values(),
        signatures=heads + signed,
        unsigned=unsigned,
        unreachable=unreachable,
        erased=erased,
        notes=notes,
    )


def require_ledger(ledger: Ledger) -> None:
    """Make sure that there is a database to read: opening one that is gone would make an empty one.

    Raises:
        Corrupt: the file is gone, empty, cut off, or no SQLite database.
    """
    url = sa.make_url(ledger.url)
    if url.get_backend_name() != "sqlite" or not url.database:
        return
    path = Path(url.database)
    advice = "restore it from a backup; nothing was changed"
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(100)
    except OSError as error:
        raise Corrupt(f"The ledger {path} cannot be read ({error.strerror}); {advice}.") from None
    if not start.startswith(b"SQLite format 3\0") or len(start) < 100:
        what = "is empty" if not size else "is not a SQLite database"
        raise Corrupt(f"The ledger {path} {what}; {advice}.")
    page = int.from_bytes(start[16:18], "big")
    if size < int.from_bytes(start[28:32], "big") * (65536 if page == 1 else page):
        raise Corrupt(f"The ledger {path} is cut off after {size:,} bytes; {advice}.")
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            known = database.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'ledger'")
            if known.fetchone() is None:
                raise Corrupt(f"The database {path} holds no ledger; {advice}.")
    except sqlite3.OperationalError:
        return  # locked, or a crash to recover from: whoever reads it now waits, or recovers
    except sqlite3.DatabaseError as error:
        raise Corrupt(f"The ledger {path} is damaged ({error}); {advice}.") from None


def _read(
    workspace: Workspace,
    claims: Claims,
    cache: DigestCache | None,
    stores: Sequence[Store],
    progress: Progress,
) -> dict[str, Reading]:
    """Hash every file once: from the first store that holds it, else from the workspace."""
    waiting = claims.paths()
    readings: dict[str, Reading] = {}
    total, done = len(waiting), 0
    for store in stores:
        here = [path for path in waiting if store.holds(path)]
        waiting = [path for path in waiting if not store.holds(path)]
        readings |= hash_streams(here, store.open, _shifted(progress, done, total))
        done += len(here)
    return readings | hash_files(workspace.root, waiting, cache, _shifted(progress, done, total))


def _shifted(progress: Progress, done: int, total: int) -> Progress:
    return lambda more, _, note: progress(done + more, total, note)


def _erasures(ledger: Ledger, believed: Ledger) -> dict[File, Entry]:
    """Return the files that the ledger says were erased, and the entry that says so.

    Entries that are not believed count as well: the ledger is at fault then, not the file that is rightly gone.
    """
    try:
        entries = ledger.entries("data.erased")
    except Corrupt:
        entries = believed.entries("data.erased")
    return {File(file["path"], file["sha256"]): e for e in entries for file in e.payload["files"]}


def _compare(
    claims: Claims, readings: Mapping[str, Reading], erasures: Mapping[File, Entry]
) -> tuple[list[Problem], list[Unreachable], list[Erased]]:
    """Return what differs, what could not be looked at, and what is gone on purpose."""
    problems, unreachable, erased = [], [], []
    for file, owner in claims.files.items():
        reading, entry = readings[file.path], erasures.get(file)
        if reading.fault == "unreachable":
            unreachable.append(Unreachable(file.path, owner, reading.reason))
        elif reading.fault == "missing" and entry is not None:
            erased.append(Erased(file.path, owner, file.sha256, entry.payload["reason"], entry.seq))
        elif reading.fault is not None:
            problems.append(Problem(reading.fault, file.path, owner, file.sha256, reading.reason or None))
        elif reading.sha256 != file.sha256:
            problems.append(Problem("changed", file.path, owner, file.sha256, reading.sha256))
        elif entry is not None:
            says = f"{owner}, erased by ledger entry {entry.seq}"
            problems.append(Problem("erased but present", file.path, says, file.sha256, reading.sha256))
    problems += (
        Problem("added", path, owner, "", readings[path].sha256) for path, owner in claims.added.items()
    )
    problems += _wrong_trees(claims.trees, readings)
    return problems, unreachable, erased


def _wrong_trees(trees: Iterable[Tree], readings: Mapping[str, Reading]) -> Iterator[Problem]:
    for tree in trees:
        files = {path.removeprefix(f"{tree.path}/"): readings[path].sha256 or "" for path in tree.files}
        if not files:
            yield Problem("missing", tree.path, tree.owner, tree.sha256, None)
        elif (digest := digest_files(files)) != tree.sha256:
            yield Problem("changed", tree.path, tree.owner, tree.sha256, digest)


def _report(
    ref: str,
    chain: Chain,
    problems: Iterable[Problem],
    *,
    checked: int = 0,
    readings: Iterable[Reading] = (),
    signatures: int = 0,
    unsigned: Iterable[str] = (),
    unreachable: Iterable[Unreachable] = (),
    erased: Iterable[Erased] = (),
    notes: Iterable[str] = (),
) -> VerifyReport:
    found = tuple(sorted(set(problems), key=lambda p: (p.path, p.owner, p.problem)))
    away = tuple(sorted(unreachable, key=lambda u: (u.path, u.owner)))
    looked = list(readings)
    cached = sum(reading.cached for reading in looked)
    return VerifyReport(
        ref=ref,
        ok=not found and not away,
        checked=chain.entries + checked,
        bytes=sum(reading.bytes for reading in looked),
        entries=chain.entries,
        head=chain.head,
        problems=found,
        signatures=signatures,
        unsigned=tuple(unsigned),
        unreachable=away,
        erased=tuple(sorted(erased, key=lambda e: e.path)),
        notes=tuple(notes),
        read=sum(reading.sha256 is not None for reading in looked) - cached,
        cached=cached,
    )
