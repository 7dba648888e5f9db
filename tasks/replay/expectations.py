"""What the episodes of a dataset must be like: one line an episode, checked by Great Expectations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tasks.expectations.checkpoint import Checkpoint, expect, run_checkpoint

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

_SCALARS = (
    "episode_id",
    "group_id",
    "sample_index",
    "env",
    "split",
    "reward",
    "finish_reason",
    "logprob_source",
)
_SUITE = (
    expect("TableRowCountToBeBetween", min_value=1),
    expect("ColumnValuesToBeUnique", column="episode_id"),
    expect("CompoundColumnsToBeUnique", column_list=["group_id", "sample_index"]),
    expect("ColumnValuesToNotBeNull", column="reward"),
    expect("ColumnValuesToBeInSet", column="split", value_set=["train"]),
    expect("ColumnValuesToBeInSet", column="finish_reason", value_set=["done", "length", "turns", "error"]),
    expect("ColumnValuesToBeInSet", column="logprob_source", value_set=["engine", "recomputed", "missing"]),
    expect("ColumnValuesToBeBetween", column="prompt_tokens", min_value=1),
    expect("ColumnValuesToBeBetween", column="response_tokens", min_value=1),
    expect("ColumnUniqueValueCountToBeBetween", column="group_id", min_value=1),
    expect("ColumnValuesToMatchRegex", column="licence", regex=r"\S"),
)


def check_episodes(table: pa.Table, subject: str, folder: Path) -> Checkpoint:
    """Run the suite over the episodes of `table` and leave its data docs under `folder`; see `run_checkpoint`."""
    return run_checkpoint(episode_frame(table), "replay-episodes", _SUITE, subject, folder)


def episode_frame(table: pa.Table) -> pd.DataFrame:
    """Return one line an episode: the scalar columns that people look at, and counts instead of tokens."""
    import pyarrow.compute as pc

    frame = table.select(_SCALARS).to_pandas()
    frame["prompt_tokens"] = pc.list_value_length(table["prompt_ids"]).to_numpy()
    frame["response_tokens"] = pc.list_value_length(table["response_ids"]).to_numpy()
    frame["behaviour"] = table["behaviour_version"].to_pandas()
    frame["licence"] = table["licence"].to_pandas()
    return frame
