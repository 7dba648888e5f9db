from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from tasks.core.errors import Corrupt, Unavailable, UsageError
from tasks.core.workspace import Workspace
from tasks.replay import segments
from tasks.replay.segments import (
    SegmentWriter,
    open_folder,
    read_line,
    salvage,
    scan,
    take,
    taken,
    waiting_groups,
)
from tests.replay.support import append, episode, group, groups, in_child


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def only_file(workspace: Workspace) -> Path:
    (path,) = open_folder(workspace, "main").glob("*.jsonl")
    return path


def test_what_was_appended_is_read_back_exactly(workspace: Workspace) -> None:
    written = groups("g", 3)
    append(workspace, written)
    found = scan(only_file(workspace))
    assert [[read_line(line) for line in members] for members in found.groups] == [
        [asdict(one) for one in members] for members in written
    ]
    assert (found.torn_bytes, found.bad) == (0, ())
    assert waiting_groups(workspace, "main") == {"g0", "g1", "g2"}


def test_any_prefix_of_a_segment_is_whole_groups_and_a_torn_tail(workspace: Workspace) -> None:
    append(workspace, groups("g", 3, size=2))
    path = only_file(workspace)
    data = path.read_bytes()
    ends = [0]
    for line in data.splitlines(keepends=True):
        ends.append(ends[-1] + len(line))
    whole = ends[::2]
    for cut in sorted(
        {*range(0, len(data), 37), *(end + step for end in ends for step in (-1, 0, 1))} - {-1, len(data) + 1}
    ):
        path.write_bytes(data[:cut])
        found = scan(path)
        kept = max(end for end in whole if end <= cut)
        assert len(found.groups) == whole.index(kept)
        assert found.torn_bytes == cut - kept
        assert found.bad == ()


def test_a_tail_of_zeros_is_torn(workspace: Workspace) -> None:
    append(workspace, groups("g", 2, size=2))
    path = only_file(workspace)
    data = path.read_bytes()
    path.write_bytes(data[:-100] + bytes(100))
    found = scan(path)
    assert [members[0].group_id for members in found.groups] == ["g0"]
    assert found.torn_bytes > 100
    assert found.bad == ()


def test_every_flipped_byte_before_the_last_newline_is_found(workspace: Workspace) -> None:
    append(workspace, groups("g", 3, size=2))
    path = only_file(workspace)
    data = path.read_bytes()
    for at in range(0, len(data) - 1, 7):
        damaged = bytearray(data)
        damaged[at] ^= 0x01
        path.write_bytes(damaged)
        found = scan(path)
        assert found.bad, f"byte {at}"
        assert (
            len(found.groups) == 2 or data[at : at + 1] == b"\n"
        )  # which joins two lines, perhaps of two groups
        with pytest.raises(Corrupt, match=rf"Line {found.bad[0][0]} of segment .*{path.name}"):
            found.require_intact()


def test_a_lost_line_is_damage(workspace: Workspace) -> None:
    append(workspace, groups("g", 3, size=3))
    path = only_file(workspace)
    lines = path.read_bytes().splitlines(keepends=True)
    for lost, number in ((3, 4), (4, 5), (5, 5)):
        path.write_bytes(b"".join(lines[:lost] + lines[lost + 1 :]))
        found = scan(path)
        assert [members[0].group_id for members in found.groups] == ["g0", "g2"]
        assert [line for line, _ in found.bad] == [number]


def test_salvage_sets_the_damaged_group_aside_and_keeps_the_others(workspace: Workspace) -> None:
    append(workspace, groups("g", 3, size=2))
    path = only_file(workspace)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0x40
    path.write_bytes(damaged)
    (report,) = salvage(workspace, "main")
    assert report.bad[0][0] in (3, 4)
    assert waiting_groups(workspace, "main") == {"g0", "g2"}
    assert scan(only_file(workspace)).bad == ()
    assert (workspace.segments / "main" / "damaged" / path.name).read_bytes() == bytes(damaged)
    assert salvage(workspace, "main") == []


def test_a_writer_goes_on_in_a_new_file_when_a_seal_took_its_own(workspace: Workspace) -> None:
    with SegmentWriter(open_folder(workspace, "main"), "w") as writer:
        writer.append(group("g0"))
        folder = take(workspace, "main", 1, {"shard_rows": 9})
        writer.append(group("g1"))
    assert folder is not None
    assert taken(workspace, "main") == [(1, folder)]
    assert segments.read_plan(folder) == {"shard_rows": 9}
    assert [scan(path).groups[0][0].group_id for path in folder.glob("*.jsonl")] == ["g0"]
    assert scan(only_file(workspace)).groups[0][0].group_id == "g1"
    assert waiting_groups(workspace, "main") == {"g0", "g1"}


def test_many_writers_and_a_seal_lose_nothing(workspace: Workspace) -> None:
    def write(number: int) -> None:
        append(workspace, groups(f"w{number}-", 20, size=2), writer="same-name")

    folders = []
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(write, number) for number in range(8)]
        version = 1
        while not all(one.done() for one in running):
            folders.append(take(workspace, "main", version, {}))
            version += 1
        for one in running:
            one.result()
    assert any(folders)
    assert waiting_groups(workspace, "main") == {f"w{n}-{g}" for n in range(8) for g in range(20)}


def test_a_killed_writer_leaves_whole_groups(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(handle: int, data: bytes) -> None:
        if b'"g2"' in data:
            os.write(handle, data[: len(data) * 2 // 3])
            os.kill(os.getpid(), 9)
        os.write(handle, data)

    monkeypatch.setattr(segments, "_write_all", write_half)
    assert in_child(lambda: append(workspace, groups("g", 3))) == 9
    monkeypatch.undo()
    assert waiting_groups(workspace, "main") == {"g0", "g1"}
    assert scan(only_file(workspace)).torn_bytes > 0
    append(workspace, [group("g2")])
    assert waiting_groups(workspace, "main") == {"g0", "g1", "g2"}


def test_a_full_disk_leaves_the_segment_as_it_was(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SegmentWriter(open_folder(workspace, "main"), "w") as writer:
        writer.append(group("g0"))
        before = only_file(workspace).read_bytes()

        def full(handle: int, data: bytes) -> None:
            os.write(handle, data[:50])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(segments, "_write_all", full)
        with pytest.raises(Unavailable, match=r"is full: a group of 4 episodes was not kept"):
            writer.append(group("g1"))
        monkeypatch.undo()
        assert only_file(workspace).read_bytes() == before
        writer.append(group("g1"))
    assert waiting_groups(workspace, "main") == {"g0", "g1"}


def test_what_is_no_group_is_refused(workspace: Workspace) -> None:
    with SegmentWriter(open_folder(workspace, "main")) as writer:
        for wrong in ([], [episode("a", 0), episode("b", 0)]):
            with pytest.raises(UsageError, match="share one group_id"):
                writer.append(wrong)
    assert not open_folder(workspace, "main").exists()


def test_rows_that_are_not_finite_are_kept_for_the_validation_to_name(workspace: Workspace) -> None:
    append(workspace, [[episode("g", 0, reward=float("nan"))]])
    (members,) = scan(only_file(workspace)).groups
    assert str(read_line(members[0])["reward"]) == "nan"


def test_rows_of_another_format_are_named(workspace: Workspace) -> None:
    append(workspace, [[episode("g", 0)]])
    path = only_file(workspace)
    row = json.loads(path.read_bytes().split(b" ", 2)[2])
    body = b"1/1 " + json.dumps({**row, "more": 1}).encode()
    path.write_bytes(b"%08x %b\n" % (segments.zlib.crc32(body), body))
    assert scan(path).bad == ((1, "its columns are of another version of Forebay"),)


def test_the_modules_need_no_heavy_import() -> None:
    heavy = {"dvc", "great_expectations", "pandas", "pyarrow", "torch", "mlflow"}
    code = (
        f"import sys, tasks.replay.seal, tasks.replay.validation; print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
