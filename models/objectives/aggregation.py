"""From token losses to one number, so that a batch cut into micro-batches has the gradient of the whole."""

from __future__ import annotations

from typing import Final, Literal, get_args

from torch import Tensor

from models.objectives.batch import Batch, Counts, Losses, lengths

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"]
AGGREGATIONS: Final[tuple[str, ...]] = get_args(Aggregation)


def aggregate(
    losses: Losses, batch: Batch, how: Aggregation, whole: Counts, *, constant: int = 1024
) -> Tensor:
    """Scalar loss of (a micro-batch of) a batch whose totals are `whole`; the parts of a batch add up to the
    whole.

    token-mean: sum of all token losses / tokens. seq-mean-token-mean: mean over sequences of the mean over
    tokens. seq-mean-token-sum: mean over sequences of the sum over tokens. constant: sum of all token losses /
    (sequences * constant), so that no answer's weight depends on a length (Dr.GRPO, arXiv 2503.20783; TRL's
    constant is the longest completion allowed).

    Raises:
        ValueError: there is no such aggregation.
    """
    if how == "token-mean":
        return losses.tokens.sum() / whole.tokens
    if how == "seq-mean-token-mean":
        return (losses.tokens / lengths(batch)[batch.sequence]).sum() / whole.sequences
    if how == "seq-mean-token-sum":
        return losses.tokens.sum() / whole.sequences
    if how == "constant":
        return losses.tokens.sum() / (whole.sequences * constant)
    raise ValueError(f"there is no aggregation {how}; choose from {', '.join(AGGREGATIONS)}")
