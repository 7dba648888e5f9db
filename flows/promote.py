"""The flow `promote`: put an agent that passed the gate into production."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.artifacts import publish
from flows.champions import promote_agent, says_promoted
from flows.context import Context
from flows.logs import report_to_prefect
from flows.registry import reconcile_registry


@flow(name="promote", flow_run_name="promote-{version}", persist_result=False)
def promote(workspace: str, version: str, reason: str = "flow promote") -> dict[str, Any]:
    """Repair what a crash left open, then promote `version` by its newest decision."""
    context = Context.open(Path(workspace))

    @task(
        name="reconcile", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=[5, 30], timeout_seconds=600
    )
    def reconcile() -> dict[str, Any]:
        return reconcile_registry(context)

    @task(name="promote", cache_policy=NO_CACHE, timeout_seconds=600)
    def change() -> dict[str, Any]:
        outputs = promote_agent(context, version, reason)
        publish(context, "promote", {**outputs, "promoted": True, "reason": says_promoted(outputs)})
        return outputs

    with report_to_prefect():
        reconcile()
        return change()
