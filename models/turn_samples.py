"""Episodes whose policy does not read everything so far: each turn is a sample of its own, with a prompt rebuilt from the
newest turns.

With a memory of w turns the policy that writes turn k has read the prompt, and of the conversation what belongs to the
turns k - w, ..., k - 1: their actions and the observations that answer them (ARL-Arena, arXiv 2602.21534, sections 2 and
4: a memory of two turns). The first w + 1 turns are read as they would be without a limit.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np

from models.packing import Sample


def oldest_read(turns: Sequence[int], turn: int, memory: int) -> int:
    """Index of the first response token that turn `turn` is written from, with a memory of so many turns.

    Args:
        turns: [T] the turn of each response token so far, ascending; an observation has that of the action it answers.
    """
    return bisect_left(turns, turn - memory)


def turn_samples(sample: Sample, turns: Sequence[int], memory: int) -> list[Sample]:
    """One sample for each turn that has trained tokens, in their order, so that the trained tokens of all of them are those
    of `sample`, one after another.

    What a turn reads is the prompt of its sample. An observation after the last trained token of a turn is in the next
    sample's prompt only.

    Args:
        turns: [T] the turn of each response token, ascending; an observation has that of the action it answers.
        memory: turns that are read beside the prompt, at least 1.

    Raises:
        ValueError: a memory below 1, or another number of turns than of response tokens.
    """
    if memory < 1:
        raise ValueError(f"a memory of {memory} turns has no place for the newest observation")
    if len(turns) != len(sample.response_ids):
        raise ValueError(f"{len(turns)} turn numbers for {len(sample.response_ids)} response tokens")
    numbers = np.asarray(turns)
    trained: Any = np.asarray(sample.trained, dtype=bool)
    found = []
    for turn in np.unique(numbers[trained]):
        read = oldest_read(turns, turn, memory)
        start = int(np.searchsorted(numbers, turn))
        stop = 1 + int(np.flatnonzero(trained & (numbers == turn))[-1])
        prompt = [*sample.prompt_ids, *sample.response_ids[read:start]]
        found.append(Sample(prompt, sample.response_ids[start:stop], trained[start:stop], sample.temperature))
    return found
