"""Open segments: where episodes wait, crash-safe, until they are sealed.

A segment is one append-only file of one writer. Each line is `crc32 index/count json` and stands for one
episode; `index/count` is its place in the group it was appended with, so that a group cut short by a crash is
known as such. A group counts once its last line is on disk (one fsync a group).

    <state>/segments/<dataset>/open/<writer>.<unique>.jsonl     being written
    <state>/segments/<dataset>/sealing/v00002/…                 taken by the seal of version 2
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tasks.core.atomic import fsync_dir, write_atomic
from tasks.core.errors import Corrupt, Unavailable, UsageError
from tasks.core.workspace import Workspace
from tasks.replay.schema import Episode

_COLUMNS = tuple(field.name for field in fields(Episode))
_LINE = re.compile(rb"([0-9a-f]{8}) ((\d+)/(\d+) (.*))", re.DOTALL)
_PLAN = "plan.json"


@dataclass(frozen=True, slots=True)
class Line:
    """Where one episode lies in a segment, and what orders it: enough to seal without holding the rows."""

    path: Path
    offset: int
    length: int
    group_id: str
    sample_index: int
    episode_id: str
    created_at: str


@dataclass(frozen=True)
class Scan:
    """What a segment holds.

    `groups` are the whole groups in file order, `torn_bytes` the length of a tail that a crash cut short,
    `bad` the lines (counted from 1) that were written whole and are no longer what was written, with the
    reason.
    """

    path: Path
    groups: tuple[tuple[Line, ...], ...]
    torn_bytes: int
    bad: tuple[tuple[int, str], ...]

    def require_intact(self) -> Scan:
        """Return this scan.

        Raises:
            Corrupt: a line is damaged; the sentence names the first one.
        """
        if self.bad:
            number, reason = self.bad[0]
            raise Corrupt(
                f"Line {number} of segment {self.path} is corrupt ({reason}; {len(self.bad)} such lines); "
                f"run `forebay salvage` to set the damaged groups aside and keep the others."
            )
        return self


class SegmentWriter:
    """Appends groups of episodes to a segment of its own under `open_folder(workspace, dataset)`.

    A writer never continues another's file, so any number of them, in any number of processes, may share a
    folder. When a seal takes the file away, the next append starts a new one.
    """

    def __init__(self, folder: Path, writer: str = "writer") -> None:
        self.folder = folder
        self._name = re.sub(r"[^A-Za-z0-9_-]+", "-", writer)
        self._path: Path | None = None
        self._handle: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, group: Sequence[Episode]) -> None:
        """Write one whole group; when this returns, the group survives a crash.

        Raises:
            UsageError: the group is empty or its episodes belong to several groups.
            Unavailable: the disk is full; the segment is as it was before.
        """
        if len({episode.group_id for episode in group}) != 1:
            raise UsageError("A group to append must hold one or more episodes that share one group_id.")
        data = b"".join(_encode(episode, at, len(group)) for at, episode in enumerate(group, start=1))
        with self._locked() as handle:
            end = os.fstat(handle).st_size
            try:
                _write_all(handle, data)
                os.fsync(handle)
            except OSError as error:
                os.ftruncate(handle, end)
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise Unavailable(
                        f"The disk that holds {self.folder} is full: a group of {len(group)} episodes was "
                        f"not kept; free some space and collect again, what was kept before is safe."
                    ) from error
                raise

    def close(self) -> None:
        """Close the segment; a later append starts a new one."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Yield the locked handle of a segment that no seal has taken."""
        while True:
            if self._handle is None or self._path is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._path = self.folder / f"{self._name}.{uuid.uuid4().hex[:12]}.jsonl"
                self._handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
                fsync_dir(self.folder)
            fcntl.flock(self._handle, fcntl.LOCK_EX)
            if self._path.exists():
                break
            self.close()
        try:
            yield self._handle
        finally:
            fcntl.flock(self._handle, fcntl.LOCK_UN)


def scan(path: Path) -> Scan:
    """Read a segment: its whole groups, the length of its torn tail, its damaged lines.

    A crash during an append leaves a prefix of the group, perhaps filled up with zeros by the file system: an
    unfinished group at the end of the file is a torn tail. A finished line whose checksum does not hold is
    damage, wherever it is.
    """
    groups: list[tuple[Line, ...]] = []
    bad: list[tuple[int, str]] = []
    group: list[Line] = []
    settled = offset = 0  # bytes that are known not to be a torn tail; bytes read
    skipping = False  # the rest of a group that holds a bad line
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            start, offset = offset, offset + len(raw)
            if not raw.endswith(b"\n"):
                break
            try:
                at, count, row = _decode(raw)
            except ValueError as error:
                bad.append((number, str(error)))
                group, skipping, settled = [], True, offset
                continue
            if at == 1:
                if group:
                    bad.append((number - 1, "the group it belongs to was cut short"))
                group, skipping = [], False
            elif skipping:
                settled = offset
                continue
            elif at != len(group) + 1:
                bad.append((number, f"it is episode {at} of its group where {len(group) + 1} was due"))
                group, skipping, settled = [], True, offset
                continue
            names = row["group_id"], row["sample_index"], row["episode_id"], row["created_at"]
            group.append(Line(path, start, len(raw), *names))
            if at == count:
                groups.append(tuple(group))
                group, settled = [], offset
    return Scan(path, tuple(groups), offset - settled, tuple(bad))


def read_episode(handle: int, line: Line) -> dict[str, Any]:
    """Return the columns of one episode from the open segment `handle`.

    Raises:
        Corrupt: the line is no longer what it was when it was scanned.
    """
    try:
        return _decode(os.pread(handle, line.length, line.offset))[2]
    except ValueError as error:
        raise Corrupt(f"The episode at byte {line.offset} of {line.path} is corrupt ({error}).") from None


def read_line(line: Line) -> dict[str, Any]:
    """Return the columns of one episode; to read many, open the segment once and use `read_episode`."""
    with line.path.open("rb") as stream:
        return read_episode(stream.fileno(), line)


def open_folder(workspace: Workspace, dataset: str) -> Path:
    """Return the folder into which writers of `dataset` append."""
    return workspace.segments / dataset / "open"


def waiting_groups(workspace: Workspace, dataset: str) -> set[str]:
    """Return the ids of the groups that are whole on disk and not sealed yet: a resumed collection skips
    them.
    """
    return {group[0].group_id for path in _files(workspace, dataset) for group in scan(path).groups}


def salvage(workspace: Workspace, dataset: str) -> list[Scan]:
    """Set the damaged groups of all unsealed segments aside and keep the others; return the damaged segments'
    scans.

    The damaged file is kept whole under `<state>/segments/<dataset>/damaged`.
    """
    damaged = [found for found in map(scan, _files(workspace, dataset)) if found.bad]
    aside = workspace.segments / dataset / "damaged"
    for found in damaged:
        with _exclusive(found.path) as stream:
            aside.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found.path, aside / found.path.name)
            lines = (line for group in found.groups for line in group)
            good = b"".join(os.pread(stream, line.length, line.offset) for line in lines)
            write_atomic(found.path.with_suffix(f".salvaged{found.path.suffix}"), good)
            found.path.unlink()
    return damaged


def take(workspace: Workspace, dataset: str, version: int, plan: Mapping[str, Any]) -> Path | None:
    """Freeze all open segments for the seal of `version`; return their folder, or None if there are none.

    The folder appears in one rename, so after a crash it is either frozen whole or taken again. `plan` holds
    the settings that a resumed seal must repeat.
    """
    sealing = workspace.segments / dataset / "sealing"
    partial = sealing / ".partial"
    partial.mkdir(parents=True, exist_ok=True)
    for path in sorted(open_folder(workspace, dataset).glob("*.jsonl")):
        with _exclusive(path):
            path.rename(partial / path.name)
    if not any(partial.glob("*.jsonl")):
        shutil.rmtree(partial)
        return None
    write_atomic(partial / _PLAN, json.dumps(dict(plan)).encode())
    folder = sealing / f"v{version:05d}"
    partial.rename(folder)
    fsync_dir(sealing)
    return folder


def taken(workspace: Workspace, dataset: str) -> list[tuple[int, Path]]:
    """Return (version, folder) of every seal that froze its segments and has not dropped them yet."""
    folders = sorted((workspace.segments / dataset / "sealing").glob("v[0-9]*"))
    return [(int(folder.name[1:]), folder) for folder in folders]


def renumber(folder: Path, version: int) -> Path:
    """Let frozen segments be of another version; return their folder."""
    return folder.rename(folder.with_name(f"v{version:05d}"))


def read_plan(folder: Path) -> dict[str, Any]:
    """Return the settings that were frozen with the segments in `folder`."""
    plan: dict[str, Any] = json.loads((folder / _PLAN).read_bytes())
    return plan


def unsealed_files(workspace: Workspace) -> list[tuple[str, Path]]:
    """Return (dataset, segment) of every segment that is not sealed yet, of all datasets; damaged ones set aside too."""
    folders = sorted(path for path in workspace.segments.glob("*") if path.is_dir())
    return [
        (folder.name, path)
        for folder in folders
        for path in [*_files(workspace, folder.name), *sorted(folder.glob("damaged/*.jsonl"))]
    ]


def drop_groups(path: Path, groups: Set[str]) -> bool:
    """Take whole groups out of a segment, which nobody writes to meanwhile; tell whether it held one of them.

    The file is replaced by one of another name, so that its writer, if there is one, begins a new segment. What cannot be read
    of it (a torn tail, damaged lines) goes too.
    """
    try:
        found = scan(path)
    except FileNotFoundError:
        return False
    if not any(group[0].group_id in groups for group in found.groups):
        return False
    with _exclusive(path) as stream:
        found = scan(path)
        kept = [line for group in found.groups if group[0].group_id not in groups for line in group]
        good = b"".join(os.pread(stream, line.length, line.offset) for line in kept)
        if good:
            write_atomic(path.with_name(f"{path.stem}.kept{path.suffix}"), good)
        path.unlink()
    return True


def _files(workspace: Workspace, dataset: str) -> list[Path]:
    return sorted((workspace.segments / dataset).glob("open/*.jsonl")) + sorted(
        (workspace.segments / dataset).glob("sealing/*/*.jsonl")
    )


@contextmanager
def _exclusive(path: Path) -> Iterator[int]:
    """Hold the segment's lock, which its writer holds during an append; yield a handle to read from."""
    with path.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield stream.fileno()


def _encode(episode: Episode, at: int, count: int) -> bytes:
    # NaN is let through here: it is the validation that names it, not the writer that loses the group.
    row = {name: getattr(episode, name) for name in _COLUMNS}
    body = b"%d/%d %b" % (at, count, json.dumps(row, separators=(",", ":"), ensure_ascii=False).encode())
    return b"%08x %b\n" % (zlib.crc32(body), body)


def _decode(raw: bytes) -> tuple[int, int, dict[str, Any]]:
    """Return place in the group, size of the group, columns; ValueError says why the line cannot be
    trusted.
    """
    match = _LINE.fullmatch(raw.removesuffix(b"\n"))
    if match is None:
        raise ValueError("it is not a segment line")
    checksum, body, at, count, text = match.groups()
    if int(checksum, 16) != zlib.crc32(body):
        raise ValueError("its checksum does not hold")
    row = json.loads(text)
    if tuple(row) != _COLUMNS:
        raise ValueError("its columns are of another version of Forebay")
    return int(at), int(count), row


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
