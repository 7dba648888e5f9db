"""The flow `collect`: an agent makes experience, which is sealed as a new dataset version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.artifacts import publish
from flows.context import Context
from flows.experience import collect_into_segment, seal_dataset
from flows.logs import report_to_prefect
from flows.registry import settle


@flow(name="collect", flow_run_name="collect", persist_result=False)
def collect(workspace: str, version: str = "champion", overrides: list[str] | None = None) -> dict[str, Any]:
    """Roll out an agent and seal what it did. Sealing emits the event that can start `retrain`."""
    context = Context.open(Path(workspace), overrides or ())

    @task(name="collect", cache_policy=NO_CACHE, timeout_seconds=12 * 3600)
    def roll_out() -> dict[str, Any]:
        outputs = collect_into_segment(context, version)
        publish(context, "collect", outputs)
        return outputs

    @task(name="seal", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=[5, 30], timeout_seconds=3600)
    def seal() -> dict[str, Any]:
        outputs = seal_dataset(context)
        publish(context, "seal", outputs)
        return outputs

    with report_to_prefect():
        settle(context)
        roll_out()
        return seal()
