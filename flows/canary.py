"""The flow `canary`: compare the new champion with its predecessor on what both did in service; roll back on harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows.context import Context
from flows.logs import report_to_prefect
from flows.registry import settle
from flows.service import watch_canary


@flow(name="canary", flow_run_name="canary", persist_result=False)
def canary(workspace: str) -> dict[str, Any]:
    """Look once; safe to run at any time and as often as you like."""
    context = Context.open(Path(workspace))

    @task(name="canary", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=[5, 30], timeout_seconds=3600)
    def look() -> dict[str, Any]:
        found = watch_canary(context)
        lines = [f"# Canary: {found.get('verdict', 'nothing to watch')}", "", found["says"]]
        if found.get("rolled_back"):
            lines += ["", f"agent/{found['rolled_back']['to']} is the champion again."]
        create_markdown_artifact(key="canary", markdown="\n".join(lines), description=found["says"])
        return found

    with report_to_prefect():
        settle(context)
        return look()
