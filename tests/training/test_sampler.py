from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from scipy.stats import chisquare

from tasks.core.errors import Conflict
from tasks.training import sampler as sampling
from tasks.training.groups import GroupTable
from tasks.training.sampler import Frontier, Sampler
from tasks.training.settings import Sampling

ORDERS = ("uniform", "recency", "staleness", "variance", "ess", "priority")


def table(size: int, name: str = "g") -> GroupTable:
    """Groups g0000, g0001, ...: the first is the newest and least stale and has the largest spread."""
    rank = np.arange(size, dtype=np.int32)
    return GroupTable(
        np.array([f"{name}{i:04d}" for i in range(size)]),
        np.full(size, 4, np.int32),
        np.full(size, 100, np.int64),
        np.full(size, 50, np.int64),
        np.zeros(size),
        1 / (1.0 + rank),
        rank,
        rank,
    )


def whole_epoch(groups: GroupTable, order: str = "uniform", seed: int = 0, epoch: int = 0) -> list[str]:
    sampler = Sampler(groups, Sampling(order=order), seed)
    frontier = sampler.start()
    for _ in range(epoch + 1):
        ids, frontier = sampler.draw(frontier, len(groups))
    return ids


def persisted(frontier: Frontier) -> Frontier:
    return Frontier.from_json(json.loads(json.dumps(frontier.to_json(), allow_nan=False)))


class Run(RuleBasedStateMachine):
    """A run that draws any counts, measures what it drew, persists now and then, and is killed."""

    @initialize(size=st.integers(1, 9), order=st.sampled_from(ORDERS), seed=st.integers(0, 3))
    def begin(self, size, order, seed):
        self.groups, self.order, self.seed = table(size), Sampling(order=order, strength=20), seed
        self.sampler = Sampler(self.groups, self.order, seed)
        self.frontier = self.kept = self.sampler.start()
        self.used: list[str] = []
        self.since: list[tuple[int, float]] = []  # updates since the frontier was persisted
        self.lost = 0  # groups that they used

    def update(self, count: int, value: float) -> list[str]:
        ids, self.frontier = self.sampler.draw(self.frontier, count)
        values = {name: value + 0.1 * at for at, name in enumerate(ids)}
        self.frontier = self.sampler.measured(self.frontier, values)
        return ids

    @rule(count=st.integers(0, 12), value=st.floats(0, 10))
    def step(self, count, value):
        ids = self.update(count, value)
        assert len(ids) == len(set(ids)) == min(count, len(self.groups))
        self.used += ids
        self.since.append((count, value))
        self.lost += len(ids)

    @rule()
    def persist(self):
        self.kept, self.since, self.lost = self.frontier, [], 0

    @rule()
    def crash_and_resume(self):
        before = self.frontier
        self.sampler = Sampler(self.groups, self.order, self.seed)
        self.frontier = persisted(self.kept)
        assert self.frontier == self.kept
        again = [name for update in self.since for name in self.update(*update)]
        assert again == self.used[len(self.used) - self.lost :]
        assert self.frontier == before

    @invariant()
    def every_group_once_an_epoch(self):
        size, ids = len(self.groups), self.groups.ids.tolist()
        epochs = [self.used[at : at + size] for at in range(0, len(self.used), size)]
        assert all(sorted(epoch) == ids for epoch in epochs[:-1])
        assert all(len(epoch) == len(set(epoch)) for epoch in epochs[-1:])
        assert self.sampler.consumed(self.frontier) == sorted(set(self.used))


TestRun = Run.TestCase
TestRun.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_a_draw_across_epochs_is_full_and_has_no_group_twice():
    sampler = Sampler(table(5), Sampling(), 3)
    frontier, used, skips = sampler.start(), [], 0
    for _ in range(25):
        ids, frontier = sampler.draw(frontier, 3)
        assert len(set(ids)) == 3
        used += ids
        skips += bool(frontier.skipped)
    assert skips  # the case is there at all
    assert Counter(used) == dict.fromkeys(table(5).ids.tolist(), 15)


def test_the_order_is_the_same_on_every_machine_and_changes_with_epoch_and_seed():
    assert whole_epoch(table(6)) == ["g0004", "g0002", "g0000", "g0005", "g0003", "g0001"]
    orders = {tuple(whole_epoch(table(8), seed=s, epoch=e)) for s in range(4) for e in range(4)}
    assert len(orders) == 16
    # A group's key does not depend on which others there are.
    fewer = table(8).where(np.arange(8) != 3)
    assert whole_epoch(fewer) == [name for name in whole_epoch(table(8)) if name != "g0003"]


def test_another_process_draws_the_same():
    code = (
        "from tests.training.test_sampler import ORDERS, table, whole_epoch\n"
        "print([whole_epoch(table(50), order, 7, 2) for order in ORDERS])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
    ).stdout
    assert out.strip() == str([whole_epoch(table(50), order, 7, 2) for order in ORDERS])


MEASURED = {"g0000": 1.0, "g0001": 0.5, "g0002": 0.25, "g0003": 0.0}
WEIGHTS = {
    "uniform": [1, 1, 1, 1],
    "recency": [1, 1 / 2, 1 / 3, 1 / 4],
    "staleness": [1, 1 / 2, 1 / 3, 1 / 4],
    "variance": [1, 1 / 2, 1 / 3, 1 / 4],
    "ess": [1, 1 / 2, 1 / 4, sampling.FLOOR],
    "priority": [1, 1 / 2, 1 / 4, sampling.FLOOR],
}


def first_two(order: Sampling, seeds: int) -> Counter[tuple[str, ...]]:
    """The first two groups of the second epoch, what was measured in the first being `MEASURED`."""
    pairs: Counter[tuple[str, ...]] = Counter()
    for seed in range(seeds):
        sampler = Sampler(table(4), order, seed)
        _, frontier = sampler.draw(sampler.start(), 4)
        pairs[tuple(sampler.draw(sampler.measured(frontier, MEASURED), 2)[0])] += 1
    return pairs


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_groups_come_with_the_probability_of_their_weight(order, strength):
    seeds = 3000
    weights = np.array(WEIGHTS[order]) ** strength
    ids = table(4).ids.tolist()
    pairs = list(itertools.permutations(range(4), 2))
    wanted = [
        weights[a] / weights.sum() * weights[b] / (weights.sum() - weights[a]) * seeds for a, b in pairs
    ]
    seen = first_two(Sampling(order=order, strength=strength), seeds)
    counts = [seen[ids[a], ids[b]] for a, b in pairs]
    if min(wanted) < 5:  # chi-square needs some of each; the rare pairs are taken together
        rare = np.array(wanted) < 5
        wanted = [*np.array(wanted)[~rare], np.array(wanted)[rare].sum()]
        counts = [*np.array(counts)[~rare], np.array(counts)[rare].sum()]
    assert chisquare(counts, wanted).pvalue > 1e-3


def test_a_strong_order_is_sorted():
    for order in ("recency", "staleness", "variance"):
        strong = Sampler(table(9), Sampling(order=order, strength=300), 0)
        assert strong.draw(strong.start(), 9)[0] == table(9).ids.tolist()


def test_measurements_count_from_the_next_epoch_and_the_newest_wins():
    sampler = Sampler(table(4), Sampling(order="priority", strength=100), 0)
    first, frontier = sampler.draw(sampler.start(), 2)
    frontier = sampler.measured(frontier, {"g0001": 9.0, "g0000": 3.0, "g0002": 2.0, "g0003": 1.0})
    sampler = Sampler(table(4), Sampling(order="priority", strength=100), 0)  # one that remembers nothing
    rest, frontier = sampler.draw(persisted(frontier), 2)
    assert first + rest == whole_epoch(table(4))
    frontier = sampler.measured(frontier, {"g0001": 2.5})
    second, frontier = sampler.draw(frontier, 4)
    assert second == ["g0000", "g0001", "g0002", "g0003"]
    # What was not measured again keeps its value.
    frontier = sampler.measured(frontier, {"g0003": 5.0})
    assert sampler.draw(frontier, 4)[0] == ["g0003", "g0000", "g0001", "g0002"]


def test_a_group_not_measured_yet_counts_as_the_best():
    sampler = Sampler(table(4), Sampling(order="ess", strength=100), 0)
    _, frontier = sampler.draw(sampler.start(), 4)
    frontier = sampler.measured(frontier, {"g0000": 0.1, "g0001": 0.9, "g0002": float("nan")})
    third, _ = sampler.draw(frontier, 4)
    assert set(third[:3]) == {"g0001", "g0002", "g0003"}


def test_without_a_signal_the_order_is_uniform():
    flat = table(6)
    flat.reward_std[:] = 0
    uniform = whole_epoch(table(6))
    assert whole_epoch(flat, "variance") == whole_epoch(table(6), "ess") == uniform


def test_a_frontier_of_other_data_is_refused():
    sampler = Sampler(table(4), Sampling(), 0)
    _, frontier = sampler.draw(sampler.start(), 2)
    others = [
        Sampler(table(5), Sampling(), 0),
        Sampler(table(4, "h"), Sampling(), 0),
        Sampler(table(4), Sampling(), 1),
        Sampler(table(4), Sampling(order="recency"), 0),
        Sampler(table(4), Sampling(strength=2), 0),
    ]
    for other in others:
        for refused in (
            lambda o=other: o.draw(frontier, 1),
            lambda o=other: o.measured(frontier, {}),
            lambda o=other: o.consumed(frontier),
        ):
            with pytest.raises(Conflict, match="other groups, another seed or another sampling order"):
                refused()


def test_wrong_requests():
    with pytest.raises(ValueError, match="no groups"):
        Sampler(table(0), Sampling(), 0)
    sampler = Sampler(table(3), Sampling(order="ess"), 0)
    for name in ("a", "g0001x", "z"):
        with pytest.raises(KeyError, match=f"group {name} is not one"):
            sampler.measured(sampler.start(), {"g0001": 1.0, name: 1.0})


def test_the_mixer_is_splitmix64():
    """The first outputs of the public reference implementation for the seed 1234567."""
    steps = np.arange(1, 6, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert sampling._mix(np.uint64(1234567) + steps).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_the_clocks_are_uniform_and_independent_between_epochs_and_ids():
    hashes = np.array([sampling._hash64(f"g{i}") for i in range(100_000)], np.uint64)
    one, two = (
        sampling._uniform(sampling._mix(hashes ^ np.uint64(sampling._hash64(f"0/{epoch}"))))
        for epoch in (0, 1)
    )
    assert 0 < min(one.min(), two.min()) < max(one.max(), two.max()) < 1
    for pairs in ((one, two), (one[:-1], one[1:])):
        counts = np.histogram2d(*pairs, bins=16, range=[[0, 1], [0, 1]])[0]
        assert chisquare(counts.ravel()).pvalue > 1e-3
    extremes = np.array([0, 2**64 - 1], np.uint64)
    assert sampling._uniform(extremes).tolist() == [2.0**-53, 1 - 2.0**-53]


@given(
    st.builds(
        Frontier,
        source=st.text("0123456789abcdef", min_size=64, max_size=64),
        epoch=st.integers(0, 10**6),
        place=st.integers(0, 10**6),
        skipped=st.lists(st.integers(0, 10**6), max_size=8).map(tuple),
        known=st.binary(max_size=64),
        recent=st.binary(max_size=64),
    )
)
def test_a_frontier_survives_json(frontier):
    assert persisted(frontier) == frontier


def test_a_million_groups():
    size = 1_000_000
    rank = np.arange(size, dtype=np.int32)
    ids = np.array([f"{i:07d}" for i in range(size)])
    groups = GroupTable(
        ids, rank, rank.astype(np.int64), rank.astype(np.int64), rank / size, rank / size, rank, rank
    )
    started = time.process_time()
    sampler = Sampler(groups, Sampling(order="priority"), 0)
    used, frontier = sampler.draw(sampler.start(), size - 5)
    assert len(json.dumps(frontier.to_json())) < 300
    values = dict(zip(used, np.random.default_rng(0).exponential(size=size - 5).tolist(), strict=True))
    frontier = sampler.measured(frontier, values)
    crossing, frontier = sampler.draw(frontier, 512)
    assert sorted([*used, *crossing[:5]]) == ids.tolist()
    frontier = sampler.measured(frontier, values)
    text = json.dumps(frontier.to_json())
    assert len(text) < 4 / 3 * 4 * size + 1000  # two values of two bytes a group, in base64
    assert sampler.draw(Frontier.from_json(json.loads(text)), 3) == sampler.draw(frontier, 3)
    assert time.process_time() - started < 20
