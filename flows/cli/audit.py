"""Whether the bytes behind an agent are intact, and what was recorded."""

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
