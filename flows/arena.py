"""The flow `arena`: methods compared on environments, cell by cell, into a table, a page and MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import as_completed

from flows import progress
from flows.context import Context
from flows.leaderboard import Question, floors_of, keep_board, plans
from flows.logs import report_to_prefect
from tasks.core.errors import ForebayError, Refused


@task(name="cell", task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
def cell(name: str, job: Mapping[str, Any], root: str) -> dict[str, Any]:
    """Run one cell in this process; an expected failure comes back as {error: sentence}, for it must not end the others."""
    import torch

    from tasks.leaderboard.cell import from_job, run_cell

    torch.set_num_threads(
        1
    )  # as many cells side by side as there are processes, and the same bits however many
    try:
        return run_cell(from_job(job), Path(root))
    except ForebayError as error:
        return {"error": f"{name}: {error}"}


@flow(name="arena", flow_run_name="arena", persist_result=False)
def arena(
    workspace: str,
    methods: list[str],
    envs: list[str],
    seeds: int,
    overrides: list[str] | None = None,
) -> dict[str, Any]:
    """Run every cell that has no result yet, and record the whole comparison.

    Raises:
        Refused: some cells could not be run; the results of the others are kept.
    """
    from tasks.leaderboard.cell import as_job

    context = Context.open(Path(workspace), overrides or ())
    question = Question(tuple(envs), tuple(methods), seeds)
    wanted = plans(context, question)
    root = context.workspace.state / "arena"
    with report_to_prefect(), progress.current().bar("arena") as report:
        futures = [
            cell.submit(f"{plan.name} {plan.env} {plan.seed}", as_job(plan), str(root)) for plan in wanted
        ]
        done: list[dict[str, Any]] = []
        report(0, len(futures), "cells")
        for future in as_completed(futures):
            done.append(future.result())
            report(len(done), len(futures), _told(done[-1]))
        errors = [one["error"] for one in done if "error" in one]
        if errors:
            more = f" ({len(errors) - 1} more cells failed)" if len(errors) > 1 else ""
            raise Refused(f"{errors[0]}{more}")
        order = {plan.key(): place for place, plan in enumerate(wanted)}
        done.sort(key=lambda one: order[one["key"]])
        return keep_board(context, question, done, floors_of(context, question.envs))


def _told(result: Mapping[str, Any]) -> str:
    if "error" in result:
        return str(result["error"])
    success = result["after"]["figures"]["success"]["estimate"]
    return f"{result['method']} {result['env']} seed {result['seed']}: success {success:.2f}"
