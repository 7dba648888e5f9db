"""Verification: everything behind an agent or a dataset is hashed again. Not even the ledger is trusted.

Signatures are checked too: of the ledger's heads, of the decisions behind the agent, of people's answers to them.
What was recorded before the workspace had keys is unsigned, which is told and is no fault.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tasks.core.digest import digest_files, digest_json, digest_tree, sha256_bytes, sha256_file
from tasks.core.errors import Corrupt, ForebayError, NotFound, UsageError
from tasks.core.heads import check_heads
from tasks.core.keys import Trust, read_trust
from tasks.core.ledger import Entry, Ledger
from tasks.core.workspace import Workspace
from tasks.lineage.graph import lineage
from tasks.lineage.index import Index
from tasks.lineage.types import File, Kind, Lineage, Node
from tasks.promotion.attest import Changed, Unsigned, check_answer, check_decision, read_signature
from tasks.promotion.canary import Recomputer
from tasks.promotion.kept_heads import kept_head
from tasks.replay.manifest import Manifest, dataset_root

Progress = Callable[[int, int, str], None]
"""progress(files done, files in all, note)"""

_THREADS = 8  # hashing lets go of the interpreter; more threads only make a disk seek


@dataclass(frozen=True)
class Problem:
    """Something that is not what its digest says.

    Attributes:
        problem: "missing", "changed", "unreadable", or "added": in an agent's folder, but never registered. Of a
            signature: "unsigned" though the workspace had keys, "forged", or by a "wrong key".
        path: relative to the workspace, or "ledger".
        owner: what it belongs to: "agent/3", "dataset main/v2", ….
        expected: the SHA-256 it must have; empty where there is none.
        found: the SHA-256 it has (for "unreadable" the system's reason); None where it is missing.
    """

    problem: Literal["missing", "changed", "unreadable", "added", "unsigned", "forged", "wrong key"]
    path: str
    owner: str
    expected: str
    found: str | None


@dataclass(frozen=True)
class VerifyReport:
    """What a verification found.

    Attributes:
        ref: what was asked for.
        ok: nothing differs.
        checked: how many digests were computed and compared, ledger entries included.
        bytes: how much was read again from files.
        entries: how long the ledger's chain is, as far as it holds.
        head: the digest of the ledger's last entry, empty where the chain is broken. Whoever keeps it
            elsewhere can tell later whether entries were cut off.
        problems: what differs, sorted by path.
        signatures: how many were verified: heads of the ledger, decisions, approvals and rejections.
        unsigned: what was recorded before the workspace had keys.
    """

    ref: str
    ok: bool
    checked: int
    bytes: int
    entries: int
    head: str
    problems: tuple[Problem, ...]
    signatures: int = 0
    unsigned: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[Problem, ...]:
        """The files that are not there."""
        return tuple(problem for problem in self.problems if problem.problem == "missing")

    @property
    def changed(self) -> tuple[Problem, ...]:
        """The files and entries whose bytes differ."""
        return tuple(problem for problem in self.problems if problem.problem == "changed")


def verify(
    ledger: Ledger,
    workspace: Workspace,
    ref: str,
    progress: Progress = lambda done, total, note: None,
) -> VerifyReport:
    """Hash again the ledger's chain and every file behind `ref`, and compute again every digest over digests.

    Raises:
        NotFound, UsageError: `ref` names nothing, or several things; see `lineage`.
    """
    problems: list[Problem] = []
    entries, head = 0, ""
    try:
        entries, head = ledger.verify_chain(), ledger.head()
    except Corrupt as error:
        problems.append(Problem("changed", "ledger", str(error), "", None))
    trust, adopted = _trust(ledger, workspace, problems)
    signatures, heads = (
        check_heads(ledger, workspace.heads, trust, kept_head(workspace)) if trust else (0, [])
    )
    problems += (Problem(h.problem, "ledger", h.says, h.expected, h.found) for h in heads)
    if trust and not signatures:
        problems.append(Problem("missing", workspace.relative(workspace.heads), "signed heads", "", None))
    try:
        found = lineage(ledger, workspace, ref, Index.derive(ledger))
    except (ForebayError, ValueError):
        if not problems:
            raise
        return VerifyReport(ref, False, 0, 0, entries, head, tuple(problems))  # the ledger is past reading
    claims, checks = _claims(workspace, found)
    for entry in ledger.entries("rollback.committed"):  # what deposed a champion without a person
        if "evidence" in entry.payload:
            owner = f"rollback to {entry.subject} (ledger entry {entry.seq})"
            claims.setdefault(File(**entry.payload["evidence"]), owner)
    looks = _looks(ledger)
    for file, owner in looks.items():
        claims.setdefault(file, owner)
    size = 0
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        jobs = {pool.submit(_hash, workspace.root, file, owner): file for file, owner in claims.items()}
        for done, job in enumerate(as_completed(jobs), start=1):
            problem, length = job.result()
            size += length
            problems += [problem] if problem else []
            progress(done, len(jobs), f"{size / 1e6:,.0f} MB read")
    problems += _misjudged(workspace, looks)
    problems += (check for check in checks if check.expected != check.found)
    problems += (
        Problem("missing", "ledger", f"the entry of {_owner(node)}", node.digest or "", None)
        for node in found.nodes.values()
        if not node.known
    )
    problems += _added(workspace, found)
    signed, wrong, unsigned = _signed(ledger, workspace, found, trust, adopted)
    problems += wrong
    problems.sort(key=lambda problem: (problem.path, problem.owner, problem.problem))
    return VerifyReport(
        ref=ref,
        ok=not problems,
        checked=entries + len(claims) + len(checks),
        bytes=size,
        entries=entries,
        head=head,
        problems=tuple(problems),
        signatures=signatures + signed,
        unsigned=tuple(unsigned),
    )


def _trust(ledger: Ledger, workspace: Workspace, problems: list[Problem]) -> tuple[Trust | None, int | None]:
    """Return the trusted keys and the entry with which the workspace adopted keys, None where it has none."""
    try:
        first = next(iter(ledger.entries("key.trusted")), None)
        adopted = None if first is None else first.seq
    except ValueError:  # a row that is past reading; the chain has named it
        adopted = 0
    if not workspace.trust.exists():
        if adopted is not None:
            problems.append(Problem("missing", workspace.trust.name, "the trusted keys", "", None))
        return None, adopted
    try:
        return read_trust(workspace.trust), adopted
    except UsageError as error:
        problems.append(Problem("unreadable", workspace.trust.name, "the trusted keys", "", str(error)))
        return None, adopted


def _signed(
    ledger: Ledger, workspace: Workspace, found: Lineage, trust: Trust | None, adopted: int | None
) -> tuple[int, list[Problem], list[str]]:
    """Check the signatures of the decisions in `found` and of the answers to them."""
    wanted = {key for kind, key in found.nodes if kind == "decision"}
    entries = {e.payload["decision"]: e for e in ledger.entries("decision.made")}  # the newest of each
    answers = [*ledger.entries("approval.granted"), *ledger.entries("approval.rejected")]
    behind = [entries[key] for key in sorted(wanted & entries.keys())]
    behind += [entry for entry in answers if entry.payload["decision"] in wanted]
    good, problems, unsigned = 0, [], []
    for entry in sorted(behind, key=lambda e: e.seq):
        owner = f"{entry.kind.replace('.', ' ')} of {entry.subject} (ledger entry {entry.seq})"
        path = entry.payload["record"]["path"] if entry.kind == "decision.made" else "ledger"
        if adopted is None or (entry.seq < adopted and "signature" not in entry.payload):
            unsigned.append(owner)
        elif trust is None:
            continue  # named already: without keys.yaml nothing can be told
        elif (problem := _check_signature(workspace, entry, trust, path, owner)) is not None:
            problems.append(problem)
        else:
            good += 1
    return good, problems, unsigned


def _check_signature(
    workspace: Workspace, entry: Entry, trust: Trust, path: str, owner: str
) -> Problem | None:
    try:
        if entry.kind == "decision.made":
            envelope = read_signature(workspace.root, entry)
            check_decision(entry, envelope, trust, at=entry.seq)
        else:
            check_answer(entry, trust, at=entry.seq)
    except (NotFound, Changed):
        return None  # hashing the file has named it
    except Unsigned:
        return Problem("unsigned", path, owner, "", None)
    except Corrupt as error:
        return Problem("forged", path, f"{owner}: {error}", "", None)
    except ForebayError as error:
        return Problem("wrong key", path, f"{owner}: {error}", "", None)
    return None


def _claims(workspace: Workspace, found: Lineage) -> tuple[dict[File, str], list[Problem]]:
    """Return each file to hash and what it belongs to, and digests over digests (problems if they differ)."""
    holder = {edge.target: found.nodes[edge.source] for edge in found.edges if edge.relation == "holds"}
    claims: dict[File, str] = {}
    checks: list[Problem] = []
    for ref, node in found.nodes.items():
        for file in node.files:
            claims.setdefault(file, _owner(holder.get(ref, node)))
    for node in found.nodes.values():
        inside = _INSIDE[node.kind](workspace, node) if node.known and node.kind in _INSIDE else ()
        for item in inside:
            if isinstance(item, File):
                claims.setdefault(item, _owner(node))
            else:
                checks.append(item)
    return claims, checks


def _folder(workspace: Workspace, node: Node) -> Iterator[Problem]:
    """The digest of an agent or a checkpoint follows from the digests of its files."""
    folder = node.facts["path"]
    inside = (
        file for file in node.files if file.path.startswith(f"{folder}/")
    )  # a run has fresh shards beside it
    files = {file.path.removeprefix(f"{folder}/"): file.sha256 for file in inside}
    expected = node.facts["digest"] if node.kind == "run" else node.digest
    yield Problem("changed", folder, _owner(node), expected or "", digest_files(files))


def _manifest(workspace: Workspace, node: Node) -> Iterator[File | Problem]:
    """The root of a dataset version follows from the shards that its manifest lists; they are its files."""
    data = _intact(workspace, node.files[0])
    if data is None:
        return
    manifest = Manifest.from_dict(json.loads(data))
    yield Problem(
        "changed",
        node.files[0].path,
        f"root of {_owner(node)}",
        node.digest or "",
        dataset_root(manifest.shards),
    )
    for shard in manifest.shards:
        yield File(shard.path, shard.sha256)


def _reward_model(workspace: Workspace, node: Node) -> Iterator[Problem]:
    """The digest of a reward model follows from the files in its folder."""
    folder = node.facts.get("path")
    if folder is None:
        return
    found = digest_files(digest_tree(workspace.root / folder)) if (workspace.root / folder).is_dir() else None
    problem: Literal["missing", "changed"] = "changed" if found else "missing"
    yield Problem(problem, folder, _owner(node), node.digest or "", found)


def _record(workspace: Workspace, node: Node) -> Iterator[File | Problem]:
    """A decision record holds the whole policy, and names the evidence files it rests on."""
    data = _intact(workspace, node.files[0])
    if data is None:
        return
    record = json.loads(data)
    policy = digest_json(record["policy"])
    yield Problem("changed", node.files[0].path, f"policy of {_owner(node)}", record["policy_digest"], policy)
    for file in record["inputs"].values():
        if isinstance(file, dict) and "path" in file:  # the others are findings and budgets
            yield File(workspace.relative(workspace.evidence / file["path"]), file["sha256"])


_INSIDE: dict[Kind, Callable[[Workspace, Node], Iterable[File | Problem]]] = {
    "agent": _folder,
    "run": _folder,
    "dataset": _manifest,
    "decision": _record,
    "reward": _reward_model,
    "source": _folder,
}


def _intact(workspace: Workspace, file: File) -> bytes | None:
    """Return the bytes of `file`, or None where they are not what they must be (hashing it reports that)."""
    try:
        data = (workspace.root / file.path).read_bytes()
    except OSError:
        return None
    return data if sha256_bytes(data) == file.sha256 else None


def _hash(root: Path, file: File, owner: str) -> tuple[Problem | None, int]:
    """Return the problem with `file`, if there is one, and how many bytes were read."""
    path = root / file.path
    try:
        digest, length = sha256_file(path), path.stat().st_size
    except FileNotFoundError:
        return Problem("missing", file.path, owner, file.sha256, None), 0
    except OSError as error:
        return Problem("unreadable", file.path, owner, file.sha256, error.strerror), 0
    return (
        None if digest == file.sha256 else Problem("changed", file.path, owner, file.sha256, digest)
    ), length


def _looks(ledger: Ledger) -> dict[File, str]:
    """Return the records of all canaries' looks: what they say keeps a champion in office, or deposed it."""
    entries = [*ledger.entries("canary.looked"), *ledger.entries("canary.ended")]
    return {
        File(**e.payload["record"]): f"canary of {e.subject} (ledger entry {e.seq})"
        for e in reversed(entries)
    }


def _misjudged(workspace: Workspace, looks: dict[File, str]) -> Iterator[Problem]:
    """Every intact record of a look is judged again: its groups must lead to what it says."""
    canaries = Recomputer()
    for file, owner in reversed(looks.items()):  # from the first look on
        if _intact(workspace, file) is None:
            continue  # hashing the file has named it
        try:
            canaries.check(workspace.root / file.path, file.sha256)
        except (Corrupt, ValueError, KeyError, TypeError):
            yield Problem("changed", file.path, f"result of the {owner}", file.sha256, None)


def _added(workspace: Workspace, found: Lineage) -> Iterator[Problem]:
    """A file that appears in an agent's folder can change the agent: libraries load what they find there."""
    for node in found.nodes.values():
        if node.kind not in ("agent", "source") or not node.known:
            continue
        registered = {file.path for file in node.files}
        for path in sorted((workspace.root / node.facts["path"]).rglob("*")):
            name = path.relative_to(workspace.root).as_posix()
            if path.is_file() and name not in registered:
                yield Problem("added", name, _owner(node), "", sha256_file(path))


def _owner(node: Node) -> str:
    return node.name if node.kind in ("agent", "source") else f"{node.kind} {node.name}"
