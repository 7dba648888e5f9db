"""Who sampled fresh groups: the digest of the behaviour stands for the weights, also in a run that went back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from models.causal_lm import load_policy, load_tokenizer, weights_digest
from tasks.arena.environment import get
from tasks.core.settings import Collect
from tasks.leaderboard.starter import EPOCH, identity_of
from tasks.rollout.fresh import Sampling, fresh_source
from tasks.training.settings import Admission, Guards, Mixture, TrainingSettings
from tasks.training.trainer import train
from tests.tiny import make_tiny_model
from tests.training.replay import make_episodes, write_shards

ENV = "calculator"
SETTINGS = TrainingSettings(  # the policy leaves its data behind within ten updates
    objective="cispo", steps=12, groups_per_step=2, learning_rate=3e-3, grad_clip=100.0, token_budget=64, checkpoint_every=2,
    admission=Admission(min_reward_std=None), mixture=Mixture(schedule="constant", fresh=0.5),
    guards=Guards(min_ess=0, max_kl=1e9, collapse="mask", roll_back=True),
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", seed=1)


def sampling(root: Path, tiny: Path) -> Sampling:
    return Sampling(
        key="a run",
        start=identity_of("agent/1", tiny),
        settings=Collect(environments={ENV: 1}, group_size=2),
        seed=0,
        environment=get,
        root=root,
        folder=root / "fresh",
        created_at=EPOCH,
    )


def behaviours(path: Path) -> set[tuple[str, str]]:
    rows = pq.read_table(path, columns=["behaviour_version", "behaviour_digest"]).to_pylist()
    return {(row["behaviour_version"], row["behaviour_digest"]) for row in rows}


def test_the_digest_follows_the_weights_and_nothing_else(tiny):
    model = load_policy(tiny)
    before = weights_digest(model)
    assert weights_digest(load_policy(tiny)) == before
    weight = next(model.parameters())
    with torch.no_grad():
        weight.view(-1)[0] += 1e-3
        changed = weights_digest(model)
        weight.view(-1)[0] -= 1e-3
    assert changed != before
    assert weights_digest(model.to(torch.bfloat16)) not in (before, changed)


def test_both_ways_of_a_run_that_rolled_back_have_names_of_their_own(tiny, tmp_path):
    root = tmp_path / "data"
    shards = write_shards(root, make_episodes(tiny))
    source = fresh_source(sampling(root, tiny), load_tokenizer(tiny))
    asked: list[tuple[int, str, Path]] = []  # updates, digest of the weights, shard

    def fresh(model, updates, before, count):
        shard = source(model, updates, before, count)
        asked.append((updates, weights_digest(model), root / shard.path))
        return shard

    made = train(
        run_dir=tmp_path / "run", init_dir=tiny, shards=shards, shard_root=root, settings=SETTINGS, seed=0, device="cpu",
        dtype="float32", fresh=fresh,
    )  # fmt: skip
    ways: dict[int, dict[str, str]] = {}
    for updates, weights, path in asked:
        ((version, digest),) = behaviours(path)
        assert version == f"agent/1+{updates}"
        assert ways.setdefault(updates, {}).setdefault(weights, digest) == digest
    twice = [found for found in ways.values() if len(found) == 2]  # updates that were made on both ways
    assert twice
    assert made.steps == SETTINGS.steps
    names = {weights: digest for found in ways.values() for weights, digest in found.items()}
    assert len(set(names.values())) == len(names) > SETTINGS.steps
    groups = [pq.read_table(path, columns=["group_id"])["group_id"].to_pylist()[0] for _, _, path in asked]
    assert len(set(groups)) == len(groups)


def test_equal_weights_of_two_runs_are_two_behaviours(tiny, tmp_path):
    model, tokenizer = load_policy(tiny), load_tokenizer(tiny)
    one = sampling(tmp_path, tiny)
    other = replace(one, key="another run", folder=tmp_path / "other")
    ((_, first),) = behaviours(tmp_path / fresh_source(one, tokenizer)(model, 0, 0, 1).path)
    ((_, second),) = behaviours(tmp_path / fresh_source(other, tokenizer)(model, 0, 0, 1).path)
    assert first != second
