"""The benchmark of faulty environments, small: every episode is accounted for, through the product's own loop."""

from __future__ import annotations

from benchmarks.episode_faults import RATES, play
from tasks.arena.guarded import Limits
from tests.arena.faulty import FAULTS


def test_exactly_the_injected_faults_cost_their_episodes() -> None:
    report = play(400, workers=2, limits=Limits(seconds=1.0, memory=256 << 20, observation=200), seed=1)
    assert report.wrong == []
    assert report.episodes == 400
    assert report.errors == sum(report.faults[fault] for fault in FAULTS)
    assert report.errors > 20
    assert report.restarts > 2
    assert sum(report.faults.values()) == 400
    assert len(report.faults) > 8
    assert max(report.rss) - report.rss[len(report.rss) // 2] < 20 << 20


def test_the_faults_are_those_of_the_environment() -> None:
    assert RATES.keys() - {"flood"} == FAULTS.keys()
