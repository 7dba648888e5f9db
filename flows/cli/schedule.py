"""Run a cycle now, on a clock or on events."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from flows import progress
from flows.cli.console import (
    HERE,
    SCHEDULE,
    Json,
    Set,
    Where,
    app,
    open_context,
    out,
    print_json,
    watch,
)


class CollectChoice(StrEnum):
    """When `retrain` lets the champion make new experience."""

    never = "never"
    missing = "missing"
    always = "always"


@app.command(rich_help_panel=SCHEDULE)
def retrain(
    collect: Annotated[
        CollectChoice, typer.Option(help="Make new experience: never, if nothing is sealed yet, or always.")
    ] = CollectChoice.missing,
    dataset: Annotated[
        str | None, typer.Option(help="Pin a dataset version: main/v3 or the start of its root.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="Train from this agent, not the champion: what a plan after `forebay revoke` says."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run again although nothing changed.")] = False,
    workspace: Where = HERE,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Run the whole cycle now: data, training, evaluation, decision, promotion.

    Examples: `forebay retrain` · `forebay retrain --collect always --set training.objective=grpo`
    """
    from flows.run import run_retrain
    from flows.show import cycle_report

    watch(as_json)
    context = open_context(workspace, overrides)
    result = run_retrain(context, collect.value, dataset, force, start)
    if as_json:
        print_json(result)
    else:
        out.print(cycle_report(context, result))


@app.command(rich_help_panel=SCHEDULE)
def schedule(
    flow: Annotated[str, typer.Argument(help="collect, retrain, audit, canary, reconcile or rehearse")],
    cron: Annotated[str | None, typer.Option(help='Five-field cron, for example "0 3 * * *".')] = None,
    interval: Annotated[str | None, typer.Option(help="A number and s, m, h or d, for example 6h.")] = None,
    on: Annotated[str | None, typer.Option(help="Event: dataset.sealed")] = None,
    timezone: Annotated[str, typer.Option(help="IANA name, for example Europe/Vienna.")] = "UTC",
    name: Annotated[str | None, typer.Option(help="Name of the schedule; the same name replaces it.")] = None,
    overrides: Set = None,
    workspace: Where = HERE,
) -> None:
    """Run a flow by the clock or upon an event, while `forebay up` is running.

    By the clock, `retrain` lets the champion make new experience first; upon an event it trains on what was sealed.

    Examples: `forebay schedule retrain --cron "0 3 * * *"` · `forebay schedule retrain --on dataset.sealed`
    """
    from flows.deployments import schedule as add

    timed = flow == "retrain" and on is None
    line = add(
        open_context(workspace).workspace,
        flow,
        cron=cron,
        interval=interval,
        on=on,
        timezone=timezone,
        parameters={"collect": "always"} if timed else None,
        overrides=overrides or [],
        name=name,
    )
    out.print(line, highlight=False)


@app.command(rich_help_panel=SCHEDULE)
def schedules(workspace: Where = HERE, as_json: Json = False) -> None:
    """List the schedules of this workspace."""
    from flows.deployments import schedules as read
    from flows.show import schedules_table

    found = [{**s.model_dump(mode="json"), "when": s.when} for s in read(open_context(workspace).workspace)]
    if as_json:
        print_json(found)
    else:
        out.print(schedules_table(found))


@app.command(rich_help_panel=SCHEDULE)
def unschedule(
    name: Annotated[str, typer.Argument(help="Name from `forebay schedules`.")], workspace: Where = HERE
) -> None:
    """Remove a schedule."""
    from flows.deployments import unschedule as remove

    out.print(remove(open_context(workspace).workspace, name), highlight=False)


@app.command(rich_help_panel=SCHEDULE)
def up(
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay, and stop everything on Ctrl-C.")
    ] = False,
    workspace: Where = HERE,
    overrides: Set = None,
) -> None:
    """Start the Prefect server, the MLflow server and the runner, on loopback."""
    from flows.servers import up as start

    watch(False)
    context = open_context(workspace, overrides)
    start(
        context.workspace,
        context.settings.servers,
        progress.current().say,
        mlflow_uri=context.settings.stores.mlflow,
        foreground=foreground,
    )


@app.command(rich_help_panel=SCHEDULE)
def down(workspace: Where = HERE) -> None:
    """Stop what `forebay up` started."""
    from flows.servers import down as stop

    stop(open_context(workspace).workspace, lambda text: out.print(text, highlight=False))
