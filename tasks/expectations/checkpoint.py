"""The Great Expectations adapter: a suite over a frame, and its data docs as evidence.

The only module that knows Great Expectations. Its import takes seconds, so it happens inside the function.
"""

# mypy: disable-error-code="attr-defined"
# (great_expectations re-exports its expectations without saying so)
from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.digest import digest_files, digest_tree

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Expectation:
    """One expectation by its name in Great Expectations without `Expect`, and what it is called with."""

    kind: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """How many of how many rows broke an expectation."""

    name: str
    ok: bool
    failed: int
    of: int
    detail: str


@dataclass(frozen=True)
class Checkpoint:
    """The findings of a suite, and a record of the run: version, HTML page, digest of the data docs."""

    checks: list[Found]
    record: Mapping[str, Any]


def expect(kind: str, **arguments: Any) -> Expectation:
    """Declare an expectation: `expect("ColumnValuesToNotBeNull", column="reward")`."""
    return Expectation(kind, arguments)


def run_checkpoint(
    frame: pd.DataFrame, suite: str, expectations: Sequence[Expectation], subject: str, folder: Path
) -> Checkpoint:
    """Run a suite over the rows of `frame` and leave its data docs under `folder`.

    Args:
        suite: its name, shown on the pages.
        subject: name of what is judged, shown on the pages.
        folder: evidence folder of this validation; an earlier run's files in it are replaced.
    """
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _run(frame, suite, expectations, subject, folder)


def _run(
    frame: pd.DataFrame, suite: str, expectations: Sequence[Expectation], subject: str, folder: Path
) -> Checkpoint:
    import great_expectations as gx
    from great_expectations import expectations as gxe
    from great_expectations.checkpoint.actions import UpdateDataDocsAction
    from great_expectations.data_context.types.base import ProgressBarsConfig

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    context = gx.get_context(mode="file", project_root_dir=folder)
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    batch = (
        context.data_sources.add_pandas("frame")
        .add_dataframe_asset(suite)
        .add_batch_definition_whole_dataframe("all")
    )
    wanted = [getattr(gxe, f"Expect{one.kind}")(**one.arguments) for one in expectations]
    definition = context.validation_definitions.add(
        gx.ValidationDefinition(
            name=subject.replace("/", "-"),
            data=batch,
            suite=context.suites.add(gx.ExpectationSuite(name=suite, expectations=wanted)),
        )
    )
    checkpoint = context.checkpoints.add(
        gx.Checkpoint(
            name=suite, validation_definitions=[definition], actions=[UpdateDataDocsAction(name="docs")]
        )
    )
    result = checkpoint.run(batch_parameters={"dataframe": frame})
    (outcome,) = result.run_results.values()
    site = folder / "gx" / "uncommitted" / "data_docs" / "local_site"
    shutil.rmtree(site / "static" / "images")  # 3 MB of pictures for a tutorial, the same in every validation
    return Checkpoint(
        checks=[_found(item, len(frame)) for item in outcome.results],
        record={
            "version": gx.__version__,
            "success": bool(result.success),
            "html": str(site.relative_to(folder) / "index.html"),
            "files": digest_files(digest_tree(site)),
            "results": [item.to_json_dict() for item in outcome.results],
        },
    )


def _found(item: Any, rows: int) -> Found:
    config, found = item.expectation_config, item.result
    columns = config.kwargs.get("column") or ", ".join(config.kwargs.get("column_list", ())) or "table"
    where = config.kwargs.get("row_condition")
    name = f"gx:{config.type.removeprefix('expect_')}:{columns}" + (f" where {where}" if where else "")
    failed = int(found.get("unexpected_count") or (0 if item.success else 1))
    raised = [info["exception_message"] for info in item.exception_info.values() if isinstance(info, dict)]
    detail = f"all {rows} rows"
    if not item.success:
        sample = found.get("partial_unexpected_list") or [found.get("observed_value")]
        detail = (
            f"{failed} of {rows} rows fail, among them {sample[:3]}" if not any(raised) else str(raised[0])
        )
    return Found(name, bool(item.success), failed, rows, detail)
