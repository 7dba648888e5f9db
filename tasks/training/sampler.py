"""Which groups an update trains on: every admitted group exactly once an epoch, killed and resumed or not.

The order of an epoch is a weighted random permutation without replacement by exponential clocks: group g gets the
key E_g / w_g with E_g = -log u_g exponential, and the smallest key comes first (Efraimidis and Spirakis,
"Weighted random sampling with a reservoir", Information Processing Letters 97, 2006). So the first group is g
with probability w_g / sum(w), the second likewise among the rest, and so on.

u_g comes from no library's generator: it is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014) of the group's 64-bit hash XOR a 64-bit hash of seed and epoch. The
order is therefore a function of seed, epoch, group ids and weights, whatever the number of groups, workers or
restarts.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from tasks.core.errors import Conflict
from tasks.training.groups import GroupTable
from tasks.training.settings import Sampling

MEASURED_ORDERS = ("ess", "priority")
FLOOR = 1e-3  # smallest weight relative to the largest: a group worth nothing still has a place at random


@dataclass(frozen=True, slots=True)
class Frontier:
    """How far the groups are used: all that a killed run needs to go on with the same groups.

    `known` is what the weights of this epoch come from, `recent` what was measured since it began and will count
    in the next one. Both hold one float16 a group (NaN: not measured) and are empty if the order needs none, so a
    frontier takes at most 4 bytes a group and else the same few bytes for any number of groups.
    """

    source: str  # SHA-256 of the admitted ids, the seed and the order
    epoch: int = 0
    place: int = 0  # in the order of the epoch
    skipped: tuple[int, ...] = ()  # groups before `place` that are still to be used in this epoch
    known: bytes = b""
    recent: bytes = b""

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json`."""
        texts = {name: _to_text(getattr(self, name)) for name in ("known", "recent")}
        return asdict(self) | {"skipped": list(self.skipped)} | texts

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Frontier:
        """The frontier of which `values` are the `to_json`."""
        contents = {name: _from_text(values[name]) for name in ("known", "recent")}
        return cls(**{**values, **contents, "skipped": tuple(values["skipped"])})


class Sampler:
    """Draws the groups of one run: frontier in, groups and next frontier out. What it keeps is a memo alone.

    Args:
        table: the admitted groups.
        settings: `order` says what a group's weight w comes from, before it is raised to `strength`.

            uniform: 1. recency: 1 / (1 + age), newest first (rank-based priority of Schaul et al., arXiv
            1511.05952, eq. 1). staleness: 1 / (1 + lag). variance: the standard deviation of its rewards. ess: its
            last measured effective sample size, so that what is still on-policy comes first. priority: its last
            measured learning signal, such as the mean of |advantage * phi|.

            A group that was not measured yet counts as the best one that was (Schaul et al., algorithm 1).
        seed: of the order.

    Raises:
        ValueError: `table` is empty.
    """

    def __init__(self, table: GroupTable, settings: Sampling, seed: int) -> None:
        if not len(table):
            raise ValueError("there are no groups to sample from")
        self._table = table
        self._settings = settings
        self._seed = seed
        self._hashes = np.fromiter(map(_hash64, table.ids.tolist()), np.uint64, len(table))
        order = f"{seed}/{settings.order}/{settings.strength}".encode()
        self._source = hashlib.sha256(order + self._hashes.tobytes()).hexdigest()
        self._latest: tuple[int, bytes, np.ndarray] | None = None

    def start(self) -> Frontier:
        """The frontier before the first draw."""
        return Frontier(self._source)

    def draw(self, frontier: Frontier, count: int) -> tuple[list[str], Frontier]:
        """The next `count` groups, or all there are if fewer, no group twice.

        A draw that reaches the end of an epoch takes the rest from the next one. A group that it holds already is
        skipped there and comes first in the draw after; so every epoch has every group once and every draw is full.

        Raises:
            Conflict: the frontier belongs to other groups, another seed or another order.
        """
        self._check(frontier)
        size = min(count, len(self._table))
        taken, frontier = self._take(frontier, size, ())
        if len(taken) < size:
            known = _latest_of(frontier)
            rest, frontier = self._take(Frontier(self._source, frontier.epoch + 1, known=known), size, taken)
            taken += rest
        return self._table.ids[taken].tolist(), frontier

    def measured(self, frontier: Frontier, values: Mapping[str, float]) -> Frontier:
        """Take note of what was measured of groups, for the weights of the epochs to come; the order of the
        present epoch stays. Values are kept to three digits, from 0 to 65504. Orders that need no measurement
        ignore them.

        Raises:
            Conflict: as `draw`.
            KeyError: a group is not one of the table.
        """
        self._check(frontier)
        if self._settings.order not in MEASURED_ORDERS or not values:
            return frontier
        ids = np.asarray(list(values))
        places = np.searchsorted(self._table.ids, ids).clip(max=len(self._table) - 1)
        unknown = ids[self._table.ids[places] != ids]
        if len(unknown):
            raise KeyError(f"group {unknown[0]} is not one of those admitted")
        recent = self._measurements(frontier.recent).copy()
        recent[places] = np.clip(list(values.values()), 0, np.finfo(np.float16).max)
        return replace(frontier, recent=recent.tobytes())

    def consumed(self, frontier: Frontier) -> list[str]:
        """The groups used so far, each once, sorted."""
        self._check(frontier)
        order = self._order(frontier)
        used = order if frontier.epoch else order[: frontier.place]
        ids: list[str] = self._table.ids[np.sort(used)].tolist()
        return ids

    def _take(self, frontier: Frontier, size: int, taken: Sequence[int]) -> tuple[list[int], Frontier]:
        """What this epoch still has of the `size` groups of a draw that holds `taken` already."""
        order, place = self._order(frontier), frontier.place
        queue = [*frontier.skipped, *order[place : place + size].tolist()]
        held = set(taken)
        chosen = [group for group in queue if group not in held][: size - len(taken)]
        read = max(len(frontier.skipped), queue.index(chosen[-1]) + 1 if chosen else 0)
        used = set(chosen)
        skipped = tuple(group for group in queue[:read] if group not in used)
        return chosen, replace(frontier, place=place + read - len(frontier.skipped), skipped=skipped)

    def _order(self, frontier: Frontier) -> np.ndarray:
        """The permutation [G] of the frontier's epoch; the latest one is kept, for it takes a second to make."""
        if self._latest is None or self._latest[:2] != (frontier.epoch, frontier.known):
            stream = np.uint64(_hash64(f"{self._seed}/{frontier.epoch}"))
            order = _permutation(_mix(self._hashes ^ stream), self._log_weights(frontier.known))
            self._latest = frontier.epoch, frontier.known, order
        return self._latest[2]

    def _log_weights(self, known: bytes) -> np.ndarray | None:
        """log w [G]; None if all are equal."""
        table, order, strength = self._table, self._settings.order, self._settings.strength
        if order == "uniform" or strength == 0:
            return None
        if order in ("recency", "staleness"):
            behind = table.age if order == "recency" else table.lag
            return -strength * np.log1p(behind.astype(np.float64))
        value = table.reward_std if order == "variance" else self._measurements(known).astype(np.float64)
        best = np.nanmax(value) if np.any(value > 0) else 0.0
        if not best:
            return None
        return strength * np.log(np.maximum(np.where(np.isnan(value), best, value), FLOOR * best))

    def _measurements(self, values: bytes) -> np.ndarray:
        size = len(self._table)
        return np.frombuffer(values, np.float16) if values else np.full(size, np.nan, np.float16)

    def _check(self, frontier: Frontier) -> None:
        if frontier.source != self._source:
            raise Conflict(
                "The frontier of this run belongs to other groups, another seed or another sampling order; "
                "give this run its own folder."
            )


def _latest_of(frontier: Frontier) -> bytes:
    """The newest measurement of every group."""
    if not (frontier.known and frontier.recent):
        return frontier.recent or frontier.known
    known, recent = (np.frombuffer(values, np.float16) for values in (frontier.known, frontier.recent))
    newest: bytes = np.where(np.isnan(recent), known, recent).tobytes()
    return newest


def _permutation(bits: np.ndarray, log_weights: np.ndarray | None) -> np.ndarray:
    """Exponential clocks from random bits [G]; equal weights are ordered by integers, exact on any machine."""
    if log_weights is None:
        return np.argsort(bits, kind="stable")
    return np.argsort(np.log(-np.log(_uniform(bits))) - log_weights, kind="stable")


def _uniform(bits: np.ndarray) -> np.ndarray:
    """The upper 52 of 64 bits as a number strictly between 0 and 1."""
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _mix(bits: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: a bijection of 64 bits in which every input bit moves half of the output."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = bits ^ (bits >> np.uint64(31))
    return mixed


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _to_text(values: bytes) -> str:
    return base64.b64encode(zlib.compress(values)).decode() if values else ""


def _from_text(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text)) if text else b""
