"""The flow `validate_reward`: judge a registered reward model on the policy's newest answers, with its artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.artifacts import publish
from flows.context import Context
from flows.logs import report_to_prefect
from flows.validation import require_no_fail
from flows.validation import validate_reward as validate


@flow(name="validate_reward", flow_run_name="validate-{ref}", persist_result=False)
def validate_reward(
    workspace: str,
    ref: str = "reward@champion",
    dataset: str | None = None,
    overrides: list[str] | None = None,
) -> dict[str, Any]:
    """Validate a reward model; the run fails where the verdict is FAIL.

    Args:
        workspace: folder of the workspace.
        ref: reward/N or reward@champion.
        dataset: name, name/vN or the start of the root of a sealed dataset; the newest by default.
        overrides: settings as section.key=value.
    """
    context = Context.open(Path(workspace), overrides or ())

    @task(name="validate", cache_policy=NO_CACHE, timeout_seconds=6 * 3600)
    def run() -> dict[str, Any]:
        outputs = validate(context, ref, dataset)
        publish(context, "reward", outputs)
        return outputs

    with report_to_prefect():
        outputs = run()
    require_no_fail(outputs)
    return outputs
