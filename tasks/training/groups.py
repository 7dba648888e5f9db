"""What is known of every group of a dataset before its episodes are read: the input of admission and sampling."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True, slots=True)
class GroupTable:
    """One entry a group, in arrays of length G sorted by id.

    Raises:
        ValueError: the arrays differ in length, or the ids are not strictly ascending.
    """

    ids: np.ndarray  # str, unique, ascending
    episodes: np.ndarray  # int32
    tokens: np.ndarray  # int64, prompt and response over all episodes
    trained: np.ndarray  # int64, tokens that may be learnt from over all episodes
    reward_mean: np.ndarray  # float64
    reward_std: np.ndarray  # float64, population
    lag: np.ndarray  # int32, registry versions behind the newest behaviour of the dataset; 0 for foreign
    age: np.ndarray  # int32, rank by time, 0 = newest

    def __post_init__(self) -> None:
        columns = (getattr(self, field.name) for field in fields(self))
        if any(column.shape != self.ids.shape for column in columns):
            raise ValueError("the columns of a group table must have one entry a group")
        if not np.all(self.ids[:-1] < self.ids[1:]):
            raise ValueError("the ids of a group table must be unique and ascending")

    def __len__(self) -> int:
        return len(self.ids)

    def where(self, keep: np.ndarray) -> GroupTable:
        """The groups for which `keep` [G] is true."""
        return GroupTable(*(getattr(self, field.name)[keep] for field in fields(self)))
