"""What a user may name by import path."""

from __future__ import annotations

from models.objectives import Batch, Losses, requires


def plain(batch: Batch, *, slope: float = 1.0) -> Losses:
    return Losses(-slope * batch.advantages * batch.logprobs, batch.logprobs.new_ones(batch.sequences))


@requires("reference_logprobs", "entropies", correction="own", coupled=True)
def demanding(batch: Batch) -> Losses:
    return plain(batch)


def attributed(batch: Batch) -> Losses:
    return plain(batch)


attributed.needs = ("turn",)


def anything(batch: Batch, **options: float) -> Losses:
    return plain(batch, slope=options["gradient"])


NUMBER = 3
