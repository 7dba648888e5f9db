"""The lineage of an agent or a dataset: a graph of everything that it follows from, read from the ledger.

Nothing here is kept by hand. Whatever a node says stands in the ledger, and its edges are the digests and
names that its entry gives. Edges lead to what came before, so following them ends at base models and shards.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from tasks.core.errors import Corrupt, NotFound, UsageError
from tasks.core.ledger import Entry, Ledger
from tasks.core.workspace import Workspace
from tasks.promotion.promote import standing

Kind = Literal[
    "agent", "base", "run", "code", "lock", "dataset", "shard", "validation", "reward", "source", "preferences",
    "evaluation", "decision", "policy", "promotion", "outside",
]  # fmt: skip
Relation = Literal[
    "trained by", "converted from", "descends from", "judged by", "in office",  # of an agent
    "run by code", "with packages", "trained on", "started from",  # of a run
    "holds", "checked by", "continues", "sampled from", "scored from", "rewarded by",  # of a dataset
    "learnt from", "reads states of", "made from", "judges",  # of a reward model and its preferences
    "under policy", "rests on", "compared with",  # of a decision
]  # fmt: skip
Ref = tuple[Kind, str]
"""What a node is found by: its kind and its full digest, or the subject of its ledger entry."""

_MIN_PREFIX = 4  # digits; with fewer, a digest prefix is more likely a typing error


@dataclass(frozen=True)
class File:
    """A file that belongs to a node: its path relative to the workspace, and the SHA-256 it must have."""

    path: str
    sha256: str


@dataclass(frozen=True)
class Node:
    """One thing with an identity.

    Attributes:
        name: what people call it: "agent/3", "main/v2", a verdict, a commit.
        digest: its SHA-256 in full; None where it has none, as for an outside policy.
        facts: what the ledger says of it, as JSON values.
        files: its bytes in the workspace.
        known: False where another entry names it but the ledger has no entry of it.
    """

    kind: Kind
    name: str
    digest: str | None
    facts: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[File, ...] = ()
    known: bool = True


@dataclass(frozen=True)
class Edge:
    """`source` follows from `target`."""

    source: Ref
    relation: Relation
    target: Ref


@dataclass(frozen=True)
class Lineage:
    """The nodes behind `root`, nearest first, each one's edges in the order in which they are best read."""

    root: Ref
    nodes: Mapping[Ref, Node]
    edges: tuple[Edge, ...]

    @cached_property
    def following(self) -> Mapping[Ref, tuple[Edge, ...]]:
        """The edges that leave each node."""
        leaving: dict[Ref, list[Edge]] = defaultdict(list)
        for edge in self.edges:
            leaving[edge.source].append(edge)
        return {ref: tuple(leaving[ref]) for ref in self.nodes}


def lineage(ledger: Ledger, workspace: Workspace, ref: str) -> Lineage:
    """Return everything that `ref` follows from.

    Args:
        ref: agent@champion, agent@candidate, agent@previous, agent/12, dataset:main/v3 (dataset:main is its
            newest version), or the first digits of a digest that the ledger names.

    Raises:
        NotFound: there is no such thing; the nearest names are given.
        UsageError: the digits fit several things.
        Corrupt: a ledger entry lacks a field that its kind must have.
    """
    records = Records(ledger)
    root = resolve(records, ref)
    nodes: dict[Ref, Node] = {}
    edges: list[Edge] = []
    waiting = [root]
    for here in waiting:  # breadth first: `waiting` grows while it is read
        if here in nodes:
            continue
        nodes[here], leaving = _describe(records, here)
        edges += leaving
        waiting += [edge.target for edge in leaving]
    return Lineage(root, nodes, tuple(edges))


class Records:
    """The ledger's entries that matter to lineage, read once, with the reading side of a ledger."""

    # What is named is written before what names it: reading backwards misses nothing while others write.
    _KINDS = (
        "promotion.committed", "promotion.dropped", "promotion.intent",
        "rollback.committed", "rollback.dropped", "rollback.intent",
        "approval.granted", "approval.rejected", "decision.made", "evaluation.done", "agent.registered",
        "run.finished", "run.started", "reward.validated", "reward.registered", "dataset.validated",
        "dataset.scored", "preferences.made", "preferences.imported", "dataset.sealed",
    )  # fmt: skip

    def __init__(self, ledger: Ledger) -> None:
        self._entries = {kind: ledger.entries(kind) for kind in self._KINDS}

    def entries(self, kind: str | None = None, subject: str | None = None) -> list[Entry]:
        """Return the entries of one kind, and subject where given, in order."""
        assert kind is not None
        return self._entries[kind] if subject is None else self._by_subject[kind].get(subject, [])

    def last(self, kind: str | None = None, subject: str | None = None) -> Entry | None:
        """Return the newest entry of that kind and subject, or None."""
        return next(reversed(self.entries(kind, subject)), None)

    @cached_property
    def _by_subject(self) -> Mapping[str, Mapping[str, list[Entry]]]:
        grouped: dict[str, dict[str, list[Entry]]] = {kind: defaultdict(list) for kind in self._KINDS}
        for kind, entries in self._entries.items():
            for entry in entries:
                grouped[kind][entry.subject].append(entry)
        return grouped

    @cached_property
    def agents(self) -> Mapping[str, Entry]:
        """The registration of each agent by the digest of its files."""
        return {entry.payload["digest"]: entry for entry in reversed(self.entries("agent.registered"))}

    @cached_property
    def datasets(self) -> Mapping[str, Entry]:
        """The first dataset version of each root (the same shards may be sealed under two names)."""
        return {entry.payload["root"]: entry for entry in reversed(self.entries("dataset.sealed"))}

    @cached_property
    def decisions(self) -> Mapping[str, Entry]:
        """The decisions by digest."""
        return {entry.payload["decision"]: entry for entry in self.entries("decision.made")}

    @cached_property
    def shards(self) -> Mapping[str, Mapping[str, Any]]:
        """What is recorded of each shard, by path."""
        return {shard["path"]: shard for e in self.entries("dataset.sealed") for shard in e.payload["shards"]}

    @cached_property
    def by_entry(self) -> Mapping[str, Entry]:
        """The entries by their own digest."""
        return {entry.digest: entry for entries in self._entries.values() for entry in entries}

    @cached_property
    def aliases(self) -> Mapping[str, int]:
        """The version in each office, by the ledger."""
        return {alias: version for alias, version in standing(self).aliases().items() if version is not None}

    @cached_property
    def sources(self) -> Mapping[str, Entry]:
        """The registration of each reward model by its digest."""
        return {entry.payload["digest"]: entry for entry in reversed(self.entries("reward.registered"))}

    @cached_property
    def evidence(self) -> Mapping[str, Ref]:
        """The node that a decision means by a digest among its evidence."""
        found: dict[str, Ref] = {}
        for entry in self.entries("evaluation.done"):
            found[entry.payload["outcomes"]["sha256"]] = ("evaluation", entry.subject)
        for entry in self.entries("dataset.validated"):
            found[entry.payload["evidence"]["sha256"]] = ("validation", entry.digest)
        for entry in self.entries("reward.validated"):
            found[entry.payload["evidence"]["sha256"]] = ("reward", entry.digest)
        return found

    @cached_property
    def by_digest(self) -> Mapping[str, Ref]:
        """What a user may ask for by digest; a shard stands for the first version that holds it."""
        found: dict[str, Ref] = {}
        for entry in reversed(self.entries("dataset.sealed")):
            here: Ref = ("dataset", entry.subject)
            found |= {shard["sha256"]: here for shard in entry.payload["shards"]}
            found[entry.payload["root"]] = here
        found |= self.evidence
        found |= {e.payload["digest"]: ("reward", e.digest) for e in self.entries("reward.validated")}
        found |= {e.subject: ("evaluation", e.subject) for e in self.entries("evaluation.done")}
        found |= {digest: ("decision", digest) for digest in self.decisions}
        found |= {e.subject: ("run", e.subject) for e in self.entries("run.started")}
        found |= {e.subject: ("preferences", e.subject) for e in self.entries("preferences.imported")}
        found |= {e.subject: ("preferences", e.subject) for e in self.entries("preferences.made")}
        found |= {digest: ("source", entry.subject) for digest, entry in self.sources.items()}
        found |= {digest: ("agent", entry.subject) for digest, entry in self.agents.items()}
        return found


def resolve(records: Records, ref: str) -> Ref:
    """Return the node that `ref` names; see `lineage`."""
    agents = [entry.subject for entry in records.entries("agent.registered")]
    datasets = [entry.subject for entry in records.entries("dataset.sealed")]
    rewards = [entry.subject for entry in records.entries("reward.registered")]
    held = {f"agent@{alias}": f"agent/{version}" for alias, version in records.aliases.items()}
    offices = standing(records, "reward").aliases()
    held |= {
        f"reward@{alias}": f"reward/{version}" for alias, version in offices.items() if version is not None
    }
    ref = held.get(ref, ref)
    if ref in agents:
        return "agent", ref
    if ref in rewards:
        return "source", ref
    if ref.startswith("dataset:"):
        wanted = ref.removeprefix("dataset:")
        for entry in reversed(records.entries("dataset.sealed")):
            if wanted in (entry.subject, entry.payload["name"]):
                return "dataset", entry.subject
    if len(ref) >= _MIN_PREFIX and set(ref) <= set("0123456789abcdef"):
        found = sorted({node for digest, node in records.by_digest.items() if digest.startswith(ref)})
        if len(found) > 1:
            several = ", ".join(f"{kind} {name[:12]}" for kind, name in found[:5])
            raise UsageError(f"`{ref}` fits {len(found)} things ({several}); give more digits.")
        if found:
            return found[0]
    known = [*held, *reversed(agents), *reversed(rewards), *(f"dataset:{n}" for n in reversed(datasets))]
    near = difflib.get_close_matches(ref, known, n=5, cutoff=0.5) or known[:5]
    raise NotFound(f"Nothing here is called `{ref}`; the nearest names are: {', '.join(near) or 'none yet'}.")


# ------------------------------------------------------------------------- one function for each kind of node

_Links = Iterable[tuple[Relation, Ref]]
_Found = tuple[Node, _Links]


def _describe(records: Records, ref: Ref) -> tuple[Node, list[Edge]]:
    kind, key = ref
    try:
        node, links = _KINDS[kind](records, key)
        return node, [Edge(ref, relation, target) for relation, target in links]
    except (KeyError, TypeError) as error:
        raise Corrupt(
            f"The ledger's entry of {kind} {key} is not whole ({error}); run `forebay verify`."
        ) from error


def _agent(records: Records, key: str) -> _Found:
    entry = records.last("agent.registered", key)
    if entry is None:
        return Node("agent", key, None, known=False), ()
    p, parents = entry.payload, entry.payload["parents"]
    roles = [alias for alias, version in records.aliases.items() if version == p["version"]]
    facts = _pick(
        p, "origin", "path", "mlflow", "tokenizer_digest", "source", roles=roles, registered=entry.time
    )
    node = Node("agent", key, p["digest"], facts, _files_under(p["path"], p["files"]))

    def links() -> Iterator[tuple[Relation, Ref]]:
        if p["origin"] == "base":
            yield "converted from", ("base", p["digest"])
        if parents["run"]:
            yield "trained by", ("run", parents["run"])
        if parents["base"]:
            yield "descends from", ("base", parents["base"])
        for decision in records.entries("decision.made", key):
            yield "judged by", ("decision", decision.payload["decision"])
        for kind in ("promotion.committed", "rollback.committed"):
            for change in records.entries(kind, key):
                yield "in office", ("promotion", change.digest)

    return node, links()


def _base(records: Records, key: str) -> _Found:
    entry = records.agents.get(key)
    if entry is None:
        return Node("base", "base model", key, known=False), ()
    source = entry.payload["source"]
    return Node("base", source["name"], key, {"source": source, "registered_as": entry.subject}), ()


def _run(records: Records, key: str) -> _Found:
    started, finished = records.last("run.started", key), records.last("run.finished", key)
    if started is None or finished is None:
        return Node("run", key[:12], key, known=False), ()
    p, end = started.payload, finished.payload["outputs"]
    facts = {
        **_pick(p, "settings", "seed", "device", "dtype", started=started.time),
        "outside_code": p.get("outside_code", {}),
        **_pick(end, "steps", "stop_reason", "metrics", "path", "digest", finished=finished.time),
    }
    fresh = tuple(File(shard["path"], shard["sha256"]) for shard in end.get("fresh", ()))
    node = Node("run", key[:12], key, facts, (*_files_under(end["path"], end["files"]), *fresh))

    def links() -> Iterator[tuple[Relation, Ref]]:
        commit = p["commit"]
        yield "run by code", ("code", f"{commit['commit'] or ''}{'+' if commit['dirty'] else ''}@{p['code']}")
        if p["lock"]:
            yield "with packages", ("lock", p["lock"])
        yield "trained on", _dataset_of(records, p["dataset"])
        yield "started from", _policy_of(records, p["init"]["agent"], p["init"]["digest"])

    return node, links()


def _code(records: Records, key: str) -> _Found:
    place, _, digest = key.partition("@")
    commit = place.removesuffix("+")
    facts = {"commit": commit or None, "changed": place.endswith("+")}
    return Node("code", f"commit {commit[:12]}" if commit else "outside git", digest, facts), ()


def _lock(records: Records, key: str) -> _Found:
    return Node("lock", "constraints.txt", key), ()


def _dataset(records: Records, key: str) -> _Found:
    entry = records.last("dataset.sealed", key)
    if entry is None:
        return Node("dataset", key, None, known=False), ()
    p = entry.payload
    parent = records.datasets.get(p["parent"]) if p["parent"] else None
    facts = _pick(p, "rows", "groups", "new_rows", "git_commit", "dvc", sealed=entry.time)
    node = Node("dataset", key, p["root"], facts, (File(p["manifest"], p["manifest_sha256"]),))

    def links() -> Iterator[tuple[Relation, Ref]]:
        # A version lists what it added; its parent lists the others.
        earlier = {shard["sha256"] for shard in parent.payload["shards"]} if parent else set()
        yield from (
            ("holds", ("shard", shard["path"])) for shard in p["shards"] if shard["sha256"] not in earlier
        )
        validated = records.last("dataset.validated", p["root"])
        if validated:
            yield "checked by", ("validation", validated.digest)
        if p["parent"]:
            yield "continues", _dataset_of(records, p["parent"])
        known = {policy["digest"] for policy in parent.payload["behaviour"]} if parent else set()
        for policy in p["behaviour"]:
            if policy["digest"] not in known:
                yield "sampled from", _policy_of(records, policy["version"], policy["digest"])
        for scored in records.entries("dataset.scored", f"dataset:{p['name']}"):
            if scored.seq < entry.seq:
                yield "scored from", _dataset_of(records, scored.payload["root"])
                yield "rewarded by", ("source", scored.payload["reward"])

    return node, links()


def _source(records: Records, key: str) -> _Found:
    entry = records.last("reward.registered", key)
    if entry is None:
        return Node("source", key, None, known=False), ()
    p, parents = entry.payload, entry.payload["parents"]
    offices = standing(records, "reward").aliases()
    facts = _pick(p, "kind", "path", "mlflow", "holdout", "licences", registered=entry.time)
    facts["roles"] = [alias for alias, version in offices.items() if version == p["version"]]
    node = Node("source", key, p["digest"], facts, _files_under(p["path"], p["files"]))

    def links() -> Iterator[tuple[Relation, Ref]]:
        if parents["preferences"]:
            yield "learnt from", ("preferences", parents["preferences"])
        backbone = parents["backbone"]
        if backbone and backbone["agent"]:
            yield "reads states of", ("agent", backbone["agent"])
        elif backbone:
            yield "reads states of", ("outside", f"{backbone['base']}@{backbone['digest']}")
        for decision in records.entries("decision.made", key):
            yield "judged by", ("decision", decision.payload["decision"])
        for kind in ("promotion.committed", "rollback.committed"):
            for change in records.entries(kind, key):
                yield "in office", ("promotion", change.digest)

    return node, links()


def _preferences(records: Records, key: str) -> _Found:
    entry = records.last("preferences.imported", key) or records.last("preferences.made", key)
    if entry is None:
        return Node("preferences", key[:12], key, known=False), ()
    p = entry.payload
    facts = _pick(p, "name", "pairs", "groups", "slices", "sources", "licences", "origin", time=entry.time)
    dataset = p["origin"].get("dataset")
    links: _Links = [("made from", _dataset_of(records, dataset))] if dataset else []
    return Node("preferences", p["name"], key, facts, (File(p["path"], key),)), links


def _shard(records: Records, key: str) -> _Found:
    shard = records.shards[key]
    facts = _pick(shard, "rows", "groups", "bytes")
    return Node("shard", key, shard["sha256"], facts, (File(key, shard["sha256"]),)), ()


def _validation(records: Records, key: str) -> _Found:
    entry = records.by_entry[key]
    p, evidence = entry.payload, _file(entry.payload["evidence"])
    facts = _pick(p, "verdict", "reasons", checks=len(p["checks"]), time=entry.time)
    return Node("validation", p["verdict"], evidence.sha256, facts, (evidence,)), ()


def _reward(records: Records, key: str) -> _Found:
    entry = records.by_entry[key]
    p = entry.payload
    files = tuple(_file(p[name]) for name in ("evidence", "plot", "best_of_n") if p.get(name))
    facts = _pick(p, "verdict", "reasons", "accuracy", "ece", "path", time=entry.time)
    judged = records.sources.get(p["digest"])
    links: list[tuple[Relation, Ref]] = []
    if p["dataset"]:
        links.append(("trained on", _dataset_of(records, p["dataset"])))
    if judged:
        links.append(("judges", ("source", judged.subject)))
    return Node("reward", p["verdict"], p["digest"], facts, files), links


def _evaluation(records: Records, key: str) -> _Found:
    entry = records.entries("evaluation.done", key)[-1]
    p, outcomes = entry.payload, _file(entry.payload["outcomes"])
    facts = _pick(p, "candidate", "champion", "tasks_digest", "slices", time=entry.time)
    name = f"agent/{p['candidate']} and agent/{p['champion']}"
    return Node("evaluation", name, key, facts, (outcomes,)), ()


def _decision(records: Records, key: str) -> _Found:
    entry = records.decisions[key]
    p = entry.payload

    def answers(kind: str) -> list[dict[str, Any]]:
        given = [e for e in records.entries(kind, entry.subject) if e.payload["decision"] == key]
        return [_pick(e.payload, "by", "reason", time=e.time) for e in given]

    facts = _pick(
        p, "verdict", "reasons", "evidence",
        approvals=answers("approval.granted"), rejections=answers("approval.rejected"), time=entry.time,
    )  # fmt: skip
    files = [_file(p[name]) for name in ("record", "signature") if name in p]
    node = Node("decision", p["verdict"], key, facts, tuple(files))

    def links() -> Iterator[tuple[Relation, Ref]]:
        yield "under policy", ("policy", p["policy_digest"])
        # One file can be behind several items (quality and every guard); some have no entry of their own.
        for digest in dict.fromkeys(item["digest"] for item in p["evidence"]):
            if digest in records.evidence:
                yield "rests on", records.evidence[digest]
        champion, office = p["champion"], entry.subject.partition("/")[0]
        if office == "agent":
            yield "compared with", _policy_of(records, f"agent/{champion['version']}", champion["digest"])
        elif champion["version"]:
            yield "compared with", ("source", f"reward/{champion['version']}")

    return node, links()


def _policy(records: Records, key: str) -> _Found:
    return Node("policy", "policy.yaml", key), ()


def _promotion(records: Records, key: str) -> _Found:
    entry = records.by_entry[key]
    facts = _pick(entry.payload, "to", "from", "by", "reason", "decision", time=entry.time, seq=entry.seq)
    facts["office"] = entry.subject.partition("/")[0]
    return Node("promotion", entry.kind.partition(".")[0], key, facts), ()


def _outside(records: Records, key: str) -> _Found:
    name, _, digest = key.rpartition("@")
    return Node("outside", name, digest or None), ()


_KINDS: Mapping[Kind, Callable[[Records, str], _Found]] = {
    "agent": _agent,
    "base": _base,
    "run": _run,
    "code": _code,
    "lock": _lock,
    "dataset": _dataset,
    "shard": _shard,
    "validation": _validation,
    "reward": _reward,
    "source": _source,
    "preferences": _preferences,
    "evaluation": _evaluation,
    "decision": _decision,
    "policy": _policy,
    "promotion": _promotion,
    "outside": _outside,
}


def _dataset_of(records: Records, root: str) -> Ref:
    entry = records.datasets.get(root)
    return "dataset", entry.subject if entry else root


def _policy_of(records: Records, name: str, digest: str) -> Ref:
    """Return the agent with that digest, else a policy from outside (its experience was imported)."""
    entry = records.agents.get(digest)
    return ("agent", entry.subject) if entry else ("outside", f"{name}@{digest}")


def _files_under(folder: str, files: Mapping[str, str]) -> tuple[File, ...]:
    return tuple(File(f"{folder}/{name}", sha256) for name, sha256 in sorted(files.items()))


def _file(value: Mapping[str, str]) -> File:
    return File(value["path"], value["sha256"])


def _pick(payload: Mapping[str, Any], *names: str, **more: Any) -> dict[str, Any]:
    return {**{name: payload[name] for name in names}, **more}
