"""What is known of an agent, whether the bytes behind it are intact, and what was recorded."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
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


class _Source(Enum):
    remote = "remote"
    mlflow = "mlflow"


@app.command(
    rich_help_panel=AUDIT,
    epilog="Examples: `forebay verify` · `forebay verify agent/12 --full` · `forebay verify dataset:main --source remote` · "
    "`forebay verify agent@champion --source remote --source mlflow --json`",
)
def verify(
    ref: Annotated[str, typer.Argument(help="What to verify, with all its ancestors.")] = "agent@champion",
    full: Annotated[
        bool, typer.Option("--full", help="Read every byte again, also of files whose stat has not changed.")
    ] = False,
    source: Annotated[
        list[_Source] | None,
        typer.Option(
            help="Read shards straight from the DVC remote, or agents from MLflow's artifact store; repeatable. "
            "The rest is read in the workspace."
        ),
    ] = None,
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Check every digest and signature down to the roots and say what differs.

    A file is read unless its size, times and inode are those it was hashed with before; `--full` trusts none of that: it
    also finds a disk that returns other bytes than were written, and changes by somebody who may write to the raw disk or
    to the cache (.forebay/digests.db). The gate and promotions always read everything.

    Exit code 6 if anything differs, is missing or not validly signed; 7 if nothing does, but something cannot be reached.
    """
    from flows.champions import verify_ref
    from flows.show import verify_view

    watch(as_json)
    sources = [one.value for one in source or ()]
    report = verify_ref(open_context(workspace), ref, full=full, sources=sources)  # type: ignore[arg-type]
    if as_json:
        print_json(report)
    else:
        out.print(verify_view(report))
    if not report["ok"]:
        raise typer.Exit(6 if report["problems"] else 7)


@app.command(rich_help_panel=AUDIT)
def audit(
    ref: Annotated[
        str,
        typer.Argument(help="agent@champion, agent/12, reward/2, dataset:main/v3, or the start of a digest."),
    ] = "agent@champion",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the page there only, to send or to keep.")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    verified: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Check everything behind it first.")
    ] = True,
    full: Annotated[
        bool, typer.Option("--full", help="Read every byte again, also of files whose stat has not changed.")
    ] = False,
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Write one HTML page with everything that is known: where it came from (a graph to zoom and click), data and licences,
    training, evidence, approvals, verification, open flags.

    It needs no network and prints well. It lies in .forebay/audits and with the agent's MLflow run; a newer audit takes its
    place. Exit code 6 if verification finds a difference, 7 if something cannot be reached; the page is written all the same.

    Examples: `forebay audit --open` · `forebay audit agent/12 --output agent-12.html` · `forebay audit dataset:main --json`
    """
    from flows.champions import verify_ref
    from flows.pages import make_audit
    from flows.show import audit_view

    watch(as_json)
    context = open_context(workspace)
    report = verify_ref(context, ref, full=full) if verified else None
    made = make_audit(context, ref, report, output)
    if as_json:
        print_json({**made, "verification": report})
    else:
        out.print(audit_view(made), highlight=False, soft_wrap=True)
    if show:
        typer.launch(Path(made["page"]).as_uri())
    if report is not None and not report["ok"]:
        raise typer.Exit(6 if report["problems"] else 7)


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
