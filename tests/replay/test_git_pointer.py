from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks.core.errors import Refused, UsageError
from tasks.replay import git_pointer

DATE = "2026-01-01T00:00:00+00:00"


def git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    root = tmp_path / "repo"
    root.mkdir()
    git(root, "init", "--quiet", "--initial-branch=main")
    git(root, "config", "user.name", "Kim")
    git(root, "config", "user.email", "kim@example.com")
    return root


def write(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_users_work_is_not_touched(repo: Path) -> None:
    for name in ("kept.txt", "staged.txt", "changed.txt", "gone.txt"):
        write(repo, name, "1\n")
    git(repo, "add", ".")
    git(repo, "commit", "--quiet", "-m", "first")
    write(repo, "staged.txt", "2\n")
    git(repo, "add", "staged.txt")
    write(repo, "staged.txt", "3\n")
    write(repo, "changed.txt", "2\n")
    (repo / "gone.txt").unlink()
    write(repo, "new.txt", "untracked\n")
    pointer = write(repo, "data/shards.dvc", "outs: []\n")

    def state() -> tuple[str, ...]:
        return (
            git(repo, "status", "--porcelain=v2", "--branch"),
            git(repo, "diff", "--cached"),
            git(repo, "diff"),
            git(repo, "rev-parse", "HEAD"),
            (repo / ".git" / "HEAD").read_text(),
        )

    before, index = state(), (repo / ".git" / "index").read_bytes()
    made = git_pointer.commit(repo, [pointer], "data", DATE)
    assert (repo / ".git" / "index").read_bytes() == index
    assert state() == before
    assert git(repo, "ls-tree", "-r", "--name-only", made).split() == ["data/shards.dvc"]
    assert git(repo, "show", f"{made}:data/shards.dvc") == "outs: []\n"
    assert git(repo, "log", "-1", "--format=%an %aI", made).strip() == f"Forebay {DATE}"


def test_a_repository_without_commits_and_a_detached_head_will_do(repo: Path) -> None:
    pointer = write(repo, "a.dvc", "1")
    first = git_pointer.commit(repo, [pointer], "one", DATE)
    assert git_pointer.head(repo) == first
    assert subprocess.run(["git", "-C", str(repo), "rev-parse", "HEAD"], capture_output=True).returncode != 0
    git(repo, "add", "a.dvc")
    git(repo, "commit", "--quiet", "-m", "user")
    git(repo, "checkout", "--quiet", "--detach")
    write(repo, "a.dvc", "2")
    second = git_pointer.commit(repo, [pointer, write(repo, "b.dvc", "3")], "two", DATE)
    assert git(repo, "rev-parse", f"{second}^").strip() == first
    assert git(repo, "ls-tree", "--name-only", second).split() == ["a.dvc", "b.dvc"]
    assert git(repo, "branch", "--show-current") == ""


def test_the_same_files_make_no_second_commit(repo: Path) -> None:
    pointer = write(repo, "a.dvc", "1")
    assert git_pointer.commit(repo, [pointer], "one", DATE) == git_pointer.commit(
        repo, [pointer], "again", DATE
    )
    assert git(repo, "rev-list", "--count", "forebay/data").strip() == "1"


def test_racing_committers_all_get_in(repo: Path) -> None:
    files = [write(repo, f"{number}.dvc", str(number)) for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda file: git_pointer.commit(repo, [file], file.name, DATE), files))
    assert sorted(git(repo, "ls-tree", "--name-only", "forebay/data").split()) == sorted(
        f.name for f in files
    )
    assert git(repo, "rev-list", "--count", "forebay/data").strip() == "8"


def test_the_variables_of_a_git_hook_do_not_lead_astray(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_INDEX_FILE", str(repo / "elsewhere"))
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    git_pointer.commit(repo, [write(repo, "a.dvc", "1")], "one", DATE)
    assert not (repo / "elsewhere").exists()


def test_a_checked_out_data_branch_is_left_alone(repo: Path) -> None:
    pointer = write(repo, "a.dvc", "1")
    git_pointer.commit(repo, [pointer], "one", DATE)
    git(repo, "worktree", "add", "--quiet", str(repo.parent / "view"), "forebay/data")
    write(repo, "a.dvc", "2")
    with pytest.raises(Refused, match="forebay/data is checked out"):
        git_pointer.commit(repo, [pointer], "two", DATE)


def test_outside_of_git_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run `git init` there"):
        git_pointer.commit(tmp_path, [write(tmp_path, "a.dvc", "1")], "one", DATE)
