"""Which groups a step trains on: a function of the seed and the step, so that a resumed run needs no sampler
state."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def groups_of_step(groups: Sequence[str], seed: int, step: int, per_step: int) -> list[str]:
    """The groups of update `step` (from 0), `per_step` of them or all there are if fewer.

    Every epoch visits the groups in a new order, that of the hashes of (seed, epoch, group), and leaves out
    what does not fill a step. The order of `groups` does not matter, and neither does any library's random
    generator.

    Raises:
        ValueError: `groups` is empty.
    """
    size = min(per_step, len(groups))
    if not size:
        raise ValueError("there are no groups to sample from")
    epoch, place = divmod(step, len(groups) // size)

    def key(group: str) -> bytes:
        return hashlib.sha256(f"{seed}/{epoch}/{group}".encode()).digest()

    return sorted(groups, key=key)[place * size : (place + 1) * size]
