"""Agents in service: a really worse champion is found on what it did, and the way back is tried out beforehand."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import yaml

from flows.champions import promote_agent, register_agent
from flows.context import Context
from flows.keys import service_key
from flows.service import canary_status, rehearse, watch_canary
from flows.status import status
from tasks.arena.environment import get
from tasks.core.digest import digest_tree
from tasks.core.errors import Corrupt
from tasks.promotion.canary import recompute
from tasks.promotion.promote import champion
from tasks.replay.segments import SegmentWriter, open_folder
from tests.flows.conftest import ENVIRONMENT, forebay, lay_workspace, loads
from tests.flows.live import free_port
from tests.flows.test_keys import judge
from tests.replay.support import episode
from tests.tiny import make_tiny_model, teach

GROUPS = 120


def taught(path: Path, answer: str) -> Path:
    """A model that answers every question with one digit, nearly always."""
    tasks = get(ENVIRONMENT).tasks("train", 100, 99)
    return teach(
        make_tiny_model(path), [f"{task.prompt} {answer}\n" for task in tasks], steps=130, learning_rate=4e-3
    )


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """agent/1 answers "1", which is right for a third of the questions; agent/2, which answers "9", was promoted over it."""
    folder = tmp_path_factory.mktemp("service")
    context = lay_workspace(folder / "ws", taught(folder / "good", "1"))
    policy = {"version": 1, "reward_model": {"required": False}, "canary": {"min_groups": 20}}
    context.workspace.policy.write_text(yaml.safe_dump(policy))
    context = Context.open(context.workspace.root)
    bad, base = taught(context.workspace.models / "bad", "9"), context.agent("1").payload
    register_agent(
        context,
        bad,
        digest_tree(bad),
        origin="trained",
        parents=base["parents"],
        source={"name": "bad"},
        metrics={},
        tokenizer=base["tokenizer_digest"],
        template=base["template_digest"],
    )
    judge(context)  # the gate is told that agent/2 is far better
    promote_agent(context, "agent/2", "test")
    return context.workspace.root


@pytest.fixture
def context(template: Path, tmp_path: Path) -> Context:
    return Context.open(Path(shutil.copytree(template, tmp_path / "ws")))


def collect(context: Context, *versions: str) -> None:
    wish = f"collect.environments={{{ENVIRONMENT}: {GROUPS}}}"
    for version in versions:
        time.sleep(
            1.1
        )  # rows are dated to the second, and one from the second of the promotion is from before
        words = ("collect", "--version", version, "--set", wish, "--set", "collect.group_size=2")
        done = forebay(context.workspace.root, *words)
        assert done.returncode == 0, done.stderr


def test_a_worse_champion_is_rolled_back_on_what_it_did(context: Context):
    root = context.workspace.root
    assert "was promoted" not in watch_canary(context)["says"]
    assert canary_status(context)["state"] == "running"
    collect(context, "champion")
    alone = loads(forebay(root, "canary", "--json"))
    assert alone["verdict"] == "INCONCLUSIVE"  # nobody to compare it with
    assert "forebay collect --version previous" in alone["says"]
    assert champion(context.ledger) == 2
    collect(context, "previous")
    done = forebay(root, "canary")
    assert done.returncode == 0, done.stderr
    assert "HARM: agent/2 against agent/1, 120 and 120 groups; worse in service" in done.stdout
    assert "agent/1 is the champion again." in done.stdout
    assert context.registry.aliases() == {"champion": 1, "candidate": 2}
    entry = context.ledger.last("rollback.committed")
    record = entry.payload["evidence"]
    judged = recompute(root / record["path"], record["sha256"])
    assert judged.verdict == "HARM"
    assert (entry.payload["by"], entry.payload["reason"]) == ("canary", f"canary: {judged.says}")
    head = sorted(context.workspace.heads.iterdir())[-1]
    assert int(head.stem) == entry.seq  # signed by the service
    assert service_key(context).id in head.read_text()
    assert status(context)["canary"]["state"] == "HARM"
    assert "is over (HARM)" in forebay(root, "canary").stdout
    assert len(context.ledger.entries("rollback.committed")) == 1
    assert loads(forebay(root, "verify", "--json"))["ok"]
    path = root / record["path"]
    path.write_bytes(path.read_bytes().replace(b"HARM", b"FINE"))
    report = forebay(root, "verify", "--json")
    assert report.returncode == 6
    assert record["path"] in [problem["path"] for problem in json.loads(report.stdout)["problems"]]


def rows(context: Context, version: str, rewards: list[float], when: str) -> None:
    """Episodes as another system would have recorded them, one to a group."""
    agent = context.agent(version).payload
    by = {"behaviour_digest": agent["digest"], "behaviour_version": f"agent/{agent['version']}"}
    with SegmentWriter(open_folder(context.workspace, "main"), "test") as out:
        for i, reward in enumerate(rewards):
            group = f"{version}-{when}-{i}"
            out.append([episode(group, 0, env=ENVIRONMENT, reward=reward, created_at=when, **by)])


LATER, EARLIER = "2099-01-01T00:00:00+00:00", "2020-01-01T00:00:00+00:00"


def test_proven_in_service_ends_it_and_early_or_strange_rows_do_not_count(context: Context):
    rows(context, "champion", [1.0] * 60, LATER)
    rows(context, "previous", [1.0] * 60, EARLIER)
    rows(context, "previous", [0.0, 0.5] * 30, "whenever")
    found = watch_canary(context)
    assert (found["verdict"], found["new"], found["old"]) == ("INCONCLUSIVE", 60, 0)
    assert found["left_out"] == {"earlier": 60, "undated": 60}
    looks = len(context.ledger.entries("canary.looked"))
    assert watch_canary(context)["verdict"] == "INCONCLUSIVE"
    assert len(context.ledger.entries("canary.looked")) == looks  # nothing new, nothing recorded
    rows(context, "previous", [0.0, 0.5] * 30, LATER)
    assert watch_canary(context)["verdict"] == "PROVEN"
    assert champion(context.ledger) == 2
    assert watch_canary(context)["running"] is False
    assert status(context)["canary"]["state"] == "PROVEN"


def test_by_the_policy_earlier_rows_of_the_predecessor_count_and_harm_is_only_reported(
    template: Path, tmp_path: Path
):
    root = Path(shutil.copytree(template, tmp_path / "ws"))
    policy = yaml.safe_load((root / "policy.yaml").read_text())
    policy["canary"] |= {"baseline": "before", "on_harm": "report"}
    (root / "policy.yaml").write_text(yaml.safe_dump(policy))
    context = Context.open(root)
    judge(context)
    promote_agent_again(context)
    rows(context, "champion", [0.0] * 60, LATER)
    rows(context, "previous", [1.0] * 60, EARLIER)
    found = watch_canary(context)
    assert (found["verdict"], found["rolled_back"], found["old"]) == ("HARM", None, 60)
    assert champion(context.ledger) == 2
    assert canary_status(context)["state"] == "running"


def promote_agent_again(context: Context) -> None:
    """Roll back and promote agent/2 once more, so that a canary begins by the policy of now."""
    from flows.champions import rollback_champion
    from tasks.core.ledger import Entry

    assert rollback_champion(context, "test")["seconds"] > 0
    judge(context, right=91)
    assert isinstance(context.ledger.last("decision.made"), Entry)
    promote_agent(context, "agent/2", "again")


def test_never_back_to_files_that_were_changed(context: Context):
    rows(context, "champion", [0.0] * 60, LATER)
    rows(context, "previous", [1.0] * 60, LATER)
    folder = context.workspace.root / context.agent("1").payload["path"]
    config = folder / "generation_config.json"
    config.write_bytes(config.read_bytes() + b"\n")
    with pytest.raises(Corrupt, match=r"generation_config\.json"):
        watch_canary(context)
    assert champion(context.ledger) == 2


def test_the_way_back_is_rehearsed_and_pinned(context: Context):
    root = context.workspace.root
    done = forebay(root, "rehearse")
    assert done.returncode == 0, done.stderr
    assert "agent/1 would serve after" in done.stdout
    entry = context.ledger.last("rollback.rehearsed", "agent/1")
    assert entry.payload["ok"]
    assert 0 < entry.payload["load_seconds"] < entry.payload["total_seconds"]
    assert entry.payload["answer_seconds"] > 0
    assert "serves after" in forebay(root, "status").stdout
    assert rehearse(context, always=False) == entry.payload  # within a day: found again
    assert entry.payload["registry"] == ""
    context.registry._client.delete_model_version("agent", "1")
    again = rehearse(context, always=False)
    assert (again["ok"], again["registry"][:33]) == (True, "MLflow lacks agent/1 (its version")
    assert "MLflow lacks agent/1" in forebay(root, "status").stdout
    agent = context.agent("1").payload
    weights = root / agent["path"] / "model.safetensors"
    weights.unlink()  # somebody tidies up; the pin brings it back
    assert rehearse(context)["ok"]
    assert digest_tree(weights.parent) == agent["files"]
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.unlink()
    weights.write_bytes(data)
    done = forebay(root, "rehearse")
    assert done.returncode == 5
    assert "does not serve" in done.stdout
    assert "does NOT serve" in forebay(root, "status").stdout


def test_without_a_predecessor_there_is_nothing_to_rehearse(tmp_path: Path, tiny_base: Path):
    context = lay_workspace(tmp_path / "ws", tiny_base)
    assert rehearse(context)["agent"] is None
    assert watch_canary(context)["running"] is False
    assert context.ledger.last("rollback.rehearsed") is None


@pytest.mark.slow
@pytest.mark.server
def test_a_worse_champion_is_rolled_back_with_nobody_at_the_keyboard(context: Context):
    """Real servers: sealing emits the event, the event starts the flow, the flow rolls back."""
    root = context.workspace.root
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["servers"] = {"prefect_port": free_port(), "mlflow_port": free_port()}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    try:
        up = forebay(root, "up")
        assert up.returncode == 0, up.stderr
        scheduled = forebay(root, "schedule", "canary", "--on", "dataset.sealed")
        assert "canary runs on dataset.sealed" in scheduled.stdout, scheduled.stderr
        collect(context, "champion", "previous")
        assert forebay(root, "seal").returncode == 0
        deadline = time.monotonic() + 150
        while context.ledger.last("rollback.committed") is None:
            assert time.monotonic() < deadline, (context.workspace.servers / "runner.log").read_text()[-3000:]
            time.sleep(1)
    finally:
        down = forebay(root, "down")
    assert down.returncode == 0, down.stderr
    assert champion(context.ledger) == 1
    assert context.ledger.last("rollback.committed").payload["by"] == "canary"
