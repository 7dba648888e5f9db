"""The flow `arena`: methods compared on environments, cell by cell, into a table, a page and MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows import progress
from flows.context import Context
from flows.leaderboard import Question, floors_of, keep_board, plans, require_same
from flows.logs import report_to_prefect
from flows.parallel import gathered, isolated


@task(name="cell", task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
def cell(name: str, job: Mapping[str, Any], root: str) -> dict[str, Any]:
    """Run one cell; see `isolated` for failures."""
    from tasks.leaderboard.cell import run_job

    return isolated(run_job, job, root)


@flow(name="arena", flow_run_name="arena", persist_result=False)
def arena(
    workspace: str,
    methods: list[str],
    envs: list[str],
    seeds: int,
    overrides: list[str] | None = None,
) -> dict[str, Any]:
    """Run every cell that has no result yet, and record the comparison; a cell that fails costs only itself.

    Raises:
        Conflict, Refused: what they learnt from was revoked meanwhile.
    """
    from tasks.leaderboard.cell import as_job
    from tasks.leaderboard.page import Failure

    context = Context.open(Path(workspace), overrides or ())
    question = Question(tuple(envs), tuple(methods), seeds)
    wanted = plans(context, question)
    root = context.workspace.state / "arena"
    with report_to_prefect(), progress.current().bar("arena") as report:
        jobs = {
            name: partial(cell.submit, name, as_job(plan), str(root))
            for name, plan in ((f"{plan.name} {plan.env} {plan.seed}", plan) for plan in wanted)
        }
        found = list(gathered(jobs, report, "cells", _told).values())
        done = [one for one in found if "error" not in one]
        failures = [
            Failure(plan.env, plan.name, plan.seed, plan.key(), one["error"])
            for plan, one in zip(wanted, found, strict=True)
            if "error" in one
        ]
        require_same(context, question, wanted)
        envs = list(dict.fromkeys(one["env"] for one in done))
        return keep_board(context, question, done, failures, floors_of(context, envs))


def _told(result: Mapping[str, Any]) -> str:
    success = result["after"]["figures"]["success"]["estimate"]
    return f"{result['method']} {result['env']} seed {result['seed']}: success {success:.2f}"
