"""Where an agent came from, whether its bytes are intact, what was recorded."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli.console import (
    AUDIT,
    HERE,
    Json,
    Where,
    app,
    open_context,
    out,
    print_json,
    watch,
)


@app.command(rich_help_panel=AUDIT)
def lineage(
    ref: Annotated[
        str, typer.Argument(help="agent@champion, agent/12, dataset:main/v3, or the start of a digest.")
    ] = "agent@champion",
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Where an agent or a dataset came from, down to shards, base model, code, policy and lock file."""
    from tasks.lineage.graph import lineage as walk
    from tasks.lineage.render import to_json, to_tree

    context = open_context(workspace)
    node = walk(context.ledger, context.workspace, ref)
    if as_json:
        print_json(to_json(node))
    else:
        out.print(to_tree(node))


@app.command(rich_help_panel=AUDIT)
def verify(
    ref: Annotated[str, typer.Argument(help="What to verify, with all its ancestors.")] = "agent@champion",
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Hash every byte again and say what differs. Exit code 6 if anything does."""
    from flows.champions import verify_ref
    from flows.show import verify_view

    watch(as_json)
    report = verify_ref(open_context(workspace), ref)
    if as_json:
        print_json(report)
    else:
        out.print(verify_view(report))
    if not report["ok"]:
        raise typer.Exit(6)


@app.command(rich_help_panel=AUDIT)
def log(
    kind: Annotated[str | None, typer.Option(help="Only this kind, for example decision.made.")] = None,
    limit: Annotated[int, typer.Option("-n", help="How many of the newest entries.")] = 20,
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Print the ledger, newest last."""
    from flows.context import as_json as plain
    from flows.show import ledger_table

    entries = open_context(workspace).ledger.entries(kind)[-limit:]
    if as_json:
        print_json([plain(e) for e in entries])
    else:
        out.print(ledger_table(entries))
