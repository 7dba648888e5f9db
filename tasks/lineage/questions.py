"""Questions about history: what was champion when and why, what changed between two agents, how one leads to the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from typing import Any

from tasks.core.errors import NotFound, UsageError
from tasks.core.ledger import Entry, Ledger
from tasks.core.workspace import Workspace
from tasks.lineage.descent import held_and_shaped
from tasks.lineage.erasure import ERASED
from tasks.lineage.graph import gather, open_index, resolve
from tasks.lineage.index import Index
from tasks.lineage.types import RELATIONS, SHAPING, Lineage, Node, Ref, Relation
from tasks.promotion.promote import OFFICES, Office, Standing, standing

# ---------------------------------------------------------------------------------------------------- at


@dataclass(frozen=True)
class Term:
    """Who held an office at a moment, and why.

    Attributes:
        office: "agent" or "reward".
        subject: "agent/3"; None where the office was vacant.
        digest: of its files.
        since, by, reason: of the promotion or rollback that put it there; `seq` is its ledger entry.
        word: "promotion" or "rollback".
        decision: digest of the gate's decision behind it, None for the first champion and for rollbacks.
        verdict, reasons: of that decision.
        until: when the next change was committed, None if it still stands.
    """

    office: Office
    subject: str | None
    digest: str | None = None
    since: str | None = None
    by: str | None = None
    reason: str | None = None
    seq: int | None = None
    word: str | None = None
    decision: str | None = None
    verdict: str | None = None
    reasons: tuple[str, ...] = ()
    until: str | None = None


@dataclass(frozen=True)
class Moment:
    """The offices at `time`. `backwards`: the clock of some writer ran backwards, so the ledger's order is what counts."""

    time: str
    entry: int
    terms: tuple[Term, ...]
    backwards: bool = False


def at(ledger: Ledger, workspace: Workspace, when: str, index: Index | None = None) -> Moment:
    """Return what was champion at a moment, and why.

    Args:
        when: a date (the end of that day, UTC), or a time in ISO 8601 (UTC where it has no zone).

    Raises:
        UsageError: it is no such thing.
        NotFound: the ledger had no entry by then.
    """
    moment = _moment(when)
    index = index or open_index(ledger, workspace)
    seq, backwards = ledger.last_before(moment.isoformat(timespec="microseconds"))
    if seq is None:
        raise NotFound(f"The ledger had no entry by {moment.isoformat()}; its first is younger.")
    terms = tuple(_term(ledger, index, office, seq) for office in OFFICES)
    return Moment(moment.isoformat(), seq, terms, backwards)


def _moment(when: str) -> datetime:
    try:
        if len(when) == len("2026-03-03"):
            return datetime.combine(date.fromisoformat(when), time.max, UTC)
        found = datetime.fromisoformat(when)
        return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise UsageError(
            f"`{when}` is no date; write 2026-03-03 for the end of that day, or 2026-03-03T14:00:00Z (UTC)."
        ) from None


@dataclass(frozen=True)
class _Past:
    """The reading side of a ledger as it was after entry `seq`."""

    index: Index
    seq: int

    def entries(self, kind: str | None = None, subject: str | None = None) -> list[Entry]:
        return [entry for entry in self.index.entries(kind, subject) if entry.seq <= self.seq]

    def last(self, kind: str | None = None, subject: str | None = None) -> Entry | None:
        return self.index.last_until(kind or "", self.seq)


def _term(ledger: Ledger, index: Index, office: Office, seq: int) -> Term:
    now: Standing = standing(_Past(index, seq), office)
    version = now.champion
    if now.intent is not None:  # announced, not yet in force
        version = standing(_Past(index, seq), office, without=now.intent.seq).champion
    later = [e for e in _commits(index, office) if e.seq > seq]
    until = later[0].time if later else None
    if version is None:
        return Term(office, None, until=until)
    subject = f"{office}/{version}"
    change = next(e for e in reversed(_commits(index, office)) if e.seq <= seq and e.subject == subject)
    entry = ledger.at([change.seq])[change.seq]
    p = entry.payload
    decision = p.get("decision")
    made = [e for e in ledger.entries("decision.made", subject) if e.payload["decision"] == decision]
    registered = ledger.last(f"{office}.registered", subject)
    return Term(
        office,
        subject,
        registered.payload["digest"] if registered else None,
        entry.time,
        p["by"],
        p["reason"],
        entry.seq,
        entry.kind.partition(".")[0],
        decision,
        made[-1].payload["verdict"] if made else None,
        tuple(made[-1].payload["reasons"]) if made else (),
        until,
    )


def _commits(index: Index, office: Office) -> list[Entry]:
    found = [*index.entries("promotion.committed"), *index.entries("rollback.committed")]
    return sorted((e for e in found if e.subject.startswith(f"{office}/")), key=lambda e: e.seq)


# -------------------------------------------------------------------------------------------------- diff


@dataclass(frozen=True)
class Change:
    """One thing in which two agents differ: what it is, what it is for each."""

    what: str
    first: Any
    second: Any


@dataclass(frozen=True)
class Diff:
    """What changed between two agents.

    Attributes:
        first, second: their subjects.
        same: what is equal, by name.
        changes: what differs; settings one by one.
        data: {"shared", "first only", "second only"}: shards, their rows and groups, of the datasets that they learnt from.
    """

    first: str
    second: str
    same: tuple[str, ...]
    changes: tuple[Change, ...]
    data: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def diff(ledger: Ledger, workspace: Workspace, first: str, second: str, index: Index | None = None) -> Diff:
    """Return what changed from agent `first` to agent `second`: data, code, settings, packages, base, reward model, scores.

    Raises:
        NotFound, UsageError, Corrupt: as `graph.lineage`; or one of them is no agent.
    """
    index = index or open_index(ledger, workspace)
    refs = [resolve(index, name) for name in (first, second)]
    for ref, name in zip(refs, (first, second), strict=True):
        if ref[0] not in ("agent", "source"):
            raise UsageError(f"`{name}` is a {ref[0]}; give two agents (or two reward models) to compare.")
    told = [dict(_told(ledger, index, ref)) for ref in refs]
    names = dict.fromkeys([*told[0], *told[1]])
    changes = [Change(n, told[0].get(n), told[1].get(n)) for n in names if told[0].get(n) != told[1].get(n)]
    same = tuple(n for n in names if told[0].get(n) == told[1].get(n) and not n.startswith("settings."))
    shards = [_shards(ledger, index, ref) for ref in refs]
    both = shards[0].keys() & shards[1].keys()
    data = {
        "shared": _count(shards[0], both),
        "first only": _count(shards[0], shards[0].keys() - both),
        "second only": _count(shards[1], shards[1].keys() - both),
    }
    return Diff(refs[0][1], refs[1][1], same, tuple(changes), data)


def _told(ledger: Ledger, index: Index, ref: Ref) -> Iterator[tuple[str, Any]]:
    node = _node(index, ref)
    yield "weights", node.digest
    for name in ("origin", "tokenizer_digest", "kind"):
        if name in node.facts:
            yield name.replace("_digest", ""), node.facts[name]
    for run in _nodes(index, ref, "trained by"):
        yield "seed", run.facts.get("seed")
        yield "device", run.facts.get("device")
        yield "steps", run.facts.get("steps")
        yield from (("settings." + k, v) for k, v in _flat(run.facts.get("settings", {})))
        here: Ref = ("run", run.digest or "")
        for relation, name in (("run by code", "code"), ("with packages", "packages"), ("trained on", "dataset"), ("started from", "started from")):  # fmt: skip
            for found in _nodes(index, here, relation):  # type: ignore[arg-type]
                yield (
                    name,
                    found.name if found.kind in ("dataset", "agent") else (found.digest or found.name)[:12],
                )
    for base in _nodes(index, ref, "descends from"):
        yield "base model", f"{base.name} {(base.digest or '')[:12]}"
    decisions = _nodes(index, ref, "judged by")
    if decisions:
        last = decisions[-1]
        yield "verdict", last.facts["verdict"]
        decision: Ref = ("decision", last.digest or "")
        for evidence in _nodes(index, decision, "rests on"):
            if evidence.kind == "reward":
                yield "reward model", f"{evidence.name} {(evidence.digest or '')[:12]}"
            if evidence.kind == "evaluation":
                yield "held-out tasks", evidence.facts["tasks_digest"][:12]
                yield from (
                    (f"score {name}", row["candidate"]) for name, row in evidence.facts["slices"].items()
                )
        for policy in _nodes(index, decision, "under policy"):
            yield "policy", (policy.digest or "")[:12]


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in sorted(values.items()):
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _shards(ledger: Ledger, index: Index, ref: Ref) -> dict[str, Mapping[str, int]]:
    """Return {digest: shard} of the dataset version that the agent's run was given."""
    runs = _targets(index, ref, "trained by") or _targets(index, ref, "learnt from")
    for run in runs:
        for dataset in _targets(index, run, "trained on") or _targets(index, run, "made from"):
            entry = ledger.last("dataset.sealed", dataset[1])
            return {shard["sha256"]: shard for shard in entry.payload["shards"]} if entry else {}
    return {}


def _count(shards: Mapping[str, Mapping[str, int]], digests: Any) -> dict[str, int]:
    chosen = [shards[digest] for digest in digests]
    return {
        "shards": len(chosen),
        **{name: sum(shard[name] for shard in chosen) for name in ("rows", "groups")},
    }


def _targets(index: Index, ref: Ref, relation: Relation) -> list[Ref]:
    number = index.id(ref)
    found = [] if number is None else [t for _, r, t in index.edges([number]) if r == relation]
    return [named for named, _ in index.refs(found).values()]


def _nodes(index: Index, ref: Ref, relation: Relation) -> list[Node]:
    targets = _targets(index, ref, relation)
    numbers = [number for number in map(index.id, targets) if number is not None]
    found = gather(index, ref, numbers).nodes
    return [found[target] for target in targets]


def _node(index: Index, ref: Ref) -> Node:
    number = index.id(ref)
    assert number is not None
    return gather(index, ref, [number]).nodes[ref]


# -------------------------------------------------------------------------------------------------- path


def path(
    ledger: Ledger, workspace: Workspace, first: str, second: str, index: Index | None = None
) -> Lineage:
    """Return a shortest way along the edges that leads from one thing to the other, whichever of the two came later.

    Raises:
        NotFound: neither follows from the other; or as `graph.lineage`.
    """
    index = index or open_index(ledger, workspace)
    start, end = (resolve(index, name) for name in (first, second))
    judging = {"decision", "promotion", "evaluation", "validation", "reward", "tasks", "policy"}
    relations = RELATIONS if judging & {start[0], end[0]} else SHAPING
    for a, b in ((start, end), (end, start)):
        numbers = index.shortest(index.id(a) or 0, index.id(b) or 0, relations)
        if numbers:
            return gather(index, a, numbers)
    raise NotFound(f"Neither of {first} and {second} follows from the other.")


# -------------------------------------------------------------------------------------------------- find


@dataclass(frozen=True)
class Found:
    """What a search found: the thing, where it lies, and whom it shaped.

    Attributes:
        what: what was asked for.
        node: it, with how many groups, datasets, sources and licences.
        versions: dataset versions that hold it, oldest first.
        shards: the files in which it lies, or lay.
        erased: those of them whose bytes were erased on purpose.
        runs: the runs that learnt from it.
        agents: subject → aliases it holds, of all agents that were shaped, oldest first.
    """

    what: str
    node: Node
    versions: tuple[str, ...]
    shards: tuple[str, ...]
    erased: tuple[str, ...]
    runs: tuple[str, ...]
    agents: Mapping[str, tuple[str, ...]]


def find(ledger: Ledger, workspace: Workspace, ref: str, index: Index | None = None) -> Found:
    """Return where a thing lies and whom it shaped.

    Args:
        ref: as of `descent.descendants`.

    Raises:
        NotFound, UsageError, Corrupt: as `descent.descendants`.
    """
    holding, found = held_and_shaped(ledger, workspace, ref, index)
    nodes = found.nodes
    versions, shards = (tuple(key for k, key in holding if k == kind) for kind in ("dataset", "shard"))
    runs = tuple(key for kind, key in nodes if kind == "run")
    agents = sorted(
        (n.name, tuple(n.facts["roles"])) for n in nodes.values() if n.kind == "agent" and n.known
    )
    agents.sort(key=lambda pair: int(pair[0].rpartition("/")[2]))
    gone = {file["path"] for entry in ledger.entries(ERASED) for file in entry.payload["files"]}
    erased = tuple(path for path in shards if path in gone)
    return Found(ref, nodes[found.root], versions, shards, erased, runs, dict(agents))
