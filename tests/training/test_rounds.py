"""Runs that mix in fresh groups, correct by older policies, or train beside frozen weights: through `train` itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from models import objectives
from models.causal_lm import load_policy, tokenizer_digest
from models.packing import Sample
from tasks.core.digest import sha256_file
from tasks.core.errors import Conflict, UsageError
from tasks.training import parallel
from tasks.training.groups import GroupTable
from tasks.training.parallel import World
from tasks.training.rounds import Curriculum, Lesson, Policies, admitted
from tasks.training.sampler import Sampler
from tasks.training.settings import (
    Adapter,
    Admission,
    Correction,
    Diversity,
    Guards,
    Mixture,
    Penalties,
    Sampling,
    TrainingSettings,
)
from tasks.training.shards import Episodes, Policy, ShardRef, read_replay
from tasks.training.trainer import train
from tasks.training.update import Measured, Update
from tests.training.replay import Source, changed, make_episodes, write_shards

SETTINGS = TrainingSettings(
    steps=6,
    groups_per_step=2,
    learning_rate=1e-3,
    token_budget=64,
    checkpoint_every=2,
    guards=Guards(min_ess=0, max_kl=100),
)


@pytest.fixture
def options(tmp_path, tiny, episodes):
    return {
        "run_dir": tmp_path / "run",
        "init_dir": tiny,
        "shards": write_shards(tmp_path / "data", episodes),
        "shard_root": tmp_path / "data",
        "settings": SETTINGS,
        "seed": 0,
        "device": "cpu",
        "dtype": "float32",
    }


def given(**update) -> TrainingSettings:
    return TrainingSettings(**{**SETTINGS.model_dump(), **update})


class Crash(Exception):
    pass


def test_fresh_groups_are_on_policy_counted_and_kept(options, tiny):
    seen = []
    source = Source(tiny, options["shard_root"])
    mixed = given(mixture=Mixture(schedule="linear", fresh=1.0, fresh_end=0.0), groups_per_step=4)
    result = train(**options | {"settings": mixed}, fresh=source, on_metrics=lambda step, m: seen.append(m))
    assert [m["fresh_groups"] for m in seen] == [4, 3, 3, 1, 1, 0]
    assert source.asked == [(0, 0, 4), (1, 4, 3), (2, 7, 3), (3, 10, 1), (4, 11, 1)]
    assert seen[0]["ess"] == pytest.approx(1, abs=1e-5)
    assert [shard.path for shard in result.fresh] == [f"fresh/{n}.parquet" for n in (0, 4, 7, 10, 11)]
    for shard in result.fresh:
        assert sha256_file(options["shard_root"] / shard.path) == shard.sha256
    # Weights have moved by the fourth update: its fresh group was sampled from them, not from the initial model.
    later = pq.read_table(options["shard_root"] / "fresh/10.parquet")["behaviour_logprobs"].to_pylist()
    initial = make_episodes(tiny, groups=1, seed=110)
    assert later != [episode.behaviour_logprobs for episode in initial]


@pytest.mark.parametrize("crash_at", [1, 3, 4])
def test_a_run_with_fresh_groups_that_was_cut_short_ends_with_the_same_bytes(
    options, tiny, tmp_path, crash_at
):
    mixed = given(
        mixture=Mixture(schedule="ess", fresh=0.5, target_ess=0.99),
        sampling=Sampling(order="priority"),
        updates_per_round=2,
        objective="decoupled_ppo",
    )
    straight = train(**options | {"settings": mixed}, fresh=Source(tiny, options["shard_root"]))

    def crash(step, metrics):
        if step == crash_at:
            raise Crash

    # Another place, and what was sampled since the last checkpoint is lost: it is sampled once more.
    root = tmp_path / "elsewhere"
    shutil.copytree(options["shard_root"], root, ignore=shutil.ignore_patterns("fresh"))
    again = options | {"settings": mixed, "run_dir": tmp_path / "again", "shard_root": root}
    first = Source(tiny, root)
    with pytest.raises(Crash):
        train(**again, fresh=first, on_metrics=crash)
    kept = 2 * ((crash_at - 1) // 2)
    for updates, before, _ in first.asked:
        if updates >= kept:
            (root / f"fresh/{before}.parquet").unlink()
    resumed = train(**again, fresh=Source(tiny, root))
    assert resumed.digest == straight.digest
    assert resumed.fresh == straight.fresh
    assert resumed.groups_consumed == straight.groups_consumed


class Dull(Source):
    """Fresh answers that are all right, so that nothing can be learnt from them."""

    def reward(self, episode):
        return 1.0


class Broken(Source):
    """An environment that fails every time."""

    def __call__(self, *args) -> ShardRef:
        shard = super().__call__(*args)
        path = self.root / shard.path
        table = pq.read_table(path)
        reasons = pa.array(["error"] * table.num_rows)
        place = table.column_names.index("finish_reason")
        pq.write_table(table.set_column(place, table.schema.field("finish_reason"), reasons), path)
        return ShardRef(shard.path, sha256_file(path))


@pytest.mark.parametrize("source", [Dull, Broken])
def test_replay_takes_the_place_of_fresh_groups_that_teach_nothing(options, tiny, source):
    seen = []
    result = train(
        **options | {"settings": given(mixture=Mixture(schedule="constant", fresh=1.0))},
        fresh=source(tiny, options["shard_root"]),
        on_metrics=lambda step, m: seen.append(m),
    )
    assert [m["fresh_groups"] for m in seen] == [0] * 6
    assert len(result.groups_consumed) == 6


def test_a_mixture_without_a_source_is_a_wrong_request(options):
    with pytest.raises(UsageError, match="needs a source of fresh groups"):
        train(**options | {"settings": given(mixture=Mixture(schedule="constant"))})


@pytest.mark.parametrize(
    "update",
    [
        {"objective": "decoupled_ppo", "updates_per_round": 3},
        {"objective": "grpo", "updates_per_round": 3, "correction": Correction(weight="token-tis")},
        {"correction": Correction(weight="token-tis"), "updates_per_round": 3},
        {"correction": Correction(sequence_mask=0.5), "objective": "cispo"},
        {"penalties": Penalties(kl=0.1, kl_estimator="k3-unbiased", entropy=0.01)},
        {"diversity": Diversity(reward=0.001, entropy=0.001), "objective": "dapo"},
        {"advantage": "gigpo", "objective": "sampo", "unit": "turn"},
        {"advantage": "empg", "objective": "grpo"},
        {"objective": "dr_grpo", "aggregation": "constant", "constant": 16, "advantage": "group_mean"},
        {"activation_checkpointing": True},
        {"adapter": Adapter(rank=4), "learning_rate": 0.02, "penalties": Penalties(kl=0.01)},
    ],
    ids=lambda update: "-".join(update),
)
def test_every_part_of_the_loss_trains_and_is_repeatable(options, tmp_path, update):
    seen = []
    settings = given(**{"steps": 9, "groups_per_step": 6, **update})
    options |= {"settings": settings}
    first = train(**options, on_metrics=lambda step, m: seen.append(m))
    assert (first.stop_reason, first.steps) == ("finished", 9)
    assert seen[-1]["reward_estimate"] > seen[0]["reward_estimate"] + 0.01
    assert train(**options | {"run_dir": tmp_path / "twin"}).digest == first.digest


def test_an_adapter_is_merged_into_plain_weights(options, tiny):
    result = train(**options | {"settings": given(adapter=Adapter(rank=2), learning_rate=0.05)})
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny, result.export_dir))
    changed_names = {
        name
        for (name, a), (_, b) in zip(before.named_parameters(), after.named_parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed_names
    assert all(name.endswith("_proj.weight") for name in changed_names)


def test_groups_far_from_the_policy_are_not_admitted(options, tiny, episodes, tmp_path):
    far = [i for i, episode in enumerate(episodes) if episode.group_id == "g2"]
    moved = episodes
    for i in far:
        logprobs = [
            logprob - 3.0 if written else 0.0
            for logprob, written in zip(moved[i].behaviour_logprobs, moved[i].loss_mask, strict=True)
        ]
        moved = changed(moved, i, behaviour_logprobs=logprobs)
    options |= {"shards": write_shards(tmp_path / "moved", moved), "shard_root": tmp_path / "moved"}
    seen = []
    result = train(
        **options | {"settings": given(admission=Admission(max_divergence=0.5))},
        on_metrics=lambda step, m: seen.append(m),
    )
    assert "g2" not in result.groups_consumed
    assert len(result.groups_consumed) == 5
    assert (seen[0]["groups_admitted"], seen[0]["groups_refused_divergence"]) == (5, 1)


def test_a_divergence_is_measured_once_a_run(options, tiny, tmp_path):
    settings = given(admission=Admission(max_divergence=0.5))
    world = World(torch.device("cpu"))
    model = load_policy(tiny, "cpu", "float32")
    scorer = parallel.split(model, world)
    policy = Policy(tokenizer_digest(tiny), model.config.vocab_size, model.config.max_position_embeddings)
    replay = read_replay(options["shards"], options["shard_root"], policy, frozenset({"behaviour_logprobs"}))
    policies = Policies(scorer, scorer, lambda: None, None, world)
    first, _ = admitted(replay, settings, policies, tmp_path / "memo")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    again, _ = admitted(replay, settings, policies, tmp_path / "memo")
    assert again.ids.tolist() == first.ids.tolist()


def test_an_objective_of_the_users_own_is_named_by_its_bytes(options, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    code = "def loss(batch, *, scale=1.0):\n    from models.objectives import reinforce, Losses\n    found = reinforce(batch)\n    return Losses(found.tokens * scale, found.phi)\n"
    (tmp_path / "our_losses.py").write_text(code)
    settings = given(objective="our_losses:loss", options={"scale": 2.0})
    result = train(**options | {"settings": settings})
    assert result.stop_reason == "finished"
    named = settings.outside_code()
    (tmp_path / "our_losses.py").write_text(code + "# changed\n")
    assert settings.outside_code() != named
    with pytest.raises(UsageError, match="no option scala; did you mean scale"):
        train(
            **options
            | {
                "run_dir": tmp_path / "b",
                "settings": given(objective="our_losses:loss", options={"scala": 1}),
            }
        )
    with pytest.raises(UsageError, match="no Python module nowhere"):
        given(objective="nowhere:loss").outside_code()


@pytest.mark.parametrize(
    ("update", "sentence"),
    [
        ({"options": {"c1_poss": 2.0}}, "no option c1_poss"),
        ({"advantage": "gigpo", "advantage_options": {"gama": 1.0}}, "gama"),
        ({"advantage": "math:pi"}, "is a float, not a function"),
        ({"objective": "bapo", "options": {"step": 0.0}}, "cannot work"),
        ({"objective": "tis", "correction": Correction(weight="token-tis")}, "cannot work"),
        ({"correction": Correction(weight="sequence-tis")}, "cannot work"),
        ({"objective": "math:nothing"}, "cannot be imported"),
        ({"updates_per_round": 3}, "would change nothing"),
        ({"objective": "decoupled_ppo"}, "updates_per_round to 2 or more"),
        ({"adapter": Adapter(rank=2, targets=("lm_head",))}, "embedding or head"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_work_are_refused_in_one_sentence(options, update, sentence):
    with pytest.raises(UsageError, match=sentence):
        train(**options | {"settings": given(**update)})


def test_values_that_cannot_work_are_no_settings():
    with pytest.raises(ValueError, match="finite"):
        given(options={"c1_pos": float("nan")})
    with pytest.raises(ValueError, match="must be below high"):
        Correction(weight="token-mis", low=3, high=1)


def test_an_unfinished_run_of_other_inputs_is_left_alone(options):
    def crash(step, metrics):
        if step == 4:
            raise Crash

    with pytest.raises(Crash):
        train(**options, on_metrics=crash)
    with pytest.raises(Conflict, match="unfinished run of other"):
        train(**options | {"seed": 1})
    assert train(**options).steps == 6


def test_a_policy_that_has_left_the_data_is_seen():
    """Sequences so unlikely that every ratio is bounded: were they all equal then, they would look on-policy."""
    generator = torch.Generator().manual_seed(0)
    drift = torch.randn(64 * 1000, generator=generator, dtype=torch.float64) * 0.3 - 0.05
    sequence = torch.arange(64).repeat_interleave(1000)
    batch = objectives.Batch(drift, torch.ones_like(drift), sequence, 64, torch.zeros_like(drift))
    log_w = objectives.sequence_log_ratio(batch)
    assert log_w.quantile(0.9) < -20
    weights = (log_w - log_w.max()).exp()
    want = float(weights.sum() ** 2 / weights.square().sum() / 64)
    assert objectives.effective_sample_size(log_w) == pytest.approx(want)
    assert want < 0.1


def test_the_mixture_is_steered_by_all_replayed_sequences_at_once():
    """Each group on its own looks fine where only the prompts have drifted apart; a fresh group does not count."""
    settings = TrainingSettings(
        groups_per_step=4, mixture=Mixture(schedule="ess", fresh=0.25, target_ess=0.5)
    )
    ids = tuple("abc")
    rank = np.arange(3)
    table = GroupTable(np.array(ids), *[rank.astype(np.int64)] * 2, rank + 1, rank, rank, rank, rank)
    curriculum = Curriculum(None, Sampler(table, settings.sampling, 0), None, settings, Path(), None)
    samples = tuple(Sample((1,), (2,), (True,)) for _ in range(8))
    episodes = Episodes(
        samples,
        (0.0, 1.0) * 4,
        (0, 0, 1, 1, 2, 2, 3, 3),
        (0,) * 8,
        torch.zeros(8),
        None,
        (*ids, "new"),
        ("",) * 8,
    )
    update = Update(
        {}, {n: Measured(1.0, 1.0) for n in range(4)}, (0.0, 0.0, -9.0, -9.0, -9.0, -9.0, 50.0, -50.0)
    )
    progress = curriculum.start()
    found = curriculum.learnt(progress, Lesson(episodes, 3, None, None, None), update)
    assert found.mix.share == pytest.approx(0.25 + 0.25 * (0.5 - 2 / 6), abs=1e-3)
