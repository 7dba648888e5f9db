"""The DVC adapter: transports and stores shards. Its hashes are only locators here.

One folder of shards is one DVC output; a shard is added and pushed by its own path, so the cost follows what
is new. DVC's own lock fails at once instead of waiting, hence all calls pass through one file lock of the
workspace.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import yaml

from tasks.core.errors import Corrupt, Unavailable, UsageError
from tasks.core.locks import file_lock
from tasks.core.workspace import STATE, Workspace

if TYPE_CHECKING:
    from dvc.repo import Repo

_REMOTE = "forebay"
_IGNORED = (f"/{STATE}/", "/.venv/")
_PRIVATE = ("/config.local", "/tmp", "/cache")


@dataclass(frozen=True)
class Pointer:
    """What DVC knows about a tracked folder: its place, DVC's MD5 of its listing, the remote's URL (a remote in the
    workspace by its path there).
    """

    path: str
    md5: str
    remote: str


class Remote:
    """Reads single objects of the remote, and brings none of them into the cache or the workspace.

    Args:
        url: how people know it.
        objects: DVC's object store there.
    """

    def __init__(self, url: str, objects: Any) -> None:
        self.url = url
        self._objects = objects

    def listing(self, md5: str) -> dict[str, str]:
        """Return {path in the folder: MD5} of a version of a tracked folder; `md5` is its pointer's.

        Raises:
            FileNotFoundError: the remote does not hold the listing. Corrupt: it is not the one that was pushed.
            Unavailable: the remote cannot be reached.
        """
        with self.open(md5) as stream:
            data = stream.read()
        if hashlib.md5(data, usedforsecurity=False).hexdigest() != md5.removesuffix(".dir"):
            raise Corrupt(f"The listing {md5} in the remote {self.url} was changed.")
        try:
            return {str(item["relpath"]): str(item["md5"]) for item in json.loads(data)}
        except (ValueError, TypeError, KeyError, RecursionError):
            raise Corrupt(f"The listing {md5} in the remote {self.url} is not one that DVC writes.") from None

    def open(self, md5: str) -> BinaryIO:
        """Open an object by its MD5.

        Raises:
            FileNotFoundError: the remote does not hold it. Unavailable: the remote cannot be reached.
        """
        store = self._objects
        try:
            stream: BinaryIO = store.fs.open(store.oid_to_path(md5), "rb")
            return stream
        except FileNotFoundError:
            if not store.fs.exists(store.path):
                raise Unavailable(f"The DVC remote {self.url} is not there.") from None
            raise
        except Exception as error:  # each kind of store has exceptions of its own
            says = " ".join(str(error).split()) or type(error).__name__
            raise Unavailable(f"The DVC remote {self.url} cannot be read: {says}") from error


def remote(workspace: Workspace) -> Remote:
    """Return the workspace's remote, to read from.

    Raises:
        Unavailable: DVC cannot tell which that is.
    """
    with _repo(workspace, "find the remote") as repo:
        return Remote(str(repo.config["remote"][_REMOTE]["url"]), repo.cloud.get_remote_odb(_REMOTE))


def init(workspace: Workspace, remote: str | None = None) -> None:
    """Make the workspace a DVC repository, analytics off, `remote` its default; harmless when it is one.

    Nothing is staged in the user's git index.

    Args:
        remote: URL of the remote (`s3://…`, a folder); None is a folder in the workspace's state.

    Raises:
        UsageError: the workspace is not a git repository.
    """
    root = workspace.root.resolve()
    if not (root / ".git").exists():
        raise UsageError(
            f"{root} is not a git repository; run `git init` there, data versions are kept in git."
        )
    with file_lock(_lock(workspace), what="the DVC store"):
        # Written here and not by `Repo.init`, which stages its files in the user's index.
        _add_lines(root / ".dvc" / ".gitignore", _PRIVATE)
        _add_lines(root / ".dvcignore", _IGNORED)
        if not (root / ".dvc" / "config").exists():
            (root / ".dvc" / "config").touch()
        _configure(root, remote)


def add(workspace: Workspace, folder: Path, files: Sequence[Path]) -> Pointer:
    """Add the new `files` of `folder` to DVC and return its pointer; earlier files are not looked at.

    Raises:
        Unavailable: DVC failed; what it said is quoted.
    """
    with _repo(workspace, "add shards") as repo:
        repo.add([str(path) for path in files] if _pointer_file(folder).exists() else [str(folder)])
        out = yaml.safe_load(_pointer_file(folder).read_text())["outs"][0]
        return Pointer(workspace.relative(folder), out["md5"], _url(workspace, repo))


def track_anew(workspace: Workspace, folder: Path) -> Pointer:
    """Make the pointer of `folder` say what is in it now, files that are gone included; return it.

    Raises:
        Unavailable: DVC failed; what it said is quoted.
    """
    with _repo(workspace, "track the folder anew") as repo:
        repo.add([str(folder)])
        out = yaml.safe_load(_pointer_file(folder).read_text())["outs"][0]
        return Pointer(workspace.relative(folder), out["md5"], _url(workspace, repo))


def locator(path: Path) -> str:
    """Return by which name DVC's cache and remote know the bytes of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest()


def erase(workspace: Workspace, locators: Sequence[str]) -> int:
    """Delete bytes from cache and remote for good; return how many copies there were. Harmless where there is none.

    Raises:
        Unavailable: the remote cannot be reached or does not allow it; run again.
    """
    gone = 0
    with _repo(workspace, "erase from cache and remote") as repo:
        for store in (repo.cache.local, repo.cloud.get_remote_odb(_REMOTE)):
            for name in locators:
                if store.exists(name):
                    store.delete(name)
                    gone += 1
    return gone


def push(workspace: Workspace, folder: Path) -> None:
    """Copy what the remote lacks of `folder` to it.

    Raises:
        Unavailable: the remote cannot be reached or written.
    """
    with _repo(workspace, "push to the remote") as repo:
        # By its pointer file: DVC looks up any other target in a `dvc.yaml` of the current directory first.
        repo.push(targets=[str(_pointer_file(folder))])


def pull(workspace: Workspace, folder: Path, damaged: Sequence[Path] = ()) -> None:
    """Bring what `folder` lacks of what its pointer says from the remote.

    Args:
        damaged: files of the folder to be replaced.

    Raises:
        Unavailable: the remote cannot be reached or does not hold them.
    """
    with _repo(workspace, "pull from the remote") as repo:
        for path in damaged:
            _discard(path, Path(repo.cache.local.path))
        repo.pull(targets=[str(_pointer_file(folder))])


def status(workspace: Workspace) -> dict[str, Any]:
    """Return what differs between workspace, cache and pointers, in DVC's words; empty if nothing does."""
    with _repo(workspace, "compare") as repo:
        found = repo.data_status(granular=True)
    return {kind: found[kind] for kind in ("uncommitted", "not_in_cache") if found.get(kind)}


def files_to_commit(workspace: Workspace, folder: Path) -> list[Path]:
    """Return the files that make a git commit from which `folder` can be pulled again."""
    root = workspace.root
    pointers = [_pointer_file(folder), folder.parent / ".gitignore"]
    return [*pointers, root / ".dvc" / "config", root / ".dvc" / ".gitignore", root / ".dvcignore"]


@contextmanager
def _repo(workspace: Workspace, what: str) -> Iterator[Repo]:
    """Open the repository under the lock and turn DVC's failures into one sentence."""
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.scm import SCMError

    logging.getLogger("dvc").setLevel(logging.ERROR)
    root = workspace.root.resolve()
    with file_lock(_lock(workspace), what="the DVC store"):
        _drop_torn_rwlock(root)
        try:
            with Repo(str(root)) as repo:
                yield repo
        except (DvcException, SCMError, OSError) as error:
            raise Unavailable(f"DVC could not {what} in {root}: {' '.join(str(error).split())}") from error


def _discard(path: Path, cache: Path) -> None:
    """Remove a damaged file and the cache's name for the same bytes, which DVC would link back unseen."""
    if not path.exists():
        return
    inode = path.stat().st_ino
    for linked in cache.rglob("*") if path.stat().st_nlink > 1 else ():
        if linked.stat().st_ino == inode:
            linked.unlink()
    path.unlink()


def _url(workspace: Workspace, repo: Any) -> str:
    url = str(repo.config["remote"][_REMOTE]["url"])
    inside = os.path.isabs(url) and Path(url).is_relative_to(workspace.root)
    return workspace.relative(Path(url)) if inside else url


def _pointer_file(folder: Path) -> Path:
    return folder.with_name(folder.name + ".dvc")


def _configure(root: Path, remote: str | None) -> None:
    from dvc.config import Config
    from dvc.config_schema import RelPath

    if remote is None:
        remote = f"{STATE}/remote"
    url = remote if "://" in remote or os.path.isabs(remote) else RelPath(root / remote)
    config = Config(str(root / ".dvc"))
    wanted: dict[str, dict[str, Any]] = {
        "core": {"analytics": "false", "autostage": "false", "remote": _REMOTE},
        "cache": {
            "type": ["reflink", "hardlink", "copy"]
        },  # shards never change, so no second copy is needed
        "remote": {_REMOTE: {"url": url}},
    }
    present = config.read("repo")
    if any(
        present.get(section, {}).get(key) != value
        for section, keys in wanted.items()
        for key, value in keys.items()
    ):
        with config.edit("repo") as values:
            for section, keys in wanted.items():
                values[section].update(keys)


def _add_lines(path: Path, lines: Sequence[str]) -> None:
    """Make sure that the ignore file at `path` holds `lines`; what the user wrote stays."""
    present = path.read_text().splitlines() if path.exists() else []
    missing = [line for line in lines if line not in present]
    if missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*present, *missing]) + "\n")


def _drop_torn_rwlock(root: Path) -> None:
    """Remove DVC's lock table if a killed process left it half-written: DVC refuses to work with it."""
    table = root / ".dvc" / "tmp" / "rwlock"
    try:
        json.loads(table.read_bytes())
    except FileNotFoundError:
        pass
    except ValueError:
        table.unlink()


def _lock(workspace: Workspace) -> Path:
    return workspace.locks / "dvc.lock"
