"""Validating a registered reward model: the stage, the command, the flow, the expiry, and what the gate makes of it."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flows.context import Context
from flows.cycle import Cycle, open_cycle, run_stage
from flows.experience import intact
from flows.rewards import newest_verdict, reward
from flows.scoring import expiry
from flows.validation import validate_registered, validate_reward
from tasks.core.digest import digest_files, digest_tree
from tasks.reward.checks import judge_report
from tasks.reward.folder import training_prompts
from tests.flows.conftest import ENVIRONMENT, forebay, lay_workspace


@pytest.fixture(scope="module")
def cycled(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Context, Cycle]:
    """A workspace in which a cycle has come to the end of its stage `reward`."""
    context = lay_workspace(tmp_path_factory.mktemp("validated") / "ws", tiny_base)
    cycle = open_cycle(context)
    assert isinstance(cycle, Cycle)
    for stage in ("collect", "seal", "validate", "reward"):
        run_stage(context, cycle, stage)
    return context, cycle


def report_of(context: Context, verdict: dict) -> dict:
    return json.loads((context.workspace.root / verdict["evidence"]["path"]).read_text())


def test_the_stage_leaves_a_report_that_gives_its_verdict_again(cycled):
    context, cycle = cycled
    told = cycle.receipt("reward")
    entry = context.ledger.last("reward.validated", told["digest"])
    assert entry is not None
    assert dict(entry.payload) == told
    assert all(intact(context, told[name]) for name in ("evidence", "plot", "best_of_n"))
    verdict, checks = judge_report(report_of(context, told), context.policy.reward_model)
    assert verdict == told["verdict"]
    assert [check.says for check in checks] == [check["says"] for check in told["checks"]]
    site = (context.workspace.root / told["docs"]["path"]).parent
    assert "reward-evaluation" in (site / "index.html").read_text()
    assert digest_files(digest_tree(site)) == told["docs"]["files"]


def test_samples_are_the_champions_answers_to_prompts_it_was_not_trained_on(cycled):
    context, cycle = cycled
    report = report_of(context, cycle.receipt("reward"))
    registered = reward(context, "1").payload
    seen = training_prompts(context.workspace.root / registered["path"])
    asked = {sample["prompt"] for sample in report["samples"]}
    assert asked
    assert not asked & seen
    assert len(report["samples"]) == 8 * len(asked)
    assert {pair["group"] for pair in report["preferences"]} <= asked
    assert report["policy"] == {"version": 1, "digest": context.agent("1").payload["digest"]}
    assert {sample["slice"] for sample in report["samples"]} == {ENVIRONMENT}
    assert report["training"]["leaked"] == []
    # the 60 held-out tasks of the evaluation are among the prompts that must not have been trained on
    assert report["training"]["evaluation_prompts"]["n"] == 60 + len(asked)


def test_the_same_question_finds_the_answer_until_it_expires(cycled, monkeypatch: pytest.MonkeyPatch):
    context, cycle = cycled
    before = len(context.ledger.entries("reward.validated"))
    found = validate_reward(context, "reward/1", "main/v1")
    assert found == cycle.receipt("reward")
    assert len(context.ledger.entries("reward.validated")) == before
    assert expiry(context, found) is None

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=31)

    monkeypatch.setattr("flows.scoring.datetime", Later)
    assert "31 days ago" in (expiry(context, found) or "")
    again = validate_reward(context, "reward/1", "main/v1")
    assert again["time"] > found["time"]
    assert again["evidence"] == found["evidence"]  # the same answers give the same bytes
    assert newest_verdict(context, found["digest"]) == again


def test_the_command_prints_the_checks_and_leaves_with_five_on_fail(cycled):
    context, _ = cycled
    root = context.workspace.root
    done = forebay(root, "reward", "validate", "reward/1", "--from", "main", "--json")
    told = json.loads(done.stdout)
    assert done.returncode == (5 if told["verdict"] == "FAIL" else 0)
    assert {"accuracy", "probes/empty", "leak"} <= {check["name"] for check in told["checks"]}
    (root / "policy.yaml").write_text("reward_model: {required: false, min_accuracy: 0.999}\n")
    strict = forebay(root, "reward", "validate", "reward/1")
    assert strict.returncode == 5
    assert "Right on" in " ".join(strict.stdout.split())
    (root / "policy.yaml").write_text("reward_model: {required: false}\n")


def test_a_verifier_is_judged_by_what_applies_to_it(cycled):
    from flows.rewards import register_untrained
    from tasks.core.settings import VerifierModel

    context, cycle = cycled
    registered = register_untrained(context, VerifierModel(name=ENVIRONMENT))
    told = validate_registered(context, registered, cycle.receipt("seal"))
    checks = {check["name"]: check for check in told["checks"]}
    assert told["kind"] == "verifier"
    assert checks["accuracy"]["estimate"] == 1.0
    assert checks["ranking"]["estimate"] == 1.0
    assert [checks[name]["counts"] for name in ("calibration", "leak", "support", "drift")] == [False] * 4
    assert checks["probes/empty"]["estimate"] == 0.0
    assert told["verdict"] != "FAIL"


@pytest.mark.server
def test_the_flow_leaves_a_table_and_plots(cycled):
    from flows.environment import prefect_api

    context, _ = cycled
    with prefect_api(context.workspace) as api:
        api.wait()
        from prefect.client.orchestration import get_client

        from flows.validate_reward import validate_reward as flow

        state = flow(str(context.workspace.root), "reward/1", return_state=True)
        with get_client(sync_client=True) as client:
            keys = {artifact.key for artifact in client.read_artifacts()}
    verdict = newest_verdict(context, reward(context, "1").payload["digest"])
    assert verdict is not None
    assert state.is_completed() == (verdict["verdict"] != "FAIL")
    assert {"reward", "reward-plots"} <= keys
    assert datetime.fromisoformat(verdict["time"]).tzinfo == UTC
