"""Everything somebody may tamper with, through the commands a person runs: found, and named."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.context import Context
from tasks.promotion.attest import sign_decision, signature_of, write_signature
from tasks.promotion.promote import champion
from tests.flows.conftest import forebay, lay_workspace, register_rival
from tests.flows.test_bad_input import says
from tests.flows.test_keys import judge
from tests.promotion.support import EVE


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """agent/2 passed against agent/1 and may be promoted."""
    context = lay_workspace(tmp_path_factory.mktemp("tamper") / "ws", tiny_base)
    register_rival(context)
    judge(context)
    return context.workspace.root


@pytest.fixture
def context(template: Path, tmp_path: Path) -> Context:
    return Context.open(Path(shutil.copytree(template, tmp_path / "ws")))


def problems(context: Context) -> list[dict]:
    done = forebay(context.workspace.root, "verify", "agent/2", "--json")
    assert done.returncode == 6, done.stderr
    return list(json.loads(done.stdout)["problems"])


def alter(context: Context, *statements: str) -> None:
    with sqlite3.connect(context.workspace.state / "ledger.db") as raw:
        for statement in statements:
            raw.execute(statement)


def made(context: Context) -> int:
    entry = context.ledger.last("decision.made")
    assert entry is not None
    return entry.seq


ROWS: dict[str, Callable[[int], tuple[str, ...]]] = {
    "altered": lambda n: (
        f"UPDATE ledger SET payload = replace(payload, 'rival', 'friend') WHERE seq = {n - 1}",
    ),
    "deleted": lambda n: (f"DELETE FROM ledger WHERE seq = {n - 1}",),
    "reordered": lambda n: (
        f"UPDATE ledger SET seq = -1 WHERE seq = {n - 1}",
        f"UPDATE ledger SET seq = {n - 1} WHERE seq = {n}",
        f"UPDATE ledger SET seq = {n} WHERE seq = -1",
    ),
}


@pytest.mark.parametrize("what", ROWS)
def test_a_ledger_row_that_was_altered_deleted_or_moved(context: Context, what: str):
    number = made(context)
    alter(context, *ROWS[what](number))
    found = [p["owner"] for p in problems(context) if p["path"] == "ledger"]
    assert any(f"altered at entry {number - 1}" in owner for owner in found), found


def test_a_decision_row_made_to_say_more_than_was_signed(context: Context):
    root = context.workspace.root
    alter(
        context,
        "UPDATE ledger SET payload = replace(payload, '\"none\"', '\"None\"') WHERE kind = 'decision.made'",
    )
    says(forebay(root, "promote", "agent/2"), 6, "was altered", "`service` signed another approval")
    says(forebay(root, "decision", "replay"), 6, "was altered")
    assert champion(context.ledger) == 1


def test_a_swapped_checkpoint(context: Context):
    root, name = context.workspace.root, "model.safetensors"
    weights = root / context.agent("2").payload["path"] / name
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.unlink()  # a hard link: MLflow's copy stays as it is
    weights.write_bytes(data)
    assert [(p["problem"], Path(p["path"]).name) for p in problems(context)] == [("changed", name)]
    says(forebay(root, "promote", "agent/2"), 6, name, "is not what agent/2 was registered with")
    assert champion(context.ledger) == 1


def test_swapped_evidence(context: Context):
    root = context.workspace.root
    (outcomes,) = (context.workspace.evidence / "outcomes").iterdir()
    outcomes.write_bytes(outcomes.read_bytes().replace(b'"champion_reward":0.0', b'"champion_reward":1.0', 1))
    assert outcomes.name in [Path(p["path"]).name for p in problems(context)]
    says(forebay(root, "decision", "replay"), 6, outcomes.name[:12])


def test_a_decision_signed_by_a_wrong_key(context: Context):
    root, ledger = context.workspace.root, context.ledger
    payload = dict(ledger.last("decision.made").payload)
    envelope = sign_decision(payload, EVE)
    path = write_signature(root / payload["record"]["path"], envelope)
    payload["signature"] = signature_of(context.workspace.relative(path), envelope, EVE)
    ledger.append("decision.made", "agent/2", payload)
    says(forebay(root, "promote", "agent/2"), 5, "not in keys.yaml")
    says(forebay(root, "decision", "replay"), 5, "not in keys.yaml")
    assert "wrong key" in [p["problem"] for p in problems(context)]
    assert champion(context.ledger) == 1
