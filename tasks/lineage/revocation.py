"""Revocation: what may not be learnt from any more. Who has learnt from it: `tasks.lineage.flagged`.

The ledger's entries `data.revoked` and `data.reinstated` are the authority; everything here is read from them, from
manifests and from shards, and nothing here appends to the ledger. Rules:

* A revoked episode takes its whole group out of sampling: an advantage compares the answers of a group, and what is
  left of it would be another estimate than the one that was admitted.
* What is revoked by prompt, source or licence is also revoked where it comes in again later.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from tasks.core.atomic import write_atomic
from tasks.core.digest import canonical_json, sha256_bytes, sha256_file
from tasks.core.errors import Corrupt, NotFound, Refused, UsageError
from tasks.core.ledger import Entry
from tasks.core.workspace import Workspace
from tasks.lineage.erasure import ERASED as ERASED
from tasks.lineage.erasure import ERASING as ERASING
from tasks.lineage.erasure import FACTS, Shards
from tasks.promotion.promote import Entries

if TYPE_CHECKING:
    import pyarrow as pa

    from tasks.replay.schema import Episode

REVOKED, REINSTATED = "data.revoked", "data.reinstated"

Kind = Literal["episode", "group", "prompt", "source", "licence", "shard", "dataset"]
_COLUMN: Mapping[Kind, str] = {
    "episode": "episode_id",
    "group": "group_id",
    "prompt": "prompt_sha256",
    "source": "source",
    "licence": "licence",
}


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

    def with_also(self, other: Revoked) -> Revoked:
        """Return what either revokes."""
        columns = {*self.values, *other.values}
        return Revoked(
            max(self.revision, other.revision),
            {**self.what, **other.what},
            {**self.by_group, **other.by_group},
            self.episodes | other.episodes,
            {c: self.values.get(c, frozenset()) | other.values.get(c, frozenset()) for c in columns},
        )

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
    return cast(dict[str, list[str]], json.loads(checked(workspace.root / file["path"], file["sha256"])))


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


def without(table: pa.Table, now: Revoked) -> pa.Table:
    """Return the rows of a table (with the columns of an episode) whose groups are not revoked."""
    import pyarrow.compute as pc

    if not now:
        return table
    gone = Facts.of(table.select(FACTS), now).direct
    return table.filter(pc.invert(pc.is_in(table["group_id"], _array(gone))))


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


def quoted(workspace: Workspace, now: Revoked) -> tuple[Place, ...]:
    """Return the sets of preferences that hold a pair which `now` revokes; `rows` are such pairs."""
    found = []
    for path in sorted(workspace.preferences.glob("*.jsonl")):
        with path.open() as stream:
            pairs = sum(pair_revoked(pair, now) is not None for pair in map(json.loads, stream))
        if pairs:
            found.append(Place(workspace.relative(path), sha256_file(path), "", pairs))
    return tuple(found)


# --------------------------------------------------------------------------------------------------------- reading


def _everything(ledger: Entries, workspace: Workspace) -> Iterator[tuple[Place, pa.Table]]:
    """Every file that holds episodes now: sealed shards, shards of runs (also of such that did not end well) and of the
    arena, segments."""
    import pyarrow as pa

    from tasks.replay.segments import read_line, scan, unsealed_files

    look = Shards(ledger, workspace)
    seen: set[str] = set()
    for shard, dataset in _recorded(ledger):
        if shard["path"] not in seen:
            seen.add(shard["path"])
            yield Place(shard["path"], shard["sha256"], dataset, 0), look.rows(shard)
    for path in _sampled(workspace):
        name = workspace.relative(path)
        if name not in seen:  # of the arena, or of a run that failed, was killed, or is at work
            shard = {"path": name, "sha256": sha256_file(path)}
            yield Place(name, shard["sha256"], "", 0), look.rows(shard)
    for dataset, path in unsealed_files(workspace):
        rows = [read_line(line) for group in scan(path).groups for line in group]
        columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in FACTS}
        yield Place(workspace.relative(path), "", dataset, 0), pa.table(columns)


def _sampled(workspace: Workspace) -> Iterator[Path]:
    """The shards that training runs, the arena's among them, sampled for themselves."""
    yield from sorted(workspace.runs.glob("*/fresh/*.parquet"))
    arena = workspace.state / "arena"
    for pattern in ("cells/*/fresh/*.parquet", "cells/*/first.parquet", "starts/*/demonstrations.parquet"):
        yield from sorted(arena.glob(pattern))


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


def checked(path: Path, sha256: str) -> bytes:
    """Return the bytes of a file.

    Raises:
        NotFound: it is gone. Corrupt: it was changed.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"{path} is gone; restore it from a backup.") from None
    if sha256_bytes(data) != sha256:
        raise Corrupt(f"{path} was changed: its bytes are not those of the digest {sha256[:12]}….")
    return data
