"""The page of a decision after a whole cycle: drawn, attached in MLflow, shown by Prefect, made again by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.artifacts import _decision_page
from flows.context import Context
from flows.judging import newest_decision, record_decision
from flows.pages import draw_page, page_of
from tasks.core.errors import Corrupt, NotFound
from tasks.promotion.gate import recompute_decision
from tests.flows.conftest import forebay, loads
from tests.promotion.test_page import parsed


@pytest.fixture
def made(cycled: Context) -> dict:
    entry = cycled.ledger.last("decision.made")
    assert entry is not None
    return dict(entry.payload)


def client(context: Context) -> MlflowClient:
    return MlflowClient(context.workspace.mlflow_uri, context.workspace.mlflow_uri)


def test_a_cycle_leaves_the_page_beside_the_record(cycled: Context, made: dict):
    page = page_of(cycled, made)
    assert page == cycled.workspace.evidence / "decisions" / f"{made['decision']}.html"
    found = parsed(page.read_text())
    entry = cycled.ledger.last("decision.made")
    assert "agent/2" in found.text
    assert f"{entry.time[:10]} {entry.time[11:19]} UTC, ledger entry {entry.seq}" in found.text
    assert f"by service {made['signature']['key'][:12]}" in found.text


def test_the_candidates_run_has_it_and_the_version_says_the_verdict(cycled: Context, made: dict):
    registered = cycled.agent("2").payload["mlflow"]
    name = f"decision/{made['decision']}.html"
    store = client(cycled)
    assert [file.path for file in store.list_artifacts(registered["run_id"], "decision")] == [name]
    kept = Path(store.download_artifacts(registered["run_id"], name))
    assert kept.read_bytes() == page_of(cycled, made).read_bytes()
    version = store.get_model_version("agent", str(registered["version"]))
    assert version.tags["forebay.verdict"] == made["verdict"]
    assert version.tags["forebay.decision"] == made["decision"]
    assert version.description.startswith(f"Gate: **{made['verdict']}**. agent/2 may replace agent/1: all ")
    assert f"/runs/{registered['run_id']}/artifacts/{name})" in version.description


def test_the_command_draws_the_same_bytes_again(cycled: Context, made: dict):
    root, page = cycled.workspace.root, page_of(cycled, made)
    before = page.read_bytes()
    page.unlink()
    again = loads(forebay(root, "decision", "page", "agent/2", "--json"))
    assert again["page"] == str(page)
    assert again["problem"] is None
    assert page.read_bytes() == before
    copy = root / "review" / "page.html"
    loads(forebay(root, "decision", "page", "--output", str(copy), "--json"))
    assert copy.read_bytes() == before
    assert str(page) in forebay(root, "decision", "show").stdout.replace("│", "").replace("\n", "").replace(
        " ", ""
    )


def test_changed_evidence_refuses_the_page(cycled: Context, made: dict):
    decision = recompute_decision(cycled.workspace.root / made["record"]["path"])
    file = cycled.workspace.evidence / decision.inputs.outcomes.path
    data = file.read_bytes()
    try:
        file.write_bytes(data.replace(b'reward":1.0', b'reward":0.0', 1))
        done = forebay(cycled.workspace.root, "decision", "page", "--json")
        assert done.returncode == Corrupt.exit_code
        assert file.name in json.loads(done.stdout)["error"]
    finally:
        file.write_bytes(data)


def test_a_forged_signature_refuses_the_page(cycled: Context, made: dict):
    file = cycled.workspace.root / made["signature"]["path"]
    data = file.read_bytes()
    try:
        file.write_bytes(data.replace(b"a", b"b", 1))
        with pytest.raises(Corrupt, match=file.name):
            draw_page(cycled, newest_decision(cycled, ""))
    finally:
        file.write_bytes(data)


def test_a_page_of_nothing_is_not_found(cycled: Context):
    with pytest.raises(NotFound, match="No decision about agent/1"):
        newest_decision(cycled, "agent/1")


def test_a_page_that_cannot_be_drawn_never_stands_in_the_way_of_a_decision(cycled: Context, made: dict):
    page = page_of(cycled, made)
    data, head = page.read_bytes(), cycled.ledger.head()
    page.unlink()
    page.mkdir()  # so that nothing can be written there
    try:
        decision = recompute_decision(cycled.workspace.root / made["record"]["path"])
        assert record_decision(cycled, decision)["decision"] == made["decision"]
        assert cycled.ledger.head() == head
    finally:
        page.rmdir()
        page.write_bytes(data)


def test_prefects_page_has_the_picture_the_reasons_and_the_place(cycled: Context, made: dict):
    text = _decision_page(cycled, made, page_of(cycled, made), "http://127.0.0.1:5000/#/experiments/1")
    assert text.startswith(f"# {made['verdict']}\n")
    assert "data:image/svg+xml;base64," in text
    assert all(evidence["name"] in text for evidence in made["evidence"])
    assert "(http://127.0.0.1:5000/#/experiments/1)" in text
    assert cycled.workspace.relative(page_of(cycled, made)) in text
