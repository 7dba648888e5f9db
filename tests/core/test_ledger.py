import multiprocessing
import sqlite3
from pathlib import Path

import pytest

from tasks.core.errors import Conflict, Corrupt
from tasks.core.ledger import GENESIS, Ledger, LedgerView


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")


def test_entries_chain_from_genesis(ledger: Ledger):
    first = ledger.append("a", "x", {"n": 1})
    second = ledger.append("b", "x", {"n": 2})
    assert (first.seq, first.prev, second.seq, second.prev) == (1, GENESIS, 2, first.digest)
    assert ledger.head() == second.digest
    assert ledger.verify_chain() == 2
    assert [e.payload["n"] for e in ledger.entries(subject="x")] == [1, 2]
    assert ledger.last("a") == first


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE ledger SET payload = '{\"n\":9}' WHERE seq = 2",
        "UPDATE ledger SET time = '2020-01-01' WHERE seq = 2",
        "DELETE FROM ledger WHERE seq = 2",
    ],
)
def test_tampering_is_found_and_named(ledger: Ledger, tmp_path: Path, sql: str):
    for n in range(4):
        ledger.append("a", "x", {"n": n})
    with sqlite3.connect(tmp_path / "ledger.db") as raw:
        raw.execute(sql)
    with pytest.raises(Corrupt, match="altered at entry 2"):
        ledger.verify_chain()


def test_a_failing_check_leaves_nothing(ledger: Ledger):
    def refuse(view: LedgerView) -> None:
        raise Conflict("no")

    with pytest.raises(Conflict):
        ledger.append("a", "x", {}, check=refuse)
    assert ledger.entries() == []
    ledger.append("a", "x", {})  # and the lock is free again


def _count_to(url: str, times: int) -> int:
    ledger, won = Ledger(url), 0
    for _ in range(times):
        expected = len(ledger.entries("n"))

        def only_if_unchanged(view: LedgerView, expected: int = expected) -> None:
            if len(view.entries("n")) != expected:
                raise Conflict("someone was faster")

        try:
            ledger.append("n", "x", {"value": expected}, check=only_if_unchanged)
            won += 1
        except Conflict:
            pass
    return won


def test_compare_and_set_holds_between_processes(tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        wins = pool.starmap(_count_to, [(url, 25)] * 4)
    values = [e.payload["value"] for e in Ledger(url).entries("n")]
    assert values == list(range(sum(wins)))  # no value twice, none skipped
    assert Ledger(url).verify_chain() == sum(wins)
