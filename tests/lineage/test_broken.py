"""Broken stores, histories made by hand, and what was erased on purpose: told in a sentence, and nothing is written."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.core import ledger as core_ledger
from tasks.core.digest import digest_tree
from tasks.core.errors import Corrupt, Unavailable
from tasks.core.ledger import GENESIS, Ledger
from tasks.lineage.chain import inspect_chain
from tasks.lineage.hashing import DigestCache
from tasks.lineage.verify import VerifyReport, verify
from tests.lineage.signed import put_back, rows
from tests.lineage.world import World


def check(world: World, ref: str = "agent@champion") -> VerifyReport:
    """Verify with a new connection, as a process of its own would."""
    return verify(Ledger(world.workspace.ledger_url), world.workspace, ref)


def database(world: World) -> Path:
    return world.workspace.state / "ledger.db"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rename(path: Path) -> None:
    """An honest program would make the table that it does not find."""
    with sqlite3.connect(path) as raw:
        raw.execute("ALTER TABLE ledger RENAME TO lodger")


def spoil_schema(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"tableledgerledger", b"tablelodgerlodger"))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (Path.unlink, "cannot be read (No such file or directory)"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "cut off": (cut, "is cut off after"),
    "no database": (lambda path: path.write_bytes(b"x" * 8192), "is not a SQLite database"),
    "without its table": (rename, "holds no ledger"),
    "with a damaged schema": (spoil_schema, "is damaged (malformed database schema"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read (Is a directory)"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_ledger_is_said_and_left_as_it_is(world, what):
    breaks, words = BROKEN[what]
    breaks(database(world))
    before = digest_tree(world.workspace.root)
    with pytest.raises(Corrupt, match="nothing was changed") as error:
        check(world)
    assert words in str(error.value)
    assert digest_tree(world.workspace.root) == before


def test_a_damaged_page_is_a_finding(world):
    """The header is whole, what follows is not."""
    path = database(world)
    data = bytearray(path.read_bytes())
    data[4096:12288] = b"\xff" * 8192
    path.write_bytes(data)
    before = digest_tree(world.workspace.root)
    report = check(world)
    assert not report.ok
    assert "database is damaged" in report.problems[0].owner
    assert {problem.path for problem in report.problems} == {"ledger"}
    assert any("past reading" in note for note in report.notes)
    assert digest_tree(world.workspace.root) == before


def test_whatever_byte_of_the_database_is_flipped_the_rows_are_the_same_or_it_is_told(world):
    """Not every byte of a SQLite file says something; of those that do, none changes unseen, and none is a crash."""
    path, chance = database(world), random.Random(0)
    right, before = path.read_bytes(), rows(world)
    told = 0
    for _ in range(60):
        data = bytearray(right)
        data[chance.randrange(len(data))] ^= chance.randrange(1, 256)
        path.write_bytes(data)
        ledger = Ledger(world.workspace.ledger_url)
        try:
            report = verify(ledger, world.workspace, "agent@champion")
        except (Corrupt, Unavailable):
            told += 1
            continue
        finally:
            ledger.__dict__.pop("_engine", None)
        if report.ok:
            assert rows(world) == before
        else:
            assert {problem.path for problem in report.problems} == {"ledger"}
            told += 1
    assert told > 20


def test_an_index_that_lost_a_row_is_a_finding(world):
    """The rows are whole, and a search by kind would miss one of them."""
    with sqlite3.connect(database(world)) as raw:
        name = raw.execute(
            "SELECT name FROM sqlite_master WHERE type = 'index' AND name LIKE '%kind%'"
        ).fetchone()[0]
        raw.execute("PRAGMA writable_schema = ON")
        raw.execute("CREATE TABLE empty (kind TEXT)")
        raw.execute("CREATE INDEX lost ON empty (kind)")
        page = raw.execute("SELECT rootpage FROM sqlite_master WHERE name = 'lost'").fetchone()[0]
        raw.execute("UPDATE sqlite_master SET rootpage = ? WHERE name = ?", (page, name))
    report = check(world)
    assert not report.ok
    assert "damaged" in report.problems[0].owner


def test_a_ledger_that_another_process_holds(world, monkeypatch):
    monkeypatch.setattr(core_ledger, "LOCK_SECONDS", 0.1)
    with sqlite3.connect(database(world), isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(Unavailable, match="locked"):
            check(world)
        other.execute("ROLLBACK")
    assert check(world).ok


@pytest.mark.parametrize("folder", ["evidence", "runs", "models"])
def test_a_half_migrated_workspace_names_each_file_that_did_not_come(world, folder):
    gone = world.workspace.state / folder
    lost = {p.relative_to(world.workspace.root).as_posix() for p in gone.rglob("*") if p.is_file()}
    shutil.rmtree(gone)
    report = check(world)
    named = {problem.path for problem in report.missing}
    assert named
    assert len(report.missing) == len(report.problems)
    assert all(path in lost or any(p.startswith(f"{path}/") for p in lost) for path in named)


def test_a_folder_and_a_pipe_in_place_of_a_file(world):
    first, second = (world.workspace.root / shard.path for shard in world.manifests["main"].shards[:2])
    first.unlink()
    first.mkdir()
    second.unlink()
    os.mkfifo(second)
    report = check(world)
    assert [problem.problem for problem in report.problems] == ["unreadable", "unreadable"]


def test_a_clock_that_ran_backwards_is_a_note(world):
    ledger = rows(world)
    for row in ledger[10:]:
        row["time"] = "2001" + row["time"][4:]
    put_back(world, ledger, rechain=True)
    report = check(world)
    assert report.ok
    (note,) = report.notes
    assert "run backwards at entry 11" in note


def test_a_circle_that_was_made_by_hand_is_walked_once_and_told(world):
    """The base of all was trained, so the rows say, on what its descendants did."""
    ledger = rows(world)
    at = next(i for i, row in enumerate(ledger) if row["kind"] == "agent.registered")
    payload = json.loads(ledger[at]["payload"])
    payload["parents"]["run"] = next(
        row["subject"] for row in reversed(ledger) if row["kind"] == "run.finished"
    )
    ledger[at]["payload"] = json.dumps(payload)
    put_back(world, ledger, rechain=True)
    before = digest_tree(world.workspace.root)
    report = check(world, "agent/4")
    (problem,) = report.of("cycle")
    assert problem.path == "ledger"
    assert "agent agent/1" in problem.owner
    assert any("leads in a circle" in note for note in report.notes)
    assert digest_tree(world.workspace.root) == before


def test_rows_that_follow_each_other_in_a_circle(world):
    ledger = rows(world)
    ledger[4]["prev"] = ledger[6]["digest"]
    put_back(world, ledger, rechain=False)
    report = check(world)
    assert "altered at entry 5" in report.problems[0].owner
    assert report.entries == 4


def test_each_altered_row_is_named_and_the_others_are_not(world):
    ledger = rows(world)
    for at in (3, 9, 17):
        ledger[at]["time"] = "2001" + ledger[at]["time"][4:]
    put_back(world, ledger, rechain=False)
    chain = inspect_chain(Ledger(world.workspace.ledger_url))
    assert [seq for seq, _ in chain.faults] == [4, 10, 18]
    assert chain.damaged == {4, 10, 18}
    assert chain.entries == 3


def test_an_entry_that_was_exchanged_for_a_well_made_one(world):
    """Its own digest fits; the next entry follows from another."""
    ledger = rows(world)
    forged = World(world.workspace.root / "elsewhere")
    for row in ledger[:6]:
        forged.append(row["kind"], row["subject"], json.loads(row["payload"]))
    ledger[5] = {**rows(forged)[5], "prev": ledger[4]["digest"]}
    ledger[5]["digest"] = core_ledger._digest(ledger[5])
    shutil.rmtree(forged.workspace.root)
    put_back(world, ledger, rechain=False)
    (problem,) = [p for p in check(world).problems if p.path == "ledger"]
    assert "altered at entry 6: another entry stands in its place" in problem.owner


def test_bytes_that_are_no_text(world):
    with sqlite3.connect(database(world)) as raw:
        for column, seq in (("payload", 7), ("digest", 9), ("kind", 11)):
            raw.execute(f"UPDATE ledger SET {column} = CAST(x'ff00fe' AS TEXT) WHERE seq = ?", (seq,))
    report = check(world)
    assert [problem.path for problem in report.problems] == ["ledger"] * 3
    assert {int(p.owner.split("altered at entry ")[1].split(":")[0]) for p in report.problems} == {7, 9, 11}


def test_a_file_is_not_blamed_for_the_ledger(world):
    """The row says another digest of the shard than it was sealed with; the shard is what it was."""
    shard = world.manifests["main"].shards[0]
    ledger = rows(world)
    at = next(i for i, row in enumerate(ledger) if row["kind"] == "dataset.sealed")
    ledger[at]["payload"] = ledger[at]["payload"].replace(shard.sha256, "0" * 64)
    put_back(world, ledger, rechain=False)
    report = check(world)
    assert {problem.path for problem in report.problems} == {"ledger"}
    assert f"altered at entry {at + 1}" in report.problems[0].owner
    assert any("cannot be believed" in note for note in report.notes)


def test_what_nobody_can_resolve_is_told_to_be_unseen(world):
    ledger = rows(world)
    for row in ledger:
        if row["kind"].startswith(("agent.", "promotion.")):
            row["time"] = "2001" + row["time"][4:]
    put_back(world, ledger, rechain=False)
    report = check(world)
    assert not report.ok
    assert any("Nothing behind agent@champion was looked at" in note for note in report.notes)


def erase(world: World, **payload: object) -> tuple[Path, str]:
    shard = world.manifests["main"].shards[0]
    payload = {"files": [{"path": shard.path, "sha256": shard.sha256}], "reason": "asked for", **payload}
    world.append("data.erased", "dataset:main", payload)
    return world.workspace.root / shard.path, shard.sha256


def test_what_was_erased_on_purpose_is_no_fault(world):
    path, sha256 = erase(world)
    path.unlink()
    report = check(world)
    assert report.ok
    (erased,) = report.erased
    assert (erased.path, erased.sha256) == (world.workspace.relative(path), sha256)
    assert (erased.owner, erased.reason) == ("dataset main/v1", "asked for")
    assert erased.entry == len(rows(world))


def test_what_was_erased_and_is_still_there_is_a_fault(world):
    path, sha256 = erase(world)
    (problem,) = check(world).problems
    assert (problem.problem, problem.path, problem.found) == (
        "erased but present",
        world.workspace.relative(path),
        sha256,
    )


def test_an_erasure_of_other_bytes_excuses_nothing(world):
    path, _ = erase(world, files=[{"path": world.manifests["main"].shards[0].path, "sha256": "0" * 64}])
    path.unlink()
    report = check(world)
    assert [problem.path for problem in report.missing] == [world.workspace.relative(path)]
    assert report.erased == ()


def test_incremental_and_full_agree_and_say_what_was_read(world):
    time.sleep(0.08)
    cache = DigestCache(world.workspace.digests, racy_seconds=0.05)
    first = verify(world.ledger, world.workspace, "agent@champion", cache=cache)
    again = verify(world.ledger, world.workspace, "agent@champion", cache=cache)
    full = verify(world.ledger, world.workspace, "agent@champion")
    assert first.ok
    assert again.ok
    assert full.ok
    assert (first.read, first.cached) == (full.read, 0) == (again.cached, again.read)
    assert (again.bytes, again.checked) == (0, full.checked)
    assert full.bytes == first.bytes > 0


def test_genesis_is_where_an_empty_chain_ends(tmp_path):
    world = World(tmp_path / "w")
    world.append("key.trusted", "key/x", {"id": "x", "name": "x"})
    put_back(world, [], rechain=False)
    chain = inspect_chain(Ledger(world.workspace.ledger_url))
    assert (chain.entries, chain.head, chain.faults) == (0, GENESIS, ())
