"""Revocation: what may not be learnt from any more, who has learnt from it, and what to train anew.

The ledger's entries `data.revoked` and `data.reinstated` are the authority; everything here is read from them, from
manifests and from shards, and no function writes. Rules:

* A revoked episode takes its whole group out of sampling: an advantage compares the answers of a group, and what is
  left of it would be another estimate than the one that was admitted.
* What is revoked by prompt, source or licence is also revoked where it comes in again later.
* Training never makes a flagged agent out of an unflagged one: starting from an agent that descends from nothing
  revoked, groups that a flagged agent sampled, or a flagged reward model rewarded, are left out as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from tasks.core.digest import canonical_json, sha256_bytes, sha256_file, write_atomic
from tasks.core.errors import Corrupt, NotFound, Refused, UsageError
from tasks.core.ledger import Entry, Ledger
from tasks.core.workspace import Workspace
from tasks.lineage.erasure import ERASED as ERASED
from tasks.lineage.erasure import ERASING as ERASING
from tasks.lineage.erasure import FACTS, Shards
from tasks.promotion.promote import Entries, standing

if TYPE_CHECKING:
    import pyarrow as pa

    from tasks.replay.schema import Episode
    from tasks.reward.source import Preference

REVOKED, REINSTATED = "data.revoked", "data.reinstated"

Kind = Literal["episode", "group", "prompt", "source", "licence", "shard", "dataset"]
_COLUMN: Mapping[Kind, str] = {
    "episode": "episode_id",
    "group": "group_id",
    "prompt": "prompt_sha256",
    "source": "source",
    "licence": "licence",
}
_OFFICES = ("champion", "previous", "candidate")


@dataclass(frozen=True)
class Target:
    """What somebody revokes: `episode:ID`, `group:ID`, `prompt:SHA256`, `source:NAME`, `licence:NAME`, `shard:PATH`
    or `dataset:main/v3` (all rows that this version holds).
    """

    kind: Kind
    name: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read a target.

        Raises:
            UsageError: the kind is none of those, or the name is missing.
        """
        kind, _, name = text.partition(":")
        if kind not in get_args(Kind) or not name.strip():
            raise UsageError(
                f"`{text}` cannot be revoked; write one of {', '.join(f'{k}:NAME' for k in get_args(Kind))}."
            )
        return cls(cast(Kind, kind), name.strip())


@dataclass(frozen=True)
class Place:
    """A file that holds revoked rows: a sealed shard, one of a run's own, a set of preferences, or an open segment
    (`sha256` is empty).

    Attributes:
        dataset: name of the dataset; "" for a shard of a run, and for preferences.
        rows: revoked rows in it.
    """

    path: str
    sha256: str
    dataset: str
    rows: int


@dataclass(frozen=True)
class Hit:
    """What a target stands for at this moment, as it is on disk.

    Attributes:
        episodes: the rows meant.
        groups: their groups, which leave sampling.
        roots: of the sealed dataset versions that hold one of them.
        places: the files that hold one of them.
    """

    episodes: frozenset[str]
    groups: frozenset[str]
    roots: tuple[str, ...]
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Revoked:
    """Everything that is revoked now. Empty: false.

    Attributes:
        revision: ledger entry of the newest revocation or reinstatement, 0 where there never was one.
        what: {target: its ledger entry} of the revocations that hold.
        by_group: {group id: target} of the groups that were hit when they were recorded.
        episodes: the rows meant, without the others of their groups.
        values: {column: values}, by which rows are revoked that come in later.
    """

    revision: int = 0
    what: Mapping[str, int] = field(default_factory=dict)
    by_group: Mapping[str, str] = field(default_factory=dict)
    episodes: frozenset[str] = frozenset()
    values: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.what)

    def reason(self, row: Episode) -> str | None:
        """Return the target that takes this episode out, None where nothing does."""
        if row.group_id in self.by_group:
            return self.by_group[row.group_id]
        for kind, column in _COLUMN.items():
            value = getattr(row, column)
            if value in self.values.get(column, ()):
                return f"{kind}:{value}"
        return None

    def prompt(self, sha256: str) -> bool:
        """Tell whether nobody may be asked this prompt any more to learn from the answers."""
        return sha256 in self.values.get("prompt_sha256", ())

    def origin(self, source: str, licence: str) -> bool:
        """Tell whether nothing of this source, or of this licence, may be learnt from."""
        return source in self.values.get("source", ()) or licence in self.values.get("licence", ())


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


# ------------------------------------------------------------------------------------------------ what is revoked


def revision(ledger: Entries) -> int:
    """Return the ledger entry of the newest revocation or reinstatement, 0 for none: what a race is noticed by."""
    newest = (ledger.last(kind) for kind in (REVOKED, REINSTATED))
    return max((entry.seq for entry in newest if entry is not None), default=0)


def standing_entries(ledger: Entries) -> list[Entry]:
    """Return the revocations that were not taken back, in order."""
    undone = {entry.payload["revocation"] for entry in ledger.entries(REINSTATED)}
    return [entry for entry in ledger.entries(REVOKED) if entry.seq not in undone]


def revoked(ledger: Entries, workspace: Workspace) -> Revoked:
    """Read what is revoked now.

    Raises:
        NotFound, Corrupt: the list of what a revocation hit is gone or was changed; nothing may be learnt until it is
        back.
    """
    at = revision(ledger)
    if not at:
        return Revoked()
    what: dict[str, int] = {}
    by_group: dict[str, str] = {}
    episodes: set[str] = set()
    values: dict[str, set[str]] = {}
    for entry in standing_entries(ledger):
        target = Target.parse(entry.payload["what"])
        what[str(target)] = entry.seq
        lists = read_lists(workspace, entry.payload["lists"])
        by_group |= dict.fromkeys(lists["groups"], str(target))
        episodes |= set(lists["episodes"])
        if target.kind in _COLUMN:
            values.setdefault(_COLUMN[target.kind], set()).add(target.name)
    return Revoked(
        at, what, by_group, frozenset(episodes), {name: frozenset(found) for name, found in values.items()}
    )


def require_not_erased(ledger: Entries, subject: str, shards: Iterable[Mapping[str, Any]]) -> None:
    """Refuse to use a dataset version whose bytes were erased on purpose.

    Raises:
        Refused: the version that holds what is left is named.
    """
    held = {shard["sha256"] for shard in shards}
    for entry in ledger.entries(ERASING):
        for each in entry.payload["datasets"]:
            if any(pair["old"]["sha256"] in held for pair in each["replaces"]):
                raise Refused(
                    f"Part of {subject} was erased on purpose ({entry.payload['what']}: {entry.payload['reason']}); the newest "
                    f"version of {each['name']} holds what is left."
                )


def write_lists(workspace: Workspace, hit: Hit) -> dict[str, Any]:
    """Keep the ids of what a target hit as evidence; return {path, sha256, groups, episodes} with their numbers."""
    data = canonical_json({"groups": sorted(hit.groups), "episodes": sorted(hit.episodes)})
    digest = sha256_bytes(data)
    path = workspace.evidence / "revoked" / f"{digest}.json"
    write_atomic(path, data)
    counts = {"groups": len(hit.groups), "episodes": len(hit.episodes)}
    return {"path": workspace.relative(path), "sha256": digest, **counts}


def read_lists(workspace: Workspace, file: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return {groups, episodes} of a revocation, bytes checked."""
    return cast(dict[str, list[str]], json.loads(_checked(workspace.root / file["path"], file["sha256"])))


def find_hit(ledger: Entries, workspace: Workspace, target: Target) -> Hit:
    """Return what `target` stands for: sealed rows of all datasets, those of runs, and those that wait to be sealed.

    Raises:
        NotFound: there is no such row, dataset or shard. A source, a licence or the SHA-256 of a prompt may be named
            before anything of it is here.
    """
    import pyarrow.compute as pc

    tables = dict(_everything(ledger, workspace))
    if target.kind in ("dataset", "shard"):
        wanted = Shards(ledger, workspace).with_heirs(_shards_of(ledger, target))
        named = [table for place, table in tables.items() if place.sha256 in wanted]
        ids = {name for table in named for name in table["episode_id"].to_pylist()}
        column: str = "episode_id"
    else:
        column, ids = _COLUMN[target.kind], {target.name}
    values = _array(ids)
    found = {
        place: table.filter(mask)
        for place, table in tables.items()
        if pc.any(mask := pc.is_in(table[column], values)).as_py()
    }
    episodes = frozenset(name for table in found.values() for name in table["episode_id"].to_pylist())
    quoting = quoted(workspace, foresee(target, Hit(episodes, frozenset(), (), ())))
    # What is revoked by such a value need not be here yet: it is kept from coming in.
    if not found and target.kind not in ("source", "licence") and not _is_prompt(target) and not quoting:
        raise NotFound(
            f"No episode here is of {target}; `forebay lineage` and the shards know what there is."
        )
    places = (
        *(Place(place.path, place.sha256, place.dataset, table.num_rows) for place, table in found.items()),
        *quoting,
    )
    shards = {place.sha256 for place in places if place.sha256}
    return Hit(
        episodes,
        frozenset(name for table in found.values() for name in table["group_id"].to_pylist()),
        tuple(
            entry.payload["root"]
            for entry in ledger.entries("dataset.sealed")
            if any(shard["sha256"] in shards for shard in entry.payload["shards"])
        ),
        places,
    )


def find_rows(ledger: Entries, workspace: Workspace, groups: Iterable[str]) -> dict[Place, pa.Table]:
    """Return {file: the facts of the rows of these groups that it holds now}, files with such rows only."""
    import pyarrow.compute as pc

    wanted = _array(groups)
    return {
        place: here
        for place, table in _everything(ledger, workspace)
        if (here := table.filter(pc.is_in(table["group_id"], wanted))).num_rows
    }


def pinned(ledger: Entries, target: Target) -> Target:
    """Return the target with a dataset by its version: what is sealed later is not meant.

    Raises:
        NotFound: there is no such dataset.
    """
    if target.kind != "dataset":
        return target
    return Target("dataset", _version(ledger, target).subject)


def foresee(target: Target, hit: Hit) -> Revoked:
    """Return what `target` alone would take out, were it revoked."""
    values = {_COLUMN[target.kind]: frozenset({target.name})} if target.kind in _COLUMN else {}
    by_group = dict.fromkeys(hit.groups, str(target))
    return Revoked(0, {str(target): 0}, by_group, hit.episodes, values)


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


def without(table: pa.Table, now: Revoked) -> pa.Table:
    """Return the rows of a table (with the columns of an episode) whose groups are not revoked."""
    import pyarrow.compute as pc

    if not now:
        return table
    gone = Facts.of(table.select(FACTS), now).direct
    return table.filter(pc.invert(pc.is_in(table["group_id"], _array(gone))))


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


@dataclass(frozen=True)
class Facts:
    """What a shard's rows say, by group: which are revoked, and who sampled and rewarded them."""

    groups: frozenset[str]
    direct: Mapping[str, str]  # group: target
    sampled: Mapping[str, frozenset[str]]  # digest of the policy: groups
    rewarded: Mapping[str, frozenset[str]]  # digest of the source: groups
    authors: Mapping[str, frozenset[str]]  # digest of the policy: episodes

    @classmethod
    def of(cls, table: pa.Table, now: Revoked) -> Facts:
        """Read them from a table with the columns `FACTS`."""
        import pyarrow.compute as pc

        groups = frozenset(table["group_id"].unique().to_pylist())
        direct = {group: now.by_group[group] for group in groups & now.by_group.keys()}
        for kind, column in _COLUMN.items():
            values = now.values.get(column)
            if values:
                hit = table.filter(pc.is_in(table[column], _array(values)))
                pairs = zip(hit["group_id"].to_pylist(), hit[column].to_pylist(), strict=True)
                for group, value in pairs:
                    direct.setdefault(group, f"{kind}:{value}")
        by = {
            name: _collected(table, column, of)
            for name, column, of in (
                ("sampled", "behaviour_digest", "group_id"),
                ("rewarded", "reward_digest", "group_id"),
                ("authors", "behaviour_digest", "episode_id"),
            )
        }
        return cls(groups, direct, by["sampled"], by["rewarded"], by["authors"])


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
        self._sets: dict[str, str] = {}  # digest of a set of preferences, key of a run: why
        self._runs: dict[str, str] = {}
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
        used = consumed(self._workspace, payload)
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

        data = _checked(self._workspace.root / entry.payload["path"], entry.subject)
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


def pair_revoked(pair: Mapping[str, Any], now: Revoked) -> str | None:
    """Return what is revoked of a preference (its fields, or those that `keep_learnt` keeps), None for nothing."""
    for name in (pair["chosen_id"], pair["rejected_id"]):
        if name and name in now.episodes:
            return f"episode {name}"
    for kind in ("source", "licence"):
        if pair[kind] in now.values.get(kind, ()):
            return f"{kind}:{pair[kind]}"
    digest = pair.get("prompt_sha256") or sha256_bytes(pair["prompt"].encode())
    return f"prompt:{digest}" if now.prompt(digest) else None


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
    return cast(list[dict[str, Any]], json.loads(_checked(workspace.root / file["path"], file["sha256"])))


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


def quoted(workspace: Workspace, now: Revoked) -> tuple[Place, ...]:
    """Return the sets of preferences that hold a pair which `now` revokes; `rows` are such pairs."""
    found = []
    for path in sorted(workspace.preferences.glob("*.jsonl")):
        with path.open() as stream:
            pairs = sum(pair_revoked(pair, now) is not None for pair in map(json.loads, stream))
        if pairs:
            found.append(Place(workspace.relative(path), sha256_file(path), "", pairs))
    return tuple(found)


def consumed(workspace: Workspace, payload: Mapping[str, Any]) -> set[str]:
    """Return the groups of the replay that a finished run used (payload of `run.finished`)."""
    from tasks.lineage import rows

    return set(rows.consumed(workspace, payload["outputs"]))


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


def _everything(ledger: Entries, workspace: Workspace) -> Iterator[tuple[Place, pa.Table]]:
    """Every file that holds episodes now: sealed shards, shards of runs (also of such that did not end well), segments."""
    import pyarrow as pa

    from tasks.replay.segments import read_line, scan, unsealed_files

    look = Shards(ledger, workspace)
    seen: set[str] = set()
    for shard, dataset in _recorded(ledger):
        if shard["path"] not in seen:
            seen.add(shard["path"])
            yield Place(shard["path"], shard["sha256"], dataset, 0), look.rows(shard)
    for path in sorted(workspace.runs.glob("*/fresh/*.parquet")):
        name = workspace.relative(path)
        if name not in seen:  # of a run that failed, was killed, or is at work
            shard = {"path": name, "sha256": sha256_file(path)}
            yield Place(name, shard["sha256"], "", 0), look.rows(shard)
    for dataset, path in unsealed_files(workspace):
        rows = [read_line(line) for group in scan(path).groups for line in group]
        columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in FACTS}
        yield Place(workspace.relative(path), "", dataset, 0), pa.table(columns)


def _recorded(ledger: Entries) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The shards that the ledger knows, each with the name of its dataset ("" for a run's own)."""
    for entry in ledger.entries("dataset.sealed"):
        for shard in entry.payload["shards"]:
            yield shard, entry.payload["name"]
    for entry in ledger.entries("run.finished"):
        for shard in entry.payload["outputs"].get("fresh", ()):
            yield shard, ""


def _shards_of(ledger: Entries, target: Target) -> set[str]:
    """Digests of the shards of a dataset version, or of one shard."""
    entries = ledger.entries("dataset.sealed")
    if target.kind == "dataset":
        return {shard["sha256"] for shard in _version(ledger, target).payload["shards"]}
    shards = [shard for entry in entries for shard in entry.payload["shards"]]
    found = {shard["sha256"] for shard in shards if target.name in (shard["path"], shard["sha256"])}
    if not found:
        raise NotFound(f"No dataset holds a shard {target.name}; `forebay lineage dataset:NAME` lists them.")
    return found


def _version(ledger: Entries, target: Target) -> Entry:
    entries = ledger.entries("dataset.sealed")
    for entry in reversed(entries):
        if target.name in (entry.subject, entry.payload["name"]) or (
            len(target.name) >= 8 and entry.payload["root"].startswith(target.name)
        ):
            return entry
    known = ", ".join(entry.subject for entry in entries[-5:]) or "none yet"
    raise NotFound(f"There is no dataset {target.name}; the newest are: {known}.")


def _collected(table: pa.Table, key: str, value: str) -> dict[str, frozenset[str]]:
    pairs = table.group_by([key, value]).aggregate([])
    found: dict[str, set[str]] = {}
    for name, one in zip(pairs[key].to_pylist(), pairs[value].to_pylist(), strict=True):
        found.setdefault(name, set()).add(one)
    return {name: frozenset(ones) for name, ones in found.items()}


def _is_prompt(target: Target) -> bool:
    return target.kind == "prompt" and len(target.name) == 64 and set(target.name) <= set("0123456789abcdef")


def _array(values: Iterable[str]) -> pa.Array:
    import pyarrow as pa

    return pa.array(sorted(values), pa.string())


def _rank(found: Descendant) -> int:
    return min((_OFFICES.index(role) for role in found.roles if role in _OFFICES), default=len(_OFFICES))


def _checked(path: Path, sha256: str) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"{path} is gone; restore it from a backup.") from None
    if sha256_bytes(data) != sha256:
        raise Corrupt(f"{path} was changed: its bytes are not those of the digest {sha256[:12]}….")
    return data


def names(found: Sequence[Descendant]) -> str:
    """Return the names of descendants for a sentence."""
    return ", ".join(f"{d.ref} ({d.roles[0]})" if d.roles else d.ref for d in found) or "nobody"
