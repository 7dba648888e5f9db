"""What happened to the audited thing, in the ledger's order, and whether what had to be signed is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tasks.core.errors import ForebayError
from tasks.core.keys import Trust, TrustedKey
from tasks.core.ledger import Entry, Ledger
from tasks.core.workspace import Workspace
from tasks.lineage.page.types import Event, Signature, Term
from tasks.lineage.types import Lineage
from tasks.promotion.attest import Unsigned, check_answer, check_decision, read_signature

_Told = tuple[str, str, str]  # what, by whom, says
_CHANGES = ("promotion.committed", "rollback.committed")


def events(
    ledger: Ledger, workspace: Workspace, found: Lineage, made: Sequence[Entry], trust: Trust | None
) -> tuple[Event, ...]:
    """Return every entry about the audited thing, oldest first, with its signature checked.

    Args:
        made: the entries of the decisions about it.
    """
    return tuple(
        Event(
            entry.seq,
            entry.time,
            *_READERS[entry.kind](entry.payload, found.root[1].partition("/")[0]),
            _signature(workspace, entry, trust),
        )
        for entry in sorted(_about(ledger, found), key=lambda e: e.seq)
    )


def terms(ledger: Ledger, subject: str) -> tuple[Term, ...]:
    """Return when an agent or a reward model was in office, oldest first."""
    office = subject.partition("/")[0]
    changes = [e for kind in _CHANGES for e in ledger.entries(kind) if e.subject.partition("/")[0] == office]
    changes.sort(key=lambda e: e.seq)
    ends = [*(e.time for e in changes[1:]), None][: len(changes)]
    return tuple(
        Term(e.time, end, e.payload["by"], e.payload["reason"])
        for e, end in zip(changes, ends, strict=True)
        if e.subject == subject
    )


def _about(ledger: Ledger, found: Lineage) -> Iterator[Entry]:
    kind, subject = found.root
    node = found.nodes[found.root]
    if kind in ("agent", "source"):
        office = subject.partition("/")[0]
        for word in (
            f"{office}.registered",
            "decision.made",
            "approval.granted",
            "approval.rejected",
            *_CANARY,
        ):
            yield from ledger.entries(word, subject)
        for word in _CHANGES:
            for entry in ledger.entries(word):
                left = f"{office}/{entry.payload['from']}" == subject and entry.subject.startswith(office)
                if entry.subject == subject or left:
                    yield entry
        yield from ledger.entries("reward.validated", node.digest) if kind == "source" else ()
        yield from ledger.entries("rollback.rehearsed", subject)
    elif kind == "dataset":
        yield from ledger.entries("dataset.sealed", subject)
        yield from ledger.entries("dataset.validated", node.digest)


def _signature(workspace: Workspace, entry: Entry, trust: Trust | None) -> Signature | None:
    """Check a signature as the ledger stood then; None for an entry that is covered by the ledger's signed heads alone."""
    if entry.kind not in ("decision.made", "approval.granted", "approval.rejected"):
        return None
    if "signature" not in entry.payload:
        return Signature("", "", "not signed")
    if trust is None:
        return Signature("", "", "cannot be checked: there is no readable keys.yaml")
    try:
        key = _signer(workspace, entry, trust)
    except Unsigned:
        return Signature("", "", "not signed")
    except ForebayError as error:
        return Signature("", "", f"does not hold: {error}")
    return Signature(key.name, key.id)


def _signer(workspace: Workspace, entry: Entry, trust: Trust) -> TrustedKey:
    if entry.kind == "decision.made":
        return check_decision(entry, read_signature(workspace.root, entry), trust, entry.seq)
    return check_answer(entry, trust, entry.seq)


_Reader = Callable[[Mapping[str, Any], str], _Told]  # of a payload and the office it is about


def _whom(office: str, version: int | None) -> str:
    return f"{office}/{version}" if version else "nobody"


def _registered(p: Mapping[str, Any], office: str) -> _Told:
    return "registered", "", str(p.get("origin") or p.get("kind") or "")


def _decided(p: Mapping[str, Any], office: str) -> _Told:
    return (
        f"gate: {p['verdict']}",
        "",
        f"against {_whom(office, p['champion']['version'])}. {' '.join(p['reasons'])}",
    )


def _put(p: Mapping[str, Any], office: str) -> _Told:
    return f"{_whom(office, p['to'])} in office", p["by"], f"after {_whom(office, p['from'])}: {p['reason']}"


def _back(p: Mapping[str, Any], office: str) -> _Told:
    return (
        f"back to {_whom(office, p['to'])}",
        p["by"],
        f"{_whom(office, p['from'])} left office: {p['reason']}",
    )


def _answered(word: str) -> _Reader:
    return lambda p, office: (word, p["by"], p["reason"])


def _judged(word: str) -> _Reader:
    return lambda p, office: (
        f"{word}: {p['verdict']}",
        "",
        " ".join(p["reasons"]) if "reasons" in p else p["says"],
    )


_CANARY = ("canary.started", "canary.looked", "canary.ended")
_READERS: Mapping[str, _Reader] = {
    "agent.registered": _registered,
    "reward.registered": _registered,
    "decision.made": _decided,
    "approval.granted": _answered("approved"),
    "approval.rejected": _answered("rejected"),
    "promotion.committed": _put,
    "rollback.committed": _back,
    "canary.started": lambda p, office: (
        "canary started",
        "",
        f"in service against {_whom(office, p['old']['version'])}",
    ),
    "canary.looked": _judged("canary looked"),
    "canary.ended": _judged("canary ended"),
    "rollback.rehearsed": lambda p, office: (
        "way back rehearsed",
        "",
        "it works" if p["ok"] else str(p["problem"]),
    ),
    "reward.validated": _judged("validated"),
    "dataset.sealed": lambda p, office: ("sealed", "", f"{p['new_rows']:,} new rows of {p['rows']:,}"),
    "dataset.validated": _judged("validated"),
}
