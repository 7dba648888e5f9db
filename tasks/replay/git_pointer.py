"""The single committer of data pointers: commits to a branch of its own and touches nothing else.

It works with git's plumbing on a temporary index, so HEAD, the user's branch, index and uncommitted work
stay as they are, and neither a detached HEAD nor a repository without commits stands in the way.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tasks.core.errors import Conflict, Refused, Unavailable, UsageError

BRANCH = "refs/heads/forebay/data"
HEADS = "refs/heads/forebay/heads"
"""The signed heads of the ledger, a second time: git keeps them where neither database is."""

_NOBODY = "0" * 40  # update-ref: the branch must not exist yet
_ATTEMPTS = 20
_IDENTITY = {
    "GIT_AUTHOR_NAME": "Forebay",
    "GIT_AUTHOR_EMAIL": "forebay@localhost",
    "GIT_COMMITTER_NAME": "Forebay",
    "GIT_COMMITTER_EMAIL": "forebay@localhost",
}


def commit(root: Path, files: Sequence[Path], message: str, date: str, branch: str = BRANCH) -> str:
    """Commit `files` (inside the repository at `root`) on top of the data branch, or of `branch`; return the commit id.

    Files that the branch holds already stay in it. When nothing would change, the branch's newest commit is
    returned, so that a repeated call is harmless.

    Args:
        date: ISO-8601, for author and committer: the same files give the same commit.

    Raises:
        UsageError: `root` is not the top of a git repository.
        Refused: the branch is checked out somewhere, so that moving it would disturb that work.
        Conflict: other committers kept winning the race.
    """
    _require_top(root)
    _require_not_checked_out(root, branch)
    blobs = _store(root, files)
    for _ in range(_ATTEMPTS):
        parent = head(root, branch)
        tree = _tree(root, parent, blobs)
        if parent is not None and tree == _git(root, "rev-parse", f"{parent}^{{tree}}"):
            return parent
        parents = ["-p", parent] if parent else []
        dated = {**_IDENTITY, "GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
        made = _git(root, "commit-tree", tree, *parents, "-m", message, env=dated)
        if _moved(root, branch, made, parent):
            return made
    raise Conflict(f"The branch {branch} of {root} kept moving; run again when other writers have ended.")


def head(root: Path, branch: str = BRANCH) -> str | None:
    """Return the newest commit of the data branch, or of `branch`; None before the first one."""
    found = _run(root, "rev-parse", "--verify", "--quiet", f"{branch}^{{commit}}")
    return found.stdout.strip() or None


def names(root: Path, branch: str) -> list[str]:
    """Return the paths of all files that a branch holds, in order; none where there is no such branch."""
    found = _run(root, "ls-tree", "-r", "--name-only", branch)
    return sorted(found.stdout.splitlines()) if found.returncode == 0 else []


def read(root: Path, branch: str, name: str) -> bytes:
    """Return the bytes of a file of a branch."""
    done = subprocess.run(
        ["git", "-C", str(root), "cat-file", "blob", f"{branch}:{name}"],
        env=_inherited(),
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        raise Unavailable(
            f"`git cat-file` failed in {root}: {done.stderr.decode(errors='replace').strip() or 'no reason given'}"
        )
    return done.stdout


def set_aside(root: Path, branch: str) -> str | None:
    """Give a branch another name, so that a new one can begin; return that name, None where there is no such branch."""
    old = head(root, branch)
    if old is None:
        return None
    name = f"{branch}-until-{old[:12]}"
    _git(root, "update-ref", name, old)
    _git(root, "update-ref", "-d", branch, old)
    return name.removeprefix("refs/heads/")


def _require_top(root: Path) -> None:
    top = _run(root, "rev-parse", "--show-toplevel")
    if top.returncode != 0 or Path(top.stdout.strip()) != root.resolve():
        raise UsageError(
            f"{root} is not the top of a git repository; run `git init` there, data versions are kept in git."
        )


def _require_not_checked_out(root: Path, branch: str) -> None:
    if f"branch {branch}" in _git(root, "worktree", "list", "--porcelain").splitlines():
        raise Refused(
            f"The branch {branch.removeprefix('refs/heads/')} is checked out in {root} or a worktree of it; "
            f"switch that to another branch, Forebay alone writes this one."
        )


def _store(root: Path, files: Sequence[Path]) -> dict[str, str]:
    """Write the files as git objects; return {path in the repository: object id}."""
    names = [file.resolve().relative_to(root.resolve()).as_posix() for file in files]
    # No filters: the bytes in git are the bytes on disk, whatever the user's line-end settings are.
    ids = _git(
        root, "hash-object", "-w", "--no-filters", "--stdin-paths", stdin="\n".join(names) + "\n"
    ).split()
    return dict(zip(names, ids, strict=True))


def _tree(root: Path, parent: str | None, blobs: Mapping[str, str]) -> str:
    with tempfile.TemporaryDirectory(prefix="forebay-index-") as folder:
        index = {"GIT_INDEX_FILE": os.path.join(folder, "index")}
        if parent is not None:
            _git(root, "read-tree", parent, env=index)
        lines = "".join(f"100644 {blob}\t{name}\n" for name, blob in blobs.items())
        _git(root, "update-index", "--add", "--index-info", stdin=lines, env=index)
        return _git(root, "write-tree", env=index)


def _moved(root: Path, branch: str, new: str, old: str | None) -> bool:
    """Move the branch from `old` to `new`; False if another committer moved it first."""
    done = _run(root, "update-ref", "-m", "forebay: data", branch, new, old or _NOBODY)
    if done.returncode == 0:
        return True
    if head(root, branch) != old or "lock" in done.stderr:
        return False
    raise Unavailable(f"git could not move {branch} in {root}: {done.stderr.strip()}")


def _git(
    root: Path,
    *words: str,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
) -> str:
    done = _run(root, *words, stdin=stdin, env=env)
    if done.returncode != 0:
        raise Unavailable(f"`git {words[0]}` failed in {root}: {done.stderr.strip() or 'no reason given'}")
    return done.stdout.strip()


def _run(
    root: Path, *words: str, stdin: str | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", "-C", str(root), "-c", "core.fsync=committed,loose-object", *words],
        input=stdin,
        env={**_inherited(), **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def _inherited() -> dict[str, str]:
    # GIT_DIR and the like are set inside a user's hook; they would lead to another repository or index.
    return {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
