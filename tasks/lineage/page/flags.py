"""What an auditor has to be told without asking: revoked data, words that do not fit, facts that are not there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasks.core.errors import ForebayError
from tasks.core.ledger import Entry, Ledger
from tasks.core.workspace import Workspace
from tasks.lineage.flagged import left_out, open_flags
from tasks.lineage.page.types import Data, Event, Flag, Term
from tasks.lineage.revocation import ERASED, revoked, standing_entries
from tasks.lineage.types import Lineage


def flags(
    ledger: Ledger,
    workspace: Workspace,
    found: Lineage,
    report: Mapping[str, Any] | None,
    made: Sequence[Entry],
    held: Sequence[Term],
    happened: Sequence[Event],
    data: Data | None,
) -> tuple[Flag, ...]:
    """Return all flags of the audited thing, the open ones first."""
    raised = [
        *_revoked(ledger, workspace, found),
        *_office(found, made, held),
        *_signatures(happened),
        *_canary(happened),
        *_code(found),
        *_unknown(found),
        *_licences(data),
        *_verification(report),
    ]
    return tuple(sorted(dict.fromkeys(raised), key=lambda flag: flag.level != "open"))


def _verification(report: Mapping[str, Any] | None) -> Iterator[Flag]:
    if report is None:
        return
    problems = report["problems"]
    if problems:
        yield Flag(
            "open", f"{_count(len(problems), 'thing does', 'things do')} not agree with the recorded digest."
        )
    if unreachable := report.get("unreachable"):
        yield Flag(
            "open", f"{_count(len(unreachable), 'file')} could not be reached, so nothing is known of them."
        )
    if erased := report.get("erased"):
        yield Flag(
            "note",
            f"{_count(len(erased), 'file was', 'files were')} erased on purpose; digests and record stay.",
        )
    if unsigned := report.get("unsigned"):
        yield Flag(
            "note", f"{_count(len(unsigned), 'entry', 'entries')} recorded before this workspace had keys."
        )


def _revoked(ledger: Ledger, workspace: Workspace, found: Lineage) -> Iterator[Flag]:
    """Say from which revoked data the audited thing learnt, by the rules of `tasks.lineage.revocation`."""
    standing = {e.payload["what"]: e for e in standing_entries(ledger)}
    if not standing:
        return
    try:
        if found.root[0] == "dataset":
            said = _held(ledger, workspace, found)
        else:
            said = _learnt(ledger, workspace, found)
    except (ForebayError, OSError, ValueError) as error:
        yield Flag("open", f"Whether it learnt from revoked data cannot be told: {error}")
        return
    if not said:
        return
    erased = {e.payload["revocation"] for e in ledger.entries(ERASED)}
    why = [
        f"{what} was revoked on {e.time[:10]} by {e.payload['by']} ({e.payload['reason']})"
        + (", its bytes erased" if e.seq in erased else "")
        for what, e in standing.items()
        if re.search(rf"{re.escape(what)}(?!\w)", said)
    ]
    yield Flag("open", "; ".join([said, *why]) + ".")


def _learnt(ledger: Ledger, workspace: Workspace, found: Lineage) -> str:
    """Say how an agent, a reward model, or the agents of a run learnt from it; "" where they did not."""
    flags = {flag.ref: flag.why for flag in open_flags(ledger, workspace)}
    kind, key = found.root
    roots = [key]
    if kind == "run":
        made = ledger.entries("agent.registered") if flags else []
        roots = [e.subject for e in made if e.payload["parents"].get("run") == key]
    flagged = [name for name in roots if name in flags]
    if not flagged:
        return ""
    behind = [name for kind, name in found.shaping if kind in ("agent", "source") and name in flags]
    names = dict.fromkeys([*flagged, *behind])
    return "Revoked data shaped it: " + ", ".join(f"{name} {flags[name]}" for name in names)


def _held(ledger: Ledger, workspace: Workspace, found: Lineage) -> str:
    """Say what of a dataset version nothing may learn from any more; "" where there is nothing."""
    now, digest = revoked(ledger, workspace), found.nodes[found.root].digest
    gone = left_out(ledger, workspace, digest or found.root[1], known=now)
    if not gone:
        return ""
    whats = sorted({now.by_group[group] for group in gone if group in now.by_group})
    by = f" by {_few(whats)}" if whats else ""
    return f"{_count(len(gone), 'group')} of it revoked{by}: no run learns from {'it' if len(gone) == 1 else 'them'}"


def _office(found: Lineage, made: Sequence[Entry], held: Sequence[Term]) -> Iterator[Flag]:
    in_office = "champion" in found.nodes[found.root].facts.get("roles", ())
    rejected = found.nodes.get(("decision", made[-1].payload["decision"])) if made else None
    if rejected is not None and rejected.facts.get("rejections"):
        last = rejected.facts["rejections"][-1]
        yield Flag("open" if in_office else "note", f"{last['by']} rejected it: {last['reason']}")
    if not in_office:
        return
    if not made:
        yield Flag("note", "No gate decision: the first in office is put there without one.")
    elif made[-1].payload["verdict"] != "PASS":
        yield Flag("open", f"It is in office, and its newest decision says {made[-1].payload['verdict']}.")


def _signatures(happened: Sequence[Event]) -> Iterator[Flag]:
    for event in happened:
        if event.signature is not None and event.signature.says.startswith("does not hold"):
            yield Flag(
                "open", f"The signature of ledger entry {event.seq} ({event.what}) {event.signature.says}"
            )


def _canary(happened: Sequence[Event]) -> Iterator[Flag]:
    looks = [event for event in happened if event.what.startswith("canary ")]
    if looks and looks[-1].what.endswith("HARM"):
        yield Flag("open", f"The canary showed harm in service: {looks[-1].says}")


def _code(found: Lineage) -> Iterator[Flag]:
    for ref in found.nodes:
        run = found.nodes[ref]
        if ref[0] == "run" and run.facts.get("outside_code"):
            yield Flag(
                "note",
                f"Run {run.name} used code from outside the project: {', '.join(run.facts['outside_code'])}.",
            )
    changed = [n for n in found.nodes.values() if n.kind == "code" and n.facts.get("changed")]
    if changed:
        yield Flag("note", "Code was run that no commit holds as it was; its own digest is recorded.")
    if any(n.kind == "code" and not n.facts.get("commit") for n in found.nodes.values()):
        yield Flag("note", "Code was run from outside git; its own digest is recorded.")


def _unknown(found: Lineage) -> Iterator[Flag]:
    for node in found.nodes.values():
        if not node.known:
            yield Flag("open", f"The ledger names {node.kind} {node.name} and has no entry of it.")
    outside = sum(node.kind == "outside" for node in found.nodes.values())
    if outside:
        yield Flag(
            "note",
            f"{_count(outside, 'policy', 'policies')} from outside: experience was imported, its agent is not here.",
        )


def _licences(data: Data | None) -> Iterator[Flag]:
    if data is None:
        return
    silent = [version.ref[1] for version in data.versions if version.parts is None]
    if silent:
        yield Flag(
            "note", f"What the rows of {_few(silent)} are was not recorded: sealed by an earlier release."
        )
    missing = {source for v in data.versions for (_, source, licence) in v.parts or {} if not licence.strip()}
    if missing:
        yield Flag("open", f"No licence is recorded for rows from {_few(sorted(missing))}.")


def _count(n: int, one: str, many: str = "") -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def _few(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
