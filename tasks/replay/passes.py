"""How the policy read an episode: as a whole, or each turn with its memory of the turns before it."""

from __future__ import annotations

from models.packing import Sample
from models.turn_samples import turn_samples
from tasks.core.errors import Refused
from tasks.replay.schema import BROKEN, MEMORY_TURNS, Episode, memory_of


def passes(episode: Episode) -> list[Sample]:
    """What is run through the model to score the episode's trained tokens, in their order.

    Raises:
        Refused: the episode does not tell what was read.
    """
    whole = Sample(episode.prompt_ids, episode.response_ids, episode.loss_mask, episode.temperature)
    memory = memory_of(episode.reward_components)
    if memory == BROKEN:
        raise Refused(
            f"Episode {episode.episode_id}: {MEMORY_TURNS} in reward_components is no number of turns, so what its policy had "
            "read cannot be told."
        )
    return turn_samples(whole, episode.turn_ids, memory) if memory else [whole]
