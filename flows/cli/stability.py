"""Whether a run was healthy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from flows.cli.console import AUDIT, HERE, Json, Where, app, open_context, out, print_json


@app.command(
    rich_help_panel=AUDIT,
    epilog="Examples: `forebay stability agent/3` · `forebay stability run:3f2a91 -o stability.html` · "
    "`forebay stability arena/grpo/textarena/Sokoban/0` · `forebay stability cell:3f2a91 --json`",
)
def stability(
    ref: Annotated[
        str | None,
        typer.Argument(
            help="An agent, or run:DIGITS of a run that may still go on; the newest run if not given. Of the arena: "
            "arena/METHOD/ENV/SEED of the newest comparison, or cell:DIGITS."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write a page with the run's curves.")
    ] = None,
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Say whether a run began to collapse, at which update, what drives it, and what to do about it."""
    from flows.stability import stability as judged

    found = judged(open_context(workspace), ref, output)
    if as_json:
        print_json(found)
        return
    what = found["what"] if found["what"] == "run" else f"{found['what']},"
    out.print(
        f"{what} {found['run'][:12]}: {found['steps']} updates, {found['stop_reason']}",
        highlight=False,
    )
    out.print(found["says"], style="bold red" if found["findings"] else "bold green", highlight=False)
    if found["findings"]:
        table = Table("driver", "metric", "began", "noticed", "before", "since", box=None, pad_edge=False)
        for each in found["findings"]:
            values = (f"{each[name]:.4g}" for name in ("before", "after"))
            table.add_row(each["driver"], each["metric"], str(each["onset"]), str(each["noticed"]), *values)
        out.print(table)
        for each in found["findings"]:
            out.print(f"{each['driver']}: {each['advice']}.", highlight=False)
    if found["page"]:
        out.print(found["page"], soft_wrap=True, highlight=False)
