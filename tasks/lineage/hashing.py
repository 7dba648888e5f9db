"""Hashing many files: in parallel, in memory that does not grow with them, and only those that may have changed.

`hashlib` lets go of the interpreter while it hashes, so threads use all cores. Each thread has one buffer, which it
reads into again and again.

A file is taken from the cache, and not read, where its path, size, times of change (of content and of inode), inode and
device are those it was hashed with, and where that was safely later than the change: a file that is written again within
one tick of the file system's clock has the same times (git calls such entries racy, Documentation/technical/racy-git).

What the cache trusts, and a full reading does not: that the file system tells the truth. A disk that returns other bytes
than were written changes no time, and whoever writes to the raw disk, sets the clock back, or may write the cache itself
can hide a change from it.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO, Literal, Protocol, cast

Progress = Callable[[int, int, str], None]
"""progress(files done, files in all, note)"""

CHUNK = 1 << 20  # benchmarks/verify_rate.py --chunks
RACY_SECONDS = 2.0  # the coarsest clock of a file system in use (FAT)
_BATCH_FILES, _BATCH_BYTES = 64, 4 << 20


class Buffer(Protocol):
    """What can be read from into a buffer: files, and those of remote stores."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill `buffer` as far as there is something; return how much, 0 at the end."""


@dataclass(frozen=True)
class Reading:
    """What reading one file gave.

    Attributes:
        sha256: None where it could not be read.
        bytes: how many were read now.
        cached: the digest is from the cache.
        fault: why there is no digest.
        reason: of the fault, in the system's words.
    """

    sha256: str | None
    bytes: int = 0
    cached: bool = False
    fault: Literal["missing", "unreadable", "unreachable"] | None = None
    reason: str = ""


@dataclass(frozen=True)
class Stat:
    """What tells, without reading, that a file may have changed. Times in nanoseconds."""

    size: int
    mtime: int
    ctime: int
    inode: int
    device: int

    @classmethod
    def of(cls, found: os.stat_result) -> Stat:
        """Pick it from what the system says."""
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)


class DigestCache:
    """Digests of files by their stat, in a SQLite file; losing it costs time only.

    Args:
        path: of the SQLite file; made at the first `put`.
        racy_seconds: how much later than its last change a file must have been hashed.
    """

    def __init__(self, path: Path, racy_seconds: float = RACY_SECONDS) -> None:
        self.path = path
        self._racy = int(racy_seconds * 1e9)

    def known(self) -> Mapping[str, tuple[Stat, str]]:
        """Return {path: (stat, SHA-256)} of what can be trusted; nothing where the cache is absent or damaged."""
        if not self.path.exists():
            return {}
        try:
            with closing(sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True)) as database:
                rows = database.execute(
                    "SELECT path, size, mtime, ctime, inode, device, sha256 FROM files "
                    "WHERE hashed - max(mtime, ctime) > ?",
                    (self._racy,),
                )
                return {path: (Stat(*numbers), sha256) for path, *numbers, sha256 in rows}
        except sqlite3.Error:
            return {}

    def put(self, found: Iterable[tuple[str, Stat, int, str]], gone: Collection[str] = ()) -> None:
        """Keep (path, stat, time of hashing in ns, SHA-256) and forget what is gone; a full disk keeps nothing."""
        rows = [
            (path, s.size, s.mtime, s.ctime, s.inode, s.device, sha256, at) for path, s, at, sha256 in found
        ]
        if not rows and not gone:
            return
        try:
            self._write(rows, gone)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # locked, full, read-only: the next one keeps it
                return
            with suppress(OSError, sqlite3.Error):  # damaged: begin anew
                self.path.unlink()
                self._write(rows, ())

    def _write(self, rows: Sequence[tuple[object, ...]], gone: Collection[str]) -> None:
        with closing(sqlite3.connect(self.path)) as database, database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size INTEGER, mtime INTEGER, "
                "ctime INTEGER, inode INTEGER, device INTEGER, sha256 TEXT, hashed INTEGER) WITHOUT ROWID"
            )
            database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
            database.executemany("DELETE FROM files WHERE path = ?", [(path,) for path in gone])


def hash_files(
    root: Path,
    paths: Iterable[str],
    cache: DigestCache | None = None,
    progress: Progress = lambda done, total, note: None,
) -> dict[str, Reading]:
    """Return the SHA-256 of each file at root/path.

    Args:
        cache: files whose stat it knows are not read; None: all are read.
    """
    wanted, base = (
        list(dict.fromkeys(paths)),
        f"{root}/",
    )  # joining Paths costs as much as hashing a small file
    known = cache.known() if cache else {}
    readings: dict[str, Reading] = {}
    waiting: list[tuple[int, str]] = []
    for path in wanted:
        try:
            found = os.stat(base + path)
        except FileNotFoundError:
            readings[path] = Reading(None, fault="missing")
        except OSError as error:  # a file where a folder was, a link to itself
            readings[path] = _fault(error)
        else:
            if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
                readings[path] = Reading(None, fault="unreadable", reason="Not a regular file")
            elif path in known and known[path][0] == Stat.of(found):
                readings[path] = Reading(known[path][1], cached=True)
            else:
                waiting.append((found.st_size, path))
    learnt: list[tuple[str, Stat, int, str]] = []  # appending is atomic

    def read(path: str, buffer: memoryview) -> Reading:
        at = time.time_ns()
        with FileIO(base + path) as stream:
            before = Stat.of(os.fstat(stream.fileno())) if cache else None
            digest, length = hash_stream(stream, buffer)
            if before is not None and Stat.of(os.fstat(stream.fileno())) == before:
                learnt.append((path, before, at, digest))
        return Reading(digest, length)

    waiting.sort(reverse=True)  # the largest first, so that no thread is left with it at the end
    readings |= _parallel(waiting, read, len(readings), progress)
    if cache:
        cache.put(learnt, [path for path in wanted if readings[path].sha256 is None and path in known])
    return readings


def hash_streams(
    paths: Iterable[str],
    open_file: Callable[[str], BinaryIO],
    progress: Progress = lambda done, total, note: None,
) -> dict[str, Reading]:
    """Return the SHA-256 of each file that `open_file` opens: those of a remote store.

    It raises FileNotFoundError where the store does not hold the file, Unavailable where that cannot be told.
    """

    def read(path: str, buffer: memoryview) -> Reading:
        try:
            with open_file(path) as stream:
                return Reading(*hash_stream(cast(Buffer, stream), buffer))
        except FileNotFoundError:
            raise
        except Exception as error:  # each kind of store has exceptions of its own
            return Reading(None, fault="unreachable", reason=" ".join(str(error).split()))

    return _parallel([(_BATCH_BYTES, path) for path in dict.fromkeys(paths)], read, 0, progress)


def hash_stream(stream: Buffer, buffer: memoryview) -> tuple[str, int]:
    """Return the SHA-256 of what is left of `stream`, read through `buffer`, and how long it is."""
    digest, length = hashlib.sha256(), 0
    while n := stream.readinto(buffer):
        digest.update(buffer[:n])
        length += n
    return digest.hexdigest(), length


def threads() -> int:
    """Return how many threads hash: one for each core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parallel(
    work: list[tuple[int, str]],
    read: Callable[[str, memoryview], Reading],
    done: int,
    progress: Progress,
) -> dict[str, Reading]:
    """Read each (size, path) of `work`, in order of the list; `done` files of the total are finished already."""
    total, size = done + len(work), 0
    for finished in range(1, done + 1):
        progress(finished, total, "0 MB read")
    buffers = threading.local()
    ended: SimpleQueue[list[tuple[str, Reading]] | BaseException] = SimpleQueue()

    def run(batch: list[str]) -> None:
        if not hasattr(buffers, "view"):
            buffers.view = memoryview(bytearray(CHUNK))
        try:
            ended.put([(path, _safely(read, path, buffers.view)) for path in batch])
        except BaseException as error:
            ended.put(error)

    readings: dict[str, Reading] = {}
    with ThreadPoolExecutor(threads()) as pool:
        for batch in _batches(work):
            pool.submit(run, batch)
        try:
            while len(readings) < len(work):
                found = ended.get()
                if isinstance(found, BaseException):
                    raise found
                size += sum(reading.bytes for _, reading in found)
                note = f"{size / 1e6:,.0f} MB read"
                for path, reading in found:
                    readings[path] = reading
                    progress(done + len(readings), total, note)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return readings


def _batches(work: list[tuple[int, str]]) -> Iterator[list[str]]:
    """Small files go to a thread several at a time: handing one over costs more than hashing it."""
    batch: list[str] = []
    held = 0
    for size, path in work:
        batch.append(path)
        held += size
        if len(batch) == _BATCH_FILES or held >= _BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _safely(read: Callable[[str, memoryview], Reading], path: str, buffer: memoryview) -> Reading:
    try:
        return read(path, buffer)
    except FileNotFoundError:
        return Reading(None, fault="missing")
    except OSError as error:
        return _fault(error)


def _fault(error: OSError) -> Reading:
    return Reading(None, fault="unreadable", reason=error.strerror or str(error))
