"""Files and directories that are whole or absent, also after a kill, a crash or a full disk."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tasks.core.errors import Unavailable

_ASIDE = ".aside-"


def fsync_dir(path: Path) -> None:
    """Make a rename in the directory `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees all of it or none of it, also after a crash.

    Raises:
        Unavailable: the disk is full; nothing is left behind.
    """

    def fill(aside: Path) -> None:
        aside.write_bytes(data)

    write_file_atomic(path, fill)


def write_file_atomic(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a file aside, then make it `path` in one durable step.

    Raises:
        Unavailable: the disk is full; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    aside = Path(name)
    try:
        fill(aside)
        with aside.open("rb") as stream:
            os.fsync(stream.fileno())
        aside.chmod(0o644)
        aside.replace(path)
        fsync_dir(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Unavailable(
                f"The disk that holds {path.parent} is full: {path.name} was not written; free some space and run again."
            ) from error
        raise
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Fill a directory aside; at the end of the block it becomes `target` in one durable step.

    What a killed writer left aside is removed first, so one process at a time may write a target. A target that is
    there is replaced.

    Raises:
        Unavailable: the disk is full; nothing is left behind.
    """
    aside = target.parent / f"{_ASIDE}{target.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in sorted(aside.rglob("*")):
            if path.is_file():
                path.chmod(0o644)
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
        fsync_dir(aside)
        old = target.parent / f"{_ASIDE}old-{target.name}"
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        aside.rename(target)
        fsync_dir(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise Unavailable(
                f"The disk that holds {target.parent} is full: {target.name} was not written; "
                "free some space and run again."
            ) from error
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def discard_unfinished(root: Path) -> None:
    """Remove what killed writers of whole directories left aside under `root`."""
    for path in root.glob(f"{_ASIDE}*"):
        shutil.rmtree(path, ignore_errors=True)
