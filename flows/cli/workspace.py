"""Lay a workspace, see how it stands, run the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import (
    HERE,
    Json,
    Set,
    Where,
    app,
    open_context,
    out,
    print_json,
    watch,
)


@app.command(rich_help_panel="Workspace")
def init(
    folder: Annotated[Path, typer.Argument(help="Folder of the workspace; made if missing.")] = HERE,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id, local folder, GGUF file, or pypi:<package>.")
    ] = None,
    overrides: Set = None,
) -> None:
    """Lay a workspace: settings, policy, git, DVC, stores, the ledger, and the base model as the first champion.

    Example: `forebay init my-agents --base-model ./llama-dir`
    """
    from flows.init import init_workspace

    watch(False)
    context = init_workspace(folder, base_model, overrides or ())
    agent = context.agent("champion").payload
    out.print(
        f"Workspace {context.workspace.root}: champion agent/{agent['version']}, {agent['digest'][:12]}.",
        highlight=False,
    )


@app.command(rich_help_panel="Workspace")
def status(workspace: Where = HERE, as_json: Json = False) -> None:
    """Champion, candidate, newest dataset, schedules, running flows, and what is stale."""
    from flows.status import status as read
    from flows.status import status_table

    value = read(open_context(workspace))
    if as_json:
        print_json(value)
    else:
        out.print(status_table(value))


@app.command(rich_help_panel="Workspace")
def demo(workspace: Where = HERE, overrides: Set = None) -> None:
    """One whole cycle on a real language model, from experience to decision and lineage."""
    from flows.demo import demo as run

    watch(False)
    run(workspace, overrides or (), out)
