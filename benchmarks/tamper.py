"""Does `verify` find whatever is done to a workspace, and blame what was touched, and nothing else?

    python -m benchmarks.tamper [--tampers 1000] [--clean 100] [--seed 0]

A signed history of three generations: shards, manifests, checkpoints, reward models, evidence, decisions with their
signatures, approvals, a canary's look, an erased shard, a removed key, signed heads (kept in git a second time). Each
tampering takes one object at random (any file of the workspace, or a ledger row through plain SQLite) and flips one byte,
truncates, deletes, swaps two of a kind, inserts a byte; adds a file to an agent's folder; brings back what was erased;
alters a ledger row and makes the whole chain anew. Half of those to files put the file's time back afterwards. Then the
workspace is verified twice, incrementally and in full. Both must find it and name the file or the ledger's entry, and no
other object. Everything is put back byte for byte, and must verify, before the next.

What cannot be found by anybody without the private key is not tried: to append a well-made entry, and to cut off or
rewrite entries after the newest signed head.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from models.machine import describe
from tasks.core.digest import sha256_file
from tasks.core.heads import newest_seq
from tasks.core.keys import read_trust, trusted, write_trust
from tasks.core.ledger import GENESIS, Ledger, _digest
from tasks.lineage.hashing import DigestCache
from tasks.lineage.report import VerifyReport
from tasks.lineage.verify import verify
from tasks.promotion.canary import Group, Rule, Traffic, make_record, write_record
from tasks.promotion.kept_heads import keep_heads
from tests.lineage.signed import SignedWorld, adopt_keys, put_back, rows
from tests.promotion.support import make_key

ADA = make_key("ada")
_FILE_ACTS = ("flip", "truncate", "delete", "insert", "swap")
_ROW_ACTS = ("flip", "truncate", "delete", "insert", "swap", "forge")


@dataclass(frozen=True)
class Tampering:
    """One thing that was done.

    Attributes:
        what: the class of the object, the act.
        named: each object that was touched, which a problem must name: its path, and of the ledger the entries.
        follows: a path that may be named as well: a file that was erased is missing, where the entry that says so
            cannot be believed.
    """

    what: tuple[str, str]
    named: tuple[tuple[str, frozenset[int]], ...]
    says: str
    follows: str = ""


def build(root: Path) -> SignedWorld:
    """A history in which everything that `verify` looks at is there."""
    world = SignedWorld(root)
    root.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    adopt_keys(world)
    world.crown(world.base())
    world.generation(1)
    _look(world)
    _remove_a_key(world)
    _erase(world)
    world.generation(2)
    entry = world.ledger.last()
    assert entry is not None
    assert newest_seq(world.workspace.heads) == entry.seq
    keep_heads(world.workspace, entry.time)
    return world


def _look(world: SignedWorld) -> None:
    good, bad = (tuple(Group(str(i), mean, 8) for i in range(20)) for mean in (0.9, 0.1))
    record, _ = make_record({"a": Traffic(bad, good)}, Rule(0.05, 0.0, 10, {"a": 1.0}, "concurrent"), {})
    path, sha256 = write_record(world.workspace.evidence, record)
    file = {"path": world.workspace.relative(path), "sha256": sha256}
    world.append("canary.looked", "agent/2", {"promotion": 1, "record": file})


def _remove_a_key(world: SignedWorld) -> None:
    trust = read_trust(world.workspace.trust).add(trusted(ADA, "approver"))
    key = trust.named(ADA.name)
    assert key is not None
    about = {"name": key.name, "role": key.role, "id": key.id}
    at = world.append("key.trusted", f"key/{key.name}", {**about, "public": key.public})
    world.append("key.removed", f"key/{key.name}", {**about, "removed": at})
    write_trust(world.workspace.trust, trust.remove(key.name, at))


def _erase(world: SignedWorld) -> None:
    shard = world.manifests["main"].shards[0]
    (world.workspace.root / shard.path).unlink()
    payload = {"files": [{"path": shard.path, "sha256": shard.sha256}], "reason": "asked for"}
    world.append("data.erased", "dataset:main", payload)


class Campaign:
    """Tampers with one workspace again and again."""

    def __init__(self, root: Path, seed: int) -> None:
        self.world = build(root)
        self.root = root
        self.random = random.Random(seed)
        self.cache = DigestCache(self.world.workspace.digests)
        self.ledger = self.world.workspace.state / "ledger.db"
        self.world.ledger._engine.dispose()
        self.erased_by = self._entry_of_erasure()
        self.bytes = {path: path.read_bytes() for path in self._files()}
        self.kinds: dict[str, list[Path]] = {}
        for path in self.bytes:
            if path != self.ledger:
                self.kinds.setdefault(self._kind(path), []).append(path)

    def _files(self) -> list[Path]:
        """Every file of the workspace but git's and the cache of digests."""
        paths = sorted(self.root.rglob("*"))
        return [p for p in paths if p.is_file() and ".git" not in p.parts and p != self.cache.path]

    def _entry_of_erasure(self) -> int:
        return next(i for i, row in enumerate(rows(self.world), start=1) if row["kind"] == "data.erased")

    def _kind(self, path: Path) -> str:
        name = path.relative_to(self.root).as_posix()
        patterns = (
            ("data", r"/shards/"), ("manifest", r"/manifests/"), ("reward model", r"^\.forebay/models/reward-"),
            ("checkpoint", r"^\.forebay/(runs|models)/"), ("signature", r"\.dsse\.json$"),
            ("head", r"^\.forebay/heads/"), ("keys.yaml", r"^keys\.yaml$"), ("evidence", r"^\.forebay/evidence/"),
        )  # fmt: skip
        return next(kind for kind, pattern in patterns if re.search(pattern, name))

    def verify(self, full: bool) -> VerifyReport:
        ledger = Ledger(self.world.workspace.ledger_url)
        try:
            return verify(ledger, self.world.workspace, "agent@champion", cache=None if full else self.cache)
        finally:
            ledger._engine.dispose()

    @contextmanager
    def tampered(self) -> Iterator[Tampering]:
        """Do one thing at random, and undo it afterwards."""
        often = ("data", "checkpoint", "evidence", "manifest", "ledger", "ledger", "ledger", "ledger")
        kind = self.random.choice([*self.kinds, *often, "added", "erased"])
        if kind == "ledger":
            done = self._tamper_row(self.random.choice(_ROW_ACTS))
        elif kind == "added":
            done = self._add()
        elif kind == "erased":
            done = self._revive()
        else:
            done = self._tamper_file(kind, self.random.choice(_FILE_ACTS))
        try:
            yield done
        finally:
            self._undo()

    def _undo(self) -> None:
        for path in self._files():
            if path not in self.bytes:
                path.unlink()
        for path, data in self.bytes.items():
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)
        assert set(self._files()) == set(self.bytes)

    def _tamper_file(self, kind: str, act: str) -> Tampering:
        if act == "swap" and len({self.bytes[path] for path in self.kinds[kind]}) < 2:
            act = "flip"
        path = self.random.choice(self.kinds[kind])
        data, touched = self.bytes[path], [path]
        stat = path.stat()
        if act == "swap":
            other = self.random.choice([p for p in self.kinds[kind] if self.bytes[p] != data])
            path.write_bytes(self.bytes[other])
            other.write_bytes(data)
            touched.append(other)
        elif act == "delete":
            path.unlink()
        else:
            path.write_bytes(self._spoilt(data, act))
        if act != "delete" and self.random.random() < 0.5:
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        names = [self._object(path) for path in touched]
        return Tampering(
            (kind, act), tuple((name, frozenset()) for name in names), f"{act} {' '.join(names)}"
        )

    def _spoilt(self, data: bytes, act: str) -> bytes:
        at = self.random.randrange(len(data))
        if act == "flip":
            return data[:at] + bytes([data[at] ^ self.random.randrange(1, 256)]) + data[at + 1 :]
        if act == "insert":
            return data[:at] + bytes([self.random.randrange(256)]) + data[at:]
        return data[:at]

    def _object(self, path: Path) -> str:
        """A reward model is one object, known by one digest over its folder."""
        where = path.parent if self._kind(path) == "reward model" else path
        return where.relative_to(self.root).as_posix()

    def _add(self) -> Tampering:
        folder = self.random.choice(self.kinds["checkpoint"]).parent
        path = folder / f"extra-{self.random.randrange(99)}.json"
        path.write_bytes(b"{}")
        name = self._object(path)
        return Tampering(("checkpoint", "add"), ((name, frozenset()),), f"add {name}")

    def _revive(self) -> Tampering:
        shard = self.world.manifests["main"].shards[0]
        path = self.root / shard.path
        path.write_bytes(self.world.shard(1, self.world.manifests["main"].behaviour[:1]))
        assert sha256_file(path) == shard.sha256
        return Tampering(("data", "revive"), ((shard.path, frozenset()),), f"revive {shard.path}")

    def _tamper_row(self, act: str) -> Tampering:
        found = rows(self.world)
        at = self.random.randrange(len(found))
        touched = [at + 1]
        follows: set[int] = set()
        if act in ("flip", "truncate"):
            column = self.random.choice(["time", "kind", "subject", "payload", "payload", "prev", "digest"])
            before = found[at][column].encode()
            after = self._spoilt(before, act)
            with sqlite3.connect(self.ledger) as raw:
                raw.execute(f"UPDATE ledger SET {column} = CAST(? AS TEXT) WHERE seq = ?", (after, at + 1))
            return self._of_rows(act, touched, follows, f"{column}: {after[:80]!r}")
        if act == "delete":
            del found[at]
        elif act == "swap":
            other = self.random.choice([i for i in range(len(found)) if i != at])
            found[at], found[other] = found[other], found[at]
            found[at]["seq"], found[other]["seq"] = at + 1, other + 1
            touched.append(other + 1)
        elif act == "insert":
            others = (
                found[:at] + found[at + 1 :]
            )  # the row itself would have one digest twice, which SQLite refuses
            made = {**self.random.choice(others), "prev": found[at - 1]["digest"] if at else GENESIS}
            found.insert(at, made)
            for i, row in enumerate(found, start=1):
                row = found[i - 1] = {**row, "seq": i}
                if i == at + 1:
                    row["digest"] = _digest(row)
            follows = set(
                range(at + 1, len(found) + 1)
            )  # they have other numbers than they were written with
        else:
            row = found[at]
            found[at] = {**row, "payload": json.dumps({**json.loads(row["payload"]), "reason": "another"})}
            follows = set(range(at + 1, len(found) + 1))  # the next signed head tells
        put_back(self.world, found, rechain=act == "forge")
        return self._of_rows(act, touched, follows)

    def _of_rows(self, act: str, touched: list[int], follows: set[int], says: str = "") -> Tampering:
        named = tuple(("ledger", frozenset({seq} | follows)) for seq in touched)
        gone = self.world.manifests["main"].shards[0].path if {*touched, *follows} & {self.erased_by} else ""
        return Tampering(("ledger", act), named, f"{act} of entries {touched} {says}", gone)


_ENTRIES = re.compile(
    r"(?:altered at|written anew:|signed) (?:entry|entries) (\d+)(?:.*so (?:is|are) the (\d+))?"
)


def wrong(done: Tampering, report: VerifyReport) -> str | None:
    """Say what is wrong with a report on `done`: it was missed, or something else is blamed; None where it is right."""
    notes = {"keys.yaml" for note in report.notes if note.startswith("keys.yaml")}
    for path, entries in done.named:
        if not any(_names(problem.path, problem.owner, path, entries) for problem in report.problems):
            if path in notes and not report.problems:
                continue  # a comment or a space: the keys are what they were, and it is told
            return "missed"
    for problem in report.problems:
        named = any(_names(problem.path, problem.owner, *name) for name in done.named)
        if not named and (problem.problem, problem.path) != ("missing", done.follows):
            return f"blamed {problem}"
    return f"unreachable {report.unreachable}" if report.unreachable else None


def _names(path: str, owner: str, wanted: str, entries: frozenset[int]) -> bool:
    if path != wanted:
        return False
    if path != "ledger":
        return True
    said = _ENTRIES.search(owner)
    if said is None:
        return False
    first, more = int(said[1]), int(said[2] or 0)
    return bool(entries & set(range(first, first + more + 1)))


def run(root: Path, tampers: int, clean: int, seed: int, say: Callable[[str], None]) -> dict[str, object]:
    """Return how many of each kind there were, and every one that was missed or wrongly blamed."""
    campaign = Campaign(root, seed)
    alarms = []
    for number in range(clean):
        report = campaign.verify(full=number % 2 == 0)
        assert report.erased, report
        assert report.signatures, report
        if report.problems or report.notes or not report.ok:
            alarms.append(repr((report.problems, report.notes)))
    counts: Counter[tuple[str, str]] = Counter()
    failures = []
    cached = 0
    started = time.perf_counter()
    for number in range(tampers):
        with campaign.tampered() as done:
            counts[done.what] += 1
            for full in (False, True):
                report = campaign.verify(full)
                cached += report.cached
                problem = wrong(done, report)
                if problem is not None:
                    failures.append(f"{'full' if full else 'incremental'}: {done.says}: {problem}")
        after = campaign.verify(full=False)
        if after.problems or after.notes or not after.ok:
            alarms.append(f"after {done.says}: {after.problems} {after.notes}")
        if (number + 1) % 100 == 0:
            say(
                f"{number + 1} tamperings, {len(failures)} not found or wrongly blamed, {len(alarms)} false alarms"
            )
    return {
        "machine": describe(), "seed": seed, "tampers": tampers, "clean_runs": clean + tampers,
        "seconds": round(time.perf_counter() - started, 1), "files_from_cache": cached,
        "failures": failures, "false_alarms": alarms,
        "kinds": {" ".join(what): n for what, n in sorted(counts.items())},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tampers", type=int, default=1000)
    parser.add_argument("--clean", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="forebay-tamper-"))
    try:
        result = run(
            folder / "workspace", given.tampers, given.clean, given.seed, lambda text: print(text, flush=True)
        )
    finally:
        shutil.rmtree(folder)
    print(json.dumps(result, indent=2))
    raise SystemExit(1 if result["failures"] or result["false_alarms"] else 0)


if __name__ == "__main__":
    main()
