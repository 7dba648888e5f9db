"""The whole cycle on a small model, through the functions that every way of running it shares."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.context import Context
from flows.cycle import Cycle, Finished, open_cycle, run_stage
from flows.experience import collect_into_segment, seal_dataset, validate_dataset
from flows.judging import replay_decision
from flows.keys import service_key
from flows.run import run_stages
from flows.status import status
from tasks.core.errors import Conflict, Corrupt, Refused
from tasks.core.stages import STAGES
from tasks.promotion.attest import sign_decision, signature_of, write_signature
from tasks.replay.segments import take
from tests.flows.conftest import ENVIRONMENT, PROJECT, forebay, lay_workspace, loads, register_rival


def test_every_stage_leaves_its_entry_and_the_chain_holds(cycled: Context):
    kinds = [entry.kind for entry in cycled.ledger.entries()]
    for kind in (
        "dataset.sealed",
        "dataset.validated",
        "reward.validated",
        "run.started",
        "run.finished",
        "agent.registered",
        "evaluation.done",
        "decision.made",
        "promotion.intent",
        "promotion.committed",
        "cycle.finished",
    ):
        assert kind in kinds
    assert cycled.ledger.verify_chain() == len(kinds)


def test_a_second_cycle_finds_everything_done(cycled: Context):
    before = cycled.ledger.head()
    found = open_cycle(Context.open(cycled.workspace.root))
    assert isinstance(found, Finished)
    assert found.entry.payload["outcome"] == "promoted"
    assert cycled.ledger.head() == before


def test_the_candidate_is_better_by_a_paired_interval_and_both_baselines_are_shown(cycled: Context):
    ended = cycled.ledger.last("cycle.finished")
    assert ended is not None
    row = ended.payload["evaluation"]["slices"][ENVIRONMENT]
    assert row["low"] > 0
    assert row["candidate"] > row["champion"]
    assert 0 < row["constant"] < 1
    assert 0 < row["random"] < 1
    assert row["baseline_error"] == ""


def test_the_agent_loads_with_plain_transformers_and_plain_mlflow(
    cycled: Context, monkeypatch: pytest.MonkeyPatch
):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", cycled.workspace.mlflow_uri)
    mlflow.set_tracking_uri(cycled.workspace.mlflow_uri)
    folder = Path(mlflow.artifacts.download_artifacts("models:/agent@champion"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    pipeline = mlflow.transformers.load_model("models:/agent@champion")
    prompt = "gcd of 24, 28:"
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=2, do_sample=False)
    text = pipeline(prompt, max_new_tokens=2, do_sample=False)[0]["generated_text"]
    assert text == tokenizer.decode(ids[0], skip_special_tokens=True)


def test_the_decision_follows_from_its_evidence_byte_for_byte(cycled: Context):
    assert replay_decision(cycled, "")["verdict"] == "PASS"


def test_mlflow_shows_metrics_dataset_and_lineage_of_the_run(cycled: Context):
    from mlflow import MlflowClient

    client = MlflowClient(cycled.workspace.mlflow_uri)
    finished = cycled.ledger.last("run.finished")
    assert finished is not None
    run = client.get_run(finished.payload["outputs"]["mlflow_run"])
    assert {
        "reward_estimate",
        "kl_k3",
        "ess",
        "phi",
        "entropy",
        "grad_norm",
        "staleness",
    } <= run.data.metrics.keys()
    assert run.info.status == "FINISHED"
    source = json.loads(run.inputs.dataset_inputs[0].dataset.source)
    sealed = cycled.ledger.last("dataset.sealed")
    assert sealed is not None
    assert source["root"] == sealed.payload["root"]
    assert run.inputs.dataset_inputs[0].dataset.source_type == "dvc"
    version = client.get_model_version_by_alias("agent", "champion")
    assert version.tags["forebay.digest"] == finished.payload["outputs"]["digest"]


def test_status_says_who_is_champion_and_that_nothing_is_stale(cycled: Context):
    now = status(Context.open(cycled.workspace.root))
    assert now["champion"]["agent"] == "agent/2"
    assert now["previous"]["agent"] == "agent/1"
    assert now["stale"] == []


def test_dvc_and_the_flow_name_the_same_stages(cycled: Context):
    chain = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]
    assert tuple(chain) == STAGES
    for stage, body in chain.items():
        assert body["cmd"] == f"forebay stage {stage}"


def test_the_user_branch_is_left_alone(cycled: Context):
    root = cycled.workspace.root

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout

    ours = ["refs/heads/forebay/data", "refs/heads/forebay/heads"]
    assert git("for-each-ref", "--format=%(refname)").split() == ours
    assert git("diff", "--cached", "--name-only") == ""


@pytest.mark.parametrize("what", ["shard", "checkpoint"])
def test_a_flipped_byte_is_found_by_verify_and_refused_by_training(
    tmp_path: Path, tiny_base: Path, what: str
):
    context = lay_workspace(tmp_path / "ws", tiny_base)
    cycle = open_cycle(context)
    assert isinstance(cycle, Cycle)
    for stage in ("collect", "seal", "validate", "reward"):
        run_stage(context, cycle, stage)
    dataset = cycle.receipt("seal")
    shard, model = dataset["shards"][0]["path"], context.agent("1").payload["path"] + "/model.safetensors"
    path = context.workspace.root / (shard if what == "shard" else model)
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    ref = f"dataset:{dataset['name']}/v{dataset['version']}" if what == "shard" else "agent/1"
    report = forebay(context.workspace.root, "verify", ref, "--json")
    assert report.returncode == 6
    assert path.name in report.stdout
    with pytest.raises(Corrupt, match=path.name):
        run_stage(context, cycle, "train")


def test_a_failing_dataset_is_quarantined_and_never_trained_on(tmp_path: Path, tiny_base: Path):
    context = lay_workspace(tmp_path / "ws", tiny_base)
    strict = Context.open(context.workspace.root, ["validation.min_groups=1000"])
    cycle = open_cycle(strict)
    assert isinstance(cycle, Cycle)
    with pytest.raises(Refused, match="quarantined"):
        run_stages(strict, cycle)
    assert strict.ledger.last("dataset.validated").payload["verdict"] == "FAIL"
    assert strict.ledger.last("run.started") is None
    assert strict.ledger.last("cycle.finished").payload["outcome"] == "refused"
    assert validate_dataset(context)["verdict"] == "PASS"  # with the workspace's own settings it is fine


def test_a_candidate_compared_with_a_deposed_champion_is_refused(tmp_path: Path, tiny_base: Path):
    context = lay_workspace(tmp_path / "ws", tiny_base)
    root = context.workspace.root
    cycle = open_cycle(context)
    assert isinstance(cycle, Cycle)
    for stage in STAGES[:-1]:
        run_stage(context, cycle, stage)
    rival = register_rival(context)
    passed = cycle.receipt("decide")
    rival_decision = {**passed, "decision": "f" * 64, "candidate": rival}
    subject = f"agent/{rival['version']}"
    context.ledger.append("decision.made", subject, rival_decision)
    borrowed = forebay(root, "promote", subject, "--json")  # with the signature of the decision about agent/2
    assert borrowed.returncode == Corrupt.exit_code
    assert "is about the decision" in json.loads(borrowed.stdout)["error"]
    context.ledger.append("decision.made", subject, _signed(context, rival_decision))
    loads(forebay(root, "promote", f"agent/{rival['version']}", "--json"))
    late = forebay(root, "promote", "agent/2", "--json")
    assert late.returncode == Conflict.exit_code
    assert (
        "agent/2 was compared with agent/1, but the champion is agent/3" in json.loads(late.stdout)["error"]
    )
    loads(forebay(root, "rollback", "--json"))
    loads(forebay(root, "promote", "agent/2", "--json"))  # the champion it met is in office again
    again = forebay(root, "promote", "agent/2", "--json")
    assert again.returncode == Conflict.exit_code
    assert "is champion already" in json.loads(again.stdout)["error"]
    assert context.registry.aliases() == {"champion": 2, "previous": 1, "candidate": 3}


def _signed(context: Context, decision: dict) -> dict:
    """Sign a decision as the gate does."""
    key = service_key(context)
    envelope = sign_decision(decision, key)
    path = write_signature(context.workspace.evidence / "decisions" / decision["decision"], envelope)
    return {**decision, "signature": signature_of(context.workspace.relative(path), envelope, key)}


def test_a_seal_that_was_cut_short_is_finished_and_not_passed_over(tmp_path: Path, tiny_base: Path):
    """The second version: tonight's episodes must not be left out because an older version exists."""
    context = lay_workspace(tmp_path / "ws", tiny_base)
    collect_into_segment(context)
    assert seal_dataset(context)["version"] == 1
    cycle = open_cycle(context, "always")
    assert isinstance(cycle, Cycle)
    run_stage(context, cycle, "collect")
    take(context.workspace, "main", 2, {"shard_rows": 8192})  # what a seal does first; here it is killed
    resumed = open_cycle(context, "always")
    assert isinstance(resumed, Cycle)
    assert resumed.key == cycle.key
    assert run_stage(context, resumed, "seal")["version"] == 2


def test_a_refused_dataset_is_refused_again(tmp_path: Path, tiny_base: Path):
    root = lay_workspace(tmp_path / "ws", tiny_base).workspace.root
    for _ in range(2):
        done = forebay(root, "retrain", "--set", "validation.min_groups=1000")
        assert done.returncode == Refused.exit_code
        assert "quarantined" in done.stderr


def test_one_cycle_at_a_time(context: Context):
    with context.exclusive("a cycle"):
        done = forebay(context.workspace.root, "retrain")
    assert done.returncode == Conflict.exit_code
    assert "is already working on a cycle" in done.stderr
