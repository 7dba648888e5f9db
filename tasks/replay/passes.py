"""How the policy read an episode: as a whole, or each turn with its memory of the turns before it."""

from __future__ import annotations

import json

from models.packing import Sample
from models.turn_samples import turn_samples
from tasks.core.errors import Refused
from tasks.replay.schema import MEMORY_TURNS, Episode

BROKEN = -1  # a memory of no number of turns
_MOST = (1 << 15) - 1  # turns that a row can have


def memory_turns(components: str) -> int:
    """The turns that the policy read beside the prompt, by an episode's `reward_components`: 0 for all, BROKEN for what is no
    number of turns. Experience that others recorded may hold anything."""
    if f'"{MEMORY_TURNS}"' not in components:
        return 0
    try:
        found = json.loads(components)
    except ValueError:
        return BROKEN
    if not isinstance(found, dict) or MEMORY_TURNS not in found:
        return 0
    turns = found[MEMORY_TURNS]
    return turns if type(turns) is int and 0 < turns <= _MOST else BROKEN


def passes(episode: Episode) -> list[Sample]:
    """What is run through the model to score the episode's trained tokens, in their order.

    Raises:
        Refused: the episode does not tell what was read.
    """
    whole = Sample(episode.prompt_ids, episode.response_ids, episode.loss_mask, episode.temperature)
    memory = memory_turns(episode.reward_components)
    if memory == BROKEN:
        raise Refused(
            f"Episode {episode.episode_id}: {MEMORY_TURNS} in reward_components is no number of turns, so what its policy had "
            "read cannot be told."
        )
    return turn_samples(whole, episode.turn_ids, memory) if memory else [whole]
