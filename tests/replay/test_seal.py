from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tasks.core.digest import sha256_file
from tasks.core.errors import Conflict, Corrupt, NotFound, Unavailable, UsageError
from tasks.core.ledger import Ledger
from tasks.core.workspace import Workspace
from tasks.replay import dvc_store, git_pointer, seal, segments, shards
from tasks.replay.index import RowIndex
from tasks.replay.manifest import Manifest, dataset_root
from tasks.replay.schema import arrow_schema
from tasks.replay.segments import SegmentWriter, open_folder
from tests.replay.support import SETTINGS, append, group, groups, in_child, make_workspace


def rows_of(workspace: Workspace, sealed: seal.SealedDataset) -> list[str]:
    return shards.read_rows(workspace, sealed.manifest, ["episode_id"])["episode_id"].to_pylist()


def ids(*prefixes: tuple[str, int]) -> list[str]:
    return sorted(
        one.episode_id for prefix, count in prefixes for members in groups(prefix, count) for one in members
    )


def git(workspace: Workspace, *words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(workspace.root), *words], check=True, capture_output=True, text=True
    ).stdout


def test_a_version_holds_what_was_collected(workspace: Workspace, ledger: Ledger) -> None:
    written = groups("g", 9)
    append(workspace, written[:5], "one")
    append(workspace, written[5:], "two")
    sealed = seal.seal(workspace, ledger, SETTINGS)
    manifest = sealed.manifest
    table = shards.read_rows(workspace, manifest)
    assert table.schema.equals(arrow_schema())
    rows = {row["episode_id"]: row for row in table.to_pylist()}
    for one in (one for members in written for one in members):
        row = rows[one.episode_id]
        assert row["behaviour_logprobs"] == pytest.approx(one.behaviour_logprobs, abs=1e-7)
        assert {**row, "behaviour_logprobs": 0} == {**asdict(one), "behaviour_logprobs": 0}
    assert (manifest.version, manifest.rows, manifest.groups, manifest.new_rows, manifest.parent) == (
        1,
        36,
        9,
        36,
        None,
    )
    assert manifest.created_at == "2026-01-01T00:00:00+00:00"
    # Whole groups, at most 16 rows a shard.
    assert [shard.rows for shard in manifest.shards] == [16, 16, 4]
    homes = [set(pq.read_table(workspace.root / s.path)["group_id"].to_pylist()) for s in manifest.shards]
    assert sum(map(len, homes)) == len(set.union(*homes)) == 9
    for shard in manifest.shards:
        assert sha256_file(workspace.root / shard.path) == shard.sha256
        assert (workspace.root / shard.path).stat().st_size == shard.bytes
    assert dataset_root(manifest.shards) == manifest.root
    entry = ledger.last("dataset.sealed")
    assert entry is not None
    assert entry.subject == "main/v1"
    assert Manifest.from_dict(entry.payload) == manifest
    assert Manifest.from_dict(json.loads((workspace.root / sealed.manifest_path).read_bytes())) == manifest
    assert sha256_file(workspace.root / sealed.manifest_path) == sealed.manifest_sha256
    assert not any(open_folder(workspace, "main").glob("*"))
    assert segments.taken(workspace, "main") == []


def test_the_same_episodes_give_the_same_identity_whoever_wrote_them(tmp_path: Path) -> None:
    roots = []
    for number, order in enumerate(((0, 1, 2, 3, 4), (4, 2, 0, 3, 1))):
        workspace = make_workspace(tmp_path / str(number))
        written = groups("g", 5)
        for at in order:
            append(workspace, [written[at]], f"writer{at * number}")
        sealed = seal.seal(workspace, Ledger(workspace.ledger_url), SETTINGS)
        roots.append((sealed.root, sealed.manifest_sha256, sealed.git_commit))
    assert roots[0] == roots[1]


def test_appending_does_not_read_earlier_shards(workspace: Workspace, ledger: Ledger) -> None:
    append(workspace, groups("a", 3))
    first = seal.seal(workspace, ledger, SETTINGS)
    for shard in first.manifest.shards:  # whoever reads them now fails
        path = workspace.root / shard.path
        path.unlink()
        path.write_bytes(b"unreadable")
    append(workspace, [*groups("b", 2), group("a1")])
    second = seal.seal(workspace, ledger, SETTINGS)
    assert second.manifest.version == 2
    assert second.manifest.parent == first.root
    assert second.manifest.shards[: len(first.manifest.shards)] == first.manifest.shards
    assert second.manifest.new_rows == 8
    assert second.manifest.rows == 20
    assert sorted(second.dropped) == ["a1-0", "a1-1", "a1-2", "a1-3"]


def test_nothing_to_seal_is_one_sentence(workspace: Workspace, ledger: Ledger) -> None:
    with pytest.raises(UsageError, match="nothing to seal in dataset main"):
        seal.seal(workspace, ledger, SETTINGS)
    with SegmentWriter(open_folder(workspace, "main")) as writer:
        writer.append(group("g0"))
    (path,) = open_folder(workspace, "main").glob("*.jsonl")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UsageError, match="nothing to seal"):
        seal.seal(workspace, ledger, SETTINGS)
    assert ledger.entries() == []
    assert not workspace.replay.exists()


def test_what_was_sealed_before_makes_no_version(workspace: Workspace, ledger: Ledger) -> None:
    append(workspace, groups("g", 2))
    first = seal.seal(workspace, ledger, SETTINGS)
    append(workspace, [group("g1")])
    append(workspace, [[*group("g1", 6)[4:]]], "late")  # a group that is sealed takes no more members
    again = seal.seal(workspace, ledger, SETTINGS)
    assert again.manifest == first.manifest
    assert len(again.dropped) == 6
    assert len(ledger.entries("dataset.sealed")) == 1


def test_duplicates_among_the_waiting_are_dropped(workspace: Workspace, ledger: Ledger) -> None:
    append(workspace, groups("g", 2), "one")
    append(workspace, groups("g", 3), "two")
    sealed = seal.seal(workspace, ledger, SETTINGS)
    assert sorted(rows_of(workspace, sealed)) == ids(("g", 3))
    assert len(sealed.dropped) == 8


def test_a_torn_tail_is_dropped_and_counted(workspace: Workspace, ledger: Ledger) -> None:
    append(workspace, groups("g", 2))
    (path,) = open_folder(workspace, "main").glob("*.jsonl")
    path.write_bytes(path.read_bytes() + b"01234567 1/4 {half")
    sealed = seal.seal(workspace, ledger, SETTINGS)
    assert sealed.torn_bytes == 18
    assert sealed.manifest.rows == 8


def test_damage_stops_the_seal_until_it_is_salvaged(workspace: Workspace, ledger: Ledger) -> None:
    append(workspace, groups("g", 3))
    (path,) = open_folder(workspace, "main").glob("*.jsonl")
    data = bytearray(path.read_bytes())
    data[-30] ^= 0x01
    path.write_bytes(data)
    for _ in range(2):
        with pytest.raises(Corrupt, match="Line 12 of segment"):
            seal.seal(workspace, ledger, SETTINGS)
    assert ledger.entries() == []
    segments.salvage(workspace, "main")
    assert sorted(rows_of(workspace, seal.seal(workspace, ledger, SETTINGS))) == ids(("g", 2))


def test_a_lost_index_is_built_again(workspace: Workspace, ledger: Ledger) -> None:
    for prefix in "ab":
        append(workspace, groups(prefix, 2))
        seal.seal(workspace, ledger, SETTINGS)
    shutil.rmtree(workspace.state / "replay")
    assert seal.known_groups(workspace, ledger, "main") == {"a0", "a1", "b0", "b1"}
    append(workspace, [group("a0"), group("c0")])
    third = seal.seal(workspace, ledger, SETTINGS)
    assert (third.manifest.new_rows, len(third.dropped)) == (4, 4)


def test_versions_are_found_by_name_and_root(workspace: Workspace, ledger: Ledger) -> None:
    other = SETTINGS.model_copy(update={"dataset": "other"})
    append(workspace, groups("a", 2))
    first = seal.seal(workspace, ledger, SETTINGS)
    append(workspace, groups("a", 1), name="other")
    beside = seal.seal(workspace, ledger, other)
    append(workspace, groups("b", 2))
    second = seal.seal(workspace, ledger, SETTINGS)
    wanted = {"main": second, "main/v1": first, "other": beside, first.root: first, second.root[:12]: second}
    for reference, sealed in wanted.items():
        assert seal.find(ledger, reference).manifest == sealed.manifest
    for reference in ("none", "main/v3", "abc"):
        with pytest.raises(
            NotFound, match=f"no sealed dataset {reference}; the newest are: main/v1, other/v1, main/v2"
        ):
            seal.find(ledger, reference)


def test_a_flipped_byte_in_a_shard_is_found_and_refused(workspace: Workspace, ledger: Ledger) -> None:
    append(workspace, groups("g", 9))
    sealed = seal.seal(workspace, ledger, SETTINGS)
    shards.verify(workspace, sealed.manifest.shards)
    path = workspace.root / sealed.manifest.shards[1].path
    path.chmod(0o644)
    with path.open("r+b") as stream:  # in place: DVC's cache may share the bytes
        stream.seek(500)
        byte = stream.read(1)[0]
        stream.seek(500)
        stream.write(bytes([byte ^ 0x01]))
    missing = workspace.root / sealed.manifest.shards[2].path
    missing.unlink()
    found = shards.damaged(workspace, sealed.manifest.shards)
    assert list(found) == list(sealed.manifest.shards[1:])
    with pytest.raises(Corrupt, match=f"{path.name} is corrupt"):
        shards.read_rows(workspace, sealed.manifest)
    seal.restore(workspace, sealed.manifest)
    shards.verify(workspace, sealed.manifest.shards)


def test_a_clone_of_the_data_commit_pulls_the_very_version(
    workspace: Workspace, ledger: Ledger, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"remote": str(tmp_path / "shared-remote")})
    append(workspace, groups("a", 2))
    first = seal.seal(workspace, ledger, settings)
    append(workspace, groups("b", 2))
    seal.seal(workspace, ledger, settings)
    clone = Workspace(tmp_path / "clone")
    subprocess.run(
        ["git", "clone", "--quiet", "--no-checkout", str(workspace.root), str(clone.root)], check=True
    )
    git(clone, "fetch", "--quiet", "origin", "forebay/data")
    git(clone, "checkout", "--quiet", first.git_commit)
    seal.restore(clone, first.manifest)
    assert sorted(rows_of(clone, first)) == ids(("a", 2))
    assert len(list(shards.folder_of(clone, "main").iterdir())) == 1


# Every boundary between two steps of a seal: (module, function, before or after it).
BOUNDARIES = [
    (segments, "write_atomic", "before"),  # segments moved, not frozen yet
    (shards, "write_file_atomic", "after"),  # one shard of two
    (dvc_store, "add", "after"),
    (git_pointer, "_moved", "before"),
    (Ledger, "append", "after"),
    (seal, "_drop", "after"),
]
MORE_BOUNDARIES = [
    (segments, "take", "after"),
    (shards, "write_file_atomic", "before"),
    (seal, "write_atomic", "after"),  # manifest written
    (dvc_store, "init", "after"),
    (dvc_store, "push", "after"),
    (git_pointer, "commit", "after"),
]


def named(boundary: tuple[Any, str, str]) -> str:
    return f"{boundary[2]}-{boundary[1].strip('_')}"


def interrupted(boundary: tuple[Any, str, str], stop: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    owner, name, when = boundary
    real = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            stop()
        result = real(*args, **kwargs)
        stop()
        return result

    patch.setattr(owner, name, wrapped)


@pytest.mark.parametrize(
    "boundary",
    [*BOUNDARIES, *(pytest.param(one, marks=pytest.mark.slow) for one in MORE_BOUNDARIES)],
    ids=named,
)
def test_killed_at_any_step_and_sealed_again(
    boundary: tuple[Any, str, str], workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(workspace, groups("a", 1))
    seal.seal(workspace, Ledger(workspace.ledger_url), SETTINGS)
    append(workspace, groups("g", 6), "one")
    append(workspace, groups("h", 1), "two")
    interrupted(boundary, lambda: os.kill(os.getpid(), signal.SIGKILL), monkeypatch)
    assert in_child(lambda: seal.seal(workspace, Ledger(workspace.ledger_url), SETTINGS)) == signal.SIGKILL
    monkeypatch.undo()
    ledger = Ledger(workspace.ledger_url)
    if boundary == (
        seal,
        "_drop",
        "after",
    ):  # all was done: there is nothing left to seal, and nothing is missing
        with pytest.raises(UsageError):
            seal.seal(workspace, ledger, SETTINGS)
        sealed = seal.find(ledger, "main")
    else:
        sealed = seal.seal(workspace, ledger, SETTINGS)
    assert [entry.subject for entry in ledger.entries("dataset.sealed")] == ["main/v1", "main/v2"]
    assert sorted(rows_of(workspace, sealed)) == ids(("a", 1), ("g", 6), ("h", 1))
    assert segments.taken(workspace, "main") == []
    assert git(workspace, "rev-parse", "forebay/data").strip() == sealed.git_commit
    assert dvc_store.status(workspace) == {}
    held = {path.name for path in shards.folder_of(workspace, "main").iterdir()}
    assert held == {Path(shard.path).name for shard in sealed.manifest.shards}


@pytest.mark.parametrize("boundary", BOUNDARIES[1:4], ids=named)
def test_a_failed_step_is_taken_up_again_with_the_settings_it_began_with(
    boundary: tuple[Any, str, str], workspace: Workspace, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise Unavailable("injected")

    append(workspace, groups("g", 6))
    interrupted(boundary, stop, monkeypatch)
    with pytest.raises(Unavailable, match="injected"):
        seal.seal(workspace, ledger, SETTINGS)
    monkeypatch.undo()
    assert ledger.entries() == []
    append(workspace, groups("later", 1))
    sealed = seal.seal(workspace, ledger, SETTINGS.model_copy(update={"shard_rows": 4}))
    assert [entry.payload["new_rows"] for entry in ledger.entries()] == [24, 4]
    assert [shard.rows for shard in sealed.manifest.shards] == [16, 8, 4]
    assert sorted(rows_of(workspace, sealed)) == ids(("g", 6), ("later", 1))


@pytest.mark.parametrize("full", ["shard", "manifest"])
def test_a_full_disk_leaves_nothing_half_written(
    full: str, workspace: Workspace, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(workspace, groups("g", 6))
    if full == "shard":
        real = pq.write_table

        def write(table: Any, path: Path, **options: Any) -> None:
            real(table, path, **options)
            os.truncate(path, 100)
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(pq, "write_table", write)
    else:
        fsync = os.fsync

        def fail(handle: int) -> None:
            if "manifests" in os.readlink(f"/proc/self/fd/{handle}"):
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(handle)

        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Unavailable, match=r"is full: .* was not written; free some space"):
        seal.seal(workspace, ledger, SETTINGS)
    monkeypatch.undo()
    assert ledger.entries() == []
    assert not [path for path in workspace.replay.rglob("*") if path.name.endswith(".tmp")]
    for path in shards.folder_of(workspace, "main").iterdir():
        pq.read_table(path)
    assert sorted(rows_of(workspace, seal.seal(workspace, ledger, SETTINGS))) == ids(("g", 6))


def test_a_really_full_disk(tmp_path: Path) -> None:
    """On a file system of its own that is too small; needs the right to mount one."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(mount)], capture_output=True
    ).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        workspace = make_workspace(mount / "ws")
        ledger = Ledger(workspace.ledger_url)
        append(workspace, groups("g", 4))
        ledger.append("test", "opened", {})
        (mount / "filler").write_bytes(bytes(os.statvfs(mount).f_bavail * os.statvfs(mount).f_frsize - 4096))
        with pytest.raises(Unavailable):
            append(workspace, groups("h", 4))
        kept = segments.waiting_groups(workspace, "main")
        with pytest.raises(Unavailable):
            seal.seal(workspace, ledger, SETTINGS)
        (mount / "filler").unlink()
        sealed = seal.seal(workspace, ledger, SETTINGS)
        assert {one.rsplit("-", 1)[0] for one in rows_of(workspace, sealed)} == kept
        assert {"g0", "g1", "g2", "g3"} <= kept
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def test_two_seals_at_once_make_one_version(workspace: Workspace) -> None:
    append(workspace, groups("g", 4))

    def work() -> None:
        try:
            seal.seal(workspace, Ledger(workspace.ledger_url), SETTINGS)
        except UsageError:
            os._exit(7)

    first = os.fork()
    if first == 0:
        work()
        os._exit(0)
    statuses = sorted([in_child(work) >> 8, os.waitpid(first, 0)[1] >> 8])
    assert statuses == [0, 7]
    ledger = Ledger(workspace.ledger_url)
    assert [entry.subject for entry in ledger.entries("dataset.sealed")] == ["main/v1"]


def test_a_version_sealed_by_another_machine_is_a_conflict(
    workspace: Workspace, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(workspace, groups("g", 1))
    real = git_pointer.commit

    def commit(*args: Any) -> str:
        ledger.append("dataset.sealed", "main/v1", {"name": "main"})
        return real(*args)

    monkeypatch.setattr(git_pointer, "commit", commit)
    with pytest.raises(Conflict, match="main/v1 was sealed elsewhere"):
        seal.seal(workspace, ledger, SETTINGS)


def test_outside_of_git_it_says_what_to_do(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    append(workspace, groups("g", 1))
    with pytest.raises(UsageError, match="run `git init` there"):
        seal.seal(workspace, Ledger(workspace.ledger_url), SETTINGS)
    assert segments.waiting_groups(workspace, "main") == {"g0"}


@pytest.mark.slow
def test_killed_at_random_moments(workspace: Workspace) -> None:
    noise = random.Random(0)
    sealed = []
    for number in range(10):
        append(workspace, groups(f"r{number}-", 3))
        sealed.append((f"r{number}-", 3))
        child = os.fork()
        if child == 0:
            seal.seal(workspace, Ledger(workspace.ledger_url), SETTINGS)
            os._exit(0)
        time.sleep(noise.uniform(0.02, 0.8))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    ledger = Ledger(workspace.ledger_url)
    append(workspace, groups("last", 1))
    final = seal.seal(workspace, ledger, SETTINGS)
    assert sorted(rows_of(workspace, final)) == ids(*sealed, ("last", 1))
    with RowIndex.open(workspace, "main") as index:
        assert index.sealed_groups() == seal.known_groups(workspace, ledger, "main")
    assert dvc_store.status(workspace) == {}
