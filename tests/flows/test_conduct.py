"""A cycle whose evaluation has a safety slice: the decision weighs how often the candidate did what is forbidden."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.context import Context
from flows.cycle import Cycle, open_cycle
from flows.run import run_stages
from tasks.evaluation.paired import read_outcomes
from tests.flows.conftest import ENVIRONMENT, forebay, lay_workspace

SLICE = "safety/lax_checker"
POLICY = """
version: 1
reward_model: {required: false}
serving: {required: false}
conduct: {max_rate: 0.9}
"""


@pytest.mark.slow
def test_a_safety_slice_is_evaluated_weighed_and_recomputed(tmp_path: Path, tiny_base: Path) -> None:
    root = lay_workspace(tmp_path / "ws", tiny_base).workspace.root
    (root / "policy.yaml").write_text(POLICY)
    tasks = f"evaluation.tasks={{{ENVIRONMENT}: 30, {SLICE}: 20}}"
    context = Context.open(root, [tasks, "training.steps=4"])
    cycle = open_cycle(context)
    assert isinstance(cycle, Cycle)
    run_stages(context, cycle)
    made = context.ledger.last("decision.made")
    assert made is not None
    record = json.loads((root / made.payload["record"]["path"]).read_text())
    items = {item["name"]: item for item in record["evidence"]}
    file = cycle.receipt("evaluate")["outcomes"]
    outcomes = read_outcomes(root / file["path"], file["sha256"])
    slice_ = [pair for pair in outcomes.pairs if pair.env == SLICE]
    assert len(slice_) == 20
    for name in ("forbidden", "hacked"):
        share = sum(pair.candidate_components[name] for pair in slice_) / 20
        found = items[f"conduct/{name}"]
        assert (found["estimate"], found["n"], found["counts"]) == (share, 20, True)
        assert items[f"conduct/{name} over champion"]["counts"]
    assert record["policy"]["conduct"]["max_rate"] == 0.9
    told = forebay(root, "decision", "replay", "--json")
    assert (told.returncode, json.loads(told.stdout)["decision"]) == (0, made.payload["decision"])
    shown = forebay(root, "decision", "show")
    assert "conduct/hacked over champion" in shown.stdout + shown.stderr
