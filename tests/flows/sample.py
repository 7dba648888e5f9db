"""Small flows with the signatures of the real ones, for the tests on real servers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Literal

from prefect import flow, task


@task
def note(workspace: str, name: str, value: object) -> None:
    """Leave a file behind, so that a test sees what ran."""
    (Path(workspace) / f"{name}.json").write_text(json.dumps(value))


@flow(name="retrain", persist_result=False)
def retrain(
    workspace: str,
    collect: Literal["never", "missing", "always"] = "missing",
    dataset: str | None = None,
    overrides: list[str] | None = None,
    start: str | None = None,
) -> None:
    """Note what it was called with."""
    note(workspace, "retrain", {"collect": collect, "dataset": dataset, "overrides": overrides})


@flow(name="collect", persist_result=False)
def collect(workspace: str, version: str = "champion", overrides: list[str] | None = None) -> None:
    """Say that it runs, then hang: a run that somebody stops."""
    note(workspace, "collect", version)
    time.sleep(600)
