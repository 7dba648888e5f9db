from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import tempfile
import time
from dataclasses import asdict, fields, replace
from datetime import datetime
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.causal_lm import tokenizer_digest
from models.packing import Sample, pack
from tasks.core.digest import sha256_file
from tasks.core.errors import Corrupt, NotFound, Refused, Unavailable
from tasks.replay.schema import DEEP_THINKING, INVALID_TURNS, MEMORY_TURNS, Episode, arrow_schema
from tasks.training import decoded
from tasks.training.shards import Episodes, Policy, Replay, ShardRef, join, read_replay
from tests.training.replay import changed, write_shards

NEEDS = frozenset({"behaviour_logprobs"})


@pytest.fixture
def policy(tiny) -> Policy:
    return Policy(tokenizer_digest(tiny), 99, 2048)


def read(tmp_path, episodes, policy, needs=NEEDS):
    return read_replay(write_shards(tmp_path, episodes), tmp_path, policy, needs)


def test_groups_are_whole_though_they_lie_across_shards(tmp_path, episodes, policy):
    replay = read(tmp_path, episodes, policy)
    assert replay.table.ids.tolist() == [f"g{i}" for i in range(6)]
    found = replay.episodes(["g4", "g1"])
    wanted = [e for g in ("g4", "g1") for e in episodes if e.group_id == g]
    assert [list(s.response_ids) for s in found.samples] == [e.response_ids for e in wanted]
    assert found.rewards == tuple(e.reward for e in wanted)
    assert found.groups == (0,) * 4 + (1,) * 4
    assert found.group_ids == ("g4", "g1")
    assert found.texts == tuple(e.response_text for e in wanted)


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
        ("turn_ids", {"turn_ids": [0]}),
        (
            "turn_ids",
            {
                "response_ids": [5] * 2,
                "loss_mask": [True] * 2,
                "behaviour_logprobs": [-1.0] * 2,
                "turn_ids": [1, 0],
            },
        ),
        ("top_p", {"top_p": 0.9}),
        ("reward_components", {"reward_components": '{"memory_turns": 0}'}),
        ("reward_components", {"reward_components": '{"memory_turns": true}'}),
        ("reward_components", {"reward_components": '{"memory_turns": "2"}'}),
        ("reward_components", {"reward_components": '{"memory_turns": 99999}'}),
        ("reward_components", {"reward_components": '{"memory_turns": 2'}),
    ],
)
def test_a_row_that_does_not_fit_is_refused_by_column(tmp_path, episodes, policy, column, values):
    with pytest.raises(Refused, match=rf"^Column {column}: 1 of 24 rows "):
        read(tmp_path, changed(episodes, 3, **values), policy)


@pytest.mark.parametrize("value", [0.5, float("nan"), float("-inf")])
def test_impossible_logprobs_are_refused(tmp_path, episodes, policy, value):
    logprobs = [value, *episodes[3].behaviour_logprobs[1:]]
    for needs in (NEEDS, frozenset()):  # reported on and guarded by, whether the objective needs them or not
        with pytest.raises(Refused, match=r"^Column behaviour_logprobs"):
            read(
                tmp_path / str(len(needs)),
                changed(episodes, 3, behaviour_logprobs=logprobs),
                policy,
                needs=needs,
            )


def test_logprobs_of_tokens_that_are_not_trained_do_not_matter(tmp_path, episodes, policy):
    given = episodes[0]
    assert not all(given.loss_mask)
    other = [x if m else -9.9 for x, m in zip(given.behaviour_logprobs, given.loss_mask, strict=True)]
    found = read(tmp_path / "other", changed(episodes, 0, behaviour_logprobs=other), policy).episodes(["g0"])
    want = read(tmp_path / "given", episodes, policy).episodes(["g0"])
    assert other != given.behaviour_logprobs
    assert torch.equal(found.behaviour_logprobs, want.behaviour_logprobs)
    assert len(found.behaviour_logprobs) == sum(sum(sample.trained) for sample in found.samples)


def test_rows_without_logprobs_are_passed_over_and_refused_if_there_are_no_others(tmp_path, episodes, policy):
    replay = read(tmp_path, changed(episodes, 3, logprob_source="missing"), policy)
    assert len(replay.episodes(replay.table.ids.tolist()).samples) == 23
    assert all(replay.episodes([group]).behaviour_logprobs is not None for group in replay.table.ids)
    for at in range(len(episodes)):
        episodes = changed(episodes, at, logprob_source="missing")
    with pytest.raises(Refused, match=r"^Column logprob_source: 24 of 24 rows "):
        read(tmp_path / "none", episodes, policy)


def test_missing_logprobs_are_fine_where_none_are_needed(tmp_path, episodes, policy):
    replay = read(tmp_path, changed(episodes, 3, logprob_source="missing"), policy, needs=frozenset())
    assert replay.episodes(["g0"]).behaviour_logprobs is None


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


def test_columns_of_another_type_and_missing_values_are_refused(tmp_path, episodes, policy):
    def written(name: str, column: pa.Array) -> list[ShardRef]:
        table = pa.Table.from_pylist([asdict(e) for e in episodes], arrow_schema())
        table = table.set_column(table.column_names.index(name), name, column)
        pq.write_table(table, tmp_path / "odd.parquet")
        return [ShardRef("odd.parquet", sha256_file(tmp_path / "odd.parquet"))]

    with pytest.raises(Refused, match="column reward is not of the type double"):
        read_replay(written("reward", pa.array(["much"] * 24)), tmp_path, policy, NEEDS)
    with pytest.raises(Refused, match="column reward has missing values"):
        read_replay(written("reward", pa.array([None, *[1.0] * 23])), tmp_path, policy, NEEDS)
    with pytest.raises(Refused, match="column turn_ids has missing values"):
        read_replay(
            written("turn_ids", pa.array([[None]] * 24, pa.list_(pa.int16()))), tmp_path, policy, NEEDS
        )
    wide = pa.array([e.prompt_ids for e in episodes], pa.large_list(pa.int64()))
    replay = read_replay(written("prompt_ids", wide), tmp_path, policy, NEEDS)
    assert replay.episodes(["g0"]).samples[0].prompt_ids.tolist() == episodes[0].prompt_ids
    table = pq.read_table(tmp_path / "odd.parquet").drop_columns(["turn_ids"])
    pq.write_table(table, tmp_path / "odd.parquet")
    lacking = [ShardRef("odd.parquet", sha256_file(tmp_path / "odd.parquet"))]
    with pytest.raises(Refused, match="lacks the column turn_ids"):
        read_replay(lacking, tmp_path, policy, NEEDS)


# The reader that this one replaces, in plain Python over rows in memory.


def naive(rows: list[Episode], needs: frozenset[str], oldest: int) -> tuple[dict[str, list[Episode]], int]:
    """The rows of every group by sample index, and the newest registry version."""
    rows = [e for e in rows if e.finish_reason != "error" and (version(e) is None or version(e) >= oldest)]
    known = [e for e in rows if e.logprob_source != "missing"]
    if needs and known:
        rows = known
    groups: dict[str, list[Episode]] = {}
    for row in sorted(rows, key=lambda e: (e.group_id, e.sample_index)):
        groups.setdefault(row.group_id, []).append(row)
    return groups, max((version(e) or 0 for e in rows), default=0)


def untrained_if_cut(episode: Episode) -> Episode:
    cut = episode.finish_reason == "length"
    return replace(episode, loss_mask=[False] * len(episode.loss_mask)) if cut else episode


def version(episode: Episode) -> int | None:
    agent, number = episode.behaviour_version.split("/")
    return int(number) if agent == "agent" else None


def lag(episode: Episode, newest: int) -> int:
    return 0 if version(episode) is None else newest - version(episode)


def assert_equal_to_naive(replay: Replay, groups: dict[str, list[Episode]], newest: int, order: list[str]):
    table = replay.table
    ids = sorted(groups)
    assert table.ids.tolist() == ids
    assert table.episodes.tolist() == [len(groups[i]) for i in ids]
    size = {i: sum(len(e.prompt_ids) + len(e.response_ids) for e in groups[i]) for i in ids}
    assert table.tokens.tolist() == [size[i] for i in ids]
    assert table.trained.tolist() == [sum(sum(e.loss_mask) for e in groups[i]) for i in ids]
    rewards = [[e.reward for e in groups[i]] for i in ids]
    assert table.reward_mean.tolist() == pytest.approx([statistics.mean(r) for r in rewards])
    assert table.reward_std.tolist() == pytest.approx([statistics.pstdev(r) for r in rewards], abs=1e-12)
    assert [std == 0 for std in table.reward_std] == [len(set(r)) == 1 for r in rewards]
    assert table.lag.tolist() == [max(lag(e, newest) for e in groups[i]) for i in ids]
    time = {i: max(datetime.fromisoformat(e.created_at).timestamp() for e in groups[i]) for i in ids}
    assert table.age.tolist() == [sorted(ids, key=lambda i: (-time[i], i)).index(i) for i in ids]
    found, rows = replay.episodes(order), [e for i in order for e in groups[i]]
    assert [s.prompt_ids.tolist() for s in found.samples] == [e.prompt_ids for e in rows]
    assert [s.response_ids.tolist() for s in found.samples] == [e.response_ids for e in rows]
    assert [s.trained.tolist() for s in found.samples] == [e.loss_mask for e in rows]
    assert [s.temperature for s in found.samples] == [e.temperature for e in rows]
    assert found.texts == tuple(e.response_text for e in rows)
    assert found.rewards == tuple(e.reward for e in rows)
    assert found.lags == tuple(lag(e, newest) for e in rows)
    assert found.group_ids == tuple(order)
    assert [found.group_ids[g] for g in found.groups] == [e.group_id for e in rows]
    turns = [t for e in rows for t, m in zip(e.turn_ids, e.loss_mask, strict=True) if m]
    assert found.turns.dtype == torch.int64
    assert found.turns.tolist() == turns
    broken = [json.loads(e.reward_components or "{}").get(INVALID_TURNS, []) for e in rows]
    right = [
        t not in b
        for e, b in zip(rows, broken, strict=True)
        for t, m in zip(e.turn_ids, e.loss_mask, strict=True)
        if m
    ]
    assert (found.valid is None) == (not any(broken))
    assert found.valid is None or found.valid.tolist() == right
    memories = [json.loads(e.reward_components or "{}").get(MEMORY_TURNS, 99) for e in rows]
    assert (found.parts is None) == (set(memories) <= {99})
    read, written = [], []  # before each trained token, by its definition, and the token
    for e, memory in zip(rows, memories, strict=True):
        for place, (token, turn, mine) in enumerate(
            zip(e.response_ids, e.turn_ids, e.loss_mask, strict=True)
        ):
            if mine:
                before = zip(e.response_ids[:place], e.turn_ids[:place], strict=True)
                read.append([*e.prompt_ids, *(i for i, t in before if t >= turn - memory)])
                written.append(token)
    passed = [
        ([*s.prompt_ids, *s.response_ids[:place]], s.response_ids[place])
        for s in found.passes.samples
        for place in np.flatnonzero(s.trained)
    ]
    assert passed == list(zip(read, written, strict=True))
    assert [
        n
        for n, s in zip(found.passes.episode, found.passes.samples, strict=True)
        for _ in range(sum(s.trained))
    ] == [n for n, e in enumerate(rows) for _ in range(sum(e.loss_mask))]
    every = [e for group in groups.values() for e in group]
    if any(e.logprob_source == "missing" for e in every):
        assert found.behaviour_logprobs is None
    else:
        logs = [p for e in rows for p, m in zip(e.behaviour_logprobs, e.loss_mask, strict=True) if m]
        assert found.behaviour_logprobs.dtype == torch.float32
        assert found.behaviour_logprobs.tolist() == np.float32(logs).tolist()


BLANK = {f.name: {"str": "", "int": 0, "float": 1.0}.get(f.type, "") for f in fields(Episode)}


@st.composite
def episode_rows(draw):
    group, at = draw(st.sampled_from(["", "a", "b", "b ", "aa", "é", "z" * 40])), draw(st.integers(0, 9))
    length = draw(st.integers(0, 4))

    def per_token(values):
        return draw(st.lists(values, min_size=length, max_size=length))

    return Episode(
        **BLANK
        | {
            "group_id": group,
            "sample_index": at,
            "prompt_ids": draw(st.lists(st.integers(0, 98), min_size=1, max_size=4)),
            "response_ids": per_token(st.integers(0, 98)),
            "loss_mask": per_token(st.booleans()),
            "turn_ids": sorted(per_token(st.integers(0, 3))),
            "behaviour_logprobs": per_token(st.floats(-9, 0)),
            "logprob_source": draw(st.sampled_from(["engine", "engine", "engine", "missing"])),
            "behaviour_version": draw(st.sampled_from(["agent/1", "agent/2", "agent/12", "some/1"])),
            "finish_reason": draw(st.sampled_from(["done", "done", "length", "error"])),
            "temperature": draw(st.sampled_from([0.7, 1.0])),
            "tokenizer_digest": "t",
            "reward": draw(st.sampled_from([0.0, 0.1, 1.0, -3.5])),
            "reward_components": draw(
                st.sampled_from(["", "{}", '{"correct":1.0}'])
                | st.sampled_from([0.25, 1, -1, "high", None, [0.5]]).map(
                    lambda ratio: json.dumps({DEEP_THINKING: ratio})
                )
                | st.integers(1, 3).map(lambda turns: json.dumps({MEMORY_TURNS: turns}))
                | st.lists(st.integers(0, 3), min_size=1).map(
                    lambda turns: json.dumps({INVALID_TURNS: turns})
                )
            ),
            "response_text": draw(st.text(max_size=3)),
            "created_at": draw(
                st.sampled_from(
                    ["2026-01-02T00:00:00+00:00", "2026-01-01T23:30:00-01:00", "2026-01-03T00:00:00Z"]
                )
            ),
        }
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(episode_rows(), min_size=1, max_size=24, unique_by=lambda e: (e.group_id, e.sample_index)),
    shards=st.integers(1, 3),
    needs=st.sampled_from([frozenset(), NEEDS]),
    oldest=st.sampled_from([0, 2]),
    block=st.sampled_from([1, 2000, 1 << 26]),
    masked=st.booleans(),
    pick=st.randoms(use_true_random=False),
)
def test_any_dataset_is_read_like_a_naive_reader_would(rows, shards, needs, oldest, block, masked, pick):
    groups, newest = naive(rows, needs, oldest)
    with tempfile.TemporaryDirectory() as folder, patch.object(decoded, "BLOCK_BYTES", block):
        refs = write_shards(Path(folder), rows, shards=shards)

        def open_it() -> Replay:
            cache = Path(folder) / "cache"
            return read_replay(
                refs, Path(folder), Policy("t", 99, 8), needs, oldest, cache, mask_truncated=masked
            )

        kept = [e for group in groups.values() for e in group]
        if needs and kept and all(e.logprob_source == "missing" for e in kept):
            with pytest.raises(Refused, match=f"Column logprob_source: {len(kept)} of {len(kept)} rows"):
                open_it()
        else:
            order = pick.sample(sorted(groups), pick.randrange(len(groups) + 1))
            if masked:
                groups = {name: list(map(untrained_if_cut, group)) for name, group in groups.items()}
            for _ in range(2):  # decoded, then found decoded
                assert_equal_to_naive(open_it(), groups, newest, order)


def test_counts_of_a_refusal_are_those_of_all_shards(tmp_path, episodes, policy):
    for at in (0, 1, 7, 8):
        episodes = changed(episodes, at, temperature=0.0)
    episodes = changed(episodes, 2, finish_reason="error")
    with pytest.raises(Refused, match=r"^Column temperature: 4 of 23 rows have no sampling temperature"):
        read(tmp_path, episodes, policy)


def test_a_conversation_may_be_longer_than_what_is_read_at_once(tmp_path, episodes, policy):
    """3000 tokens, of which no turn reads more than 33 with a memory of two turns."""
    turns = [n // 10 for n in range(3000)]
    long = {
        "response_ids": [5] * 3000,
        "loss_mask": [n % 10 < 4 for n in range(3000)],
        "behaviour_logprobs": [-1.0] * 3000,
        "turn_ids": turns,
    }
    read_in_parts = changed(episodes, 3, **long, reward_components='{"memory_turns": 2}')
    most = len(episodes[3].prompt_ids) + 24
    found = read(tmp_path, read_in_parts, replace(policy, max_tokens=most))
    group = found.episodes([episodes[3].group_id])
    assert max(len(s.prompt_ids) + len(s.response_ids) for s in group.passes.samples) == most
    with pytest.raises(Refused, match=rf"response_ids: .* longer than the {most - 1} tokens"):
        read(tmp_path, read_in_parts, replace(policy, max_tokens=most - 1))
    with pytest.raises(Refused, match="response_ids"):
        read(tmp_path, changed(episodes, 3, **long), replace(policy, max_tokens=most))


def test_ratios_that_are_paid_for_must_be_there(tmp_path, episodes, policy):
    def with_ratio(episode, ratio):
        return replace(episode, reward_components=json.dumps({"correct": 1.0, DEEP_THINKING: ratio}))

    wanted = NEEDS | {"deep_thinking"}
    with pytest.raises(
        Refused, match=rf"Column reward_components: {len(episodes)} of .*collect.deep_thinking"
    ):
        read(tmp_path / "none", episodes, policy, wanted)
    rated = [with_ratio(episode, number / 100) for number, episode in enumerate(episodes)]
    replay = read(tmp_path / "all", rated, policy, wanted)
    found = replay.episodes(["g1", "g0"])
    assert found.deep_thinking.tolist() == [0.04, 0.05, 0.06, 0.07, 0.0, 0.01, 0.02, 0.03]
    joined = join([replay.episodes(["g1"]), replay.episodes(["g0"])])
    assert torch.equal(joined.deep_thinking, found.deep_thinking)
    part = read(tmp_path / "part", [*rated[:-1], episodes[-1]], policy)
    assert part.episodes(["g0"]).deep_thinking is not None
    assert part.episodes([part.table.ids[-1]]).deep_thinking is None


def test_the_spread_of_equal_rewards_is_exactly_zero(tmp_path, episodes, policy):
    table = read(
        tmp_path, [replace(e, reward=0.1) if e.group_id == "g2" else e for e in episodes], policy
    ).table
    assert table.reward_std[2] == 0
    assert table.reward_mean[2] == 0.1
    assert np.all(table.reward_std[[0, 1, 3, 4, 5]] > 0)


def test_a_time_that_is_none_counts_as_the_oldest(tmp_path, episodes, policy):
    episodes = [replace(e, created_at="yesterday") if e.group_id == "g0" else e for e in episodes]
    assert read(tmp_path, episodes, policy).table.age.tolist() == [5, 0, 1, 2, 3, 4]


def test_an_unknown_group_is_named(tmp_path, episodes, policy):
    replay = read(tmp_path, episodes, policy)
    for name in ("", "g00", "zzz", "g0" * 99):
        with pytest.raises(KeyError, match=f"group {name} is not"):
            replay.episodes(["g1", name])


def test_joined_episodes_are_those_of_the_groups_together(tmp_path, episodes, policy):
    replay = read(tmp_path, episodes, policy)
    parts = [replay.episodes(groups) for groups in (["g4", "g0"], [], ["g3"])]
    joined, whole = join(parts), replay.episodes(["g4", "g0", "g3"])
    for name in ("rewards", "groups", "lags", "group_ids", "texts"):
        assert getattr(joined, name) == getattr(whole, name)
    assert [s.response_ids.tolist() for s in joined.samples] == [
        s.response_ids.tolist() for s in whole.samples
    ]
    assert torch.equal(joined.turns, whole.turns)
    assert torch.equal(joined.behaviour_logprobs, whole.behaviour_logprobs)
    assert join([*parts, replace(parts[0], behaviour_logprobs=None)]).behaviour_logprobs is None


def test_samples_pack_as_lists_do(tmp_path, episodes, policy):
    samples = read(tmp_path, episodes, policy).episodes(["g0", "g3"]).samples
    plain = [
        Sample(s.prompt_ids.tolist(), s.response_ids.tolist(), s.trained.tolist(), s.temperature)
        for s in samples
    ]
    for a, b in zip(pack(samples, 40), pack(plain, 40), strict=True):
        for field in fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            assert x == y if isinstance(x, tuple) else (x.dtype, x.tolist()) == (y.dtype, y.tolist())


# The cache of decoded shards.


def everything(replay: Replay) -> tuple:
    found: Episodes = replay.episodes(replay.table.ids.tolist())
    samples = [(s.prompt_ids.tolist(), s.response_ids.tolist(), s.trained.tolist()) for s in found.samples]
    return samples, found.rewards, found.turns.tolist(), found.behaviour_logprobs.tolist(), found.texts


@pytest.fixture
def opened(tmp_path, episodes, policy):
    """Opens the same two shards with the same cache."""
    refs = write_shards(tmp_path, episodes)
    return lambda: read_replay(refs, tmp_path, policy, NEEDS, cache=tmp_path / "cache")


def files(tmp_path: Path) -> dict[str, tuple[bytes, int]]:
    return {
        p.name: (p.read_bytes(), p.stat().st_ino) for p in (tmp_path / "cache").iterdir() if p.name != ".lock"
    }


def test_a_decoded_shard_is_used_again(tmp_path, opened):
    want = everything(opened())
    before = files(tmp_path)
    assert len(before) == 4
    for part in tmp_path.glob("*.parquet"):
        part.unlink()
    assert everything(opened()) == want
    assert files(tmp_path) == before
    done = subprocess.run(
        "sha256sum --check *.sha256", shell=True, cwd=tmp_path / "cache", capture_output=True
    )
    assert done.returncode == 0


@pytest.mark.parametrize("place", [0.0, 0.2, 0.5, 0.8, 0.999])
@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_decoded_shard_is_made_anew(tmp_path, opened, damage, place):
    want = everything(opened())
    before = files(tmp_path)
    victim = sorted((tmp_path / "cache").glob("*.arrow"))[0]
    data = bytearray(victim.read_bytes())
    at = int(place * len(data))
    if damage == "flip":
        data[at] ^= 1
    victim.write_bytes(data if damage == "flip" else data[:at])
    assert everything(opened()) == want
    assert {name: data for name, (data, _) in files(tmp_path).items()} == {
        n: d for n, (d, _) in before.items()
    }


@pytest.mark.parametrize("content", [None, b"", b"0" * 64, b"\xff"])
def test_a_damaged_digest_counts_as_a_damaged_shard(tmp_path, opened, content):
    want = everything(opened())
    before = files(tmp_path)
    victim = sorted((tmp_path / "cache").glob("*.sha256"))[0]
    victim.unlink() if content is None else victim.write_bytes(content)
    assert everything(opened()) == want
    assert {name: data for name, (data, _) in files(tmp_path).items()} == {
        n: d for n, (d, _) in before.items()
    }


def test_what_is_parsed_is_what_was_hashed(tmp_path, opened, monkeypatch):
    """The shard is overwritten in place right after it was verified."""
    want = everything(opened())
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    real = decoded._parquet

    def overwritten_first(stream, source):
        source.write_bytes(bytes(source.stat().st_size))
        return real(stream, source)

    monkeypatch.setattr(decoded, "_parquet", overwritten_first)
    assert everything(opened()) == want
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    with pytest.raises(Corrupt):
        opened()


def test_decoded_shards_of_other_datasets_go_when_nobody_opened_them_for_a_day(
    tmp_path, episodes, policy, opened
):
    opened()
    cache = tmp_path / "cache"
    first = sorted(cache.glob("*.arrow"))
    others = write_shards(tmp_path / "other", episodes[:12])

    def open_others() -> None:
        read_replay(others, tmp_path / "other", policy, NEEDS, cache=cache)

    open_others()
    assert set(first) < set(cache.glob("*.arrow"))
    long_ago = time.time() - decoded.IDLE_SECONDS - 10
    for path in first:
        os.utime(path, (long_ago, long_ago))
    opened()  # in use again
    open_others()
    assert set(first) < set(cache.glob("*.arrow"))
    for path in first:
        os.utime(path, (long_ago, long_ago))
    open_others()
    assert not set(first) & set(cache.glob("*.arrow"))
    assert len(list(cache.glob("*.sha256"))) == len(list(cache.glob("*.arrow"))) == len(others)


def test_processes_that_open_at_once_make_it_once(tmp_path, opened, monkeypatch):
    fork = multiprocessing.get_context("fork")
    gate, made, answers = fork.Barrier(3), fork.Queue(), fork.Queue()
    real = decoded._make

    def counted(*arguments):
        made.put(1)
        real(*arguments)

    monkeypatch.setattr(decoded, "_make", counted)

    def work() -> None:
        gate.wait()
        answers.put(everything(opened()))
        for queue in (made, answers):
            queue.close()
            queue.join_thread()
        os._exit(0)  # without the exit handlers of all that this process had imported

    workers = [fork.Process(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert found[0] == found[1] == found[2] == everything(opened())
    assert sum(made.get(timeout=5) for _ in range(2)) == 2  # one a shard
    assert made.empty()


def test_a_killed_writer_leaves_nothing_that_counts(tmp_path, opened, monkeypatch):
    real, block = decoded._decoded, decoded.BLOCK_BYTES
    calls = []

    def killed_in_the_middle(batch, source):
        calls.append(batch)
        if len(calls) > 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(batch, source)

    monkeypatch.setattr(decoded, "BLOCK_BYTES", 1)  # a row at a time
    monkeypatch.setattr(decoded, "_decoded", killed_in_the_middle)
    worker = multiprocessing.get_context("fork").Process(target=opened)
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    left = files(tmp_path)
    assert [name.endswith(".tmp") for name in left] == [True]
    assert len(next(iter(left.values()))[0]) > 0
    monkeypatch.setattr(decoded, "BLOCK_BYTES", block)
    monkeypatch.setattr(decoded, "_decoded", real)
    want = everything(opened())
    assert sorted(name.rpartition(".")[2] for name in files(tmp_path)) == [
        "arrow",
        "arrow",
        "sha256",
        "sha256",
    ]
    assert want == everything(opened())


def test_a_full_disk_leaves_nothing_behind(tmp_path, episodes, policy):
    """On a file system of its own that is too small; needs the right to mount one."""
    mount = tmp_path / "small"
    mount.mkdir()
    many = [replace(e, group_id=f"{e.group_id}-{n}") for n in range(40) for e in episodes]
    refs = write_shards(tmp_path, many)
    size = math.ceil(sum((tmp_path / ref.path).stat().st_size for ref in refs) / 4096) * 4
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(mount)], capture_output=True
    ).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        with pytest.raises(Unavailable, match=r"is full: .* was not written; free some space"):
            read_replay(refs, tmp_path, policy, NEEDS, cache=mount)
        assert [path.name for path in mount.iterdir()] == [".lock"]
        subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
        assert len(read_replay(refs, tmp_path, policy, NEEDS, cache=mount).table) == 240
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def test_without_a_cache_nothing_is_left_and_no_file_stays_open(tmp_path, episodes, policy, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    refs = write_shards(tmp_path, random.Random(0).sample(episodes, len(episodes)), shards=12)
    before = len(os.listdir("/proc/self/fd"))
    replay = read_replay(refs, tmp_path, policy, NEEDS)
    assert len(os.listdir("/proc/self/fd")) == before
    assert not list((tmp_path / "scratch").iterdir())
    assert_equal_to_naive(replay, *naive(episodes, NEEDS, 0), ["g5", "g0"])
