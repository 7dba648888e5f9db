from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tasks.core.errors import Unavailable
from tasks.core.workspace import Workspace
from tasks.replay import dvc_store


@pytest.fixture
def folder(workspace: Workspace) -> Path:
    folder = workspace.replay / "main" / "shards"
    folder.mkdir(parents=True)
    return folder


def add(workspace: Workspace, folder: Path, name: str, data: bytes) -> dvc_store.Pointer:
    (folder / name).write_bytes(data)
    pointer = dvc_store.add(workspace, folder, [folder / name])
    dvc_store.push(workspace, folder)
    return pointer


def test_init_stages_nothing_and_names_no_machine(workspace: Workspace) -> None:
    dvc_store.init(workspace)
    config = (workspace.root / ".dvc" / "config").read_text()
    assert "analytics = false" in config
    assert "url = ../.forebay/remote" in config
    assert str(workspace.root) not in config
    staged = subprocess.run(
        ["git", "-C", str(workspace.root), "diff", "--cached", "--name-only"], capture_output=True
    )
    assert staged.stdout == b""
    before = {path: path.stat().st_mtime_ns for path in (workspace.root / ".dvc").iterdir() if path.is_file()}
    dvc_store.init(workspace)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    dvc_store.init(workspace, "s3://bucket/replay")
    assert "url = s3://bucket/replay" in (workspace.root / ".dvc" / "config").read_text()


def test_what_is_pushed_can_be_pulled(workspace: Workspace, folder: Path) -> None:
    dvc_store.init(workspace)
    first = add(workspace, folder, "one", b"1" * 1000)
    second = add(workspace, folder, "two", b"2" * 1000)
    assert first.path == second.path == "data/replay/main/shards"
    assert first.md5 != second.md5
    assert second.md5.endswith(".dir")
    assert second.remote == workspace.relative(workspace.remote)
    assert dvc_store.status(workspace) == {}
    subprocess.run(["rm", "-r", str(folder), str(workspace.root / ".dvc" / "cache")], check=True)
    assert dvc_store.status(workspace) != {}
    dvc_store.pull(workspace, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "one": b"1" * 1000,
        "two": b"2" * 1000,
    }


def test_it_does_not_depend_on_the_current_folder(
    workspace: Workspace, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dvc_store.init(workspace)
    other = tmp_path / "other"
    other.mkdir()
    (other / "dvc.yaml").write_text("not: [a pipeline")
    monkeypatch.chdir(other)
    add(workspace, folder, "one", b"1")
    (folder / "one").unlink()
    dvc_store.pull(workspace, folder)
    assert (folder / "one").read_bytes() == b"1"


def test_a_killed_process_leaves_no_lock_behind(workspace: Workspace, folder: Path) -> None:
    dvc_store.init(workspace)
    add(workspace, folder, "one", b"1")
    (workspace.root / ".dvc" / "tmp" / "rwlock").write_text('{"read": ')
    add(workspace, folder, "two", b"2")


def test_failures_are_one_sentence(workspace: Workspace, folder: Path, tmp_path: Path) -> None:
    remote = tmp_path / "remote"
    remote.write_text("a file, not a folder")
    dvc_store.init(workspace, str(remote))
    (folder / "one").write_bytes(b"1")
    dvc_store.add(workspace, folder, [folder / "one"])
    with pytest.raises(Unavailable, match="DVC could not push to the remote"):
        dvc_store.push(workspace, folder)
    (folder / "two").write_bytes(b"not added")
    dvc_store.init(workspace, str(tmp_path / "empty"))
    subprocess.run(["rm", "-r", str(workspace.root / ".dvc" / "cache")], check=True)
    with pytest.raises(Unavailable, match="DVC could not pull from the remote"):
        dvc_store.pull(workspace, folder)
    assert {path.name for path in folder.iterdir()} == {"one", "two"}  # what it cannot replace it leaves


def test_a_pipeline_of_the_user_beside_it_does_no_harm(workspace: Workspace, folder: Path) -> None:
    (workspace.root / "dvc.yaml").write_text(
        "stages:\n  one:\n    cmd: echo x\n    outs: [{data/cycle/one.json: {cache: false}}]\n"
    )
    dvc_store.init(workspace)
    add(workspace, folder, "one", b"1")
