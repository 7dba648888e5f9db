from __future__ import annotations

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.training.mixture import Mix, fresh_groups, measured, refused, start
from tasks.training.settings import Mixture


def schedule(settings: Mixture, steps: int, size: int) -> list[int]:
    mix, given_ = start(settings, size), []
    for step in range(steps):
        fresh, mix = fresh_groups(settings, mix, step, steps, size)
        given_.append(fresh)
    return given_


def test_replay_alone_is_the_default():
    assert schedule(Mixture(), 5, 8) == [0] * 5


def test_worked_schedules():
    assert schedule(Mixture(schedule="constant", fresh=0.25), 4, 8) == [2, 2, 2, 2]
    assert schedule(Mixture(schedule="constant", fresh=0.25), 8, 1) == [0, 1, 0, 0, 0, 1, 0, 0]
    assert schedule(Mixture(schedule="linear", fresh=1, fresh_end=0), 5, 4) == [4, 3, 2, 1, 0]
    assert schedule(Mixture(schedule="linear", fresh=0.5, fresh_end=1), 1, 4) == [2]


@given(
    st.sampled_from(["replay", "constant", "linear"]),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 60),
    st.integers(1, 50),
)
def test_rounding_is_exact_over_time(name, first, last, steps, size):
    settings = Mixture(schedule=name, fresh=first, fresh_end=last)
    begin, end = Fraction(first), Fraction(last)
    ideal, total = Fraction(0), 0
    for step, fresh in enumerate(schedule(settings, steps, size)):
        share = {
            "replay": Fraction(0),
            "constant": begin,
            "linear": begin + (end - begin) * Fraction(step, max(steps - 1, 1)),
        }[name]
        ideal, total = ideal + share * size, total + fresh
        assert 0 <= fresh <= size
        assert abs(total - ideal) < Fraction(1, 2) + Fraction(1, 10**9)


@given(
    st.lists(st.floats(0, 1), max_size=60),
    st.floats(0, 1),
    st.floats(0.01, 1),
    st.integers(1, 50),
)
def test_the_controller_is_bounded_and_leaves_replay_to_measure(measurements, first, target, size):
    settings = Mixture(schedule="ess", fresh=first, target_ess=target)
    mix, fresh, asked = start(settings, size), 0, 0.0
    for step, ess in enumerate(measurements):
        asked += mix.share * size
        more, mix = fresh_groups(settings, mix, step, len(measurements), size)
        fresh += more
        assert 0 <= more <= max(size - 1, 1)
        assert abs(fresh - asked) < 0.5 + 1e-9
        before = mix.share
        mix = measured(settings, mix, ess, size)
        assert (mix.share - before) * (target - ess) >= 0
    if size == 1 and measurements:
        assert fresh <= (len(measurements) + 1) // 2


@pytest.mark.parametrize("slope", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("size", [2, 8, 64])
def test_the_controller_settles_at_the_target(slope, size):
    """A plant in which replay that is `share` fresh has the effective sample size 0.3 + slope * share."""
    target = 0.3 + slope * 0.4 if slope < 1 else 0.6
    settings = Mixture(schedule="ess", fresh=0.0, target_ess=target)
    mix = start(settings, size)
    for _ in range(200):
        mix = measured(settings, mix, min(0.3 + slope * mix.share, 1.0), size)
    assert 0.3 + slope * mix.share == pytest.approx(target, abs=1e-3)


@pytest.mark.parametrize(("ess", "share"), [(0.0, 7 / 8), (1.0, 0.0)])
def test_the_controller_rests_at_a_bound_and_leaves_it_at_once(ess, share):
    settings = Mixture(schedule="ess", fresh=0.5, target_ess=0.5)
    mix = start(settings, 8)
    for _ in range(100):
        mix = measured(settings, mix, ess, 8)
    assert mix.share == pytest.approx(share)
    assert measured(settings, mix, 1 - ess, 8).share == pytest.approx(abs(share - 0.125))


def test_other_schedules_do_not_heed_the_effective_sample_size():
    for name in ("replay", "constant", "linear"):
        settings = Mixture(schedule=name)
        assert measured(settings, start(settings, 8), 0.0, 8) == start(settings, 8)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.data())
def test_a_resumed_schedule_goes_on_the_same(measurements, data):
    settings = Mixture(schedule="ess", fresh=0.37, target_ess=0.5)
    killed_at = data.draw(st.integers(0, len(measurements) - 1))
    mix = resumed = start(settings, 7)
    for step, ess in enumerate(measurements):
        if step == killed_at:
            resumed = Mix.from_json(json.loads(json.dumps(mix.to_json())))
        fresh, mix = fresh_groups(settings, mix, step, 30, 7)
        mix = measured(settings, mix, ess, 7)
        if step >= killed_at:
            again, resumed = fresh_groups(settings, resumed, step, 30, 7)
            resumed = measured(settings, resumed, ess, 7)
            assert (again, resumed) == (fresh, mix)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=80), st.floats(0, 1), st.integers(1, 20))
def test_what_was_refused_is_asked_for_again(admission, share, size):
    settings = Mixture(schedule="constant", fresh=share)
    mix = start(settings, size)
    for step, part in enumerate(admission):
        asked, mix = fresh_groups(settings, mix, step, len(admission), size)
        assert 0 <= asked <= size
        mix = refused(mix, asked - int(part * asked), size)
        assert -0.5 - 1e-9 <= mix.owed <= size


def test_the_share_that_is_learnt_from_is_the_one_asked_for():
    """Every second fresh group is dull: asking for a quarter takes half of the update."""
    settings, size = Mixture(schedule="constant", fresh=0.25), 8
    mix, learnt, asked = start(settings, size), 0, 0
    for step in range(200):
        count, mix = fresh_groups(settings, mix, step, 200, size)
        admitted = (asked + count) // 2 - asked // 2
        asked += count
        learnt += admitted
        mix = refused(mix, count - admitted, size)
    assert learnt / (200 * size) == pytest.approx(0.25, abs=0.01)
