"""Advantages: how much better an answer was than the other answers to the same prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

EPSILON = 1e-6


def group_mean(rewards: Tensor, groups: Tensor) -> Tensor:
    """Reward minus the mean reward of its group (a group of one is left as it is, its mean being no
    baseline).

    Args:
        rewards: [B].
        groups: [B] group index of each reward, any integers.

    Returns:
        [B], of the dtype of `rewards`.
    """
    mean, _, _ = _statistics(rewards, groups)
    return rewards - mean


def group_norm(rewards: Tensor, groups: Tensor) -> Tensor:
    """`group_mean` divided by the group's standard deviation (n - 1) plus 1e-6; a group of one divides by
    1."""
    mean, deviation, _ = _statistics(rewards, groups)
    return (rewards - mean) / (deviation + EPSILON)


def _statistics(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation and size of each reward's own group, [B] each."""
    _, index = torch.unique(groups, return_inverse=True)
    size = torch.bincount(index).to(rewards.dtype)

    def total(values: Tensor) -> Tensor:
        return torch.zeros_like(size).index_add_(0, index, values)

    alone = size == 1
    mean = torch.where(alone, torch.zeros_like(size), total(rewards) / size)
    squares = total((rewards - mean[index]).square())
    deviation = torch.where(alone, torch.ones_like(size), (squares / (size - 1).clamp(min=1)).sqrt())
    return mean[index], deviation[index], size[index]


ADVANTAGES: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "group_mean": group_mean,
    "group_norm": group_norm,
}
