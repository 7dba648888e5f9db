from __future__ import annotations

import pytest
import torch

from models.advantages import group_mean, group_norm

REWARDS = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0], dtype=torch.float64)
ONE = torch.zeros(8, dtype=torch.int64)


def test_group_norm_divides_by_the_sample_deviation():
    found = group_norm(REWARDS, ONE).tolist()
    assert found == pytest.approx([1.620182 if r else -0.540061 for r in REWARDS.tolist()], abs=1e-6)


def test_group_mean():
    assert group_mean(REWARDS, ONE).tolist() == pytest.approx(
        [0.75 if r else -0.25 for r in REWARDS.tolist()]
    )


@pytest.mark.parametrize("advantage", [group_mean, group_norm])
def test_groups_do_not_mix_and_order_does_not_matter(advantage):
    groups = torch.tensor([7, 3] * 8)
    rewards = torch.stack([REWARDS, REWARDS * 5 + 2], dim=1).flatten()
    found = advantage(rewards, groups)
    torch.testing.assert_close(found[::2], advantage(REWARDS, ONE))
    torch.testing.assert_close(found[1::2], advantage(REWARDS * 5 + 2, ONE))


@pytest.mark.parametrize("advantage", [group_mean, group_norm])
def test_equal_rewards_give_zero_and_a_single_answer_keeps_its_reward(advantage):
    found = advantage(torch.tensor([1.0, 1.0, 1.0, 0.5]), torch.tensor([0, 0, 0, 1]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 0.0, 0.5]))
