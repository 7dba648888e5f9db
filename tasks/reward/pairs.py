"""Preferences from replay: a better and a worse answer to one prompt, by the reward that a verifier gave."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import product

from tasks.core.digest import sha256_bytes
from tasks.replay.schema import Episode
from tasks.reward.source import Preference

LEAST_GAP = 0.5  # of reward between the two answers: a clear case, not a shade
MOST_GROUPS = 512  # enough for an accuracy to about two points; features of more cost time and add little

Decode = Callable[[Sequence[int]], str]
"""Gives the text of token ids: the tokenizer's `decode`."""


def replay_preferences(
    episodes: Iterable[Episode], decode: Decode, *, per_group: int, seed: int
) -> list[Preference]:
    """Return up to `per_group` preferences of each group, at most of `MOST_GROUPS` groups, by `seed` and ids alone.

    The chosen answer earned at least `LEAST_GAP` more. Pairs that read the same are taken once: a group often has
    the same answer several times. Groups of one prompt (two nights of collecting) share their `group`.
    """
    groups: dict[str, list[Episode]] = defaultdict(list)
    for episode in episodes:
        groups[episode.group_id].append(episode)
    found = {group: _of_group(rows, per_group, seed) for group, rows in groups.items()}
    mixed = sorted((group for group, pairs in found.items() if pairs), key=lambda group: _rank(seed, group))
    return [
        _preference(better, worse, decode) for group in mixed[:MOST_GROUPS] for better, worse in found[group]
    ]


def _of_group(rows: Sequence[Episode], per_group: int, seed: int) -> list[tuple[Episode, Episode]]:
    rows = sorted(rows, key=lambda row: row.sample_index)
    clear = [(a, b) for a, b in product(rows, rows) if a.reward - b.reward >= LEAST_GAP]
    random.Random(f"{seed}/{rows[0].group_id}").shuffle(clear)
    distinct: dict[tuple[str, str], tuple[Episode, Episode]] = {}
    for better, worse in clear:
        distinct.setdefault((better.response_text, worse.response_text), (better, worse))
    return list(distinct.values())[:per_group]


def _preference(better: Episode, worse: Episode, decode: Decode) -> Preference:
    prompt = decode(better.prompt_ids)
    return Preference(
        prompt=prompt,
        chosen=better.response_text,
        rejected=worse.response_text,
        group=sha256_bytes(prompt.encode()),
        slice=better.env,
        source=better.source,
        licence=better.licence,
        chosen_id=better.episode_id,
        rejected_id=worse.episode_id,
    )


def _rank(seed: int, name: str) -> str:
    return sha256_bytes(f"{seed}/{name}".encode())
