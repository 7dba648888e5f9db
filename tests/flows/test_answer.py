"""A reviewer's answer from elsewhere: signed where the key is, given on the command line or on the run's page."""

from __future__ import annotations

import base64
import json
import shutil
import time
from pathlib import Path

import pytest
import yaml

from flows.context import Context
from flows.keys import init_keys
from flows.servers import running_url
from tasks.core.workspace import Workspace
from tasks.promotion.promote import champion
from tests.flows.conftest import forebay, lay_workspace, loads, register_rival
from tests.flows.live import ask, free_port, until
from tests.flows.test_bad_input import says
from tests.flows.test_keys import judge


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    context = lay_workspace(tmp_path_factory.mktemp("answer") / "ws", tiny_base)
    register_rival(context)
    return context.workspace.root


@pytest.fixture
def context(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    """agent/2 passed and waits; kim may approve, eve has a key that nobody trusts."""
    monkeypatch.setenv("FOREBAY_KEYS", str(tmp_path / "mine"))
    context = Context.open(Path(shutil.copytree(template, tmp_path / "ws")))
    elsewhere = Context.open(Path(shutil.copytree(template, tmp_path / "elsewhere")))
    init_keys(elsewhere, "eve", approver=True)
    init_keys(context, "kim", approver=True)
    return context


def sign(folder: Path, *words: str) -> str:
    """Make a statement in a folder that is no workspace."""
    done = forebay(folder, *words, "--print", "--workspace", str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return done.stdout.strip()


def altered(line: str, **changes: str) -> str:
    """Change what a statement says and keep its signature."""
    envelope = json.loads(base64.b64decode(line))
    payload = json.loads(base64.b64decode(envelope["payload"]))
    payload["predicate"] |= changes
    envelope["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    return base64.b64encode(json.dumps(envelope).encode()).decode()


def test_an_answer_is_made_without_a_workspace_and_promotes_in_one(context: Context, tmp_path: Path):
    root, away = context.workspace.root, tmp_path / "away"
    away.mkdir()
    decision = judge(context, "required")["decision"]
    line = sign(away, "approve", decision, "--reason", "read 40 answers", "--key", "kim")
    says(forebay(root, "answer", "not a statement"), 2, "no signed statement", "--print")
    says(forebay(root, "answer", altered(line, reason="looks fine")), 6, "forged", "not one of `kim`")
    eve = sign(away, "approve", decision, "--key", "eve")
    says(forebay(root, "answer", eve), 5, "not in keys.yaml")
    other = sign(away, "approve", "ab" * 32, "--key", "kim")
    says(forebay(root, "answer", other), 3, "knows no decision abababababab")
    assert context.ledger.entries("approval.granted") == []
    folded = "\n".join(line[i : i + 76] for i in range(0, len(line), 76))  # as a mail program sends it
    done = loads(forebay(root, "answer", folded, "--json"))
    assert (done["by"], done["reason"], done["promoted"]["to"]) == ("kim", "read 40 answers", 2)
    assert champion(context.ledger) == 2
    says(forebay(root, "answer", line), 4, "by `kim` is in the ledger already", "counts once")
    assert loads(forebay(root, "verify", "agent@champion", "--json"))["ok"]


def test_a_rejection_is_final_and_an_approval_after_it_is_refused(context: Context, tmp_path: Path):
    root = context.workspace.root
    decision = judge(context, "required")["decision"]
    yes = sign(tmp_path, "approve", decision, "--key", "kim")
    no = sign(root, "reject", "agent/2", "--reason", "too long", "--key", "kim")
    assert "agent/2 is rejected by kim" in forebay(root, "answer", no).stdout
    says(forebay(root, "answer", yes), 5, "was rejected by `kim`", "too long")
    assert champion(context.ledger) == 1


def test_the_same_approval_again_adds_nothing(context: Context):
    root = context.workspace.root
    decision = judge(context, "required")["decision"]
    for ref in ("agent/2", decision):
        given = loads(forebay(root, "approve", ref, "--key", "kim", "--json"))
        assert given["approved"] == "agent/2"
    assert len(context.ledger.entries("approval.granted")) == 1


@pytest.mark.slow
@pytest.mark.server
def test_a_reviewer_answers_on_the_runs_page(context: Context, tmp_path: Path):
    """The page of the decision shows what to sign and where; the form's run records it and promotes."""
    root = context.workspace.root
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["servers"] = {"prefect_port": free_port(), "mlflow_port": free_port()}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    decision = judge(context, "required")
    workspace = Workspace(root)
    try:
        up = forebay(root, "up")
        assert up.returncode == 0, up.stderr
        page = decide_page(context, decision)
        assert f"forebay approve {decision['decision']} --print" in page
        deployments = {d["name"] + d["entrypoint"]: d["id"] for d in ask(workspace, "/deployments/filter")}
        (mine,) = [d for name, d in deployments.items() if name.endswith("flows.answer.answer")]
        form = f"{running_url(workspace, 'prefect')}/deployments/deployment/{mine}/run"
        assert form in page
        line = sign(tmp_path, "approve", decision["decision"], "--reason", "on the page", "--key", "kim")
        forged = start(workspace, mine, altered(line, reason="other words"))
        assert ended(workspace, forged)["state_type"] == "FAILED"
        assert "forged" in ended(workspace, forged)["state"]["message"]
        assert champion(context.ledger) == 1
        run = start(workspace, mine, line)
        assert ended(workspace, run)["state_type"] == "COMPLETED"
        assert champion(context.ledger) == 2
        again = start(workspace, mine, line)
        assert "counts once" in ended(workspace, again)["state"]["message"]
    finally:
        down = forebay(root, "down")
    assert down.returncode == 0, down.stderr


def decide_page(context: Context, decision: dict) -> str:
    """Let a flow publish the decision as `retrain` does, and return its page."""
    import subprocess
    import sys

    from tests.flows.conftest import environment

    code = """
import json, sys
from pathlib import Path
from flows.context import Context
from flows.environment import prefect_api
context = Context.open(Path(sys.argv[1]))
with prefect_api(context.workspace) as api:
    from prefect import flow
    from flows.artifacts import publish
    api.wait()
    outputs = {**json.loads(sys.argv[2]), "evidence": []}
    flow(name="page")(lambda: publish(context, "decide", outputs))()
"""
    words = [sys.executable, "-c", code, str(context.workspace.root), json.dumps(decision)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=240)
    assert done.returncode == 0, done.stderr
    (artifact,) = [a for a in ask(context.workspace, "/artifacts/filter") if a["key"] == "decide"]
    return str(artifact["data"])


def start(workspace: Workspace, deployment: str, line: str) -> str:
    """Start the deployment as the form on the page does."""
    wish = {"parameters": {"statement": line}, "state": {"type": "SCHEDULED"}}
    return str(ask(workspace, f"/deployments/{deployment}/create_flow_run", wish)["id"])


def ended(workspace: Workspace, run: str) -> dict:
    def look() -> dict | None:
        (found,) = [r for r in ask(workspace, "/flow_runs/filter") if r["id"] == run]
        return found if found["state_type"] in ("COMPLETED", "FAILED", "CRASHED") else None

    found = until(look, 150)
    assert found is not None
    time.sleep(0.1)
    return found
