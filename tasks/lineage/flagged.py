"""Who learnt from what is revoked, what nobody may learn from any more, and what to train anew.

Rules:

* An agent is flagged that learnt from revoked data, itself or through others; so is a reward model.
* Training never makes a flagged agent out of an unflagged one: starting from an agent that descends from nothing
  revoked, groups that a flagged agent sampled, or a flagged reward model rewarded, are left out as well.

The walk reads the shards themselves, not the index of `tasks.lineage.descent`, which answers the same question for
anything: a flag keeps an agent from production, so it rests on bytes alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from tasks.core.atomic import write_atomic
from tasks.core.digest import canonical_json, sha256_bytes
from tasks.core.ledger import Entry, Ledger
from tasks.core.workspace import Workspace
from tasks.lineage.erasure import Shards
from tasks.lineage.revocation import Facts, Revoked, checked, pair_revoked, revoked
from tasks.lineage.rows import consumed
from tasks.promotion.promote import Entries, standing

if TYPE_CHECKING:
    import pyarrow as pa

    from tasks.reward.source import Preference

_OFFICES = ("champion", "previous", "candidate")


@dataclass(frozen=True)
class Descendant:
    """An agent or a reward model that learnt from revoked data, itself or through others.

    Attributes:
        ref: agent/3 or reward/2.
        why: how, in a few words; the first link of the chain that was found.
        since: the ledger entry that registered it.
    """

    ref: str
    digest: str
    roles: tuple[str, ...]
    why: str
    since: int

    def plain(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "roles": list(self.roles)}


# ----------------------------------------------------------------------------------------------- who learnt from it


def descendants_of(ledger: Entries, workspace: Workspace, now: Revoked) -> tuple[Descendant, ...]:
    """Return the agents and reward models that follow from what is revoked: champions first, then newest first.

    Exact to the row. An agent descends if its run used a revoked group, a group that a descendant sampled, or one whose
    reward a descendant gave, or if it started from a descendant; a reward model if a pair that it was trained on quotes
    a revoked episode or one that a descendant sampled, or if it reads the states of a descendant.
    """
    if not now:
        return ()
    walk = _Walk(ledger, workspace, now)
    found = sorted(walk.run(), key=lambda d: -d.since)
    return tuple(sorted(found, key=_rank))


def open_flags(ledger: Entries, workspace: Workspace) -> tuple[Descendant, ...]:
    """Return every agent and reward model that descends from what is revoked now."""
    return descendants_of(ledger, workspace, revoked(ledger, workspace))


class _Walk:
    """One pass over the ledger in its order: what follows from something is always recorded after it."""

    _KINDS = (
        "preferences.imported",
        "preferences.made",
        "reward.registered",
        "run.finished",
        "agent.registered",
    )

    def __init__(self, ledger: Entries, workspace: Workspace, now: Revoked) -> None:
        self._ledger, self._workspace, self._now = ledger, workspace, now
        self._started = {entry.subject: entry.payload for entry in ledger.entries("run.started")}
        self._shards = {e.payload["root"]: e.payload["shards"] for e in ledger.entries("dataset.sealed")}
        self._look = Shards(ledger, workspace)
        self._facts: dict[str, Facts] = {}
        self._agents: dict[str, str] = {}  # digest of a flagged agent: its name
        self._sources: dict[str, str] = {}
        self._runs: dict[str, str] = {}  # key of a run: why
        self._named = {entry.subject: entry.payload["digest"] for entry in ledger.entries("agent.registered")}

    def run(self) -> Iterator[Descendant]:
        entries = sorted((e for kind in self._KINDS for e in self._ledger.entries(kind)), key=lambda e: e.seq)
        pairs: dict[str, Entry] = {}
        for entry in entries:
            if entry.kind.startswith("preferences."):
                pairs[entry.subject] = entry
            elif entry.kind == "run.finished":
                why = self._of_run(entry.subject, entry.payload)
                if why:
                    self._runs[entry.subject] = why
            else:
                agent = entry.kind == "agent.registered"
                why = self._of_agent(entry.payload) if agent else self._of_source(entry.payload, pairs)
                if why:
                    made = self._agents if agent else self._sources
                    made[entry.payload["digest"]] = entry.subject
                    yield Descendant(
                        entry.subject, entry.payload["digest"], self._roles(entry), why, entry.seq
                    )

    def _roles(self, entry: Entry) -> tuple[str, ...]:
        office: Any = entry.subject.partition("/")[0]
        held = standing(self._ledger, office).aliases()
        return tuple(alias for alias, version in held.items() if version == entry.payload["version"])

    def _of_agent(self, payload: Mapping[str, Any]) -> str:
        parents = payload["parents"]
        init = self._named.get(parents.get("init") or "")
        if init in self._agents:
            return f"started from {self._agents[init]}"
        return self._runs.get(parents.get("run") or "", "")

    def _of_run(self, key: str, payload: Mapping[str, Any]) -> str:
        started = self._started.get(key)
        if started is None:
            return ""
        init = started["init"]["digest"]
        if init in self._agents:
            return f"started from {self._agents[init]}"
        used = set(consumed(self._workspace, payload["outputs"]))
        for group in sorted(used & self._now.by_group.keys()):  # also where the bytes are erased
            return f"trained on group {group}, revoked by {self._now.by_group[group]}"
        fresh = payload["outputs"].get("fresh", ())
        for shard in (*self._shards.get(started["dataset"], ()), *fresh):
            facts = self._of_shard(shard)
            # Of the shards that a run sampled itself it used what it asked for.
            mine = facts.groups if shard in fresh else used & facts.groups
            for group in sorted(mine & facts.direct.keys()):
                return f"trained on group {group}, revoked by {facts.direct[group]}"
            for digest, name in self._agents.items():
                if mine & facts.sampled.get(digest, frozenset()):
                    return f"trained on episodes that {name} sampled"
            for digest, name in self._sources.items():
                if mine & facts.rewarded.get(digest, frozenset()):
                    return f"trained on rewards of {name}"
        return ""

    def _of_source(self, payload: Mapping[str, Any], pairs: Mapping[str, Entry]) -> str:
        parents = payload["parents"]
        backbone = parents.get("backbone") or {}
        if backbone.get("digest") in self._agents:
            return f"reads the states of {self._agents[backbone['digest']]}"
        made = pairs.get(parents.get("preferences") or "")
        if made is None:
            return ""
        learnt = payload.get("learnt")  # earlier releases did not say which pairs
        there = (self._workspace.root / made.payload["path"]).exists()
        if learnt is None and not there and self._look.erased(made.subject):
            return f"learnt from the preferences {made.subject[:12]}, which were erased"
        pairs_of = read_learnt(self._workspace, learnt) if learnt else self._of_set(made, payload["holdout"])
        return self._of_pairs(pairs_of, made.payload["origin"].get("dataset"))

    def _of_set(self, entry: Entry, holdout: float | None) -> list[dict[str, Any]]:
        """All pairs of a set that may have been trained on."""
        from tasks.reward.preferences import fraction

        data = checked(self._workspace.root / entry.payload["path"], entry.subject)
        pairs = map(json.loads, data.splitlines())
        return [pair for pair in pairs if holdout is None or fraction(pair["group"]) >= holdout]

    def _of_pairs(self, pairs: Iterable[Mapping[str, Any]], root: str | None) -> str:
        flagged: dict[str, str] = {}
        for shard in self._shards.get(root or "", ()) if self._agents else ():
            for digest, episodes in self._of_shard(shard).authors.items():
                if digest in self._agents:
                    flagged |= dict.fromkeys(episodes, self._agents[digest])
        for pair in pairs:
            why = pair_revoked(pair, self._now)
            if why:
                return f"learnt from a pair of {why}"
            for name in (pair["chosen_id"], pair["rejected_id"]):
                if name in flagged:
                    return f"learnt from a pair that {flagged[name]} sampled"
        return ""

    def _of_shard(self, shard: Mapping[str, Any]) -> Facts:
        if shard["sha256"] not in self._facts:
            self._facts[shard["sha256"]] = Facts.of(self._look.facts(shard), self._now)
        return self._facts[shard["sha256"]]


# --------------------------------------------------------------------------------------- what is not learnt from


def left_out(
    ledger: Entries, workspace: Workspace, root: str, init: str | None = None, known: Revoked | None = None
) -> tuple[str, ...]:
    """Return the sorted ids of the groups of a dataset version that nothing may learn from.

    Args:
        root: of the version.
        init: digest of the agent that training starts from; where it is not flagged, groups that flagged agents
            sampled or flagged reward models rewarded are left out too.
        known: what is revoked, where the caller has read it.
    """
    now = revoked(ledger, workspace) if known is None else known
    if not now:
        return ()
    facts = [Facts.of(table, now) for table in _tables_of(ledger, workspace, root)]
    found = {group for each in facts for group in each.direct}
    if init is not None:
        flagged = {d.digest for d in descendants_of(ledger, workspace, now)}
        if init not in flagged:
            for each in facts:
                for made in (each.sampled, each.rewarded):
                    found |= {
                        group for digest, groups in made.items() if digest in flagged for group in groups
                    }
    return tuple(sorted(found))


def keep_learnt(workspace: Workspace, pairs: Iterable[Preference]) -> dict[str, Any]:
    """Keep as evidence which pairs a reward model is trained on, by their ids; return {path, sha256, pairs}."""
    rows = [
        {
            "chosen_id": pair.chosen_id,
            "rejected_id": pair.rejected_id,
            "source": pair.source,
            "licence": pair.licence,
            "prompt_sha256": sha256_bytes(pair.prompt.encode()),
        }
        for pair in pairs
    ]
    data = canonical_json(rows)
    digest = sha256_bytes(data)
    path = workspace.evidence / "learnt" / f"{digest}.json"
    write_atomic(path, data)
    return {"path": workspace.relative(path), "sha256": digest, "pairs": len(rows)}


def read_learnt(workspace: Workspace, file: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the pairs that `keep_learnt` kept, bytes checked."""
    return cast(list[dict[str, Any]], json.loads(checked(workspace.root / file["path"], file["sha256"])))


def learnable(
    ledger: Entries,
    workspace: Workspace,
    pairs: Sequence[Preference],
    root: str | None,
    backbone: str | None,
    now: Revoked,
) -> list[Preference]:
    """Return the pairs that a reward model may be trained on: training makes no flagged model out of unflagged parts.

    Args:
        pairs: such as are not revoked themselves.
        root: of the dataset that they were made of, None for imported ones.
        backbone: digest of what the model is built on; where that is flagged, pairs of flagged agents are no loss.
    """
    flagged = {d.digest for d in descendants_of(ledger, workspace, now)} if root else set()
    if not flagged or backbone in flagged:
        return list(pairs)
    facts = (Facts.of(table, now) for table in _tables_of(ledger, workspace, root or ""))
    theirs = {
        name for each in facts for digest in flagged & each.authors.keys() for name in each.authors[digest]
    }
    return [pair for pair in pairs if theirs.isdisjoint((pair.chosen_id, pair.rejected_id))]


# ------------------------------------------------------------------------------------------------ a plan to retrain


@dataclass(frozen=True)
class Step:
    """One retraining: `agent` is replaced by training from `start` on a dataset version without `left_out` groups."""

    agent: str
    start: str
    dataset: str
    root: str
    groups: int
    left_out: int

    @property
    def command(self) -> str:
        """What does it on the command line."""
        return f"forebay retrain --start {self.start} --dataset {self.dataset} --collect never"


def retrain_plan(ledger: Ledger, workspace: Workspace, now: Revoked | None = None) -> tuple[Step, ...]:
    """Return what replaces the champion, and its predecessor, where they are flagged: nothing where neither is.

    Training starts from the newest ancestor in the agent's own line that is not flagged, on the newest version of the
    dataset that the agent was trained on; the revoked groups, and those that flagged agents sampled, are left out. One
    run replaces the whole flagged part of the line: its agents are steps on the way to the champion, not in service.
    """
    known = revoked(ledger, workspace) if now is None else now
    flagged = {d.ref for d in descendants_of(ledger, workspace, known)}
    registered = {e.subject: e.payload for e in ledger.entries("agent.registered")}
    sealed = ledger.entries("dataset.sealed")
    held = standing(ledger).aliases()
    steps: list[Step] = []
    for role in ("champion", "previous"):
        agent = f"agent/{held[role]}"
        if agent not in flagged:
            continue
        start = agent
        while start in flagged and registered[start]["parents"].get("init"):
            start = registered[start]["parents"]["init"]
        root = registered[agent]["parents"]["dataset"]
        name = next((e.payload["name"] for e in sealed if e.payload["root"] == root), None)
        newest = next((e for e in reversed(sealed) if e.payload["name"] == name), None)
        if start in flagged or newest is None:
            continue  # a base model that learnt from revoked data itself cannot be trained anew here
        p = newest.payload
        gone = len(left_out(ledger, workspace, p["root"], registered[start]["digest"], known))
        step = Step(agent, start, newest.subject, p["root"], p["groups"], gone)
        if not any((s.start, s.root) == (step.start, step.root) for s in steps):
            steps.append(step)
    return tuple(steps)


# --------------------------------------------------------------------------------------------------------- reading


def _tables_of(ledger: Entries, workspace: Workspace, root: str) -> list[pa.Table]:
    sealed = next((e for e in reversed(ledger.entries("dataset.sealed")) if e.payload["root"] == root), None)
    look = Shards(ledger, workspace)
    return [look.facts(shard) for shard in (sealed.payload["shards"] if sealed else ())]


def _rank(found: Descendant) -> int:
    return min((_OFFICES.index(role) for role in found.roles if role in _OFFICES), default=len(_OFFICES))


def names(found: Sequence[Descendant]) -> str:
    """Return the names of descendants for a sentence."""
    return ", ".join(f"{d.ref} ({d.roles[0]})" if d.roles else d.ref for d in found) or "nobody"
