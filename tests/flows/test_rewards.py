"""Reward models on the command line: import, train, register, score a dataset, and the veto of an unproven one."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pytest

from flows import cli, progress
from flows.context import Context
from flows.experience import collect_into_segment, seal_dataset
from flows.keys import init_keys
from flows.pages import page_of
from flows.rewards import Decoder, episodes, heldout, open_source, replay_set, reward
from flows.scoring import _claim, require_valid_reward, rescored, resting_on
from flows.training import train_agent, train_and_validate_reward_model
from tasks.core.atomic import write_atomic
from tasks.core.digest import canonical_json, sha256_bytes
from tasks.core.errors import Conflict, Corrupt, Refused
from tasks.lineage.graph import lineage
from tasks.promotion.policy import Policy
from tasks.replay.seal import find
from tasks.reward.folder import training_prompts
from tasks.reward.preferences import prompt_digests
from tests.flows.conftest import ENVIRONMENT, PROJECT, forebay, lay_workspace, loads
from tests.flows.test_bad_input import says
from tests.lineage.test_render import drawn
from tests.models.test_reward_classifier import make_tiny_encoder
from tests.reward.report import make_report, sure_margins


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process: a new one takes seconds to import what is here already."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["forebay", *words, *([] if "--help" in words else ["--workspace", str(folder)])]
    with redirect_stdout(out), redirect_stderr(err), mock.patch.object(sys, "argv", argv):
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            progress.use(progress.Silent())
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def laid(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Context:
    """A workspace with a sealed dataset, main/v1."""
    context = lay_workspace(tmp_path_factory.mktemp("rewards") / "ws", tiny_base)
    collect_into_segment(context)
    seal_dataset(context, announce=False)
    return context


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


def comparisons(path: Path, n: int = 60) -> Path:
    lines = [
        {"prompt": f"{i} or not?", "chosen": f"y{i % 7}", "rejected": f"n{i % 5}", "licence": "CC0-1.0"}
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def validated(
    context: Context,
    registered: dict,
    verdict: str,
    days: float = 0.0,
    dataset: str = "",
    policy: dict | None = None,
) -> None:
    """Record a validation whose report is judged so: only margins, and a policy that asks for nothing else."""
    right = {"PASS": 0.9, "FAIL": 0.5, "INCONCLUSIVE": 0.62}[verdict]
    source = {"kind": registered["kind"], "digest": registered["digest"]}
    data = canonical_json(make_report(sure_margins(right, 200), source=source))
    path = context.workspace.evidence / "reward" / f"{sha256_bytes(data)}.json"
    write_atomic(path, data)
    context.ledger.append(
        "reward.validated",
        registered["digest"],
        {
            "digest": registered["digest"],
            "dataset": dataset,
            "verdict": verdict,
            "reasons": ["told by a test"],
            "accuracy": {"estimate": right, "low": right, "high": right, "n": 200},
            "ece": 0.0,
            "path": registered["path"],
            "time": (datetime.now(UTC) - timedelta(days=days)).isoformat(),
            "policy": policy,
            "evidence": {"path": context.workspace.relative(path), "sha256": sha256_bytes(data)},
        },
    )


@pytest.fixture(scope="module")
def head(laid: Context) -> dict:
    """reward/1: a head on the champion, by the replay's preferences."""
    return loads(forebay(laid.workspace.root, "reward", "train", "--json"))


@pytest.fixture(scope="module")
def scored(laid: Context, head: dict) -> dict:
    """The dataset `scored`, sealed."""
    root = laid.workspace.root
    result = loads(
        run(root, "reward", "score", "--with", "reward/1", "--from", "main", "--into", "scored", "--json")
    )
    loads(run(root, "seal", "--set", "replay.dataset=scored", "--json"))
    return result


def test_a_head_is_trained_registered_and_found_again(laid: Context, head: dict):
    assert (head["version"], head["kind"]) == (1, "head")
    assert head["parents"]["backbone"]["agent"] == "agent/1"
    assert head["parents"]["dataset"] == find(laid.ledger, "main").root
    assert head["licences"] == ["Apache-2.0"]
    before = laid.ledger.head()
    assert loads(run(laid.workspace.root, "reward", "train", "--json")) == head
    assert laid.ledger.head() == before
    registry = laid.registry.for_office("reward")
    assert registry.digest(head["mlflow"]["version"]) == head["digest"]
    assert laid.registry.aliases() == {"champion": 1}  # the agents' offices are theirs


def test_no_held_out_prompt_was_trained_on(laid: Context, head: dict):
    unseen = heldout(laid, head)
    trained = training_prompts(laid.workspace.root / head["path"])
    assert unseen
    assert trained
    assert not set(prompt_digests(unseen)) & trained
    assert {p.slice for p in unseen} == {ENVIRONMENT}
    # Replay's own digest of a prompt is the one that is compared with evaluation prompts.
    assert trained <= {row.prompt_sha256 for row in episodes(laid, {"root": head["parents"]["dataset"]})}


def test_scores_are_rewards_and_everything_else_stays(laid: Context, head: dict, scored: dict):
    before = {row.episode_id: row for row in episodes(laid, {"root": find(laid.ledger, "main").root})}
    after = {row.episode_id: row for row in episodes(laid, {"root": find(laid.ledger, "scored").root})}
    assert before.keys() == after.keys()
    assert scored["episodes"] == len(before)
    source = open_source(laid, head)
    for key, row in list(after.items())[:20]:
        old = before[key]
        components = json.loads(row.reward_components)
        assert components["before"] == old.reward
        assert {k: components[k] for k in json.loads(old.reward_components)} == json.loads(
            old.reward_components
        )
        assert row.reward == pytest.approx(1 / (1 + math.exp(-components["score"])))
        assert row.reward_digest == head["digest"] == source.digest
        for name in ("group_id", "prompt_ids", "response_ids", "behaviour_logprobs", "source", "created_at"):
            assert getattr(row, name) == getattr(old, name)


def test_scoring_again_adds_nothing_and_two_sources_never_share_a_dataset(laid: Context, scored: dict):
    root = laid.workspace.root
    words = ("reward", "score", "--with", "reward/1", "--from", "main")
    again = loads(run(root, *words, "--into", "scored", "--json"))
    assert (again["groups"], again["passed_over"]) == (0, scored["groups"])
    says(run(root, *words, "--into", "main"), 2, "another --into")
    says(run(root, *words, "--into", "../x"), 2, "--into")
    says(run(root, "reward", "score", "--with", "reward/9", "--from", "main", "--into", "x"), 3, "reward/1")
    says(run(root, *words[:-1], "none", "--into", "x"), 3, "none")


def test_what_rests_on_a_model_nobody_validated_is_not_trained_on(laid: Context, head: dict, scored: dict):
    root = find(laid.ledger, "scored").root
    with pytest.raises(Refused, match=r"rests on reward/1, which nobody has validated"):
        require_valid_reward(laid, root)
    require_valid_reward(laid, find(laid.ledger, "main").root)

    for verdict in ("FAIL", "INCONCLUSIVE"):
        validated(laid, head, verdict)
        with pytest.raises(Refused, match=f"says {verdict}: "):
            require_valid_reward(laid, root)
    sealed = laid.ledger.last("dataset.sealed", "scored/v1")
    assert sealed is not None
    with pytest.raises(Refused, match="INCONCLUSIVE"):
        train_agent(laid, sealed.payload, 1)
    assert laid.ledger.last("run.started") is None
    validated(laid, head, "PASS")
    with pytest.raises(Refused, match="which failed on data no older"):  # asked again
        require_valid_reward(laid, root)
    validated(laid, head, "PASS", days=999)
    with pytest.raises(Refused, match="expired"):
        require_valid_reward(laid, root)
    validated(laid, head, "PASS", dataset=find(laid.ledger, "main").root)
    require_valid_reward(laid, root)
    report = laid.workspace.root / laid.ledger.last("reward.validated").payload["evidence"]["path"]
    data = report.read_bytes()
    report.write_bytes(data + b" ")
    with pytest.raises(Corrupt):
        require_valid_reward(laid, root)
    report.write_bytes(data)
    strict = Policy.model_validate({"reward_model": {"min_accuracy": 0.99}})
    with (
        mock.patch.object(Context, "policy", strict),
        pytest.raises(Refused, match="says FAIL"),
    ):
        require_valid_reward(Context(laid.workspace, laid.settings), root)


def test_a_rescored_dataset_is_judged_by_the_model_it_rests_on(laid: Context, head: dict, scored: dict):
    sealed = laid.ledger.last("dataset.sealed", "scored/v1")
    assert sealed is not None
    assert train_and_validate_reward_model(laid, sealed.payload, 1)["digest"] == head["digest"]


def test_what_a_verifier_said_outlives_a_second_scoring(laid: Context, head: dict, scored: dict):
    rows = list(episodes(laid, {"root": find(laid.ledger, "scored").root}))[:8]
    again = rescored(rows, open_source(laid, head), Decoder(laid, "champion"), {head["digest"]})
    for row, twice in zip(rows, again, strict=True):
        assert json.loads(twice.reward_components)["before"] == json.loads(row.reward_components)["before"]
    sealed = {n: laid.ledger.last("dataset.sealed", f"{n}/v1").payload for n in ("main", "scored")}
    assert replay_set(laid, sealed["scored"])["digest"] == replay_set(laid, sealed["main"])["digest"]


def test_a_dataset_belongs_to_the_source_that_began_it(laid: Context, head: dict):
    _claim(laid, "begun", "reward/1", head["digest"], "0" * 64)
    with pytest.raises(Conflict, match=r"rewards of reward/1"):
        _claim(laid, "begun", "reward/7", "7" * 64, "0" * 64)
    _claim(laid, "begun", "reward/1", head["digest"], "0" * 64)  # the same goes on


def test_a_dataset_of_two_sources_rests_on_nobody(laid: Context, scored: dict, monkeypatch):
    root = find(laid.ledger, "scored").root
    entries = laid.ledger.entries("reward.registered")
    other = replace(entries[0], payload={**entries[0].payload, "digest": "7" * 64, "version": 7})
    digests = pa.table({"reward_digest": [entries[0].payload["digest"], "7" * 64]})
    monkeypatch.setattr(type(laid.ledger), "entries", lambda *_: [entries[0], other])
    monkeypatch.setattr("tasks.replay.seal.find", lambda *_: mock.Mock())
    monkeypatch.setattr("tasks.replay.seal.read_rows", lambda *_, **__: digests)
    with pytest.raises(Refused, match="rewards of reward/1, reward/7"):
        resting_on(laid, root)


def test_imports_name_bad_lines_and_make_a_classifier(laid: Context, encoder: Path, tmp_path: Path):
    root = laid.workspace.root
    file = comparisons(tmp_path / "mine.jsonl")
    with file.open("a") as stream:
        stream.write("{broken\n")
    done = run(root, "reward", "import", str(file), "--source", "a test", "--licence", "MIT", "--json")
    assert done.returncode == 5
    report = json.loads(done.stdout)
    assert (report["pairs"], report["licences"], report["dropped"]["unreadable"]) == (60, ["CC0-1.0"], 1)
    assert report["errors"][0].startswith("mine.jsonl:61: it is not JSON")
    settings = (
        f"reward.model={{kind: classifier, base: {encoder}, epochs: 2, learning_rate: 0.003, max_tokens: 64}}"
    )
    made = loads(run(root, "reward", "train", "--on", "mine", "--set", settings, "--json"))
    assert made["kind"] == "classifier"
    assert made["parents"]["preferences"] == report["digest"]
    assert (
        loads(run(root, "reward", "train", "--on", report["digest"][:10], "--set", settings, "--json"))
        == made
    )
    source = open_source(laid, made)
    pairs = heldout(laid, made)
    scores = source.score([answer for p in pairs for answer in (p.better, p.worse)])
    assert sum(a > b for a, b in zip(scores[::2], scores[1::2], strict=True)) / len(pairs) > 0.9
    assert source.features([pairs[0].better]).shape == (1, 32)
    weights = root / made["path"] / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(data)
    with pytest.raises(Corrupt, match=r"model\.safetensors is not what reward/"):
        open_source(laid, made)
    data[-1] ^= 1
    weights.write_bytes(data)


def test_a_head_on_an_encoder(laid: Context, encoder: Path, tmp_path: Path):
    root = laid.workspace.root
    loads(run(root, "reward", "import", str(comparisons(tmp_path / "other.jsonl", 80)), "--json"))
    setting = f"reward.model={{kind: head, base: {encoder}, max_tokens: 64}}"
    made = loads(run(root, "reward", "train", "--on", "other", "--set", setting, "--json"))
    pairs = heldout(laid, made)
    scores = open_source(laid, made).score([answer for p in pairs for answer in (p.better, p.worse)])
    assert sum(a > b for a, b in zip(scores[::2], scores[1::2], strict=True)) / len(pairs) > 0.9


def test_a_verifier_is_registered_and_agrees_with_the_rewards_that_are_there(laid: Context):
    root = laid.workspace.root
    setting = f"reward.model={{kind: verifier, name: {ENVIRONMENT}}}"
    made = loads(run(root, "reward", "train", "--set", setting, "--json"))
    assert made["kind"] == "verifier"
    assert loads(run(root, "reward", "train", "--set", setting, "--json")) == made
    name = f"reward/{made['version']}"
    words = ("reward", "score", "--with", name, "--from", "main", "--into", "verified", "--json")
    result = loads(run(root, *words))
    assert result["before"] == result["after"]
    says(run(root, *words[:6], "--into", "scored"), 4, "rewards of reward/1")


def test_list_and_show(laid: Context, head: dict):
    root = laid.workspace.root
    found = loads(run(root, "reward", "list", "--json"))
    assert found[0]["reward"] == "reward/1"
    shown = loads(run(root, "reward", "show", "reward/1", "--json"))
    assert shown["digest"] == head["digest"]
    assert shown["pairs"] > 0
    for words in (("reward", "list"), ("reward", "show", "reward/1")):
        done = run(root, *words)
        assert done.returncode == 0, done.stderr
        assert "head" in done.stdout
    assert reward(laid, "candidate").subject == f"reward/{len(found)}"


def test_wrong_requests_are_one_sentence(laid: Context, tmp_path: Path):
    root = laid.workspace.root
    says(run(root, "reward", "import", str(tmp_path / "none.jsonl")), 3, "none.jsonl")
    (tmp_path / "bad.jsonl").write_text("{}\n")
    says(run(root, "reward", "import", str(tmp_path / "bad.jsonl")), 2, "bad.jsonl:1")
    says(run(root, "reward", "train", "--on", "nothing"), 3, "nothing")
    bad = "reward.model={kind: classifier, base: 'pypi:no-such-package'}"
    says(run(root, "reward", "train", "--set", bad), 2, "reward.model.base", "no-such-package")
    says(run(root, "reward", "train", "--set", "reward.model.kind=clasifier"), 2, "classifier")
    says(run(root, "reward", "train", "--set", "reward.model={kind: classifier, epoch: 1}"), 2, "`epochs`")
    says(run(root, "reward", "train", "--set", "reward.model={kind: judge}"), 2, "reward.model.model")
    says(run(root, "reward", "train", "--set", "reward.model={kind: verifier}"), 2, "reward.model.name")
    says(run(root, "reward", "show", "reward/77"), 3, "reward/1")
    for command in ("import", "train", "score", "show"):
        assert "Example" in run(root, "reward", command, "--help").stdout


def test_the_default_is_a_head_on_the_champion():
    from flows.settings import Settings

    model = Settings.load(PROJECT / "params.yaml").reward.model
    assert (model.kind, model.base) == ("head", None)


def test_an_office_of_its_own_from_decision_to_rollback(
    laid: Context, head: dict, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = laid.workspace.root
    says(run(root, "reward", "promote", "reward/1"), 3, "not decided about reward/1")
    validated(laid, head, "FAIL")
    done = run(root, "reward", "decide", "reward/1", "--json")
    assert (done.returncode, json.loads(done.stdout)["verdict"]) == (5, "FAIL")
    says(run(root, "reward", "promote", "reward/1"), 5, "said FAIL to reward/1")
    validated(laid, head, "PASS")  # asked again on the same data: the FAIL stands, as it does for training
    done = run(root, "reward", "decide", "reward/1", "--json")
    told = json.loads(done.stdout)
    assert (done.returncode, told["verdict"]) == (5, "FAIL")
    assert "failed on data no older than that of its newest validation" in told["reasons"][0]
    says(run(root, "reward", "promote", "reward/1"), 5, "said FAIL to reward/1")
    collect_into_segment(laid)
    newer = loads(run(root, "seal", "--json"))
    validated(laid, head, "PASS", dataset=newer["root"], policy={"version": 1})
    decision = loads(run(root, "reward", "decide", "reward/1", "--json"))
    page = page_of(laid, decision).read_text()
    assert "forebay reward promote reward/1" in page
    assert "agent/" not in page
    # An approval from elsewhere puts the reward model in office, as it does with an agent.
    monkeypatch.setenv("FOREBAY_KEYS", str(tmp_path / "mine"))
    init_keys(laid, "kim", approver=True)
    line = run(root, "approve", "reward/1", "--key", "kim", "--print").stdout.strip()
    answered = loads(run(root, "answer", line, "--json"))
    assert (answered["promoted"]["subject"], answered["promoted"]["from"]) == ("reward/1", None)
    assert answered["promoted"]["decision"] == decision["decision"]
    registry = laid.registry.for_office("reward")
    assert registry.aliases()["champion"] == head["mlflow"]["version"]
    assert laid.registry.aliases()["champion"] == 1
    assert reward(laid, "reward@champion").subject == "reward/1"
    # A second one, on the same preferences with another penalty, compared on what neither has seen.
    second = loads(run(root, "reward", "train", "--set", "reward.model.l2=0.01", "--json"))
    name = f"reward/{second['version']}"
    validated(laid, second, "PASS")
    told = loads(run(root, "reward", "decide", name, "--json"))
    assert told["champion"] == {"version": 1, "digest": head["digest"]}
    assert [item["name"] for item in told["evidence"]] == ["integrity", "reward model", "accuracy"]
    again = loads(run(root, "reward", "replay", name, "--json"))
    assert (again["decision"], again["signed_by"]) == (told["decision"], "service")
    assert loads(run(root, "reward", "promote", name, "--json"))["from"] == 1
    assert registry.aliases()["champion"] == second["mlflow"]["version"]
    shown = drawn(lineage(laid.ledger, laid.workspace, name))
    assert ("over reward/1 by" in shown, "over agent/" in shown) == (True, False)
    says(run(root, "reward", "promote", name), 4, "champion already")
    assert loads(run(root, "reward", "rollback", "--json"))["to"] == 1
    assert reward(laid, "champion").subject == "reward/1"
    # Decisions about reward models are none about agents.
    assert decision["decision"] != told["decision"]
    says(run(root, "decision", "show"), 3, "No decision about any agent")
    record = root / told["record"]["path"]
    data = record.read_bytes()
    record.write_bytes(b"{}")
    says(run(root, "reward", "replay", name), 6, "was changed")
    record.write_bytes(data)


def test_lineage_and_verify_reach_from_a_scored_dataset_to_the_backbone(
    laid: Context, head: dict, scored: dict
):
    from tasks.lineage.render import to_json
    from tasks.lineage.verify import verify

    found = lineage(laid.ledger, laid.workspace, "dataset:scored")
    said = {(e.source[0], e.relation, e.target[0]) for e in found.edges}
    assert ("dataset", "rewarded by", "source") in said
    assert ("dataset", "scored from", "dataset") in said
    assert ("source", "learnt from", "preferences") in said
    assert ("source", "reads states of", "agent") in said
    assert ("preferences", "made from", "dataset") in said
    assert found.nodes["source", "reward/1"].digest == head["digest"]
    assert lineage(laid.ledger, laid.workspace, head["digest"][:12]).root == ("source", "reward/1")
    assert to_json(found)["nodes"]
    for ref in ("reward/1", "reward@candidate", "dataset:scored"):
        report = verify(laid.ledger, laid.workspace, ref)
        assert report.ok, report.problems
    folder = laid.workspace.root / head["path"]
    (folder / "extra.json").write_text("{}")
    data = (folder / "head.safetensors").read_bytes()
    (folder / "head.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    problems = verify(laid.ledger, laid.workspace, "dataset:scored").problems
    assert {(p.problem, Path(p.path).name) for p in problems} == {
        ("changed", "head.safetensors"),
        ("changed", folder.name),  # by its validation, which names the folder as a whole
        ("added", "extra.json"),
    }
    (folder / "extra.json").unlink()
    (folder / "head.safetensors").write_bytes(data)
    assert verify(laid.ledger, laid.workspace, "reward/1").ok
