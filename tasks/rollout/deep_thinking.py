"""The deep-thinking ratio of episodes (`models.deep_thinking`) and its baseline, measured by the policy that wrote them.

Of an episode of several turns only the tokens that the policy wrote count; it reads the observations between them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from models.deep_thinking import Lens, deep_thinking_ratio, deep_tokens, log_probs, self_certainty
from models.packing import Sample
from tasks.core.digest import canonical_json
from tasks.core.settings import DeepThinking
from tasks.replay.passes import passes
from tasks.replay.schema import DEEP_THINKING, Episode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def lens_of(settings: DeepThinking) -> Lens:
    """How the settings read the layers."""
    return Lens(settings.unit, settings.norm, settings.threshold, settings.rho)


def measured(
    model: PreTrainedModel, group: Sequence[Episode], settings: DeepThinking | None
) -> list[Episode]:
    """Return the episodes of a group, with their ratios in `reward_components`; as they are without settings.

    Raises:
        ModelError: the layers of the model cannot be read, or its logits are not numbers.
    """
    if settings is None:
        return list(group)
    found = ratios(model, group, lens_of(settings))
    return [
        replace(
            one,
            reward_components=canonical_json(
                {**json.loads(one.reward_components), DEEP_THINKING: ratio}
            ).decode(),
        )
        for one, ratio in zip(group, found, strict=True)
    ]


def ratios(model: PreTrainedModel, episodes: Sequence[Episode], lens: Lens) -> list[float]:
    """Return the ratio of each episode, over the tokens that the policy wrote (one at least) from what it had read.

    Raises:
        ModelError: the layers of the model cannot be read, or its logits are not numbers.
    """
    flags: dict[int, list[torch.Tensor]] = {}  # by episode
    for prompt, alike in _by_prompt(episodes):
        found = deep_tokens(model, prompt, [sample.response_ids for _, sample in alike], lens)
        for (number, sample), deep in zip(alike, found, strict=True):
            flags.setdefault(number, []).append(deep[_written(model, sample)])
    return [deep_thinking_ratio(torch.cat(flags[number])) for number in range(len(episodes))]


def certainties(model: PreTrainedModel, episodes: Sequence[Episode]) -> list[float]:
    """Return the self-certainty of each episode in nats, over the tokens that `ratios` counts.

    Raises:
        ModelError: as `ratios`.
    """
    totals, tokens = [0.0] * len(episodes), [0] * len(episodes)
    for prompt, alike in _by_prompt(episodes):
        found = log_probs(model, prompt, [sample.response_ids for _, sample in alike])
        for (number, sample), logs in zip(alike, found, strict=True):
            mine = logs[_written(model, sample)]
            if len(mine):
                totals[number] += self_certainty(mine) * len(mine)
                tokens[number] += len(mine)
    return [total / count for total, count in zip(totals, tokens, strict=True)]


def _by_prompt(
    episodes: Sequence[Episode],
) -> Iterable[tuple[tuple[int, ...], list[tuple[int, Sample]]]]:
    """The passes of all episodes with their episodes' numbers, those that begin with the same prompt together."""
    found: dict[tuple[int, ...], list[tuple[int, Sample]]] = {}
    for number, episode in enumerate(episodes):
        for sample in passes(episode):
            found.setdefault(tuple(sample.prompt_ids), []).append((number, sample))
    return found.items()


def _written(model: PreTrainedModel, sample: Sample) -> torch.Tensor:
    return torch.tensor([*map(bool, sample.trained)], device=model.device)
