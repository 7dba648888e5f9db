"""The signed heads a second time: on a git branch of their own, where neither the ledger nor MLflow is."""

from __future__ import annotations

from pathlib import Path

from tasks.core.heads import Kept
from tasks.core.workspace import Workspace
from tasks.replay import git_pointer


def keep_heads(workspace: Workspace, date: str) -> None:
    """Commit the signed heads that git does not have yet.

    Args:
        date: ISO-8601, of the commit.

    Raises:
        Refused, Conflict, Unavailable: git could not; the next call makes up for it.
    """
    known = {Path(name).name for name in git_pointer.names(workspace.root, git_pointer.HEADS)}
    files = [
        path
        for path in sorted(workspace.heads.glob("*.json"))
        if path.stem.isdecimal() and path.name not in known
    ]
    if files:
        title = f"Heads of the ledger up to entry {int(files[-1].stem)}"
        git_pointer.commit(workspace.root, files, title, date, git_pointer.HEADS)


def kept_head(workspace: Workspace) -> Kept | None:
    """Return the newest signed head that git has, None where it has none."""
    known = [n for n in git_pointer.names(workspace.root, git_pointer.HEADS) if Path(n).stem.isdigit()]
    if not known:
        return None
    data = git_pointer.read(workspace.root, git_pointer.HEADS, known[-1])
    return Kept(Path(known[-1]).name, data, "git's branch forebay/heads")


def kept_names(workspace: Workspace) -> set[str]:
    """Return the names of the signed heads that git has."""
    return {Path(name).name for name in git_pointer.names(workspace.root, git_pointer.HEADS)}
