"""Lineage in the formats of others, and the check of what was exported."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import AUDIT, HERE, Json, Where, app, open_context, out, print_json


class Format(StrEnum):
    """What lineage can be exported as."""

    INTOTO = "intoto"
    OPENLINEAGE = "openlineage"
    CYCLONEDX = "cyclonedx"
    CARD = "card"
    PROV = "prov"
    ALL = "all"


@app.command(rich_help_panel=AUDIT)
def export(
    ref: Annotated[
        str, typer.Argument(help="agent@champion, agent/12, dataset:main/v3, or the start of a digest.")
    ] = "agent@champion",
    formats: Annotated[
        list[Format] | None,
        typer.Option(
            "--as",
            help="intoto: signed SLSA provenance; openlineage: events; cyclonedx: bill of materials; card: Hugging Face "
            "model card; prov: W3C PROV-JSON; all. Repeatable.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write to; default: export-REF here.")
    ] = None,
    openlineage_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Post the OpenLineage events to this collector, such as Marquez."),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Verify an export instead: its signatures, and the files they are about."
        ),
    ] = None,
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Write the lineage of an agent or a dataset in the formats of others, or check what was written.

    The same ledger gives the same bytes. Exit code 6 if a check finds something that does not fit.

    Examples: `forebay export agent@champion --as all -o export` · `forebay export agent/3 --as card --as cyclonedx` ·
    `forebay export agent/3 --openlineage-url http://localhost:5000` · `forebay export --check export`
    """
    from flows.export import check_export
    from flows.export import export as write
    from flows.show import export_view

    context = open_context(workspace)
    if check is not None:
        report = check_export(context, check)
        if as_json:
            print_json(report)
        else:
            out.print(export_view(report))
        raise typer.Exit(0 if report["ok"] else 6)
    wanted = [chosen.value for chosen in formats or ()]
    if not wanted and openlineage_url is None:
        wanted = [Format.ALL.value]
    default = Path("export-" + ref.replace("/", "-").replace(":", "-").replace("@", "-"))
    folder = (output or default) if wanted else None
    made = write(context, ref, wanted, folder, openlineage_url)
    if as_json:
        print_json({**made, "folder": None if folder is None else str(folder)})
        return
    if folder is not None:
        out.print(f"{made['ref']}: {len(made['files'])} files in {folder}.", highlight=False, soft_wrap=True)
    if made["unsigned"]:
        out.print(
            f"{len(made['unsigned'])} decisions are not signed and have no attestation.", highlight=False
        )
    if openlineage_url is not None:
        out.print(f"{made['ref']}: the collector took {made['sent']} events.", highlight=False)
