"""What is read, what is taken from the cache, and what no cache may hide."""

from __future__ import annotations

import hashlib
import os
import random
import sqlite3
import time
from io import BytesIO
from pathlib import Path

import pytest

from tasks.core.errors import Unavailable
from tasks.lineage import hashing
from tasks.lineage.hashing import DigestCache, Reading, hash_files, hash_streams

SIZES = (0, 1, 4095, hashing.CHUNK - 1, hashing.CHUNK, hashing.CHUNK + 1, 3 * hashing.CHUNK + 7)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, size in enumerate(SIZES):
        (tmp_path / f"{number}.bin").write_bytes(random.Random(number).randbytes(size))
    for number in range(200):
        (tmp_path / f"small-{number}").write_bytes(f"{number}".encode())
    return tmp_path


@pytest.fixture
def cache(tmp_path_factory) -> DigestCache:
    """One that takes a file as settled 50 ms after its change, so that a test need not wait for seconds."""
    return DigestCache(tmp_path_factory.mktemp("cache") / "digests.db", racy_seconds=0.05)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def settle() -> None:
    time.sleep(0.08)


def test_every_file_is_hashed_as_hashlib_hashes_it(root: Path):
    found = hash_files(root, names(root))
    assert {name: reading.sha256 for name, reading in found.items()} == {
        name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in names(root)
    }
    assert sum(reading.bytes for reading in found.values()) == sum(p.stat().st_size for p in root.iterdir())
    assert not any(reading.cached for reading in found.values())


def test_progress_counts_every_file_once(root: Path, cache: DigestCache):
    settle()
    for _ in range(2):  # read, then from the cache
        seen: list[int] = []
        hash_files(root, names(root), cache, lambda done, total, note, seen=seen: seen.append(done))
        assert seen == list(range(1, len(names(root)) + 1))


def test_an_unchanged_file_is_not_read_again(root: Path, cache: DigestCache):
    settle()
    first = hash_files(root, names(root), cache)
    again = hash_files(root, names(root), cache)
    assert all(reading.cached and reading.bytes == 0 for reading in again.values())
    assert {n: r.sha256 for n, r in again.items()} == {n: r.sha256 for n, r in first.items()}
    assert not any(reading.cached for reading in hash_files(root, names(root)).values())


def test_a_flipped_byte_is_found_though_its_time_was_put_back(root: Path, cache: DigestCache):
    settle()
    hash_files(root, names(root), cache)
    path, before = root / "3.bin", (root / "3.bin").stat()
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        before.st_size,
        before.st_mtime_ns,
        before.st_ino,
    )
    reading = hash_files(root, names(root), cache)["3.bin"]
    assert (reading.sha256, reading.cached) == (hashlib.sha256(data).hexdigest(), False)


def test_another_file_in_its_place_is_read(root: Path, cache: DigestCache):
    settle()
    hash_files(root, ["4.bin"], cache)
    stat = (root / "4.bin").stat()
    other = root / "other"
    other.write_bytes(b"x" * stat.st_size)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(root / "4.bin")
    assert not hash_files(root, ["4.bin"], cache)["4.bin"].cached


def test_a_file_hashed_right_after_its_change_is_not_trusted(tmp_path: Path, cache: DigestCache):
    """It may be written again within one tick of the clock, with the same times."""
    careful = DigestCache(cache.path, racy_seconds=60)
    (tmp_path / "new").write_bytes(b"new")
    for _ in range(3):
        assert not hash_files(tmp_path, ["new"], careful)["new"].cached


def test_a_file_from_the_future_is_not_trusted(root: Path, cache: DigestCache):
    """A clock that was set back, or a time that somebody chose."""
    later = time.time_ns() + 3600 * 10**9
    os.utime(root / "1.bin", ns=(later, later))
    settle()
    for _ in range(2):
        assert not hash_files(root, ["1.bin"], cache)["1.bin"].cached


@pytest.mark.parametrize("damage", [b"", b"no database at all", None], ids=["empty", "nonsense", "cut"])
def test_a_damaged_cache_costs_time_only(root: Path, cache: DigestCache, damage: bytes | None):
    settle()
    right = hash_files(root, names(root), cache)
    data = cache.path.read_bytes()
    cache.path.write_bytes(data[: len(data) // 2] if damage is None else damage)
    assert {n: r.sha256 for n, r in hash_files(root, names(root), cache).items()} == {
        n: r.sha256 for n, r in right.items()
    }
    assert all(reading.cached for reading in hash_files(root, names(root), cache).values())


def test_a_cache_that_another_process_holds_is_done_without(root: Path, cache: DigestCache, monkeypatch):
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **{**k, "timeout": 0.05}))
    hash_files(root, ["2.bin"], cache)
    with connect(cache.path, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert hash_files(root, names(root), cache)["2.bin"].sha256 is not None
        other.execute("ROLLBACK")


def test_what_cannot_be_read_is_told_apart(root: Path):
    (root / "folder").mkdir()
    os.mkfifo(root / "pipe")  # opening it would wait for a writer
    (root / "loop").symlink_to("loop")
    found = hash_files(root, ["nowhere", "folder", "pipe", "loop", "1.bin/x"])
    assert found["nowhere"].fault == "missing"
    assert {found[name].fault for name in ("folder", "pipe", "loop", "1.bin/x")} == {"unreadable"}
    assert found["pipe"].reason == "Not a regular file"


def test_a_store_that_lacks_a_file_and_one_that_does_not_answer(tmp_path: Path):
    class Breaks(BytesIO):
        def readinto(self, buffer):
            raise RuntimeError("connection reset")

    def open_file(path: str):
        if path == "gone":
            raise FileNotFoundError(path)
        if path == "away":
            raise Unavailable("nobody answers")
        return Breaks() if path == "breaks" else BytesIO(b"here")

    found = hash_streams(["here", "gone", "away", "breaks"], open_file)
    assert found["here"] == Reading(hashlib.sha256(b"here").hexdigest(), 4)
    assert found["gone"].fault == "missing"
    assert (found["away"].fault, found["away"].reason) == ("unreachable", "nobody answers")
    assert (found["breaks"].fault, found["breaks"].reason) == ("unreachable", "connection reset")


def test_an_interrupt_ends_it(root: Path):
    def stop(done: int, total: int, note: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hash_files(root, names(root), progress=stop)
