"""From episodes to a verdict: pairs, split, training, evidence, and bad reward models."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.reward_support import distances
from tasks.core.digest import sha256_bytes, sha256_file
from tasks.core.settings import HeadModel
from tasks.core.workspace import Workspace
from tasks.promotion.gate import FileRef, reward_evidence
from tasks.promotion.policy import Policy
from tasks.replay.schema import Episode
from tasks.reward.head import Backbone, HeadSource, train_head
from tasks.reward.metrics import calibration_error, reliability
from tasks.reward.pairs import replay_preferences
from tasks.reward.preferences import split_preferences
from tasks.reward.source import Answer
from tasks.reward.validation import Material, Training, validate_source
from tests.tiny import make_tiny_model

NOW = "2026-11-25T12:00:00+00:00"


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


def decode(ids):
    return f"prompt {ids}"


def test_preferences_are_better_and_worse_of_one_group_without_repetition():
    rows = [
        episode("g", i, text, reward)
        for i, (text, reward) in enumerate([("a", 1), ("a", 1), ("b", 0), ("c", 0.7)])
    ]
    found = replay_preferences(rows, decode, per_group=9, seed=0)
    assert sorted((p.chosen, p.rejected) for p in found) == [("a", "b"), ("c", "b")]
    assert replay_preferences(rows, decode, per_group=1, seed=0) == found[:1]
    assert replay_preferences([r for r in rows if r.reward == 1], decode, per_group=9, seed=0) == []
    assert replay_preferences(list(reversed(rows)), decode, per_group=9, seed=0) == found
    assert found[0].licence == "Apache-2.0"
    assert found[0].prompt == "prompt [3, 4]"
    assert found[0].group == sha256_bytes(b"prompt [3, 4]")
    assert {found[0].chosen_id, found[0].rejected_id} <= {f"g-{i}" for i in range(4)}


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


def train(backbone, target, rows, holdout=0.3, **changes):
    """Train a head on the rows' preferences; return it, the preferences it has not seen, and the verdict."""
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    found = replay_preferences(rows, tokenizer.decode, per_group=4, seed=0)
    split = split_preferences(found, holdout=holdout)
    frozen = Backbone(backbone, "b" * 64, "language model")
    head = train_head(split.train, frozen, HeadModel(**changes), target=target, origin={"base": "tiny"})
    return head, split.heldout


# A tiny model of random weights, on fifteen prompts: what it makes of edits and hacks is chance.
POLICY = Policy.model_validate(
    {"reward_model": {"counts": ["accuracy", "slices", "calibration", "leak", "frame"]}}
)


def judged(head, heldout, root):
    material, training = Material(heldout, dataset="d" * 64), Training.of(head.kind, root / "reward")
    return validate_source(
        head,
        material,
        POLICY.reward_model,
        Workspace(root),
        training=training,
        time=NOW,
        path=root / "reward",
    )


def margins(head, heldout):
    scores = head.score([answer for p in heldout for answer in (p.better, p.worse)])
    return [a - b for a, b in zip(scores[::2], scores[1::2], strict=True)]


def test_what_a_killed_training_left_is_no_part_of_the_next_head(backbone, tmp_path):
    clean, _ = train(backbone, tmp_path / "clean", letters(backbone))
    for folder in (tmp_path / "reward", tmp_path / ".aside-reward"):
        folder.mkdir()
        (folder / "head.safetensors").write_bytes(b"half")
        (folder / ".prompts.json.x.tmp").write_bytes(b"half")
    again, _ = train(backbone, tmp_path / "reward", letters(backbone))
    assert again.digest == clean.digest
    assert sorted(path.name for path in tmp_path.iterdir() if "reward" in path.name) == ["reward"]


def test_a_learnable_reward_passes_with_evidence_that_the_gate_recomputes(backbone, tmp_path):
    head, heldout = train(backbone, tmp_path / "reward", letters(backbone))
    told = judged(head, heldout, tmp_path)
    assert told["verdict"] == "PASS", told["reasons"]
    assert told["accuracy"]["estimate"] > 0.9
    assert told["slices"]["letters"] == pytest.approx(told["accuracy"])
    assert told["path"] == "reward"
    for name in ("evidence", "plot"):
        assert sha256_file(tmp_path / told[name]["path"]) == told[name]["sha256"]
    assert (tmp_path / told["plot"]["path"]).read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / told["evidence"]["path"]).read_text())
    assert report["source"]["digest"] == told["digest"]
    assert report["preferences"][0]["licence"] == "Apache-2.0"
    item = reward_evidence(report, FileRef(told["evidence"]["path"], told["evidence"]["sha256"]), POLICY)
    assert (item.verdict, item.n) == ("PASS", len({p.group for p in heldout}))
    assert item.low == pytest.approx(told["accuracy"]["low"])


def test_a_reward_of_coins_does_not_pass(backbone, tmp_path):
    head, heldout = train(backbone, tmp_path / "reward", letters(backbone, groups=120, learnable=False))
    told = judged(head, heldout, tmp_path)
    assert told["verdict"] != "PASS"
    assert told["accuracy"]["low"] < 0.6


@pytest.mark.parametrize("l2", [1e-5, 1e-1])
def test_confidence_is_right_whatever_the_penalty(backbone, tmp_path, l2):
    head, heldout = train(backbone, tmp_path / "reward", letters(backbone, groups=150), l2=l2)
    assert calibration_error(reliability(margins(head, heldout))) < 0.12


def test_the_same_rows_give_the_same_bytes_and_the_files_say_all(backbone, tmp_path):
    rows = letters(backbone)
    (first, heldout), (second, _) = (train(backbone, tmp_path / name, rows) for name in ("a", "b"))
    assert first.digest == second.digest
    assert train(backbone, tmp_path / "c", rows, l2=1e-3)[0].digest != first.digest
    loaded = HeadSource.load(tmp_path / "a", Backbone(backbone, "b" * 64, "language model"))
    assert loaded.digest == first.digest
    assert margins(loaded, heldout) == margins(first, heldout)
    with pytest.raises(ValueError, match="belongs to the backbone"):
        HeadSource.load(tmp_path / "a", Backbone(backbone, "c" * 64, "language model"))


def test_the_score_of_a_text_is_what_plain_transformers_says(backbone, tmp_path):
    head, heldout = train(backbone, tmp_path / "reward", letters(backbone))
    model = AutoModelForCausalLM.from_pretrained(backbone)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    answer = heldout[0].better
    prompt, response = (tokenizer(text)["input_ids"] for text in (answer.prompt, answer.response))
    with torch.inference_mode():
        states = model(torch.tensor([[*prompt, *response]]), output_hidden_states=True).hidden_states
    pooled = states[head.backbone.layer][0, len(prompt) :].double().mean(0)
    assert head.score([answer]) == [pytest.approx(float(pooled @ head.weight + head.bias), abs=1e-4)]


def test_an_empty_answer_has_a_finite_score(backbone, tmp_path):
    head, heldout = train(backbone, tmp_path / "reward", letters(backbone))
    scores = head.score([Answer(heldout[0].prompt, ""), Answer("", "abc"), Answer("", "")])
    assert np.isfinite(scores).all()
    assert head.score([]) == []


def test_training_answers_are_within_the_support_and_gibberish_is_not(backbone, tmp_path):
    head, heldout = train(backbone, tmp_path / "reward", letters(backbone, groups=150))
    support = load_file(tmp_path / "reward" / "support.safetensors")
    limit = float(support["distances"][95])
    seen = distances(support, head.features([p.better for p in heldout]))
    odd = distances(support, head.features([Answer("%%%", "{}[]()<>/&$#@!" * 4)] * 2))
    assert (seen <= limit).double().mean() > 0.8
    assert (odd > limit).all()
