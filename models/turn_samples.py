"""Episodes whose policy does not read everything so far: each turn is a sample of its own, with a prompt rebuilt from the
newest turns.

With a memory of w turns the policy that writes turn k has read the prompt, and of the conversation what belongs to the
turns k - w, ..., k - 1: their actions and the observations that answer them (ARL-Arena, arXiv 2602.21534, sections 2 and
4: a memory of two turns). The first w + 1 turns are read as they would be without a limit.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from models.packing import Sample


def oldest_read(turns: Sequence[int], turn: int, memory: int) -> int:
    """Index of the first response token that turn `turn` is written from, with a memory of so many turns.

    Args:
        turns: [T] the turn of each response token so far, ascending; an observation has that of the action it answers.
    """
    return bisect_left(turns, turn - memory)


@dataclass(frozen=True, slots=True)
class Span:
    """A turn in a response: tokens `read`..`start` are what it was written from beside the prompt, `start`..`stop` are its own
    up to the last trained one."""

    read: int
    start: int
    stop: int


def spans(trained: Sequence[bool], turns: Sequence[int], memory: int) -> list[Span]:
    """The turns that have trained tokens, in their order; the arguments are those of `turn_samples`.

    Raises:
        ValueError: a memory below 1, or another number of turns than of response tokens.
    """
    if memory < 1:
        raise ValueError(f"a memory of {memory} turns has no place for the newest observation")
    if len(turns) != len(trained):
        raise ValueError(f"{len(turns)} turn numbers for {len(trained)} response tokens")
    numbers, places = np.asarray(turns, np.int64), np.flatnonzero(np.asarray(trained, dtype=bool))
    # The last trained token of each turn that has one.
    last = places[np.flatnonzero(np.diff(numbers[places], append=-1))]
    wrote = numbers[last]
    read, start = np.searchsorted(numbers, wrote - memory), np.searchsorted(numbers, wrote)
    return [Span(*bounds) for bounds in zip(read.tolist(), start.tolist(), (last + 1).tolist(), strict=True)]


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
    prompt, response = (np.asarray(ids, np.int64) for ids in (sample.prompt_ids, sample.response_ids))
    return [
        Sample(
            _ids(np.concatenate([prompt, response[one.read : one.start]])),
            _ids(response[one.start : one.stop]),
            sample.trained[one.start : one.stop],
            sample.temperature,
        )
        for one in spans(sample.trained, turns, memory)
    ]


def _ids(values: Any) -> Sequence[int]:
    """An array, which is a sequence of integers to all who read it."""
    return cast("Sequence[int]", values)
