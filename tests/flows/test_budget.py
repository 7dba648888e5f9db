"""The budgets of the gate in a workspace: what a cycle takes, what another policy takes, and how tasks are rotated."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flows.context import Context
from flows.cycle import Cycle
from flows.judging import decide_promotion, heldout_tasks, replay_decision
from flows.status import status
from tasks.arena.environment import get
from tests.flows.conftest import ENVIRONMENT, POLICY


def decide_again(root: Path, policy: str) -> tuple[Context, dict]:
    """Let the gate look at the evidence of the last cycle under another policy."""
    (root / "policy.yaml").write_text(policy)
    context = Context.open(root)
    started = context.ledger.last("cycle.started")
    assert started is not None
    cycle = Cycle(
        started.subject, started.payload["champion"], None, False, 0, context.workspace.root / "data/cycle"
    )
    return context, decide_promotion(
        context,
        candidate=cycle.receipt("register")["version"],
        evaluation=cycle.receipt("evaluate"),
        reward=cycle.receipt("reward"),
        data=cycle.receipt("validate"),
    )


def test_a_decision_takes_its_share_once_and_status_says_what_is_left(decided: Path, tmp_path: Path):
    root = Path(shutil.copytree(decided, tmp_path / "ws"))
    context, again = decide_again(root, POLICY)
    assert len(context.ledger.entries("decision.made")) == 1
    assert again["spent"] == {"decisions": 0, "error": 0.0, "uses": 0}
    left = status(context)["budget"]
    assert left == {"decisions": 1, "error_left": 0.0475, "error": 0.05, "uses_left": 19, "uses": 20}


@pytest.mark.parametrize(
    ("rule", "way_out"),
    [
        ("errors: {alpha: 0.05, cycles: 1}\n", "raise errors.alpha"),
        ("evaluation_set: {uses: 1}\n", "raise evaluation.rotation by 1"),
    ],
)
def test_what_is_spent_refuses_and_the_refusal_replays(
    decided: Path, tmp_path: Path, rule: str, way_out: str
):
    root = Path(shutil.copytree(decided, tmp_path / "ws"))
    context, refused = decide_again(root, POLICY + rule)
    assert refused["verdict"] == "INCONCLUSIVE"
    assert way_out in " ".join(refused["reasons"])
    assert refused["error"] == 0.0
    again = replay_decision(context, "")
    assert (again["verdict"], again["decision"]) == ("INCONCLUSIVE", refused["decision"])


def test_a_rotation_draws_other_tasks_that_are_no_training_tasks_either(decided: Path):
    first, same, second = (
        {task.prompt for task in heldout_tasks(Context.open(decided, words))[ENVIRONMENT]}
        for words in ([], ["evaluation.rotation=0"], ["evaluation.rotation=1"])
    )
    trained = {task.prompt for task in get(ENVIRONMENT).tasks("train", 200, 0)}
    assert first == same
    assert len(second) == len(first)
    assert len(second - first) > len(first) / 2
    assert not trained & (first | second)
