"""The flow `rehearse`: try out the way back to the predecessor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows import service
from flows.context import Context
from flows.logs import report_to_prefect
from flows.registry import settle
from tasks.core.errors import Refused


@flow(name="rehearse", flow_run_name="rehearse", persist_result=False)
def rehearse(workspace: str) -> dict[str, Any]:
    """Verify, load and smoke-test the predecessor in a clean process; the run fails if it does not serve."""
    context = Context.open(Path(workspace))

    @task(name="rehearse", cache_policy=NO_CACHE, timeout_seconds=3600)
    def act() -> dict[str, Any]:
        return service.rehearse(context)

    with report_to_prefect():
        settle(context)
        found = act()
    if found["agent"] is not None and not found["ok"]:
        raise Refused(f"A rollback to {found['agent']} would not serve: {found['problem']}")
    return found
