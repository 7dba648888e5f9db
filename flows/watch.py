"""The flow `reconcile`: look for what somebody changed in MLflow without Forebay, and deal with it by the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from flows.context import Context
from flows.logs import report_to_prefect
from flows.registry import reconcile_registry


@flow(name="reconcile", flow_run_name="reconcile", persist_result=False)
def reconcile(workspace: str, dry_run: bool = False) -> dict[str, Any]:
    """Compare the registry with the ledger; restore, adopt or report what differs."""
    context = Context.open(Path(workspace))

    @task(
        name="reconcile", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=[5, 30], timeout_seconds=600
    )
    def look() -> dict[str, Any]:
        done = reconcile_registry(context, dry_run)
        rows = [{"found": drift["says"], "policy": done["policy"]} for drift in done["drift"]]
        if rows:
            create_table_artifact(key="registry-drift", table=rows, description="; ".join(done["did"]))
        return done

    with report_to_prefect():
        return look()
