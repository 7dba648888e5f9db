"""From episodes to a verdict: pairs, split, training, evidence, and bad reward models."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.core.digest import sha256_bytes, sha256_file
from tasks.core.errors import Refused
from tasks.core.settings import Reward
from tasks.core.workspace import Workspace
from tasks.evaluation.statistics import clopper_pearson
from tasks.promotion.gate import FileRef, reward_evidence
from tasks.promotion.policy import Policy
from tasks.replay.schema import Episode
from tasks.reward.metrics import calibration_error, judge_reward, pair_accuracy, reliability
from tasks.reward.model import RewardModel, train_reward_model
from tasks.reward.pairs import make_pairs, split_pairs
from tasks.reward.validation import validate_reward_model
from tests.tiny import make_tiny_model

SETTINGS = Reward(pairs_per_group=4, holdout=0.3, l2=1e-4)


def episode(
    group: str, sample: int, text: str, reward: float, env: str = "letters", prompt: str = ""
) -> Episode:
    prompt = prompt or f"{group}: "
    return Episode(
        episode_id=f"{group}-{sample}", group_id=group, sample_index=sample, task_id=group, env=env,
        env_version="1", split="train", seed=0, prompt_ids=[3, 4], response_ids=[5],
        loss_mask=[True], turn_ids=[0],
        behaviour_logprobs=[-1.0], logprob_source="engine", behaviour_version="agent/1", behaviour_digest="b",
        temperature=1.0, top_p=1.0, max_new_tokens=4, tokenizer_digest="t", template_digest="t",
        reward=reward, reward_components="{}", reward_digest="r", finish_reason="done",
        prompt_sha256=sha256_bytes(prompt.encode()),
        response_text=text, source="rollout", licence="Apache-2.0", created_at="2026-01-01T00:00:00+00:00",
    )  # fmt: skip


def test_pairs_are_better_and_worse_of_one_group_without_repetition():
    rows = [
        episode("g", i, text, reward)
        for i, (text, reward) in enumerate([("a", 1), ("a", 1), ("b", 0), ("c", 0.7)])
    ]
    pairs = make_pairs(rows, per_group=9, seed=0)
    assert sorted((p.better.response_text, p.worse.response_text) for p in pairs) == [("a", "b"), ("c", "b")]
    assert make_pairs(rows, per_group=1, seed=0) == pairs[:1]
    assert make_pairs([row for row in rows if row.reward == 1], per_group=9, seed=0) == []
    assert make_pairs(list(reversed(rows)), per_group=9, seed=0) == pairs  # the order of rows does not matter
    assert pairs[0].better.licence == "Apache-2.0"


def test_no_prompt_is_on_both_sides_even_across_groups():
    rows = []
    for g in range(60):  # two groups a prompt, as two nights of collecting give
        for sample, reward in enumerate((1.0, 0.0)):
            rows.append(
                episode(f"g{g}", sample, str(sample), reward, env=f"env{g % 2}", prompt=f"p{g // 4} {g % 2}")
            )
    split = split_pairs(make_pairs(rows, per_group=4, seed=3), holdout=0.3, seed=3)
    sides = [{p.better.prompt_sha256 for p in side} for side in (split.train, split.heldout)]
    assert not sides[0] & sides[1]
    assert len(split.train) + len(split.heldout) == 60
    assert {p.env for p in split.heldout} == {"env0", "env1"}
    assert 0.2 < len(split.heldout) / 60 < 0.4


def test_accuracy_is_clustered_by_group():
    margins = np.where(np.arange(100) < 80, 1.0, -1.0)
    alone = pair_accuracy(margins, [str(i) for i in range(100)], alpha=0.05)
    together = pair_accuracy(margins, [str(i // 10) for i in range(100)], alpha=0.05)
    assert alone.estimate == together.estimate == 0.8
    assert together.high - together.low > 2 * (alone.high - alone.low)
    assert alone.low == pytest.approx(clopper_pearson(80, 100, alpha=0.05)[0], abs=0.02)


def test_calibration_worked_example():
    # sure at sigmoid(1.0986) = 0.75: right 3 of 4 is perfect, right 1 of 4 is off by one half
    margin = np.log(3)
    assert calibration_error(reliability([margin, margin, margin, -margin])) == pytest.approx(0, abs=1e-9)
    assert calibration_error(reliability([margin, -margin, -margin, -margin])) == pytest.approx(0.5, abs=1e-9)
    assert calibration_error(reliability([0.0, 0.0])) == pytest.approx(0)
    assert sum(bar.n for bar in reliability(np.linspace(-40, 40, 101))) == 101


def test_verdicts():
    def verdict(right, n, ece):
        accuracy = pair_accuracy(
            np.where(np.arange(n) < right, 1.0, -1.0), [str(i) for i in range(n)], alpha=0.05
        )
        return judge_reward(accuracy, ece, min_accuracy=0.6, max_ece=0.15)

    assert verdict(80, 100, 0.05) == "PASS"
    assert verdict(80, 100, 0.25) == "FAIL"
    assert verdict(50, 100, 0.05) == "FAIL"
    assert verdict(63, 100, 0.05) == "INCONCLUSIVE"
    assert verdict(4, 4, 0.05) == "INCONCLUSIVE"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("backbone"), layers=3)


def letters(backbone, groups=60, learnable=True):
    """Answers of eight letters; right where there is a "y" (or by coin, where nothing is to be learnt)."""
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    draw = random.Random(0)
    rows = []
    for g in range(groups):
        prompt = f"{g:03d}: "
        for sample in range(4):
            text = "".join(draw.choice("abcdefgh") for _ in range(8))
            if sample % 2 == 0:
                text = text[:3] + "y" + text[4:]
            reward = float(sample % 2 == 0) if learnable else float(draw.random() < 0.5)
            row = episode(f"g{g:03d}", sample, text, reward, prompt=prompt)
            ids = tokenizer(text)["input_ids"]
            ones = {"loss_mask": [True] * 8, "turn_ids": [0] * 8, "behaviour_logprobs": [-1.0] * 8}
            rows.append(replace(row, prompt_ids=tokenizer(prompt)["input_ids"], response_ids=ids, **ones))
    return rows


def train(backbone, target, rows, **changes):
    settings = SETTINGS.model_copy(update=changes)
    return train_reward_model(rows, backbone, "b" * 64, settings, seed=0, target=target)


def test_a_learnable_reward_passes_with_evidence_that_the_gate_recomputes(backbone, tmp_path):
    trained = train(backbone, tmp_path / "models" / "reward", letters(backbone))
    workspace = Workspace(tmp_path)
    told = validate_reward_model(trained, Policy().reward_model, workspace, "d" * 64)
    assert told["verdict"] == "PASS", told["reasons"]
    assert told["accuracy"]["estimate"] > 0.9
    assert told["slices"]["letters"] == told["accuracy"]
    assert told["path"] == "models/reward"
    for name in ("evidence", "plot"):
        assert sha256_file(tmp_path / told[name]["path"]) == told[name]["sha256"]
    assert (tmp_path / told["plot"]["path"]).read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / told["evidence"]["path"]).read_text())
    assert report["reward_model"] == told["digest"]
    assert report["pairs"][0]["licence"] == "Apache-2.0"
    item = reward_evidence(report, FileRef(told["evidence"]["path"], told["evidence"]["sha256"]), Policy())
    assert (item.verdict, item.n) == ("PASS", told["accuracy"]["n"])
    assert item.low == pytest.approx(told["accuracy"]["low"])


def test_a_reward_of_coins_does_not_pass(backbone, tmp_path):
    trained = train(backbone, tmp_path / "reward", letters(backbone, groups=120, learnable=False))
    told = validate_reward_model(trained, Policy().reward_model, Workspace(tmp_path), "d" * 64)
    assert told["verdict"] != "PASS"
    assert told["accuracy"]["low"] < 0.6


@pytest.mark.parametrize("l2", [1e-5, 1e-1])
def test_confidence_is_right_whatever_the_penalty(backbone, tmp_path, l2):
    trained = train(backbone, tmp_path / "reward", letters(backbone, groups=150), l2=l2)
    assert calibration_error(reliability(trained.margins)) < 0.12


def test_the_same_rows_give_the_same_bytes_and_the_files_say_all(backbone, tmp_path):
    rows = letters(backbone)
    first, second = (train(backbone, tmp_path / name, rows) for name in ("a", "b"))
    assert first.model.digest == second.model.digest
    assert first.margins == second.margins
    assert train(backbone, tmp_path / "c", rows, l2=1e-3).model.digest != first.model.digest
    loaded = RewardModel.load(tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(backbone)
    pair = first.split.heldout[0]
    better, worse = loaded.score(model, [pair.better, pair.worse])
    assert better - worse == pytest.approx(first.margins[0], abs=1e-4)


@pytest.mark.parametrize("rows", [[], [episode("g", 0, "a", 1.0), episode("g", 1, "b", 0.0)]])
def test_too_little_to_learn_from_is_refused_in_one_sentence(backbone, tmp_path, rows):
    with pytest.raises(Refused, match=f"has {len(rows) // 2} groups with both"):
        train(backbone, tmp_path / "reward", rows)
    assert not (tmp_path / "reward").exists()
