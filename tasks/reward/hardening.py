"""Preferences that teach a reward model that copying is no answer.

A model that has only met right and wrong answers has no opinion on what answers nothing, and a linear head on states of
a language model may well like the prompt's own words best: they are fluent and full of right answers where worked
examples stand in it. The remedy is the usual one, to train on the fault (docs/reward-validation.md has what it changed).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from tasks.reward.source import Preference

_LEAST, _TAIL = 8, 60  # characters of a copy


def harden(preferences: Sequence[Preference], copies: int) -> list[Preference]:
    """Return `copies` preferences a group, of its first chosen answer over a part of the prompt.

    In turn the end of the prompt and a part from anywhere, about as long as an answer; by the group's name alone.
    """
    first = {p.group: p for p in reversed(preferences) if len(p.prompt) > _LEAST}
    found = []
    for p in first.values():
        for number in range(copies):
            draw = random.Random(f"{p.group}/{number}")
            if number % 2 == 0:
                copy = p.prompt[-draw.randint(_LEAST, _TAIL) :]
            else:
                length = max(_LEAST, len(p.chosen))
                start = draw.randrange(max(1, len(p.prompt) - length))
                copy = p.prompt[start : start + draw.randint(length, 2 * length)]
            if copy != p.chosen:
                found.append(replace(p, rejected=copy, rejected_id=""))
    return found
