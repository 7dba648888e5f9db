"""What the loss needs of episodes beside the policy's log-probabilities: advantages, diversity, turns, groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from models import advantages
from models.diversity import bonus, coupling, diversity, embedding_diversity, formula_diversity, formulas
from tasks.training.settings import TrainingSettings
from tasks.training.shards import Episodes


class TextEncoder(Protocol):
    """What is needed of `models.diversity.Encoder`."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """[len(texts), D], one vector a text."""


def answer_diversity(
    texts: Sequence[str], groups: Sequence[int], encoder: TextEncoder, ceiling: float
) -> Tensor:
    """DSDR's clipped diversity of each answer (`models.diversity.diversity`), [B] float64 in [0, ceiling].

    It depends on the texts of the answer's own group alone, so that it may be kept for later updates.
    """
    index = torch.tensor(groups)
    written = [formulas(text) for text in texts]
    meaning = embedding_diversity(encoder.encode(texts), index)
    return diversity(meaning, formula_diversity(written, index), ceiling)


def needs_entropies(settings: TrainingSettings) -> bool:
    """Whether `token_advantages` wants entropies, which cost a forward pass."""
    return "entropies" in advantages.get(settings.advantage).needs


def token_advantages(
    episodes: Episodes,
    settings: TrainingSettings,
    *,
    entropies: Tensor | None = None,
    diversity: Tensor | None = None,
) -> Tensor:
    """Advantage of every trained token, [N] float64.

    Args:
        entropies: [N] of the policy at the trained tokens, for estimators that need them.
        diversity: [B] from `answer_diversity`; with it, correct answers (reward 1) earn DSDR's bonus first.

    Raises:
        ValueError: no such estimator, or what it or a reward term needs is missing.
    """
    estimator = advantages.get(settings.advantage)
    rewards = torch.tensor(episodes.rewards, dtype=torch.float64)
    if settings.overlong.longest is not None:
        lengths = torch.tensor([len(sample.response_ids) for sample in episodes.samples])
        rewards = rewards + advantages.overlong_penalty(
            lengths, settings.overlong.longest, settings.overlong.buffer
        )
    if settings.deep_thinking.coefficient:
        if episodes.deep_thinking is None:
            raise ValueError("the deep-thinking ratio is paid for, and an episode has none")
        rewards = rewards + settings.deep_thinking.coefficient * episodes.deep_thinking
    if diversity is not None:
        rewards = rewards + bonus(diversity, correct(episodes), settings.diversity.reward)
    trajectory, turn, place = advantages.turn_table(sequence(episodes), episodes.turns)
    valid = None
    if episodes.valid is not None:
        valid = torch.ones(len(turn), dtype=torch.bool).index_put((place,), episodes.valid)
    outcomes = advantages.Outcomes(
        rewards=rewards,
        groups=torch.tensor(episodes.groups),
        trajectory=trajectory,
        turn=turn,
        anchors=advantages.turn_anchors(episodes.samples, episodes.turns)
        if "anchors" in estimator.needs
        else None,
        valid=valid,
        entropies=None
        if entropies is None
        else advantages.turn_means(entropies.double().cpu(), place, len(turn)),
    )
    return estimator.estimate(outcomes, **settings.advantage_options)[place]


def entropy_shares(episodes: Episodes, settings: TrainingSettings, diversity: Tensor) -> Tensor:
    """DSDR's w: each answer's share of its group's entropy term, [B] float64."""
    groups = torch.tensor(episodes.groups)
    return coupling(diversity, correct(episodes), groups, settings.diversity.temperature)


def valid_share(episodes: Episodes) -> float:
    """Share of the turns whose action had the right form and was possible (`Step.valid`); 1 where nobody judged it."""
    if episodes.valid is None:
        return 1.0
    _, _, place = advantages.turn_table(sequence(episodes), episodes.turns)
    turns = torch.unique(torch.stack([place, episodes.valid.long()]), dim=1)
    return float(turns[1].double().mean())


def correct(episodes: Episodes) -> Tensor:
    """[B] bool: the answer earned the full reward of 1, as DSDR's indicator has it."""
    return torch.tensor(episodes.rewards) >= 1


def sequence(episodes: Episodes) -> Tensor:
    """[N] int64, the episode of each trained token."""
    trained = torch.tensor([sum(sample.trained) for sample in episodes.samples])
    return torch.repeat_interleave(torch.arange(len(trained)), trained)
