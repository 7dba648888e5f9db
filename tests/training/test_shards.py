from __future__ import annotations

from dataclasses import replace

import pytest

from models.causal_lm import tokenizer_digest
from tasks.core.digest import sha256_file
from tasks.core.errors import Corrupt, NotFound, Refused
from tasks.training.shards import Policy, ShardRef, read_replay
from tests.training.replay import changed, write_shards

NEEDS = frozenset({"behaviour_logprobs"})


@pytest.fixture
def policy(tiny) -> Policy:
    return Policy(tokenizer_digest(tiny), 99, 2048)


def read(tmp_path, episodes, policy, needs=NEEDS):
    return read_replay(write_shards(tmp_path, episodes), tmp_path, policy, needs)


def test_groups_are_whole_though_they_lie_across_shards(tmp_path, episodes, policy):
    replay = read(tmp_path, episodes, policy)
    assert replay.groups == tuple(f"g{i}" for i in range(6))
    found = replay.episodes(["g4", "g1"])
    wanted = [e for g in ("g4", "g1") for e in episodes if e.group_id == g]
    assert [list(s.response_ids) for s in found.samples] == [e.response_ids for e in wanted]
    assert found.rewards == tuple(e.reward for e in wanted)
    assert found.groups == (0,) * 4 + (1,) * 4
    assert found.samples[0].behaviour_logprobs == pytest.approx(wanted[0].behaviour_logprobs)


def test_groups_without_a_signal_are_left_out(tmp_path, episodes, policy):
    flat = [replace(e, reward=1.0) if e.group_id == "g2" else e for e in episodes]
    assert "g2" not in read(tmp_path, flat, policy).groups
    with pytest.raises(Refused, match="Column reward: in each of the 6 groups"):
        read(tmp_path, [replace(e, reward=0.0) for e in episodes], policy)


def test_policy_lag_counts_registry_versions(tmp_path, episodes, policy):
    replay = read(tmp_path, changed(episodes, 0, behaviour_version="agent/4"), policy)
    assert replay.episodes(["g0"]).lags == (0, 3, 3, 3)
    foreign = changed(episodes, 0, behaviour_version="someone/else")
    assert read(tmp_path, foreign, policy).episodes(["g0"]).lags == (0, 0, 0, 0)


def test_episodes_of_a_failed_environment_are_left_out(tmp_path, episodes, policy):
    replay = read(tmp_path, changed(episodes, 1, finish_reason="error"), policy)
    assert len(replay.episodes(["g0"]).samples) == 3


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("tokenizer_digest", {"tokenizer_digest": "f" * 64}),
        ("temperature", {"temperature": 0.0}),
        ("temperature", {"temperature": float("nan")}),
        ("reward", {"reward": float("inf")}),
        ("prompt_ids", {"prompt_ids": []}),
        ("prompt_ids", {"prompt_ids": [5, 99]}),
        (
            "response_ids",
            {"response_ids": [-1] * 5, "loss_mask": [True] * 5, "behaviour_logprobs": [-1.0] * 5},
        ),
        (
            "response_ids",
            {"response_ids": [5] * 3000, "loss_mask": [True] * 3000, "behaviour_logprobs": [-1.0] * 3000},
        ),
        ("loss_mask", {"loss_mask": [True]}),
        ("behaviour_logprobs", {"behaviour_logprobs": [-1.0]}),
        ("top_p", {"top_p": 0.9}),
    ],
)
def test_a_row_that_does_not_fit_is_refused_by_column(tmp_path, episodes, policy, column, values):
    with pytest.raises(Refused, match=rf"^Column {column}: 1 of 24 rows "):
        read(tmp_path, changed(episodes, 3, **values), policy)


@pytest.mark.parametrize("value", [0.5, float("nan"), float("-inf")])
def test_impossible_logprobs_are_refused(tmp_path, episodes, policy, value):
    logprobs = [value, *episodes[3].behaviour_logprobs[1:]]
    with pytest.raises(Refused, match=r"^Column behaviour_logprobs"):
        read(tmp_path, changed(episodes, 3, behaviour_logprobs=logprobs), policy)


def test_rows_without_logprobs_are_passed_over_and_refused_if_there_are_no_others(tmp_path, episodes, policy):
    replay = read(tmp_path, changed(episodes, 3, logprob_source="missing"), policy)
    assert len(replay.groups) >= 5
    assert all(replay.episodes([group]).logprobs_known for group in replay.groups)
    for at in range(len(episodes)):
        episodes = changed(episodes, at, logprob_source="missing")
    with pytest.raises(Refused, match=r"^Column logprob_source: 24 of 24 rows "):
        read(tmp_path / "none", episodes, policy)


def test_missing_logprobs_are_fine_where_none_are_needed(tmp_path, episodes, policy):
    replay = read(tmp_path, changed(episodes, 3, logprob_source="missing"), policy, needs=frozenset())
    assert not replay.episodes(["g0"]).logprobs_known


def test_a_flipped_byte_is_refused_before_use(tmp_path, episodes, policy):
    refs = write_shards(tmp_path, episodes)
    path = tmp_path / refs[1].path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(Corrupt, match=r"part-1\.parquet differs from its digest"):
        read_replay(refs, tmp_path, policy, NEEDS)


def test_missing_foreign_and_no_shards(tmp_path, policy):
    with pytest.raises(NotFound, match="dvc pull"):
        read_replay([ShardRef("x.parquet", "0" * 64)], tmp_path, policy, NEEDS)
    path = tmp_path / "text.parquet"
    path.write_text("hello")
    with pytest.raises(Corrupt, match="not a Parquet file"):
        read_replay([ShardRef(path.name, sha256_file(path))], tmp_path, policy, NEEDS)
    with pytest.raises(Refused, match="no shards"):
        read_replay([], tmp_path, policy, NEEDS)
