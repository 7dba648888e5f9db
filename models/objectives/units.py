"""What a sequence is: a whole trajectory, or one turn of it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from models.objectives.batch import Batch, lengths


def by_turn(batch: Batch) -> tuple[Batch, Tensor]:
    """The batch with (trajectory, turn) as its sequences, ARLArena's unit (arXiv 2602.21534, section 2).

    Ratios, lengths and sequence means then run over turns; groups go along, and DSDR's shares are split over a
    trajectory's turns by their tokens. As trajectories are never cut, micro-batches stay exact; count
    `turns` for the whole batch.

    Returns:
        (batch of U turns, owner [U]: the trajectory of each turn, ascending). A trajectory without trained
        tokens has none.

    Raises:
        ValueError: the batch has no turns.
    """
    if batch.turn is None:
        raise ValueError("turns as sequences need turn; the batch has none")
    owner, unit = _turns(batch.sequence, batch.turn)
    turned = replace(
        batch,
        sequence=unit,
        sequences=len(owner),
        group=None if batch.group is None else batch.group[owner],
    )
    if batch.diversity is not None:
        part = lengths(turned) / lengths(batch)[owner]
        turned = replace(turned, diversity=batch.diversity[owner] * part)
    return turned, owner


def turns(sequence: Tensor, turn: Tensor) -> int:
    """How many different (trajectory, turn) pairs the tokens [N] come from."""
    return len(_turns(sequence, turn)[0])


def _turns(sequence: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Trajectory of each turn [U], ordered by trajectory and turn, and turn of each token [N] in 0..U-1."""
    pairs, unit = torch.unique(torch.stack([sequence, turn]), dim=1, return_inverse=True)
    return pairs[0], unit
