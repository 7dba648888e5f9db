"""Pairs of a better and a worse answer to one prompt, from replay; no prompt is on both sides of a split."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from tasks.core.digest import sha256_bytes
from tasks.replay.schema import Episode

LEAST_GAP = 0.5  # of reward between the two answers: a clear case, not a shade
MOST_GROUPS = 512  # enough for an accuracy to about two points; features of more cost time and add little


@dataclass(frozen=True)
class Pair:
    """Two episodes of one group; `better` earned at least `LEAST_GAP` more from the verifier."""

    better: Episode
    worse: Episode

    @property
    def group_id(self) -> str:
        """The group both belong to."""
        return self.better.group_id

    @property
    def env(self) -> str:
        """The environment both belong to."""
        return self.better.env


@dataclass(frozen=True)
class Split:
    """Pairs to train on and pairs held out; the prompts are disjoint."""

    train: tuple[Pair, ...]
    heldout: tuple[Pair, ...]


def make_pairs(episodes: Iterable[Episode], *, per_group: int, seed: int) -> list[Pair]:
    """Return up to `per_group` pairs of each group, at most of `MOST_GROUPS` groups, by `seed` and ids alone.

    Pairs that read the same are taken once: a group often has the same answer several times.
    """
    groups: dict[str, list[Episode]] = defaultdict(list)
    for episode in episodes:
        groups[episode.group_id].append(episode)
    found = {group: _of_group(rows, per_group, seed) for group, rows in groups.items()}
    mixed = sorted((group for group, pairs in found.items() if pairs), key=lambda group: _rank(seed, group))
    return [pair for group in mixed[:MOST_GROUPS] for pair in found[group]]


def split_pairs(pairs: Sequence[Pair], *, holdout: float, seed: int) -> Split:
    """Hold out the share `holdout` of the prompts of each environment, by hash, with all their pairs."""
    prompts: dict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        prompts[pair.env].add(pair.better.prompt_sha256)
    away = {
        prompt
        for found in prompts.values()
        for prompt in sorted(found, key=lambda prompt: _rank(seed, prompt))[: round(holdout * len(found))]
    }
    train = tuple(pair for pair in pairs if pair.better.prompt_sha256 not in away)
    return Split(train, tuple(pair for pair in pairs if pair.better.prompt_sha256 in away))


def _of_group(rows: Sequence[Episode], per_group: int, seed: int) -> list[Pair]:
    rows = sorted(rows, key=lambda row: row.sample_index)
    clear = [(a, b) for a, b in product(rows, rows) if a.reward - b.reward >= LEAST_GAP]
    random.Random(f"{seed}/{rows[0].group_id}").shuffle(clear)
    distinct: dict[tuple[str, str], Pair] = {}
    for better, worse in clear:
        distinct.setdefault((better.response_text, worse.response_text), Pair(better, worse))
    return list(distinct.values())[:per_group]


def _rank(seed: int, name: str) -> str:
    return sha256_bytes(f"{seed}/{name}".encode())
