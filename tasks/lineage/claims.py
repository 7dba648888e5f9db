"""What the ledger claims of files: the digest each must have, and the digests that must follow from other digests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from tasks.core.digest import digest_files, digest_json, sha256_bytes
from tasks.core.errors import Corrupt
from tasks.core.ledger import Ledger
from tasks.core.workspace import Workspace
from tasks.lineage.report import Problem
from tasks.lineage.types import File, Kind, Lineage, Node
from tasks.promotion.canary import Recomputer
from tasks.replay.manifest import Manifest, dataset_root


@dataclass(frozen=True)
class Tree:
    """A folder that is known by one digest over the files in it."""

    path: str
    sha256: str
    owner: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Claims:
    """What must hold.

    Attributes:
        files: each file with its digest, and what it belongs to.
        trees: folders that are known by one digest.
        added: files in an agent's folder that nobody registered, and whose folder it is.
        checks: digests over digests; a problem where expected and found differ.
        looks: the records of canaries among `files`.
    """

    files: dict[File, str] = field(default_factory=dict)
    trees: list[Tree] = field(default_factory=list)
    added: dict[str, str] = field(default_factory=dict)
    checks: list[Problem] = field(default_factory=list)
    looks: dict[File, str] = field(default_factory=dict)

    def paths(self) -> list[str]:
        """Return every file that is to be hashed, each once."""
        trees = (path for tree in self.trees for path in tree.files)
        return list(dict.fromkeys([*(file.path for file in self.files), *trees, *self.added]))


def gather(ledger: Ledger, workspace: Workspace, found: Lineage) -> Claims:
    """Return all that must hold for `found` to be what it was."""
    claims = Claims()
    holder = {edge.target: found.nodes[edge.source] for edge in found.edges if edge.relation == "holds"}
    for ref, node in found.nodes.items():
        for file in node.files:
            claims.files.setdefault(file, owner_of(holder.get(ref, node)))
    for node in found.nodes.values():
        inside = _INSIDE[node.kind](workspace, node) if node.known and node.kind in _INSIDE else ()
        for item in inside:
            if isinstance(item, File):
                claims.files.setdefault(item, owner_of(node))
            elif isinstance(item, Tree):
                claims.trees.append(item)
            else:
                claims.checks.append(item)
    for entry in ledger.entries("rollback.committed"):  # what deposed a champion without a person
        if "evidence" in entry.payload:
            owner = f"rollback to {entry.subject} (ledger entry {entry.seq})"
            claims.files.setdefault(File(**entry.payload["evidence"]), owner)
    for kind in (
        "data.revoked",
        "data.erasing",
    ):  # which rows were meant, and what was kept of those that went
        for entry in ledger.entries(kind):
            for name in ("lists", "facts"):
                if name in entry.payload:
                    kept = entry.payload[name]
                    owner = f"{kind.replace('.', ' ')} {entry.subject} (ledger entry {entry.seq})"
                    claims.files.setdefault(File(kept["path"], kept["sha256"]), owner)
    claims.looks.update(_looks(ledger))
    for file, owner in claims.looks.items():
        claims.files.setdefault(file, owner)
    claims.added.update(_added(workspace, found))
    return claims


def owner_of(node: Node) -> str:
    """Return what people call a node."""
    return node.name if node.kind in ("agent", "source") else f"{node.kind} {node.name}"


def misjudged(workspace: Workspace, looks: dict[File, str]) -> Iterator[Problem]:
    """Every intact record of a look is judged again: its groups must lead to what it says."""
    canaries = Recomputer()
    for file, owner in reversed(looks.items()):  # from the first look on
        if _intact(workspace, file) is None:
            continue  # hashing the file has named it
        try:
            canaries.check(workspace.root / file.path, file.sha256)
        except (Corrupt, ValueError, KeyError, TypeError):
            yield Problem("changed", file.path, f"result of the {owner}", file.sha256, None)


def _folder(workspace: Workspace, node: Node) -> Iterator[Problem]:
    """The digest of an agent or a checkpoint follows from the digests of its files."""
    folder = node.facts["path"]
    inside = (
        file for file in node.files if file.path.startswith(f"{folder}/")
    )  # a run has fresh shards beside it
    files = {file.path.removeprefix(f"{folder}/"): file.sha256 for file in inside}
    expected = node.facts["digest"] if node.kind == "run" else node.digest
    yield Problem("changed", folder, owner_of(node), expected or "", digest_files(files))


def _manifest(workspace: Workspace, node: Node) -> Iterator[File | Problem]:
    """The root of a dataset version follows from the shards that its manifest lists; they are its files."""
    data = _intact(workspace, node.files[0])
    if data is None:
        return
    manifest = Manifest.from_dict(json.loads(data))
    yield Problem(
        "changed",
        node.files[0].path,
        f"root of {owner_of(node)}",
        node.digest or "",
        dataset_root(manifest.shards),
    )
    for shard in manifest.shards:
        yield File(shard.path, shard.sha256)


def _reward_model(workspace: Workspace, node: Node) -> Iterator[Tree]:
    """The digest of a reward model follows from the files in its folder."""
    folder = node.facts.get("path")
    if folder is not None:
        inside = tuple(_inside(workspace, folder))
        yield Tree(folder, node.digest or "", owner_of(node), inside)


def _record(workspace: Workspace, node: Node) -> Iterator[File | Problem]:
    """A decision record holds the whole policy, and names the evidence files it rests on."""
    data = _intact(workspace, node.files[0])
    if data is None:
        return
    record = json.loads(data)
    policy = digest_json(record["policy"])
    yield Problem(
        "changed", node.files[0].path, f"policy of {owner_of(node)}", record["policy_digest"], policy
    )
    for file in record["inputs"].values():
        if isinstance(file, dict) and "path" in file:  # the others are findings and budgets
            yield File(workspace.relative(workspace.evidence / file["path"]), file["sha256"])


_INSIDE: dict[Kind, Callable[[Workspace, Node], Iterable[File | Tree | Problem]]] = {
    "agent": _folder,
    "run": _folder,
    "dataset": _manifest,
    "decision": _record,
    "reward": _reward_model,
    "source": _folder,
}


def _looks(ledger: Ledger) -> dict[File, str]:
    """Return the records of all canaries' looks: what they say keeps a champion in office, or deposed it."""
    entries = [*ledger.entries("canary.looked"), *ledger.entries("canary.ended")]
    return {
        File(**e.payload["record"]): f"canary of {e.subject} (ledger entry {e.seq})"
        for e in reversed(entries)
    }


def _added(workspace: Workspace, found: Lineage) -> Iterator[tuple[str, str]]:
    """A file that appears in an agent's folder can change the agent: libraries load what they find there."""
    for node in found.nodes.values():
        if node.kind in ("agent", "source") and node.known:
            registered = {file.path for file in node.files}
            names = _inside(workspace, node.facts["path"])
            yield from ((name, owner_of(node)) for name in names if name not in registered)


def _inside(workspace: Workspace, folder: str) -> Iterator[str]:
    """Yield the files in a folder, and links to other folders, relative to the workspace, in order."""
    found = []
    for place, folders, names in os.walk(workspace.root / folder):
        here = os.path.relpath(place, workspace.root).replace(os.sep, "/")
        links = (name for name in folders if os.path.islink(os.path.join(place, name)))
        found += [f"{here}/{name}" for name in (*names, *links)]
    return iter(sorted(found))


def _intact(workspace: Workspace, file: File) -> bytes | None:
    """Return the bytes of `file`, or None where they are not what they must be (hashing it reports that)."""
    path = workspace.root / file.path
    try:
        data = path.read_bytes() if path.is_file() else b""  # opening a pipe would wait for ever
    except OSError:
        return None
    return data if sha256_bytes(data) == file.sha256 else None
