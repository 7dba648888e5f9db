"""The Great Expectations adapter: a checkpoint over the episodes of a dataset, and its data docs as evidence.

The only module that knows Great Expectations. Its import takes seconds, so it happens inside the function.
"""

# mypy: disable-error-code="attr-defined"
# (great_expectations re-exports its expectations without saying so)
from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.digest import digest_files, digest_tree
from tasks.replay.validation import Check

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


@dataclass(frozen=True)
class Checkpoint:
    """The checks of the suite, and a record of the run: version, HTML page, digest of the data docs."""

    checks: list[Check]
    record: Mapping[str, Any]


def run_checkpoint(table: pa.Table, subject: str, folder: Path) -> Checkpoint:
    """Run the suite over the episodes of `table` and leave its data docs under `folder`.

    Args:
        subject: name of the dataset version, shown on the pages.
        folder: evidence folder of this validation; an earlier run's files in it are replaced.
    """
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _run(table, subject, folder)


def episode_frame(table: pa.Table) -> pd.DataFrame:
    """Return one line an episode: the scalar columns that people look at, and counts instead of tokens."""
    import pyarrow.compute as pc

    frame = table.select(_SCALARS).to_pandas()
    frame["prompt_tokens"] = pc.list_value_length(table["prompt_ids"]).to_numpy()
    frame["response_tokens"] = pc.list_value_length(table["response_ids"]).to_numpy()
    frame["behaviour"] = table["behaviour_version"].to_pandas()
    frame["licence"] = table["licence"].to_pandas()
    return frame


def _run(table: pa.Table, subject: str, folder: Path) -> Checkpoint:
    import great_expectations as gx
    from great_expectations import expectations as gxe
    from great_expectations.checkpoint.actions import UpdateDataDocsAction
    from great_expectations.data_context.types.base import ProgressBarsConfig

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    context = gx.get_context(mode="file", project_root_dir=folder)
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    frame = episode_frame(table)
    batch = (
        context.data_sources.add_pandas("replay")
        .add_dataframe_asset("episodes")
        .add_batch_definition_whole_dataframe("all")
    )
    expectations = [
        gxe.ExpectTableRowCountToBeBetween(min_value=1),
        gxe.ExpectColumnValuesToBeUnique(column="episode_id"),
        gxe.ExpectCompoundColumnsToBeUnique(column_list=["group_id", "sample_index"]),
        gxe.ExpectColumnValuesToNotBeNull(column="reward"),
        gxe.ExpectColumnValuesToBeInSet(column="split", value_set=["train"]),
        gxe.ExpectColumnValuesToBeInSet(
            column="finish_reason", value_set=["done", "length", "turns", "error"]
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="logprob_source", value_set=["engine", "recomputed", "missing"]
        ),
        gxe.ExpectColumnValuesToBeBetween(column="prompt_tokens", min_value=1),
        gxe.ExpectColumnValuesToBeBetween(column="response_tokens", min_value=1),
        gxe.ExpectColumnUniqueValueCountToBeBetween(column="group_id", min_value=1),
        gxe.ExpectColumnValuesToMatchRegex(column="licence", regex=r"\S"),
    ]
    suite = context.suites.add(gx.ExpectationSuite(name="replay-episodes", expectations=expectations))
    definition = context.validation_definitions.add(
        gx.ValidationDefinition(name=subject.replace("/", "-"), data=batch, suite=suite)
    )
    checkpoint = context.checkpoints.add(
        gx.Checkpoint(
            name="replay", validation_definitions=[definition], actions=[UpdateDataDocsAction(name="docs")]
        )
    )
    result = checkpoint.run(batch_parameters={"dataframe": frame})
    (outcome,) = result.run_results.values()
    site = folder / "gx" / "uncommitted" / "data_docs" / "local_site"
    shutil.rmtree(site / "static" / "images")  # 3 MB of pictures for a tutorial, the same in every validation
    return Checkpoint(
        checks=[_check(item, len(frame)) for item in outcome.results],
        record={
            "version": gx.__version__,
            "success": bool(result.success),
            "html": str(site.relative_to(folder) / "index.html"),
            "files": digest_files(digest_tree(site)),
            "results": [item.to_json_dict() for item in outcome.results],
        },
    )


def _check(item: Any, rows: int) -> Check:
    config, found = item.expectation_config, item.result
    columns = config.kwargs.get("column") or ", ".join(config.kwargs.get("column_list", ())) or "table"
    name = f"gx:{config.type.removeprefix('expect_')}:{columns}"
    failed = int(found.get("unexpected_count") or (0 if item.success else 1))
    raised = [info["exception_message"] for info in item.exception_info.values() if isinstance(info, dict)]
    detail = f"all {rows} rows"
    if not item.success:
        sample = found.get("partial_unexpected_list") or [found.get("observed_value")]
        detail = (
            f"{failed} of {rows} rows fail, among them {sample[:3]}" if not any(raised) else str(raised[0])
        )
    return Check(name, bool(item.success), failed, rows, detail)
