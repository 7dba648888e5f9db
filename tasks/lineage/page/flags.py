"""What an auditor has to be told without asking: revoked data, words that do not fit, facts that are not there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasks.core.digest import sha256_bytes
from tasks.core.errors import ForebayError
from tasks.core.ledger import Entry, Ledger
from tasks.core.workspace import Workspace
from tasks.lineage import rows
from tasks.lineage.page.types import Data, Event, Flag, Term
from tasks.lineage.types import SHAPING, Lineage, Ref


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
    """Name each revocation that stands and that shaped the audited thing: a run behind it learnt from one of the groups,
    or a set of preferences behind it quotes one of the episodes.
    """
    undone = {e.payload.get("revocation") for e in ledger.entries("data.reinstated")}
    erased = {e.payload.get("revocation") for e in ledger.entries("data.erased")}
    standing = [e for e in ledger.entries("data.revoked") if e.seq not in undone]
    shaping = _shaping(found) if standing else []
    for entry in standing:
        p = entry.payload
        told = f"{p.get('what', entry.subject)} was revoked on {entry.time[:10]} by {p.get('by', 'somebody')} ({p.get('reason', '')})"
        told += ", its bytes erased" if entry.seq in erased else ""
        try:
            groups, episodes = _listed(workspace, p)
            learnt = {ref: _used(ledger, workspace, ref, groups, episodes) for ref in shaping}
        except (ForebayError, OSError, ValueError, KeyError, TypeError) as error:
            yield Flag("open", f"{told}; whether this learnt from it cannot be told: {error}.")
            continue
        by = [f"{ref[0]} {ref[1][:12]}" for ref in shaping if learnt[ref]]
        if by:
            used = set().union(*learnt.values())
            what = [
                _count(len(part), word)
                for part, word in ((used & groups, "group"), (used & episodes, "episode"))
                if part
            ]
            yield Flag("open", f"{told}; {' and '.join(what)} of it shaped this through {_few(by)}.")
        elif found.root[0] == "dataset" and _held(workspace, found, groups):
            yield Flag("open", f"{told}; this dataset holds rows of it, which no run learns from any more.")


def _listed(workspace: Workspace, payload: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """Return the groups and episodes that a revocation hit."""
    file = payload["lists"]
    data = (workspace.root / file["path"]).read_bytes()
    if sha256_bytes(data) != file["sha256"]:
        raise ValueError(f"{file['path']} was changed")
    lists = json.loads(data)
    return set(lists["groups"]), set(lists["episodes"])


def _used(ledger: Ledger, workspace: Workspace, ref: Ref, groups: set[str], episodes: set[str]) -> set[str]:
    """Return which of the groups a run learnt from, or which of the episodes a set of preferences compares."""
    if ref[0] == "run":
        finished = ledger.last("run.finished", ref[1])
        return groups & set(rows.consumed(workspace, finished.payload["outputs"])) if finished else set()
    if ref[0] == "preferences":
        made = ledger.last("preferences.made", ref[1]) or ledger.last("preferences.imported", ref[1])
        lines = (workspace.root / made.payload["path"]).read_text().splitlines() if made else []
        pairs = [json.loads(line) for line in lines if line.strip()]
        return episodes & {pair[name] for pair in pairs for name in ("chosen_id", "rejected_id")}
    return set()


def _held(workspace: Workspace, found: Lineage, groups: set[str]) -> set[str]:
    from tasks.replay import index as replay

    name = found.root[1].rpartition("/")[0]
    shards = {key for kind, key in found.nodes if kind == "shard"}
    return {
        group
        for group in groups
        if any(place.shard in shards for place in replay.places(workspace, name, "group", group))
    }


def _shaping(found: Lineage) -> list[Ref]:
    """Return what shaped the audited thing's bytes; what it was only compared with is left out."""
    reached = {found.root: None}
    waiting = [found.root]
    for here in waiting:
        for edge in found.following.get(here, ()):
            if edge.relation in SHAPING and edge.target not in reached:
                reached[edge.target] = None
                waiting.append(edge.target)
    return list(reached)


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
