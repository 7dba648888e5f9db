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
from tasks.core.digest import canonical_json
from tasks.core.settings import DeepThinking
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
    found = ratios(model, group[0].prompt_ids, [(one.response_ids, one.loss_mask) for one in group], lens)
    return [
        replace(
            one,
            reward_components=canonical_json(
                {**json.loads(one.reward_components), DEEP_THINKING: ratio}
            ).decode(),
        )
        for one, ratio in zip(group, found, strict=True)
    ]


def ratios(
    model: PreTrainedModel,
    prompt: Sequence[int],
    responses: Sequence[tuple[Sequence[int], Sequence[bool]]],
    lens: Lens,
) -> list[float]:
    """Return the ratio of each response, given as token ids and which of them the policy wrote (one at least).

    Raises:
        ModelError: the layers of the model cannot be read, or its logits are not numbers.
    """
    flags = deep_tokens(model, prompt, [ids for ids, _ in responses], lens)
    written = [torch.tensor(list(mask), device=model.device) for _, mask in responses]
    return [deep_thinking_ratio(one[mask]) for one, mask in zip(flags, written, strict=True)]
