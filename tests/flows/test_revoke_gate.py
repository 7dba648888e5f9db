"""A revocation in the middle of a chain: the gate, promotion, status and the next retraining know of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from flows.context import Context
from flows.cycle import Cycle, open_cycle, run_stage
from flows.revoke import erase, listing, revoke, schedule_plan
from flows.run import run_stages
from flows.status import status
from tasks.core.errors import Refused
from tests.flows.conftest import POLICY, forebay
from tests.flows.test_revoke import learnt, used

UNBLOCKED = POLICY + "revocation: {block_promotion: false}\n"


@pytest.fixture
def root(decided: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(decided, tmp_path / "ws"))


def test_what_was_revoked_after_the_decision_blocks_the_promotion(root: Path):
    context = Context.open(root)
    group = used(context, 2)[0]
    revoke(context, f"group:{group}", "asked to be forgotten")
    done = forebay(root, "promote", "agent/2", "--json")
    assert done.returncode == Refused.exit_code
    assert f"trained on group {group}" in json.loads(done.stdout)["error"]
    (root / "policy.yaml").write_text(UNBLOCKED)
    done = forebay(root, "promote", "agent/2", "--json")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("erased", [False, True])
def test_a_champion_is_replaced_by_the_plan_and_the_new_one_is_clean(root: Path, erased: bool):
    context = Context.open(root)
    cycle = open_cycle(context)
    assert isinstance(cycle, Cycle)
    run_stage(context, cycle, "promote")
    group = used(context, 2)[0]
    report = revoke(context, f"group:{group}", "asked to be forgotten")
    assert report["descendants"][0]["roles"] == ["champion"]
    if erased:
        erase(context, f"group:{group}", "")
    (step,) = listing(context)["plan"]
    dataset = "main/v2" if erased else "main/v1"
    assert (step["agent"], step["start"], step["dataset"]) == ("agent/2", "agent/1", dataset)
    assert step["left_out"] == (0 if erased else 1)
    (line,) = schedule_plan(context, [step])
    assert f"forebay retrain --start agent/1 --dataset {dataset} --collect never" in line
    assert status(context)["flags"][0]["ref"] == "agent/2"
    again = Context.open(root, ["evaluation.rotation=1"])
    cycle = open_cycle(again, "never", step["dataset"], start=step["start"])
    assert isinstance(cycle, Cycle)
    assert (cycle.champion, cycle.start) == (2, 1)
    run_stages(again, cycle)
    candidate = cycle.receipt("register")["version"]
    entry = again.agent(str(candidate)).payload
    assert entry["parents"]["init"] == "agent/1"
    assert group not in learnt(again, cycle.receipt("train"))
    decision = again.ledger.last("decision.made", f"agent/{candidate}")
    assert decision is not None
    lineage = [e for e in decision.payload["evidence"] if e["name"] == "lineage"]
    assert [e["verdict"] for e in lineage] == ["PASS"]
    assert [flag["ref"] for flag in listing(again)["descendants"] if flag["ref"] != "reward/1"] == ["agent/2"]


def test_the_gate_fails_a_candidate_that_learnt_from_revoked_data(root: Path):
    context = Context.open(root)
    started = context.ledger.last("cycle.started")
    assert started is not None
    cycle = Cycle(started.subject, 1, None, False, 0, root / "data" / "cycle")
    revoke(context, f"group:{used(context, 2)[0]}", "asked to be forgotten")
    made = run_stage(Context.open(root), cycle, "decide")
    assert made["verdict"] == "FAIL"
    assert "Lineage of" in made["reasons"][0]
    (root / "policy.yaml").write_text(UNBLOCKED)
    assert run_stage(Context.open(root), cycle, "decide")["verdict"] == "PASS"
