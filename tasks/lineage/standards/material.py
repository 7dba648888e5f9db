"""What the exports are made of: a lineage, and the facts that stand in the files its nodes name.

A file is used only if its bytes are those of the digest in the ledger; so an export says nothing that was altered.
"""

from __future__ import annotations

import io
import json
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from tasks.core.digest import sha256_bytes
from tasks.core.errors import Corrupt, NotFound
from tasks.core.ledger import Ledger
from tasks.core.workspace import Workspace
from tasks.lineage.flagged import open_flags
from tasks.lineage.graph import lineage
from tasks.lineage.revocation import ERASED
from tasks.lineage.types import Edge, File, Kind, Lineage, Node, Ref, Relation
from tasks.replay.manifest import Manifest

NOT_RECORDED = "not recorded"
_Key = tuple[str, str, str, str, str]
_PORTION = ["source", "licence", "env", "env_version", "split"]  # the fields of `_Key`


@dataclass(frozen=True, order=True)
class Portion:
    """Rows of one source, licence, environment and split."""

    source: str
    licence: str
    env: str
    env_version: str
    split: str
    rows: int
    groups: int


@dataclass(frozen=True)
class Composition:
    """What a dataset version is made of.

    Attributes:
        portions: sorted; their rows and groups add up to those of the shards that are here.
        absent: the paths of shards that are not in the workspace, so that nothing was counted in them.
        erased: the paths of shards that were erased on purpose.
    """

    portions: tuple[Portion, ...]
    absent: tuple[str, ...] = ()
    erased: tuple[str, ...] = ()

    @property
    def licences(self) -> list[str]:
        """The licences of the rows, sorted."""
        return sorted({portion.licence for portion in self.portions})

    @property
    def sources(self) -> list[str]:
        """The sources of the rows, sorted."""
        return sorted({portion.source for portion in self.portions})


@dataclass(frozen=True)
class Material:
    """A lineage and what its files say.

    Attributes:
        ledger: digest of the ledger's first entry, which tells workspaces apart.
        manifests: of each dataset version.
        shards: the portions of each shard by path, those that a run sampled itself included; None where it is not here.
        records: of each decision.
        signatures: the envelope of each decision that is signed.
        flags: why an agent or a reward model of the lineage learnt from revoked data, of each that did.
        erased: what was revoked, and why, of each shard whose bytes were erased on purpose, by path.
    """

    lineage: Lineage
    ledger: str
    manifests: Mapping[Ref, Manifest] = field(default_factory=dict)
    shards: Mapping[str, tuple[Portion, ...] | None] = field(default_factory=dict)
    records: Mapping[Ref, Mapping[str, Any]] = field(default_factory=dict)
    signatures: Mapping[Ref, bytes] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    erased: Mapping[str, str] = field(default_factory=dict)

    @property
    def root(self) -> Node:
        """The node that was asked for."""
        return self.node(self.lineage.root)

    @property
    def namespace(self) -> str:
        """A name for the workspace that is its own, and stays when it is moved or copied."""
        return f"forebay://{self.ledger[:16]}"

    def node(self, ref: Ref) -> Node:
        """Return the node."""
        return self.lineage.nodes[ref]

    def of(self, *kinds: Kind) -> Iterator[tuple[Ref, Node]]:
        """Yield the nodes of these kinds that the ledger knows."""
        for ref, node in self.lineage.nodes.items():
            if ref[0] in kinds and node.known:
                yield ref, node

    def known(self, ref: Ref, relation: Relation) -> list[Ref]:
        """Return what `ref` has this relation to and the ledger has an entry of."""
        return [target for target in self.behind(ref, relation) if self.node(target).known]

    def behind(self, ref: Ref, relation: Relation) -> list[Ref]:
        """Return what `ref` has this relation to."""
        return [edge.target for edge in self.lineage.following[ref] if edge.relation == relation]

    def bases(self, agent: Ref) -> list[Ref]:
        """Return the base model that an agent descends from, or was converted from."""
        return [*self.behind(agent, "converted from"), *self.behind(agent, "descends from")]

    def without(self, ref: Ref) -> list[str]:
        """Return the paths of the parent's shards that a dataset version holds no more: some were revoked."""
        held = {shard.sha256 for shard in self.manifests[ref].shards}
        parents = [self.manifests[p] for p in self.behind(ref, "continues") if p in self.manifests]
        return [shard.path for parent in parents for shard in parent.shards if shard.sha256 not in held]

    def flag(self, ref: Ref) -> str | None:
        """Return why an agent or a reward model counts as having learnt from revoked data, None where it does not."""
        return self.flags.get(ref[1]) if ref[0] in ("agent", "source") else None

    def open_flags(self) -> list[str]:
        """Say which revoked data the root learnt from: its own flag, and those of what it descends from."""
        if self.flag(self.lineage.root) is None:
            return []
        return [f"{ref[1]} {why}" for ref in self.lineage.shaping if (why := self.flag(ref)) is not None]

    def composition(self, ref: Ref) -> Composition:
        """Return what a dataset version is made of, or what a run sampled while it trained."""
        return self._compositions[ref]

    @cached_property
    def _compositions(self) -> Mapping[Ref, Composition]:
        datasets = {
            ref: [shard.path for shard in manifest.shards] for ref, manifest in self.manifests.items()
        }
        runs = {ref: [file.path for file in fresh_of(node)] for ref, node in self.of("run")}
        return {ref: self._composed(paths) for ref, paths in (datasets | runs).items()}

    def _composed(self, paths: Sequence[str]) -> Composition:
        rows: Counter[_Key] = Counter()
        groups: Counter[_Key] = Counter()
        absent: list[str] = []
        erased: list[str] = []
        for path in paths:
            portions = self.shards[path]
            if portions is None:
                (erased if path in self.erased else absent).append(path)
                continue
            for p in portions:
                key = (p.source, p.licence, p.env, p.env_version, p.split)
                rows[key] += p.rows
                groups[key] += p.groups
        return Composition(
            tuple(Portion(*key, rows[key], groups[key]) for key in sorted(rows)),
            tuple(absent),
            tuple(erased),
        )

    def newest_decision(self, ref: Ref) -> Ref | None:
        """Return the newest decision about an agent."""
        return max(
            self.behind(ref, "judged by"), key=lambda made: self.node(made).facts["time"], default=None
        )

    @cached_property
    def time(self) -> str:
        """When the newest thing in the lineage was recorded."""
        names = ("registered", "finished", "sealed", "time")
        found = [
            node.facts[name] for node in self.lineage.nodes.values() for name in names if name in node.facts
        ]
        return utc(max(found))

    def uuid(self, *words: str) -> str:
        """Return an id that is the same for the same words in the same workspace (UUID version 5)."""
        return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join([self.namespace, *words])))


def gather(ledger: Ledger, workspace: Workspace, ref: str) -> Material:
    """Read the lineage of `ref` and the files in which its facts stand.

    Raises:
        NotFound, UsageError: see `lineage`; or a manifest or a decision's record is gone.
        Corrupt: a file is not what its digest says.
    """
    found = lineage(ledger, workspace, ref)
    gone = erasures(ledger)
    first = next(iter(ledger.entries()), None)
    assert first is not None  # there is a lineage, so there is an entry
    known = [(ref, node) for ref, node in found.nodes.items() if node.known]
    manifests = {
        ref: Manifest.from_dict(json.loads(_read(workspace, node.files[0])))
        for ref, node in known
        if ref[0] == "dataset"
    }
    decisions = [(ref, node) for ref, node in known if ref[0] == "decision"]
    shards = {s.path: File(s.path, s.sha256) for manifest in manifests.values() for s in manifest.shards}
    shards |= {file.path: file for ref, node in known if ref[0] == "run" for file in fresh_of(node)}
    return Material(
        lineage=Lineage(
            found.root,
            {ref: _portable(node) for ref, node in sorted(found.nodes.items())},
            tuple(sorted(found.edges, key=_words)),
        ),
        ledger=first.digest,
        manifests=manifests,
        shards={path: _portions(workspace, shard) for path, shard in shards.items()},
        records={ref: json.loads(_read(workspace, node.files[0])) for ref, node in decisions},
        signatures={ref: _read(workspace, node.files[1]) for ref, node in decisions if len(node.files) > 1},
        flags={flag.ref: flag.why for flag in open_flags(ledger, workspace)},
        erased={path: gone[shard.sha256] for path, shard in shards.items() if shard.sha256 in gone},
    )


def erasures(ledger: Ledger) -> dict[str, str]:
    """Return {SHA-256 of a file that was erased on purpose: what was revoked, and why}."""
    return {
        file["sha256"]: f"{entry.payload['what']}: {entry.payload['reason']}"
        for entry in ledger.entries(ERASED)
        for file in entry.payload["files"]
    }


def _portable(node: Node) -> Node:
    """Return a node without paths of this machine: of a base model and of a remote only the last part is left."""
    facts = dict(node.facts)
    if facts.get("source"):
        facts["source"] = {**facts["source"], "name": _last_part(facts["source"]["name"])}
    if facts.get("dvc"):
        facts["dvc"] = {**facts["dvc"], "remote": _last_part(facts["dvc"]["remote"])}
    return replace(node, name=_last_part(node.name) if node.kind == "base" else node.name, facts=facts)


def _last_part(name: str) -> str:
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.is_absolute() or path.parts[:1] in (("..",), ("~",), (".",)):
            return path.name
    return name


def _words(edge: Edge) -> tuple[Ref, Relation, Ref]:
    """By what edges are sorted, so that an index that was built anew changes no byte."""
    return edge.source, edge.relation, edge.target


def utc(time: str) -> str:
    """Return a time of the ledger as RFC 3339 in UTC, with the letter Z."""
    moment = datetime.fromisoformat(time)
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def name_of(ref: Ref) -> str:
    """Return a name that is one word and no two nodes share: "agent/3", "dataset/main/v2", "run/…"."""
    kind, key = ref
    return key if kind in ("agent", "source") else f"{kind}/{key}"


def beside(run: Node) -> list[File]:
    """Return the files of a run that are no part of its checkpoint: which groups it learnt from, what it sampled."""
    return [file for file in run.files if not file.path.startswith(f"{run.facts['path']}/")]


def fresh_of(run: Node) -> list[File]:
    """Return the shards of the groups that a run sampled from the policy in training (hybrid runs)."""
    return [file for file in beside(run) if file.path.endswith(".parquet")]


def _read(workspace: Workspace, file: File) -> bytes:
    path = workspace.root / file.path
    try:
        data: bytes = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(
            f"There is no {file.path}, in which facts of this export stand; restore it from a backup."
        ) from None
    if sha256_bytes(data) != file.sha256:
        raise Corrupt(
            f"{file.path} is not what the ledger says (its SHA-256 differs); `forebay verify` says more."
        )
    return data


def _portions(workspace: Workspace, shard: File) -> tuple[Portion, ...] | None:
    """Count the rows of a shard, None where it is not here."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not (workspace.root / shard.path).exists():
        return None
    data = _read(workspace, shard)
    try:
        table = pq.read_table(io.BytesIO(data), columns=[*_PORTION, "group_id"])
        counted = table.group_by(_PORTION).aggregate([([], "count_all"), ("group_id", "count_distinct")])
    except (pa.ArrowInvalid, KeyError) as error:
        raise Corrupt(f"The shard {shard.path} is no table of episodes ({error}).") from None
    names = {"count_all": "rows", "group_id_count_distinct": "groups"}
    rows = counted.rename_columns([names.get(name, name) for name in counted.column_names]).to_pylist()
    return tuple(sorted(Portion(**row) for row in rows))
