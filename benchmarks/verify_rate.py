"""How near does `verify` come to the machine's SHA-256 rate over what must be read?

    python -m benchmarks.verify_rate [--gigabytes 2] [--rounds 5] [--chunks]

A workspace-like set of files, from 4 KB to 256 MB, is registered as an agent in a real ledger and verified in full,
through the function that the command calls: the ledger's chain, the walk, opening, reading and comparing every file.
Beside it, in the same round, the same number of threads hash as many bytes that are in memory already, in chunks of the
same size: no program can be faster on this machine. The files lie in the page cache, so the disk is not what is measured.
The ratio is of wall-clock times; the one of processor times beside it does not feel what else the machine does meanwhile.
With --chunks, how the size of the chunk that is read at a time matters.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from models.machine import describe
from tasks.core.digest import sha256_file
from tasks.lineage import hashing
from tasks.lineage.hashing import DigestCache
from tasks.lineage.verify import verify
from tests.lineage.world import World

_KB, _MB = 1 << 10, 1 << 20
_SIZES = (256 * _MB, 64 * _MB, 16 * _MB, 4 * _MB, _MB, 256 * _KB, 64 * _KB, 16 * _KB, 4 * _KB)
# Shares of the bytes. Some 900 files a gigabyte; the workspace of the demo has about 40.
_SHARES = (0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.015, 0.004, 0.001)


def fill(world: World, total: int, seed: int = 0) -> dict[str, int]:
    """Register an agent of about `total` bytes; return how many files there are of each size."""
    block = random.Random(seed).randbytes(_MB)
    folder = world.workspace.models / "base"
    files, counts = {}, {}
    for size, share in zip(_SIZES, _SHARES, strict=True):
        counts[f"{size // _KB} KB"] = count = max(1, round(total * share / size))
        for i in range(count):
            path = folder / f"{size // _KB}k" / f"{i:05d}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as stream:
                stream.write(f"{size} {i}".encode().ljust(64))
                left = size - 64
                while left:
                    left -= stream.write(block[: min(left, len(block))])
            files[path.relative_to(folder).as_posix()] = sha256_file(path)
    world.crown(world._register(folder, files, "base"))
    return counts


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return what `work` returns, the seconds it took, and the processor's seconds over all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def pure(total: int, threads: int) -> None:
    """Let `threads` threads hash `total` bytes which are in memory."""

    def work(share: int) -> None:
        chunk = memoryview(bytearray(random.randbytes(hashing.CHUNK)))
        digest = hashlib.sha256()
        while share > 0:
            digest.update(chunk[: min(share, len(chunk))])
            share -= len(chunk)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [total // threads] * threads))


def measure(world: World, rounds: int) -> list[dict[str, float]]:
    """Alternate the two, so that whatever else the machine does falls on both."""
    found = []
    for _ in range(rounds):
        report, seconds, cpu = timed(lambda: verify(world.ledger, world.workspace, "agent@champion"))
        assert report.ok, report.problems
        total = report.bytes
        _, alone, alone_cpu = timed(partial(pure, total, hashing.threads()))
        found.append(
            {
                "verify_mb_s": total / seconds / 1e6,
                "sha256_mb_s": total / alone / 1e6,
                "ratio": alone / seconds,
                "cpu_ratio": alone_cpu / cpu,
            }
        )
    return found


def incremental(world: World) -> dict[str, float]:
    """How long a verification takes of which every file is known."""
    cache = DigestCache(world.workspace.digests, racy_seconds=0)
    verify(world.ledger, world.workspace, "agent@champion", cache=cache)
    started = time.perf_counter()
    report = verify(world.ledger, world.workspace, "agent@champion", cache=cache)
    return {
        "seconds": time.perf_counter() - started,
        "files_from_cache": report.cached,
        "files_read": report.read,
    }


def _median(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in found) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunks", action="store_true")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="forebay-rate-"))
    try:
        world = World(folder / "workspace")
        counts = fill(world, int(given.gigabytes * 1e9))
        measure(world, 1)  # brings the files into the page cache
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{'chunk KB':>9} {'verify MB/s':>12} {'SHA-256 MB/s':>13} {'ratio':>6} {'of CPU':>7}")
        table = {}
        for chunk in (64, 128, 256, 512, 1024, 4096) if given.chunks else (hashing.CHUNK // _KB,):
            hashing.CHUNK = chunk * _KB
            found = measure(world, given.rounds)
            table[chunk] = {"median": _median(found), "rounds": found}
            m = table[chunk]["median"]
            print(
                f"{chunk:>9} {m['verify_mb_s']:>12,.0f} {m['sha256_mb_s']:>13,.0f} {m['ratio']:>6.2f} {m['cpu_ratio']:>7.2f}",
                flush=True,
            )
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        again = incremental(world)
    finally:
        shutil.rmtree(folder)
    print(
        json.dumps(
            {
                "machine": describe(), "cores": os.cpu_count(), "threads": hashing.threads(), "files": counts,
                "chunk_kb": table, "memory_grown_kb": grown, "incremental": again,
            },
            indent=2,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
