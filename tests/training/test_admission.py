from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tasks.core.errors import Refused
from tasks.training.admission import Report, admit, admit_measured, held_out
from tasks.training.groups import GroupTable
from tasks.training.settings import Admission


def table(std: list[float], lag: list[int] | None = None, mean: float = 0.5) -> GroupTable:
    size = len(std)
    return GroupTable(
        np.array([f"g{i:03d}" for i in range(size)]),
        np.full(size, 4, np.int32),
        np.full(size, 100, np.int64),
        np.full(size, 50, np.int64),
        np.full(size, mean),
        np.array(std, np.float64),
        np.array(lag or [0] * size, np.int32),
        np.arange(size, dtype=np.int32),
    )


def test_a_group_is_refused_for_its_first_reason():
    groups, report = admit(
        table([0.0, 0.5, 0.1, 0.4, 0.0], [0, 3, 0, 2, 9]), Admission(min_reward_std=0.1, max_lag=2)
    )
    assert groups.ids.tolist() == ["g003"]
    assert groups.age.tolist() == [3]
    assert report == Report(1, {"no_tokens": 0, "reward_std": 3, "lag": 1})
    assert str(report) == "1 of 5 groups admitted; refused: 3 reward_std, 1 lag"
    assert report.metrics() == {
        "groups_admitted": 1.0,
        "groups_refused_no_tokens": 0.0,
        "groups_refused_reward_std": 3.0,
        "groups_refused_lag": 1.0,
    }


def test_the_defaults_drop_only_groups_without_a_signal():
    rewards = np.full(7, 0.1)
    assert rewards.std() > 0  # rounding, not a signal
    groups, report = admit(table([float(rewards.std()), 1e-6, 0.5], [0, 99, 99]), Admission())
    assert groups.ids.tolist() == ["g001", "g002"]
    assert report.refused == {"no_tokens": 0, "reward_std": 1, "lag": 0}


def test_measured_divergence_is_a_second_filter():
    first, before = admit(table([0.0, 0.5, 0.5, 0.5, 0.5]), Admission())
    settings = Admission(max_divergence=0.2)
    groups, after = admit_measured(first, settings, np.array([0.2, 0.21, np.nan, np.inf]))
    assert groups.ids.tolist() == ["g001"]
    assert before.then(after) == Report(1, {"no_tokens": 0, "reward_std": 1, "lag": 0, "divergence": 3})
    assert str(before.then(after)) == "1 of 5 groups admitted; refused: 1 reward_std, 3 divergence"
    assert admit_measured(first, Admission(), np.full(4, np.nan)) == (first, Report(4))


@pytest.mark.parametrize(
    ("rows", "settings", "sentence"),
    [
        (table([0.0, 0.0]), Admission(), r"0 of 2 groups admitted; refused: 2 reward_std.*harder or easier"),
        (table([0.1]), Admission(min_reward_std=0.3), r"lower training.admission.min_reward_std \(0.3\)\."),
        (
            table([0.0, 0.4], [0, 4]),
            Admission(max_lag=3),
            r"easier.*, or raise training.admission.max_lag \(3\)",
        ),
        (table([]), Admission(), r"0 of 0 groups admitted, so .* collect and seal"),
    ],
)
def test_nothing_left_is_refused_with_what_to_change(rows, settings, sentence):
    with pytest.raises(Refused, match=sentence):
        admit(rows, settings)


def test_nothing_near_is_refused_with_what_to_change():
    with pytest.raises(Refused, match=r"2 divergence, so .* raise training.admission.max_divergence \(0.1\)"):
        admit_measured(table([0.5, 0.5]), Admission(max_divergence=0.1), np.array([0.3, 0.2]))


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 5)), min_size=1),
    st.floats(0, 0.5),
    st.none() | st.integers(0, 5),
)
def test_admits_exactly_the_groups_within_the_bounds(rows, floor, newest):
    groups = table([std for std, _ in rows], [lag for _, lag in rows])
    assume(all(abs(std - floor) > 2e-9 for std, _ in rows))
    wanted = [i for i, (std, lag) in enumerate(rows) if std > floor and (newest is None or lag <= newest)]
    settings = Admission(min_reward_std=floor, max_lag=newest)
    if not wanted:
        with pytest.raises(Refused):
            admit(groups, settings)
        return
    admitted, report = admit(groups, settings)
    assert admitted.ids.tolist() == groups.ids[wanted].tolist()
    assert report.admitted + sum(report.refused.values()) == len(rows)


def test_a_table_is_whole_and_sorted():
    whole = table([0.5, 0.5])
    columns = [getattr(whole, name) for name in GroupTable.__slots__]
    with pytest.raises(ValueError, match="ascending"):
        GroupTable(columns[0][::-1], *columns[1:])
    with pytest.raises(ValueError, match="ascending"):
        GroupTable(np.array(["a", "a"]), *columns[1:])
    with pytest.raises(ValueError, match="one entry a group"):
        GroupTable(*columns[:-1], columns[-1][:1])


def test_groups_of_equal_rewards_are_admitted_on_request():
    equal = table([0.0, 0.5])
    assert len(admit(equal, Admission())[0]) == 1
    assert len(admit(equal, Admission(min_reward_std=None))[0]) == 2


def test_what_is_held_out_is_a_share_by_hash_that_never_comes_back():
    everything = table([0.5] * 1000)
    ids = everything.ids.tolist()
    groups, report = admit(everything, Admission(holdout=0.1))
    kept_back = set(ids) - set(groups.ids.tolist())
    assert report.refused["held_out"] == len(kept_back)
    assert 70 <= len(kept_back) <= 130  # 100 +- 3 standard deviations
    more, _ = admit(everything, Admission(holdout=0.2))
    assert kept_back.isdisjoint(more.ids.tolist())  # a larger share keeps what a smaller one kept
    later = held_out(ids[500:600], 0.1)
    assert {name for name, held in zip(ids[500:600], later, strict=True) if held} == kept_back & set(
        ids[500:600]
    )
    with pytest.raises(Refused, match=r"lower training\.admission\.holdout"):
        admit(table([0.5]), Admission(holdout=0.999))
