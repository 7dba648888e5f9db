"""The flow `retrain`: one whole cycle, each stage a Prefect task with retries, a time limit and artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from flows import progress
from flows.artifacts import publish
from flows.context import Context
from flows.cycle import Cycle, run_stage
from flows.logs import report_to_prefect
from flows.registry import reconcile_registry
from flows.run import plan, run_stages
from flows.service import watch_canary
from tasks.core.errors import ForebayError, Unavailable

# A stage that hangs must not hold the workspace for ever; a day is beyond any honest training on one machine.
_TIMEOUT_SECONDS = {"train": 24 * 3600, "collect": 12 * 3600, "evaluate": 12 * 3600}
_OTHERWISE_SECONDS = 3600


def _transient(_task: Any, _run: TaskRun, state: State[Any]) -> bool:
    """Retry what may pass: a server that was down, a full disk. A refusal or bad input stays what it is."""
    return isinstance(state.result(raise_on_failure=False), Unavailable | ConnectionError)


def _stage(context: Context, cycle: Cycle, stage: str) -> dict[str, Any]:
    @task(
        name=stage,
        retries=2,
        retry_delay_seconds=[5, 30],
        retry_condition_fn=_transient,
        timeout_seconds=_TIMEOUT_SECONDS.get(stage, _OTHERWISE_SECONDS),
        cache_policy=NO_CACHE,  # stages are found again by content key: docs/decisions/0004
        persist_result=False,
    )
    def run(cycle_key: str) -> dict[str, Any]:
        outputs = run_stage(context, cycle, stage)
        publish(context, stage, outputs)
        return outputs

    return run(cycle.key)


def _canary(context: Context) -> None:
    """Look at the canary; what keeps it from judging is said, and keeps nobody from training."""
    try:
        found = watch_canary(context)
        says = f"{found['agent']}: {found['says']}" if found["running"] else ""
    except ForebayError as error:
        says = str(error)
    if says:
        progress.current().say(f"canary: {says}")


@flow(name="retrain", flow_run_name="retrain", validate_parameters=True, persist_result=False)
def retrain(
    workspace: str,
    collect: Literal["never", "missing", "always"] = "missing",
    dataset: str | None = None,
    overrides: list[str] | None = None,
    start: str | None = None,
) -> dict[str, Any]:
    """Post-train the champion on a dataset version, judge the candidate, and promote it if the gate passes.

    Args:
        workspace: folder of the workspace.
        collect: let the champion make new experience: never, if nothing is sealed yet, or always.
        dataset: Merkle root (or its start) or name/vN of a sealed dataset; the newest by default.
        overrides: settings as section.key=value.
        start: train from this agent instead of the champion, as a retrain plan after a revocation asks for.
    """
    context = Context.open(Path(workspace), overrides or ())
    with report_to_prefect(), context.exclusive("a cycle"):
        reconcile_registry(context)  # the canary may need the way back
        _canary(context)  # before the champion is pinned, which it may depose
        planned = plan(context, collect, dataset, start=start)
        if isinstance(planned, dict):
            progress.current().say(f"Nothing to do: {planned['reason']}")
            return planned
        return run_stages(context, planned, _stage)
