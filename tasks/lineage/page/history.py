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
        Event(entry.seq, entry.time, *_READERS[entry.kind](entry.payload), _signature(workspace, entry, trust))
        for entry in sorted(_about(ledger, found), key=lambda e: e.seq)
    )


def terms(ledger: Ledger, subject: str) -> tuple[Term, ...]:
    """Return when an agent or a reward model was in office, oldest first."""
    office = subject.partition("/")[0]
    changes = [e for kind in _CHANGES for e in ledger.entries(kind) if e.subject.partition("/")[0] == office]
    changes.sort(key=lambda e: e.seq)
    ends = [*(e.time for e in changes[1:]), None]
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
        for word in (f"{office}.registered", "decision.made", "approval.granted", "approval.rejected", *_CANARY):
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
        return check_decision(entry.payload, read_signature(workspace.root, entry.payload), trust, entry.seq)
    return check_answer(entry, trust, entry.seq)


def _registered(p: Mapping[str, Any]) -> _Told:
    return "registered", "", str(p.get("origin") or p.get("kind") or "")


def _decided(p: Mapping[str, Any]) -> _Told:
    champion = p["champion"]["version"]
    return f"gate: {p['verdict']}", "", f"against {champion or 'nobody'}. {' '.join(p['reasons'])}"


def _put(p: Mapping[str, Any]) -> _Told:
    return "put in office", p["by"], f"after {p['from'] or 'nobody'}: {p['reason']}"


def _back(p: Mapping[str, Any]) -> _Told:
    return "rolled back", p["by"], f"{p['from']} left office for {p['to']}: {p['reason']}"


def _answered(word: str) -> Callable[[Mapping[str, Any]], _Told]:
    return lambda p: (word, p["by"], p["reason"])


_CANARY = ("canary.started", "canary.looked", "canary.ended")
_READERS: Mapping[str, Callable[[Mapping[str, Any]], _Told]] = {
    "agent.registered": _registered,
    "reward.registered": _registered,
    "decision.made": _decided,
    "approval.granted": _answered("approved"),
    "approval.rejected": _answered("rejected"),
    "promotion.committed": _put,
    "rollback.committed": _back,
    "canary.started": lambda p: ("canary started", "", f"in service against {p['old']['version']}"),
    "canary.looked": lambda p: (f"canary looked: {p['verdict']}", "", p["says"]),
    "canary.ended": lambda p: (f"canary ended: {p['verdict']}", "", p["says"]),
    "rollback.rehearsed": lambda p: ("way back rehearsed", "", "it works" if p["ok"] else str(p["problem"])),
    "reward.validated": lambda p: (f"validated: {p['verdict']}", "", " ".join(p["reasons"])),
    "dataset.sealed": lambda p: ("sealed", "", f"{p['new_rows']:,} new rows of {p['rows']:,}"),
    "dataset.validated": lambda p: (f"validated: {p['verdict']}", "", " ".join(p["reasons"])),
}
