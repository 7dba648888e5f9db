"""All evidence of one cycle on a small model: gathered once, kept by content, weighed by the gate, found again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows import progress
from flows.context import Context
from flows.cycle import Cycle, open_cycle
from flows.evidence import estimate_on_replay, trained_prompts
from flows.judging import check_evaluation, evaluate_candidate, replay_decision, tell_memories
from flows.run import run_stages
from tasks.core.errors import UsageError
from tasks.replay.seal import find, read_rows
from tasks.training.admission import held_out
from tests.flows.conftest import forebay, lay_workspace

POLICY = """
version: 1
reward_model: {required: false}
superiority: {test: betting}
errors: {alpha: 0.05, cycles: 1}
divergence: {max_nats_per_token: 5}
resources: {max_seconds: 600, max_tokens: 10000000}
"""
WORDS = (
    "training.admission.holdout=0.4",
    "evaluation.early_stop={first: 20, every: 10}",
    "evaluation.proxy_tasks=15",
)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Context, Cycle]:
    """A workspace whose cycle kept some replay back and watched its evaluation."""
    root = lay_workspace(tmp_path_factory.mktemp("evidence") / "ws", tiny_base).workspace.root
    (root / "policy.yaml").write_text(POLICY)
    context = Context.open(root, WORDS)
    cycle = open_cycle(context)
    assert isinstance(cycle, Cycle)
    run_stages(context, cycle)
    return context, cycle


def items(context: Context) -> dict[str, dict]:
    made = context.ledger.last("decision.made")
    assert made is not None
    record = json.loads((context.workspace.root / made.payload["record"]["path"]).read_text())
    return {item["name"]: item for item in record["evidence"]}


def test_a_watched_evaluation_stops_early_and_the_decision_says_so(judged: tuple[Context, Cycle]):
    context, cycle = judged
    evaluation = cycle.receipt("evaluate")
    assert evaluation["planned"] == 60
    assert 20 <= evaluation["slices"]["all"]["n"] < 60
    quality = items(context)["quality"]
    assert quality["verdict"] == "PASS"
    assert f"after {evaluation['slices']['all']['n']} of 60 tasks" in quality["says"]
    assert replay_decision(context, "")["verdict"] == cycle.receipt("decide")["verdict"]


def test_every_kind_of_evidence_reaches_the_decision(judged: tuple[Context, Cycle]):
    found = items(judged[0])
    for name in ("serving", "safety/empty", "hacking/proxy", "divergence", "resources"):
        assert found[name]["digest"], name
        assert found[name]["counts"], name
    assert found["serving"]["verdict"] == "PASS", found["serving"]["says"]
    assert found["serving"]["unit"] == "seconds"
    assert found["resources"]["verdict"] == "PASS"
    assert found["resources"]["estimate"] > 0
    assert found["hacking/proxy"]["n"] <= 15
    assert found["replay value"]["n"] > 0
    assert not found["replay value"]["counts"]


def test_only_what_was_held_out_by_hash_is_judged_off_policy(judged: tuple[Context, Cycle]):
    """Groups that training passed over because their rewards are all alike are no fair sample of the log."""
    context, cycle = judged
    candidate = cycle.receipt("register")["version"]
    table = read_rows(context.workspace, find(context.ledger, cycle.receipt("seal")["root"]).manifest)
    names = dict(zip(table["group_id"].to_pylist(), table["prompt_sha256"].to_pylist(), strict=True))
    held = {name for name, out in zip(names, held_out(list(names), 0.4), strict=True) if out}
    assert held.isdisjoint(cycle.receipt("train")["groups"])
    assert trained_prompts(context, candidate) == {p for name, p in names.items() if name not in held}
    report = json.loads(
        (context.workspace.root / cycle.receipt("evaluate")["evidence"]["replay_value"]["path"]).read_text()
    )
    assert set(report["log"]["prompts"]) == {names[name] for name in held}
    # The champion wrote the log, so that its ratios are 1 but for rounding; the candidate's are not.
    assert max(abs(x) for row in report["champion_ratios"] for x in row) < 1e-3
    assert max(abs(x) for row in report["candidate_ratios"] for x in row) > 0.01
    assert trained_prompts(context, 1) == set()


def test_asking_again_finds_the_evidence(judged: tuple[Context, Cycle]):
    context, cycle = judged
    before = context.ledger.head()
    again = evaluate_candidate(
        context,
        cycle.receipt("register")["version"],
        cycle.champion,
        dataset=cycle.receipt("seal")["root"],
        run=cycle.receipt("train"),
        reward=cycle.receipt("reward"),
    )
    assert again == cycle.receipt("evaluate")
    assert context.ledger.head() == before
    lost = context.workspace.root / again["evidence"]["replay_value"]["path"]
    kept = lost.read_bytes()
    lost.unlink()
    root = cycle.receipt("seal")["root"]
    assert (
        estimate_on_replay(context, again["candidate"], again["champion"], root)
        == again["evidence"]["replay_value"]
    )
    assert lost.read_bytes() == kept


def test_the_command_judges_a_log_and_says_why_one_is_of_no_use(judged: tuple[Context, Cycle]):
    context, cycle = judged
    version = cycle.receipt("register")["version"]
    words = [
        "evaluate",
        "replay",
        "--candidate",
        f"agent/{version}",
        "--champion",
        "agent/1",
        "--on",
        "main/v1",
    ]
    told = forebay(context.workspace.root, *words, "--json")
    found = json.loads(told.stdout)
    assert found["evidence"] == cycle.receipt("evaluate")["evidence"]["replay_value"]
    assert found["verdict"] == items(context)["replay value"]["verdict"]
    assert told.returncode == (5 if found["verdict"] == "FAIL" else 0)
    missing = forebay(context.workspace.root, *words[:-1], "logs", "--json")
    assert missing.returncode == 3
    assert json.loads(missing.stdout)["kind"] == "NotFound"


def test_another_memory_in_judging_than_in_collecting_is_told(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    root = lay_workspace(tmp_path / "ws", tiny_base).workspace.root
    room = "minigrid/Empty-Random-6x6"
    monkeypatch.setattr(progress, "_current", progress.Lines(print))
    for collected, told in ((f"memory_2/{room}", True), (room, False), ("largest", False)):
        tell_memories(
            Context.open(
                root, [f"collect.environments={{{collected}: 4}}", f"evaluation.tasks={{{room}: 4}}"]
            )
        )
        shown = capsys.readouterr().out
        assert (f"evaluation.tasks has {room}, collect.environments {collected}" in shown) == told


def test_watching_by_t_is_refused_before_anything_is_collected(tmp_path: Path, tiny_base: Path):
    root = lay_workspace(tmp_path / "ws", tiny_base).workspace.root
    context = Context.open(root, [WORDS[1]])
    with pytest.raises(UsageError, match=r"superiority\.test is `t`, which holds for one look alone"):
        check_evaluation(context)
    cycle = open_cycle(context)
    assert isinstance(cycle, Cycle)
    with pytest.raises(UsageError, match="early_stop"):
        run_stages(context, cycle)
    assert not cycle.has("collect")
    check_evaluation(Context.open(root))
