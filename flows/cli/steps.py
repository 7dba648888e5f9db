"""The single steps of a cycle."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from flows.cli.console import (
    HERE,
    STEPS,
    Json,
    Set,
    Where,
    app,
    err,
    open_context,
    out,
    print_json,
    watch,
)
from tasks.core.errors import Refused


class ImportFormat(StrEnum):
    """Shapes of recorded experience."""

    chat = "chat"
    traces = "traces"


@app.command(rich_help_panel=STEPS)
def collect(
    version: Annotated[
        str, typer.Option(help="Agent that acts: champion, candidate, or a version number.")
    ] = "champion",
    workspace: Where = HERE,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Roll out an agent on environments with verifiable rewards, into an open segment.

    Example: `forebay collect --set collect.environments.calculator=16`
    """
    from flows.experience import collect_into_segment
    from flows.show import baselines

    watch(as_json)
    context = open_context(workspace, overrides)
    result = collect_into_segment(context, version)
    if as_json:
        print_json(result)
        return
    out.print(
        f"{result['episodes']} episodes in {result['groups']} groups by agent/{result['version']}:",
        highlight=False,
    )
    for env, row in result["environments"].items():
        out.print(
            f"  {env:<28} mean reward {row['reward']:.3f}   groups with signal {row['mixed']:.0%}   {baselines(row)}",
            highlight=False,
            markup=False,
        )


@app.command("import", rich_help_panel=STEPS)
def import_(
    what: Annotated[
        str, typer.Argument(help="Chat JSONL; with --format traces a JSON list, or an MLflow experiment.")
    ],
    kind: Annotated[
        ImportFormat, typer.Option("--format", help="What is recorded there.")
    ] = ImportFormat.chat,
    written_by: Annotated[
        str, typer.Option(help="Who wrote it: a registered agent, or any name.")
    ] = "unknown",
    recompute: Annotated[
        bool,
        typer.Option("--recompute", help="Let that agent compute the log-probabilities that are missing."),
    ] = False,
    source: Annotated[str, typer.Option(help="Where it is from, if the records do not say.")] = "import",
    licence: Annotated[
        str, typer.Option(help="Its licence (SPDX), if the records do not say.")
    ] = "NOASSERTION",
    feedback: Annotated[str, typer.Option(help="Feedback that is a trace's reward.")] = "reward",
    workspace: Where = HERE,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Bring in experience that others recorded. Corrupt records are named, good ones kept (then exit code 5).

    Examples: `forebay import chats.jsonl --source support-desk --licence CC-BY-4.0` ·
    `forebay import my-experiment --format traces --written-by agent/1 --recompute`
    """
    from flows.experience import import_experience

    watch(as_json)
    result = import_experience(
        open_context(workspace, overrides),
        what,
        kind.value,
        written_by=written_by,
        recompute=recompute,
        source=source,
        licence=licence,
        feedback=feedback,
    )
    if as_json:
        print_json(result)
    else:
        out.print(f"{result['episodes']} episodes imported in {result['groups']} groups.", highlight=False)
        for error in result["errors"]:
            err.print(f"left out {error}", highlight=False, markup=False)
    if result["errors"]:
        raise typer.Exit(Refused.exit_code)


@app.command(rich_help_panel=STEPS)
def seal(workspace: Where = HERE, overrides: Set = None, as_json: Json = False) -> None:
    """Make the open segments an immutable dataset version, tracked and pushed by DVC."""
    from flows.experience import seal_dataset

    watch(as_json)
    result = seal_dataset(open_context(workspace, overrides))
    if as_json:
        print_json(result)
    else:
        out.print(
            f"Sealed {result['name']}/v{result['version']}: {result['new_rows']} new of {result['rows']} episodes, root {result['root'][:12]}.",
            highlight=False,
        )


@app.command(rich_help_panel=STEPS)
def salvage(workspace: Where = HERE, overrides: Set = None) -> None:
    """Set the damaged groups of open segments aside, so that the others can be sealed."""
    from tasks.replay.segments import salvage as set_aside

    context = open_context(workspace, overrides)
    damaged = set_aside(context.workspace, context.settings.replay.dataset)
    for found in damaged:
        out.print(
            f"{found.path.name}: {len(found.bad)} damaged lines set aside, {len(found.groups)} groups kept",
            highlight=False,
        )
    if not damaged:
        out.print("No open segment is damaged.")


@app.command(rich_help_panel=STEPS)
def restore(
    dataset: Annotated[
        str | None, typer.Argument(help="main/v3 or the start of its root; default: the newest.")
    ] = None,
    workspace: Where = HERE,
) -> None:
    """Bring missing or damaged shards of a dataset version back from the DVC remote."""
    from tasks.replay.seal import find
    from tasks.replay.seal import restore as bring_back

    context = open_context(workspace)
    sealed = find(context.ledger, dataset or context.settings.replay.dataset)
    bring_back(context.workspace, sealed.manifest)
    out.print(
        f"{sealed.manifest.subject}: all {len(sealed.manifest.shards)} shards are as they were sealed.",
        highlight=False,
    )


@app.command(rich_help_panel=STEPS)
def validate(
    dataset: Annotated[
        str | None, typer.Argument(help="main/v3 or the start of its root; default: the newest.")
    ] = None,
    workspace: Where = HERE,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Check a dataset version row by row and with Great Expectations; a failing one is quarantined."""
    from flows.experience import validate_dataset
    from flows.show import checks_table

    watch(as_json)
    report = validate_dataset(open_context(workspace, overrides), dataset)
    if as_json:
        print_json(report)
    else:
        out.print(checks_table(report))
    if report["verdict"] != "PASS":
        raise Refused(f"Dataset {report['root'][:12]} is quarantined: {'; '.join(report['reasons'])}.")


@app.command(hidden=True)
def stage(
    name: Annotated[str, typer.Argument(help="Stage of the cycle.")],
    workspace: Where = HERE,
    overrides: Set = None,
) -> None:
    """Run one stage of the current cycle (this is what dvc.yaml calls)."""
    from flows.offline import run_one_stage

    watch(False)
    run_one_stage(open_context(workspace, overrides), name)
