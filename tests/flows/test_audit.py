"""`forebay audit` after a real cycle: the page, MLflow, the flow and its artifacts, and what it says where bytes differ."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from flows.context import Context
from flows.pages import make_audit
from tasks.lineage.graph import lineage
from tasks.lineage.picture import layout
from tests.flows.conftest import forebay, loads
from tests.lineage.page.browser import browser, chromium
from tests.promotion.test_page import parsed

REPORT = {
    "ok": True,
    "problems": [],
    "checked": 1,
    "bytes": 0,
    "signatures": 0,
    "unsigned": [],
    "entries": 1,
    "head": "0",
}


def client(context: Context) -> MlflowClient:
    return MlflowClient(context.workspace.mlflow_uri, context.workspace.mlflow_uri)


@pytest.fixture(scope="module")
def made(cycled: Context) -> dict:
    """What the command says; it changes nothing in the ledger."""
    before = cycled.ledger.head()
    told = loads(forebay(cycled.workspace.root, "audit", "--json"))
    assert cycled.ledger.head() == before
    return told


def test_the_command_writes_the_page_and_says_what_it_says(cycled: Context, made: dict):
    digest = cycled.agent("2").payload["digest"]
    page = cycled.workspace.root / ".forebay" / "audits" / f"agent-2-{digest[:12]}.html"
    assert made["page"] == str(page)
    assert (made["subject"], made["digest"], made["verdict"]) == ("agent/2", digest, "VERIFIED")
    assert (made["open"], made["problem"]) == ([], None)
    assert made["verification"]["ok"]
    checked = parsed(page.read_text())
    assert f"{made['verification']['checked']} digests agree" in checked.text
    assert "agent/2 is the champion" in checked.text
    decision = cycled.ledger.last("decision.made").payload["decision"]
    link = next(v for _, name, v in checked.attributes if name == "href" and not v.startswith("#"))
    assert (page.parent / link).resolve() == cycled.workspace.evidence / "decisions" / f"{decision}.html"
    told = forebay(cycled.workspace.root, "audit", "agent/2", "--no-verify", "-o", "copy.html")
    assert told.returncode == 0
    assert "NOT VERIFIED" in told.stdout
    assert str(cycled.workspace.root / "copy.html") in told.stdout.replace("\n", "")


def test_mlflow_has_the_page_and_says_the_result_at_the_version(cycled: Context, made: dict):
    registered = cycled.agent("2").payload["mlflow"]
    name = f"audit/{Path(made['page']).name}"
    store = client(cycled)
    assert [file.path for file in store.list_artifacts(registered["run_id"], "audit")] == [name]
    kept = Path(store.download_artifacts(registered["run_id"], name))
    assert kept.read_bytes() == Path(made["page"]).read_bytes()
    version = store.get_model_version("agent", str(registered["version"]))
    assert version.tags["forebay.audit"] == f"VERIFIED {made['time']}"
    assert version.tags["forebay.audit.page"].endswith(f"/runs/{registered['run_id']}/artifacts/{name}")
    gate, audit = version.description.split("\n\n")  # each keeps to its own paragraph
    assert gate.startswith("Gate: **PASS**.")
    assert audit.startswith(f"Audit: **VERIFIED**, {made['time']}. ")
    assert audit.endswith(f"No open flags. [The audit]({version.tags['forebay.audit.page']})")


def test_a_description_by_hand_is_left_alone(cycled: Context, made: dict):
    registered = cycled.agent("2").payload["mlflow"]
    store, version = client(cycled), str(registered["version"])
    before = store.get_model_version("agent", version).description
    store.update_model_version("agent", version, "Ours since March.")
    try:
        assert make_audit(cycled, "agent/2", REPORT)["problem"] is None
        found = store.get_model_version("agent", version)
        assert found.description == "Ours since March."
        assert found.tags["forebay.audit"].startswith("VERIFIED")
    finally:
        store.update_model_version("agent", version, before)


def test_what_the_run_learnt_from_is_counted_from_its_rows(cycled: Context, made: dict):
    """Held against the raw files: the list of groups and the columns of the shards."""
    run = cycled.agent("2").payload["parents"]["run"]
    finished = cycled.ledger.last("run.finished", run).payload["outputs"]
    used = set((cycled.workspace.root / finished["groups"]["path"]).read_text().split())
    sealed = cycled.ledger.last("dataset.sealed").payload
    shards = [pq.read_table(cycled.workspace.root / shard["path"]) for shard in sealed["shards"]]
    rows = pa.concat_tables(shards).select(["group_id", "env", "source", "licence"]).to_pylist()
    kinds = {(row["group_id"], row["env"], row["source"], row["licence"]) for row in rows}
    learnt = Counter(kind[1:] for kind in kinds if kind[0] in used)
    ((env, source, licence),) = learnt
    words = parsed(Path(made["page"]).read_text()).words
    text = " ".join(" ".join(words).split())
    assert f"The run learnt from {len(used)} of these {sealed['groups']} groups" in text
    (part,) = sealed["contents"]
    found = f"{env}@{part['env_version']} {source} {licence} {len(rows)} {sealed['groups']} {learnt[(env, source, licence)]}"
    assert found in text
    assert learnt[(env, source, licence)] == len(used)


def test_a_changed_byte_is_exit_code_6_and_the_page_is_written(cycled: Context, made: dict):
    file = cycled.workspace.root / cycled.ledger.last("dataset.sealed").payload["shards"][0]["path"]
    data, page = file.read_bytes(), cycled.workspace.root / "review" / "spoilt.html"
    mode = file.stat().st_mode
    try:
        file.chmod(0o644)
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        done = forebay(cycled.workspace.root, "audit", "agent/2", "--output", str(page), "--json")
        assert done.returncode == 6
        told = json.loads(done.stdout)
        assert told["verdict"] == "DIFFERS"
        assert "1 thing does not agree with the recorded digest." in told["open"]
        text = parsed(page.read_text()).text
        assert "DIFFERS" in text
        assert file.name in text
    finally:
        file.write_bytes(data)
        file.chmod(mode)
    stored = client(cycled).get_model_version("agent", "2").tags["forebay.audit"]
    assert stored.startswith("VERIFIED")  # a page written elsewhere is not attached


def test_a_dataset_a_base_model_and_a_wrong_name(cycled: Context):
    data = make_audit(cycled, "dataset:main", None)
    assert Path(data["page"]).name.startswith("main-v1-")
    assert data["mlflow"] is None
    base = make_audit(cycled, "agent/1", None)
    assert base["headline"].startswith("agent/1 was the champion on ")
    wrong = forebay(cycled.workspace.root, "audit", "agent@chapion")
    assert (wrong.returncode, "Traceback" in wrong.stderr) == (3, False)
    assert "agent@champion" in wrong.stderr


def test_mlflow_away_is_told_and_the_page_stands(cycled: Context):
    stores = cycled.settings.stores.model_copy(update={"mlflow": "http://127.0.0.1:9"})
    away = replace(cycled, settings=cycled.settings.model_copy(update={"stores": stores}))
    told = make_audit(away, "agent/2", REPORT)
    assert "forebay up" in told["problem"]
    assert Path(told["page"]).exists()


@pytest.mark.server
def test_the_flow_keeps_table_page_and_link_with_its_run(cycled: Context, monkeypatch: pytest.MonkeyPatch):
    from flows import pages
    from flows.environment import prefect_api

    monkeypatch.setattr(pages, "_server", lambda context: "http://127.0.0.1:5000")
    with prefect_api(cycled.workspace) as api:
        api.wait()
        from prefect.client.orchestration import get_client

        from flows.audit import audit

        report = audit(str(cycled.workspace.root))
        with get_client(sync_client=True) as client:
            kept = {artifact.key: artifact for artifact in client.read_artifacts()}
    assert report["ok"]
    assert {"verify", "audit", "audit-page"} <= kept.keys()
    assert "# VERIFIED" in kept["audit"].data
    assert "open flags: none" in kept["audit"].data
    assert ".forebay/audits/agent-2-" in kept["audit"].data
    assert "http://127.0.0.1:5000/#/experiments/" in kept["audit-page"].data
    assert kept["audit-page"].flow_run_id is not None


@pytest.mark.skipif(
    chromium() is None, reason="no Chromium: put chromium on the PATH, or set FOREBAY_CHROMIUM"
)
def test_a_browser_draws_the_real_page(cycled: Context, made: dict, tmp_path: Path):
    found = lineage(cycled.ledger, cycled.workspace, "agent@champion")
    with browser(tmp_path / "profile") as page:
        page.open(Path(made["page"]))
        drawn = page.ask("document.querySelectorAll('#scene [data-node]').length")
        page.click("[data-do=fit]")
        page.click("[data-node='1']")
        panel = page.ask("document.querySelector('#panel').innerText")
        page.screenshot(Path(os.environ.get("FOREBAY_ARTIFACTS") or tmp_path) / "audit-of-a-cycle.png")
        assert page.complaints == []
        assert len(page.requests) == 1
    assert drawn == len(layout(found).boxes)
    assert list(found.nodes.values())[1].digest in panel
