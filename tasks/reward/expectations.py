"""What the evaluation frame of a reward model must be like: one line a scored pair or answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.expectations.checkpoint import Checkpoint, expect, run_checkpoint

if TYPE_CHECKING:
    import pandas as pd

_MOST_NATS = 1e4  # a score beyond is a broken model, not a sure one


def _of(kind: str) -> dict[str, Any]:
    return {"row_condition": f"kind=='{kind}'", "condition_parser": "pandas"}


_SUITE = (
    expect("TableRowCountToBeBetween", min_value=1),
    expect("ColumnValuesToBeInSet", column="kind", value_set=["pair", "sample", "edit", "probe"]),
    expect("ColumnValuesToNotBeNull", column="prompt"),
    expect("ColumnValuesToNotBeNull", column="score"),
    expect("ColumnValuesToBeBetween", column="score", min_value=-_MOST_NATS, max_value=_MOST_NATS),
    expect("ColumnUniqueValueCountToBeBetween", column="score", min_value=2),
    expect("CompoundColumnsToBeUnique", column_list=["prompt", "name"], **_of("pair")),
    expect("ColumnValuesToMatchRegex", column="licence", regex=r"\S", **_of("pair")),
    expect("ColumnValuesToNotBeNull", column="licence", **_of("pair")),
    expect("ColumnValuesToNotBeNull", column="gold", **_of("sample")),
    expect("CompoundColumnsToBeUnique", column_list=["prompt", "name"], **_of("edit")),
    expect("CompoundColumnsToBeUnique", column_list=["prompt", "name"], **_of("probe")),
)


def check_frame(frame: pd.DataFrame, subject: str, folder: Path) -> Checkpoint:
    """Run the suite over a frame (`tasks.reward.validation.frame_of`) and leave its data docs under `folder`."""
    return run_checkpoint(frame, "reward-evaluation", _SUITE, subject, folder)
