"""Signed heads: after each decision and change of champion the service signs the digest of the ledger's newest entry.

An entry's digest pins everything before it, so a signed head that the ledger does not contain means that the end of
the ledger was cut off or written anew. Heads are files outside the database: whoever can only write the one is found
by the other. Each is kept a second time elsewhere (Forebay: on a git branch of its own, which can be pushed), so that
whoever cuts the ledger back to an older head, and deletes the newer ones, is found by that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tasks.core.atomic import write_atomic
from tasks.core.dsse import Predicate, open_envelope, sign
from tasks.core.errors import Corrupt, Refused
from tasks.core.keys import PrivateKey, Trust
from tasks.core.ledger import Entry, Ledger

_HEAD: Predicate = "ledger-head"
_KINDS: Mapping[str, Predicate] = {
    "promotion.committed": "promotion",
    "rollback.committed": "rollback",
}


@dataclass(frozen=True)
class HeadProblem:
    """A signed head that the ledger contradicts, or one that is not validly signed.

    Attributes:
        problem: "missing": the ledger ends before it; "changed": the entry has another digest; "forged"; "wrong key".
        seq: the entry it is about.
        says: what is wrong, in words.
        expected, found: the digest that was signed, and the one the ledger has.
        name: the file of the head; empty where it is the one that is kept elsewhere.
    """

    problem: Literal["missing", "changed", "forged", "wrong key"]
    seq: int
    says: str
    expected: str = ""
    found: str | None = None
    name: str = ""


@dataclass(frozen=True)
class Kept:
    """The newest signed head as another place keeps it: the file's name, its bytes, and what place that is."""

    name: str
    envelope: bytes
    where: str


def write_head(
    ledger: Ledger,
    folder: Path,
    entry: Entry,
    key: PrivateKey,
    trust: Trust,
    subjects: Mapping[str, str] | None = None,
    kept: Kept | None = None,
) -> Path:
    """Sign that `entry` is in the ledger after everything before it, and keep the envelope in `folder`.

    Args:
        subjects: what else the statement is about, for example the agent that was promoted: {name: SHA-256}.
        kept: the newest head that is kept elsewhere.

    Raises:
        Corrupt: the ledger does not hold what was signed before; nothing is signed on top of that.
        Refused: `key` is not a trusted service key.
    """
    trust.check(key.id, "service")
    require_newest(ledger, folder, trust, kept)
    kind = _KINDS.get(entry.kind, _HEAD)
    facts: dict[str, Any] = {
        "seq": entry.seq,
        "entry": entry.kind,
        "about": entry.subject,
        "time": entry.time,
    }
    if kind != _HEAD:
        names = ("to", "from", "decision", "reason", "by")
        facts |= {name: entry.payload[name] for name in names}
    path = folder / f"{entry.seq:08d}.json"
    write_atomic(path, sign(kind, {"ledger": entry.digest, **(subjects or {})}, facts, key))
    return path


def signed_seqs(folder: Path) -> list[int]:
    """Return the numbers of the entries with a signed head, in order."""
    return [int(path.stem) for path in _files(folder)]


def newest_seq(folder: Path) -> int:
    """Return the number of the newest entry with a signed head, 0 where there is none."""
    return max(signed_seqs(folder), default=0)


def require_newest(ledger: Ledger, folder: Path, trust: Trust, kept: Kept | None = None) -> None:
    """Refuse to act on a ledger that does not hold what was signed last, as `folder` or another place keeps it.

    Raises:
        Corrupt: its end was cut off or written anew, or the head is forged.
    """
    files = _files(folder)
    problem = _check(ledger, files[-1], trust) if files else None
    if problem is None and kept is not None:
        problem = _check_kept(ledger, folder, trust, kept)
        if problem is not None and ledger.digest_at(problem.seq) == problem.expected:
            problem = None  # only the file is gone; the ledger is whole, and `verify` tells
    if problem is not None:
        raise Corrupt(f"{problem.says}; `forebay verify` lists what else differs.")


def check_heads(
    ledger: Ledger, folder: Path, trust: Trust, kept: Kept | None = None
) -> tuple[int, list[HeadProblem]]:
    """Return how many signed heads there are, and those that are wrong or that the ledger contradicts."""
    files = _files(folder)
    found = [_check(ledger, path, trust) for path in files]
    problems = [problem for problem in found if problem is not None]
    elsewhere = None if kept is None else _check_kept(ledger, folder, trust, kept)
    if elsewhere is not None and (elsewhere.problem, elsewhere.seq) not in {
        (p.problem, p.seq) for p in problems
    }:
        problems.append(elsewhere)
    return len(files), problems


def _check_kept(ledger: Ledger, folder: Path, trust: Trust, kept: Kept) -> HeadProblem | None:
    """Check the newest head that another place keeps: the folder must have it too, and the ledger its entry."""
    problem = _check_bytes(ledger, kept.name, kept.envelope, trust)
    if problem is not None:
        return replace(problem, says=f"{problem.says} (as {kept.where} has kept it)")
    if (folder / kept.name).exists():
        return None  # that file is checked with the others
    seq = int(Path(kept.name).stem)
    says = f"The signed head {kept.name} of the ledger was deleted; {kept.where} has kept it"
    return HeadProblem("missing", seq, says, ledger.digest_at(seq) or "")


def _files(folder: Path) -> list[Path]:
    """The heads in the order of their entries; a file that has not exactly the name of a head is none."""
    numbered = [path for path in folder.glob("*.json") if path.stem.isdecimal()]
    return sorted(path for path in numbered if path.stem == f"{int(path.stem):08d}")


def _check(ledger: Ledger, path: Path, trust: Trust) -> HeadProblem | None:
    problem = _check_bytes(ledger, path.name, path.read_bytes(), trust)
    return None if problem is None else replace(problem, name=path.name)


def _check_bytes(ledger: Ledger, name: str, envelope: bytes, trust: Trust) -> HeadProblem | None:
    seq = int(Path(name).stem)
    try:
        said = open_envelope(envelope, (_HEAD, *_KINDS.values()), trust, "service", at=seq)
    except Refused as error:
        return HeadProblem("wrong key", seq, f"The signed head {name} of the ledger: {error}")
    except Corrupt as error:
        return HeadProblem("forged", seq, f"The signed head {name} of the ledger: {error}")
    digest = said.subjects.get("ledger", "")
    if said.predicate.get("seq") != seq:
        return HeadProblem(
            "forged", seq, f"The signed head {name} is about entry {said.predicate.get('seq')}", digest
        )
    found = ledger.digest_at(seq)
    if found == digest:
        return None
    if found is None:
        return HeadProblem(
            "missing",
            seq,
            f"The ledger was cut off: `{said.key.name}` signed entry {seq}, and it is gone",
            digest,
        )
    return HeadProblem(
        "changed",
        seq,
        f"The ledger was written anew: entry {seq} is not the one that `{said.key.name}` signed",
        digest,
        found,
    )
