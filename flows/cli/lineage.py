"""`forebay lineage`: questions about where things came from and what followed from them."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.console import HERE, Json, Where, lineage_app, open_context, out, print_json

if TYPE_CHECKING:
    from tasks.lineage.types import Lineage


class Form(StrEnum):
    """How a graph is shown."""

    tree = "tree"
    table = "table"
    picture = "picture"


Thing = Annotated[
    str,
    typer.Argument(
        help="agent@champion, agent/12, reward/2, dataset:main/v3, shard:PATH, run:DIGITS, source:NAME, licence:NAME, "
        "environment:NAME, or the first digits of a digest."
    ),
]
Row = Annotated[
    str,
    typer.Argument(
        help="As of `show`; or episode:ID, group:ID, prompt:TEXT (or its SHA-256): exact to the row, as source:NAME "
        "and licence:NAME are."
    ),
]
As = Annotated[Form, typer.Option("--as", help="A tree, a table, or a picture (SVG) written to --output.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Where the picture is written.", show_default=True)
]
PICTURE = Path("lineage.svg")


@lineage_app.command()
def show(
    ref: Thing = "agent@champion",
    form: As = Form.tree,
    output: Output = PICTURE,
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Everything that an agent or a dataset follows from, down to shards, base model, code, policy and lock file.

    Examples: `forebay lineage show agent@champion` · `forebay lineage show dataset:main/v3 --as table` ·
    `forebay lineage show agent/12 --as picture -o agent-12.svg`
    """
    from tasks.lineage.graph import lineage

    context = open_context(workspace)
    _print(lineage(context.ledger, context.workspace, ref), form, output, as_json, back=False)


@lineage_app.command()
def descendants(
    ref: Row,
    form: As = Form.table,
    output: Output = PICTURE,
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Everything that follows from a thing: agents, runs and datasets that it shaped, and what was decided about them.

    A run counts for an episode only if it learnt from that episode's group.

    Examples: `forebay lineage descendants shard:data/replay/main/shards/v00001-00000.parquet` ·
    `forebay lineage descendants episode:ID --as tree` · `forebay lineage descendants licence:CC-BY-NC-4.0`
    """
    from tasks.lineage.descent import descendants as walk

    context = open_context(workspace)
    _print(walk(context.ledger, context.workspace, ref), form, output, as_json, back=True)


@lineage_app.command()
def path(
    first: Thing,
    second: Thing,
    form: As = Form.tree,
    output: Output = PICTURE,
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """A shortest way from one thing to another that it follows from.

    Example: `forebay lineage path agent/12 shard:data/replay/main/shards/v00001-00000.parquet`
    """
    from tasks.lineage.questions import path as walk

    context = open_context(workspace)
    _print(walk(context.ledger, context.workspace, first, second), form, output, as_json, back=False)


@lineage_app.command()
def find(ref: Row, workspace: Where = HERE, as_json: Json = False) -> None:
    """Where an episode, prompt, shard, dataset, source or licence lies, and which agents it shaped.

    Examples: `forebay lineage find episode:ID` · `forebay lineage find "prompt:What is 2 + 2?"` ·
    `forebay lineage find source:gsm8k`
    """
    from tasks.lineage.questions import find as search
    from tasks.lineage.views import found_view

    context = open_context(workspace)
    found = search(context.ledger, context.workspace, ref)
    if as_json:
        print_json(asdict(found))
    else:
        out.print(found_view(found))


@lineage_app.command()
def diff(first: Thing, second: Thing, workspace: Where = HERE, as_json: Json = False) -> None:
    """What changed between two agents: data, code, settings, packages, base, reward model, scores.

    Example: `forebay lineage diff agent@previous agent@champion`
    """
    from tasks.lineage.questions import diff as compare
    from tasks.lineage.views import diff_view

    context = open_context(workspace)
    found = compare(context.ledger, context.workspace, first, second)
    if as_json:
        print_json(asdict(found))
    else:
        out.print(diff_view(found))


@lineage_app.command()
def at(
    date: Annotated[str, typer.Argument(help="A date (the end of that day, UTC), or a time in ISO 8601.")],
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """What was champion at a moment, and why.

    Examples: `forebay lineage at 2026-03-03` · `forebay lineage at 2026-03-03T14:00:00+01:00`
    """
    from tasks.lineage.questions import at as look
    from tasks.lineage.views import moment_view

    context = open_context(workspace)
    found = look(context.ledger, context.workspace, date)
    if as_json:
        print_json(asdict(found))
    else:
        out.print(moment_view(found))


def _print(found: Lineage, form: Form, output: Path, as_json: bool, back: bool) -> None:
    from tasks.lineage.picture import to_svg
    from tasks.lineage.render import to_json, to_table, to_tree

    if form is Form.picture:
        output.write_text(to_svg(found))
    if as_json:
        print_json(to_json(found))
    elif form is Form.picture:
        out.print(f"{len(found.nodes)} things drawn to {output}.", highlight=False)
    else:
        out.print(to_table(found) if form is Form.table else to_tree(found, back=back))
