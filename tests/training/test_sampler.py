from __future__ import annotations

import pytest

from tasks.training.sampler import groups_of_step

GROUPS = [f"g{i}" for i in range(10)]


def test_an_epoch_visits_every_group_once_and_the_next_in_another_order():
    epochs = [[g for s in range(e * 5, e * 5 + 5) for g in groups_of_step(GROUPS, 0, s, 2)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(GROUPS)
    assert epochs[0] != epochs[1]


def test_depends_on_seed_and_step_only():
    assert groups_of_step(GROUPS, 0, 3, 4) == groups_of_step(GROUPS[::-1], 0, 3, 4)
    assert groups_of_step(GROUPS, 0, 3, 4) != groups_of_step(GROUPS, 1, 3, 4)
    assert groups_of_step(GROUPS, 0, 0, 3) == ["g3", "g4", "g1"]  # the same on every machine and version


def test_few_groups():
    assert sorted(groups_of_step(["a", "b"], 0, 5, 8)) == ["a", "b"]
    assert len(set(groups_of_step(GROUPS, 0, 7, 4))) == 4
    with pytest.raises(ValueError, match="no groups"):
        groups_of_step([], 0, 0, 8)
