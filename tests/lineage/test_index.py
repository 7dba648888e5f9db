"""The index is a projection: whatever happens to it, answers are those of the ledger."""

from __future__ import annotations

import sqlite3
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tasks.core.errors import Corrupt, NotFound, UsageError
from tasks.core.ledger import Ledger
from tasks.lineage.descent import descendants
from tasks.lineage.graph import lineage, open_index
from tasks.lineage.index import Index
from tasks.lineage.picture import layout, to_svg
from tasks.lineage.questions import at, diff, path
from tests.lineage.world import PaperWorld, World


def edges(index: Index) -> list[tuple]:
    query = "SELECT a.kind, a.key, relation, b.kind, b.key FROM edge JOIN node a ON a.id = source JOIN node b ON b.id = target"
    return sorted(index._db.execute(query))


def test_catching_up_gives_what_reading_at_once_gives(tmp_path: Path):
    world = World(tmp_path)
    champion = world.base()
    world.crown(champion)
    for _ in range(3):
        champion = world.generation(champion)
        step_by_step = open_index(world.ledger, world.workspace)
    assert edges(step_by_step) == edges(Index.derive(world.ledger))
    assert len(edges(step_by_step)) > 40


def test_an_index_of_another_ledger_is_made_anew(world, tmp_path: Path):
    open_index(world.ledger, world.workspace)
    other = World(tmp_path / "other")
    other.base()
    other.seal([1])
    index = Index.open(other.ledger, world.workspace.state / "lineage.db")
    assert edges(index) == edges(Index.derive(other.ledger))


def test_a_damaged_index_is_made_anew(world):
    expected = edges(open_index(world.ledger, world.workspace))
    file = world.workspace.state / "lineage.db"
    for rubbish in (b"", b"no database at all", b"SQLite format 3\x00" + b"\xff" * 5000):
        for suffix in ("-wal", "-shm"):
            file.with_name(file.name + suffix).unlink(missing_ok=True)
        file.write_bytes(rubbish)
        assert edges(open_index(world.ledger, world.workspace)) == expected


def test_many_readers_catch_up_at_once(world):
    found: list[list[tuple]] = []

    def read() -> None:
        found.append(edges(open_index(Ledger(world.workspace.ledger_url), world.workspace)))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [edges(Index.derive(world.ledger))] * 8


def test_descendants_agree_with_brute_force_over_the_worlds_own_account(tmp_path: Path):
    world = PaperWorld(tmp_path)
    champion = world.base()
    for _ in range(6):
        champion = world.generation(champion)
    # A decision about two agents makes neither follow from the other.
    parents = {
        child: {p for p in found if not p.startswith("decision")}
        for child, found in world.parents.items()
        if not child.startswith("decision")
    }
    ledger = world.publish()

    def above(name: str) -> set[str]:
        found: set[str] = set()
        while more := {p for child in (*found, name) for p in parents.get(child, ())} - found:
            found |= more
        return found

    for version in world.agents:
        name = f"agent/{version}"
        expected = {f"agent/{v}" for v in world.agents if name in above(f"agent/{v}")} | {name}
        found = descendants(ledger, world.workspace, name)
        assert {key for kind, key in found.nodes if kind == "agent"} == expected


def test_a_circle_put_in_by_hand_is_spelt_out_and_nothing_is_changed(world):
    """The run that made agent/3 is made to start from agent/4, which follows from agent/3."""
    run = world.agents[3]["parents"]["run"]
    before = {
        p: p.read_bytes()
        for p in world.workspace.root.rglob("*")
        if p.is_file() and "lineage.db" not in p.name
    }
    world.crown(4, 3)
    champion = world.train(4)
    late = world.ledger.last("agent.registered", f"agent/{champion}").seq
    early = world.ledger.entries("dataset.validated")[0].seq
    with sqlite3.connect(world.workspace.state / "ledger.db") as database:
        (text,) = database.execute(
            "SELECT payload FROM ledger WHERE kind = 'run.started' AND subject = ?", (run,)
        ).fetchone()
        text = text.replace('"agent":"agent/2"', f'"agent":"agent/{champion}"').replace(
            world.agents[2]["digest"], world.agents[champion]["digest"]
        )
        database.execute(
            "UPDATE ledger SET payload = ? WHERE kind = 'run.started' AND subject = ?", (text, run)
        )
        # As a forger would: the entry that makes the circle possible comes first.
        for old, new in ((late, -1), (early, late), (-1, early)):
            database.execute("UPDATE ledger SET seq = ? WHERE seq = ?", (new, old))
    with pytest.raises(Corrupt, match=r"leads in a circle.*agent agent/\d -> "):
        lineage(world.ledger, world.workspace, f"agent/{champion}", Index.derive(world.ledger))
    after = {p: p.read_bytes() for p in before if "ledger.db" not in p.name}
    assert after == {p: data for p, data in before.items() if "ledger.db" not in p.name}


def test_two_agents_that_were_compared_with_each_other_are_no_circle(world):
    world.judge(2, 3)
    found = lineage(world.ledger, world.workspace, "agent/3")
    assert {"agent/2", "agent/3"} <= {key for kind, key in found.nodes if kind == "agent"}
    assert "agent/3" not in {key for kind, key in descendants(world.ledger, world.workspace, "agent/4").nodes}
    assert to_svg(found).count("data-node=") == len(layout(found).boxes)


def test_a_broken_entry_harms_only_what_it_is_about(world):
    world.append("dataset.sealed", "main/v9", {"name": "main"})
    assert lineage(world.ledger, world.workspace, "agent/3").root == ("agent", "agent/3")
    with pytest.raises(NotFound, match="dataset:main/v9"):
        lineage(world.ledger, world.workspace, "dataset:main/v9")


def test_ids_of_other_tools_lead_to_their_things(world):
    assert lineage(world.ledger, world.workspace, "git:" + "c" * 10).root[0] == "code"
    with pytest.raises(UsageError, match="fits 3 things"):  # all versions of this world have one commit
        lineage(world.ledger, world.workspace, "git:" + "d" * 10)
    with pytest.raises(NotFound, match="Nothing here is called `dvc:0000"):
        lineage(world.ledger, world.workspace, "dvc:0000")


def test_what_was_champion_when_the_clock_ran_backwards(world):
    entries = world.ledger.entries()
    middle = entries[len(entries) // 2]
    early = (datetime.fromisoformat(entries[0].time) - timedelta(days=1)).isoformat(timespec="microseconds")
    calm = at(world.ledger, world.workspace, entries[-1].time)
    assert not calm.backwards
    with sqlite3.connect(world.workspace.state / "ledger.db") as database:
        database.execute("UPDATE ledger SET time = ? WHERE seq = ?", (early, middle.seq))
    found = at(
        world.ledger, world.workspace, (datetime.fromisoformat(early) + timedelta(hours=1)).isoformat()
    )
    assert found.backwards
    assert found.entry == middle.seq
    assert at(world.ledger, world.workspace, entries[-1].time).terms == calm.terms


@pytest.mark.parametrize("when", ["yesterday", "2026-13-01", "03.03.2026", ""])
def test_no_date(world, when: str):
    with pytest.raises(UsageError, match="is no date"):
        at(world.ledger, world.workspace, when)


def test_before_the_first_entry(world):
    with pytest.raises(NotFound, match="had no entry by"):
        at(world.ledger, world.workspace, "2001-01-01")
    assert (
        at(world.ledger, world.workspace, datetime.now(UTC).date().isoformat()).terms[0].subject == "agent/3"
    )


def test_diff_and_path_refuse_what_they_cannot_answer(world):
    with pytest.raises(UsageError, match="is a dataset; give two agents"):
        diff(world.ledger, world.workspace, "dataset:main/v1", "agent/2")
    with pytest.raises(NotFound, match="Neither of"):
        path(world.ledger, world.workspace, f"shard:{world.manifests['main'].shards[-1].path}", "agent/2")
