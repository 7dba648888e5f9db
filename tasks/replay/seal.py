"""Sealing: open segments become one immutable, content-addressed version of a dataset.

The ledger entry is the only commit point and comes last. Everything before it is repeatable from the frozen
segments and gives the same bytes, so a seal that was killed anywhere is finished by the next one:

    freeze segments → shards → manifest → DVC add and push → git commit of pointers → ledger → drop segments
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tasks.core.atomic import write_atomic
from tasks.core.digest import sha256_bytes
from tasks.core.errors import Conflict, NotFound, UsageError
from tasks.core.ledger import Ledger, LedgerView
from tasks.core.locks import file_lock
from tasks.core.settings import Replay
from tasks.core.workspace import Workspace
from tasks.replay import dvc_store, git_pointer, segments, shards
from tasks.replay.index import RowIndex
from tasks.replay.manifest import Manifest, Shard
from tasks.replay.segments import Line
from tasks.replay.shards import read_rows as read_rows

SEALED = "dataset.sealed"


@dataclass(frozen=True)
class SealedDataset:
    """A sealed version, and what sealing it met on the way.

    `dropped` are the ids of episodes that were sealed before (or whose group was), `torn_bytes` the length of
    tails that crashes had cut off, `seconds` where the time went.
    """

    manifest: Manifest
    manifest_path: str
    manifest_sha256: str
    git_commit: str
    dropped: tuple[str, ...] = ()
    torn_bytes: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def root(self) -> str:
        """The identity of the version's rows."""
        return self.manifest.root

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> SealedDataset:
        """Build it from the payload of a `dataset.sealed` entry."""
        manifest = Manifest.from_dict(payload)
        return cls(manifest, payload["manifest"], payload["manifest_sha256"], payload["git_commit"])


def seal(workspace: Workspace, ledger: Ledger, settings: Replay) -> SealedDataset:
    """Seal everything that waits in the open segments of `settings.dataset` as its next version.

    Appending costs what is new: earlier shards are neither read nor hashed. When all that waits was sealed
    before, the present version is returned with the episodes under `dropped`.

    Raises:
        UsageError: nothing waits to be sealed.
        Corrupt: a segment is damaged; its line is named and nothing is sealed.
        Unavailable: the disk is full, or DVC or git failed; run again when that is mended, nothing is lost.
        Conflict: another machine sealed the same version.
    """
    name = settings.dataset
    with locked(workspace, name):
        parent = newest(ledger, name)
        sealed = _finish(workspace, ledger, settings, parent)
        parent = sealed or parent
        folder = segments.take(workspace, name, _next(parent), {"shard_rows": settings.shard_rows})
        if folder is not None:
            sealed = _seal_folder(workspace, ledger, settings, parent, folder) or sealed
        if sealed is None:
            raise UsageError(
                f"There is nothing to seal in dataset {name}: no whole group of episodes waits; "
                f"run `forebay collect` or import some."
            )
        return sealed


def newest(ledger: Ledger, name: str) -> SealedDataset | None:
    """Return the newest sealed version of dataset `name`, or None."""
    last = ledger.last(SEALED)
    if last is not None and last.payload["name"] != name:
        last = next(
            (entry for entry in reversed(ledger.entries(SEALED)) if entry.payload["name"] == name), None
        )
    return SealedDataset.from_payload(last.payload) if last else None


def find(ledger: Ledger, reference: str) -> SealedDataset:
    """Return the version that `reference` names: "main" (its newest), "main/v3", or a root (8 digits or
    more).

    Raises:
        NotFound: there is none; the sentence lists what there is.
    """
    name, slash, _ = reference.partition("/")
    entry = ledger.last(SEALED, reference) if slash else None
    if entry is not None:
        return SealedDataset.from_payload(entry.payload)
    found = None if slash else newest(ledger, name)
    if found is not None:
        return found
    entries = ledger.entries(SEALED)
    by_root = [
        entry for entry in entries if len(reference) >= 8 and entry.payload["root"].startswith(reference)
    ]
    if by_root:
        return SealedDataset.from_payload(by_root[-1].payload)
    known = ", ".join(entry.subject for entry in entries[-5:]) or "none yet"
    raise NotFound(f"There is no sealed dataset {reference}; the newest are: {known}.")


def manifest_path(workspace: Workspace, name: str, version: int) -> Path:
    """Return where the manifest of version `version` of dataset `name` lies."""
    return workspace.replay / name / "manifests" / f"v{version:05d}.json"


def known_groups(workspace: Workspace, ledger: Ledger, name: str) -> set[str]:
    """Return the ids of all groups that are on disk, sealed or waiting: a resumed collection skips them."""
    parent = newest(ledger, name)
    with RowIndex.open(workspace, name) as index:
        if parent is not None:
            index.catch_up(parent.manifest)
        return segments.waiting_groups(workspace, name) | index.sealed_groups()


def seal_rewritten(
    workspace: Workspace, ledger: Ledger, name: str, replaced: Mapping[str, Shard | None], erasing: int
) -> SealedDataset:
    """Seal the newest version of a dataset anew with shards replaced, old ones gone; the lock of the dataset is held.

    The files of the replaced shards are removed from the workspace, so that DVC's pointer does not name them any more. Called
    again after a crash it finds the version that it had sealed.

    Args:
        replaced: {SHA-256 of a shard: what takes its place, None for nothing}.
        erasing: ledger entry of the intent to erase; the new version names it.
    """
    done = [
        e for e in ledger.entries(SEALED) if e.payload.get("erasing") == erasing and e.payload["name"] == name
    ]
    if done:
        return SealedDataset.from_payload(done[-1].payload)
    parent = newest(ledger, name)
    assert parent is not None  # a shard of it is to be replaced
    gone = [shard for shard in parent.manifest.shards if shard.sha256 in replaced]
    left = [replaced.get(shard.sha256, shard) for shard in parent.manifest.shards]
    behaviour = shards.behaviours(workspace, [shard for shard in left if shard is not None])
    manifest = Manifest.rewrite(parent.manifest, replaced, behaviour)
    for shard in gone:
        (workspace.root / shard.path).unlink(missing_ok=True)
    write_atomic(_manifest_path(workspace, manifest), manifest.to_bytes())
    folder = shards.folder_of(workspace, name)
    pointer = dvc_store.track_anew(workspace, folder)
    dvc_store.push(workspace, folder)
    commit = _commit(
        workspace,
        manifest,
        f"Seal {manifest.subject}: {len(gone)} shards replaced, data was erased on purpose",
    )
    place = workspace.relative(_manifest_path(workspace, manifest))
    sealed = SealedDataset(manifest, place, sha256_bytes(manifest.to_bytes()), commit)
    replaces = [
        {"path": shard.path, "sha256": shard.sha256, "by": (new := replaced[shard.sha256]) and asdict(new)}
        for shard in gone
    ]
    # No row is new: what is left was counted when it was sealed first.
    _record(ledger, sealed, pointer, (), {"erasing": erasing, "replaces": replaces})
    return sealed


def restore(workspace: Workspace, manifest: Manifest) -> None:
    """Bring the shards of a version that are missing or damaged back from the remote.

    The present pointer of the dataset must still hold them, as that of every later version does.

    Raises:
        Unavailable: the remote cannot be reached or does not hold them.
        Corrupt: what came back is not what was sealed.
    """
    with locked(workspace, manifest.name):
        damaged = [workspace.root / shard.path for shard in shards.damaged(workspace, manifest.shards)]
        if damaged:
            dvc_store.pull(workspace, shards.folder_of(workspace, manifest.name), damaged)
            shards.verify(workspace, manifest.shards)


def locked(workspace: Workspace, name: str) -> AbstractContextManager[None]:
    """Let nobody else on this machine change the dataset `name`."""
    return file_lock(workspace.locks / f"seal-{name}.lock", what=f"the dataset {name}")


def _finish(
    workspace: Workspace, ledger: Ledger, settings: Replay, parent: SealedDataset | None
) -> SealedDataset | None:
    """Finish the seal that a crash interrupted, if there is one with rows."""
    for version, folder in segments.taken(workspace, settings.dataset):
        if version == _next(parent):
            return _seal_folder(workspace, ledger, settings, parent, folder)
        # The ledger has that version: of this seal, killed before its end, or of an erasure since. The rows tell which.
        folder = segments.renumber(folder, _next(parent))
        sealed = _seal_folder(workspace, ledger, settings, parent, folder)
        return parent if sealed is None or parent is None or sealed.root == parent.root else sealed
    return None


def _seal_folder(
    workspace: Workspace, ledger: Ledger, settings: Replay, parent: SealedDataset | None, folder: Path
) -> SealedDataset | None:
    """Turn the frozen segments of `folder` into the version after `parent`; None if they hold no whole
    group.
    """
    clock = _Clock()
    with clock("scan"), RowIndex.open(workspace, settings.dataset) as index:
        if parent is not None:
            index.catch_up(parent.manifest)
        lines, dropped, torn_bytes = _rows_to_seal(index, folder)
    if not lines:
        _drop(folder)
        return replace(parent, dropped=dropped, torn_bytes=torn_bytes) if parent and dropped else None
    with clock("parquet"):
        manifest, new = _write_version(workspace, settings.dataset, parent, lines, segments.read_plan(folder))
    with clock("dvc"):
        pointer = _store(workspace, settings, new)
    with clock("git"):
        commit = _commit(workspace, manifest)
    sealed = SealedDataset(
        manifest=manifest,
        manifest_path=workspace.relative(_manifest_path(workspace, manifest)),
        manifest_sha256=sha256_bytes(manifest.to_bytes()),
        git_commit=commit,
        dropped=dropped,
        torn_bytes=torn_bytes,
    )
    with clock("ledger"):
        _record(ledger, sealed, pointer, shards.contents(workspace, new))
    with clock("index"), RowIndex.open(workspace, settings.dataset) as index:
        _drop(folder)
        index.catch_up(manifest)
    return replace(sealed, seconds=clock.seconds)


def _rows_to_seal(index: RowIndex, folder: Path) -> tuple[list[Line], tuple[str, ...], int]:
    """Return the episodes of `folder` in sealing order, the ids of dropped duplicates, the length of torn
    tails.

    The order depends on the episodes alone, not on who wrote them: by group, then by place in it.
    """
    scans = [segments.scan(path).require_intact() for path in sorted(folder.glob("*.jsonl"))]
    lines = [line for found in scans for group in found.groups for line in group]
    lines.sort(key=attrgetter("group_id", "sample_index", "episode_id", "created_at"))
    sealed = index.sealed_among((line.episode_id, line.group_id) for line in lines)
    kept: dict[str, Line] = {}
    dropped = []
    for line in lines:
        if line.episode_id in sealed or line.episode_id in kept:
            dropped.append(line.episode_id)
        else:
            kept[line.episode_id] = line
    return list(kept.values()), tuple(dropped), sum(found.torn_bytes for found in scans)


def _write_version(
    workspace: Workspace,
    name: str,
    parent: SealedDataset | None,
    lines: Sequence[Line],
    plan: Mapping[str, Any],
) -> tuple[Manifest, list[Shard]]:
    """Write the new shards and the manifest of the version they make."""
    new = shards.write(workspace, name, _next(parent), lines, plan["shard_rows"])
    behaviours = shards.behaviours(workspace, new)
    created_at = max(line.created_at for line in lines)
    manifest = Manifest.append(name, parent.manifest if parent else None, new, behaviours, created_at)
    write_atomic(_manifest_path(workspace, manifest), manifest.to_bytes())
    return manifest, new


def _store(workspace: Workspace, settings: Replay, new: Sequence[Shard]) -> dvc_store.Pointer:
    """Hand the new shards to DVC and push them."""
    files = [workspace.root / shard.path for shard in new]
    dvc_store.init(workspace, settings.remote)
    folder = shards.folder_of(workspace, settings.dataset)
    pointer = dvc_store.add(workspace, folder, files)
    dvc_store.push(workspace, folder)
    return pointer


def _commit(workspace: Workspace, manifest: Manifest, title: str = "") -> str:
    """Commit manifest and pointers to the data branch; return the commit id."""
    pointers = dvc_store.files_to_commit(workspace, shards.folder_of(workspace, manifest.name))
    title = title or f"Seal {manifest.subject}: {manifest.new_rows} new rows, {manifest.rows} in all"
    files = [_manifest_path(workspace, manifest), *pointers]
    return git_pointer.commit(workspace.root, files, f"{title}\n\nroot {manifest.root}", manifest.created_at)


def _record(
    ledger: Ledger,
    sealed: SealedDataset,
    pointer: dvc_store.Pointer,
    contents: Sequence[Mapping[str, Any]],
    more: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    def check(view: LedgerView) -> None:
        if view.last(SEALED, sealed.manifest.subject) is not None:
            raise Conflict(
                f"{sealed.manifest.subject} was sealed elsewhere meanwhile; fetch it and seal again."
            )

    payload = {
        **sealed.manifest.to_dict(),
        "manifest": sealed.manifest_path,
        "manifest_sha256": sealed.manifest_sha256,
        "git_commit": sealed.git_commit,
        "dvc": asdict(pointer),
        "contents": list(contents),  # of the new rows
        "dropped": len(sealed.dropped),
        "torn_bytes": sealed.torn_bytes,
        **more,
    }
    ledger.append(SEALED, sealed.manifest.subject, payload, check)


def _drop(folder: Path) -> None:
    """Remove frozen segments whose rows are sealed."""
    shutil.rmtree(folder)


def _manifest_path(workspace: Workspace, manifest: Manifest) -> Path:
    return manifest_path(workspace, manifest.name, manifest.version)


def _next(parent: SealedDataset | None) -> int:
    return parent.manifest.version + 1 if parent else 1


class _Clock:
    """Adds up the seconds of named sections."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
