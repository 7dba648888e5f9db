"""The deep-thinking ratio of episodes (`models.deep_thinking`), measured by the policy that wrote them.

Of an episode of several turns only the tokens that the policy wrote count; it reads the observations between them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from models.deep_thinking import Lens, deep_thinking_ratio, deep_tokens
from models.packing import Sample
from tasks.core.digest import canonical_json
from tasks.core.settings import DeepThinking
from tasks.replay.passes import passes
from tasks.replay.schema import DEEP_THINKING, Episode

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def measured(
    model: PreTrainedModel, group: Sequence[Episode], settings: DeepThinking | None
) -> list[Episode]:
    """Return the episodes of a group, with their ratios in `reward_components`; as they are without settings.

    Raises:
        ModelError: the layers of the model cannot be read, or its logits are not numbers.
    """
    if settings is None:
        return list(group)
    lens = Lens(threshold=settings.threshold, rho=settings.rho)
    found = ratios(model, group, lens)
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
    by_prompt: dict[tuple[int, ...], list[tuple[int, Sample]]] = {}
    for number, episode in enumerate(episodes):
        for sample in passes(episode):
            by_prompt.setdefault(tuple(sample.prompt_ids), []).append((number, sample))
    for prompt, alike in by_prompt.items():
        found = deep_tokens(model, prompt, [sample.response_ids for _, sample in alike], lens)
        for (number, sample), deep in zip(alike, found, strict=True):
            written = torch.tensor([*map(bool, sample.trained)], device=model.device)
            flags.setdefault(number, []).append(deep[written])
    return [deep_thinking_ratio(torch.cat(flags[number])) for number in range(len(episodes))]
