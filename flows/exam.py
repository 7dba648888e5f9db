"""The flow `exam`: an agent attempts held-out tasks of several environments, each in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows import progress
from flows.context import Context
from flows.examination import Terms, exams
from flows.logs import report_to_prefect
from flows.parallel import gathered, isolated, require_all


@task(name="attempt", task_run_name="attempt {name}", cache_policy=NO_CACHE, persist_result=False)
def attempt(name: str, exam: Mapping[str, Any]) -> dict[str, Any]:
    """Sit one exam; see `isolated` for failures."""
    from tasks.evaluation.attempted import run_job

    return isolated(run_job, exam)


@flow(name="exam", flow_run_name="exam of {ref}", persist_result=False)
def exam(
    workspace: str, ref: str, terms: dict[str, Any], overrides: list[str] | None = None
) -> list[dict[str, Any]]:
    """Return the figures of every environment, in the order asked for.

    Raises:
        Refused: an environment could not be attempted.
    """
    context = Context.open(Path(workspace), overrides or ())
    asked = Terms(**{**terms, "envs": tuple(terms["envs"])})
    with report_to_prefect(), progress.current().bar("attempt") as report:
        jobs = {one["env"]: partial(attempt.submit, one["env"], one) for one in exams(context, ref, asked)}
        done = gathered(jobs, report, "environments", lambda one: str(one["env"]))
    require_all(done, "environments")
    return [done[env] for env in asked.envs]
