"""Signed heads find what a hash chain alone cannot: an end that was cut off, or a history written anew."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from tasks.core.errors import Corrupt, Refused
from tasks.core.heads import Kept, check_heads, newest_seq, require_newest, write_head
from tasks.core.ledger import Ledger
from tests.promotion.support import EVE, LEE, SERVICE, TRUST


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Six entries; the head is signed after entries 2, 4 and 6."""
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    for n in range(1, 7):
        entry = ledger.append("a", "x", {"n": n})
        if n % 2 == 0:
            write_head(ledger, tmp_path / "heads", entry, SERVICE, TRUST)
    return ledger


def alter(tmp_path: Path, *statements: str) -> None:
    with sqlite3.connect(tmp_path / "ledger.db") as raw:
        for statement in statements:
            raw.execute(statement)


def rewrite(tmp_path: Path, keep: int, say: int) -> None:
    """Cut the ledger off after `keep` entries and write others, chain and all."""
    alter(tmp_path, f"DELETE FROM ledger WHERE seq > {keep}")
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    for _ in range(keep, 7):
        ledger.append("a", "x", {"n": say})


def test_an_honest_ledger_agrees_and_may_grow(ledger: Ledger, tmp_path: Path):
    ledger.append("a", "x", {"n": 7})
    assert check_heads(ledger, tmp_path / "heads", TRUST) == (3, [])
    require_newest(ledger, tmp_path / "heads", TRUST)
    assert newest_seq(tmp_path / "heads") == 6


def test_a_cut_off_end_is_found_though_the_chain_holds(ledger: Ledger, tmp_path: Path):
    alter(tmp_path, "DELETE FROM ledger WHERE seq > 3")
    assert ledger.verify_chain() == 3
    _, problems = check_heads(ledger, tmp_path / "heads", TRUST)
    assert [(p.problem, p.seq) for p in problems] == [("missing", 4), ("missing", 6)]
    with pytest.raises(Corrupt, match="cut off: `service` signed entry 6, and it is gone"):
        require_newest(ledger, tmp_path / "heads", TRUST)


def test_a_history_written_anew_is_found_though_the_chain_holds(ledger: Ledger, tmp_path: Path):
    signed = ledger.digest_at(4)
    rewrite(tmp_path, keep=2, say=9)
    assert ledger.verify_chain() == 7
    _, problems = check_heads(ledger, tmp_path / "heads", TRUST)
    assert [(p.problem, p.seq) for p in problems] == [("changed", 4), ("changed", 6)]
    assert (problems[0].expected, problems[0].found) == (signed, ledger.digest_at(4))


def test_nothing_is_signed_on_top_of_a_ledger_that_lost_its_end(ledger: Ledger, tmp_path: Path):
    alter(tmp_path, "DELETE FROM ledger WHERE seq > 3")
    entry = ledger.append("a", "x", {"n": 0})
    with pytest.raises(Corrupt, match="cut off"):
        write_head(ledger, tmp_path / "heads", entry, SERVICE, TRUST)
    assert newest_seq(tmp_path / "heads") == 6


def test_only_the_service_signs_heads(ledger: Ledger, tmp_path: Path):
    entry = ledger.last()
    assert entry is not None
    for key in (LEE, EVE):
        with pytest.raises(Refused):
            write_head(ledger, tmp_path / "heads", entry, key, TRUST)


def test_swapped_heads_and_foreign_ones_are_named(ledger: Ledger, tmp_path: Path):
    heads = tmp_path / "heads"
    (heads / "00000006.json").write_bytes((heads / "00000004.json").read_bytes())
    _, (problem,) = check_heads(ledger, heads, TRUST)
    assert (problem.problem, problem.says) == ("forged", "The signed head 00000006.json is about entry 4")
    data = (heads / "00000004.json").read_bytes()
    (heads / "00000006.json").write_bytes(data.replace(b'"sig":"', b'"sig":"AA', 1))
    _, (problem,) = check_heads(ledger, heads, TRUST)
    assert problem.problem == "forged"
    _, problems = check_heads(ledger, heads, TRUST.remove("service", 3))
    assert [(p.problem, p.seq) for p in problems] == [("wrong key", 4), ("forged", 6)]


def test_a_head_that_is_kept_elsewhere_counts_whatever_lies_in_its_place(ledger: Ledger, tmp_path: Path):
    """Somebody cuts the ledger back, spoils the newest head, and gives an older one a name that sorts last."""
    heads = tmp_path / "heads"
    kept = Kept("00000006.json", (heads / "00000006.json").read_bytes(), "git")
    require_newest(ledger, heads, TRUST, kept)
    alter(tmp_path, "DELETE FROM ledger WHERE seq > 2")
    (heads / "00000006.json").write_bytes(b"garbage")
    (heads / "6.json").write_bytes((heads / "00000002.json").read_bytes())
    (heads / "notes.json").write_text("{}")
    with pytest.raises(Corrupt):
        require_newest(ledger, heads, TRUST, kept)
    (heads / "00000006.json").unlink()
    (heads / "00000004.json").unlink()
    with pytest.raises(Corrupt, match="was cut off"):
        require_newest(ledger, heads, TRUST, kept)
