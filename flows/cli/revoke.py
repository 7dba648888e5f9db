"""Take data back: out of sampling, off the disk, out of the agents; and train an agent again to see that it is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.console import AUDIT, HERE, Json, Where, app, open_context, out, print_json, watch
from tasks.core.errors import UsageError


@app.command(rich_help_panel=AUDIT)
def revoke(
    what: Annotated[
        str | None,
        typer.Argument(
            help="episode:ID, group:ID, prompt:SHA256, source:NAME, licence:NAME, shard:PATH or dataset:main/v3."
        ),
    ] = None,
    reason: Annotated[str, typer.Option(help="Why; it is kept for good.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen; write nothing.")] = False,
    erase: Annotated[
        bool,
        typer.Option(
            "--erase", help="Delete the bytes too: workspace, cache, remote. This cannot be undone."
        ),
    ] = False,
    undo: Annotated[bool, typer.Option("--reinstate", help="Take the revocation back.")] = False,
    schedule: Annotated[
        bool, typer.Option("--schedule", help="Hand the retrain plan to the runner, if one is up.")
    ] = False,
    show: Annotated[bool, typer.Option("--list", help="What is revoked, who is flagged, the plan.")] = False,
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Take data out of all later training, with everything that learnt from it flagged, champions first.

    Examples: `forebay revoke episode:3f2a… --reason "asked to be forgotten" --dry-run` ·
    `forebay revoke source:forum --reason "licence withdrawn" --erase` · `forebay revoke --list`
    """
    from flows import revoke as office

    watch(as_json)
    context = open_context(workspace)
    if show or what is None:
        if what is not None or dry_run or erase or undo:
            raise UsageError("`forebay revoke --list` takes no other arguments but --schedule.")
        report = office.listing(context)
    elif undo:
        if dry_run or erase or schedule:
            raise UsageError("--reinstate goes with --reason alone.")
        report = office.reinstate(context, what, reason)
    else:
        report = office.revoke(context, what, reason, dry_run)
        report["dry_run"] = dry_run
        if erase and not dry_run:
            report["erased"] = office.erase(context, what, reason)
    if schedule and not dry_run:
        report["scheduled"] = office.schedule_plan(context, report["plan"])
    if as_json:
        print_json(report)
    else:
        for line in _lines(report):
            out.print(line, highlight=False, soft_wrap=True)


def _lines(report: dict[str, Any]) -> list[str]:
    """Say a report in lines for a person."""
    if "reinstated" in report:
        return [f"{report['reinstated']} may be learnt from again (ledger entry {report['entry']})."]
    lines = []
    if isinstance(report["revoked"], list):
        lines += [
            f"{e['what']}  {_count(e['episodes'], 'episode')}, {_count(e['groups'], 'group')}  {e['time'][:19]} by {e['by']}: {e['reason']}"
            + ("  (erased)" if e["erased"] else "")
            for e in report["revoked"]
        ] or ["Nothing is revoked."]
    else:
        verb = "would leave" if report["dry_run"] else "left" if report["new"] else "had left"
        lines.append(
            f"{report['revoked']}: {_count(report['episodes'], 'episode')}, with {_count(report['groups'], 'group')}, "
            f"{verb} all later sampling."
        )
        lines += [f"  {_count(file['rows'], 'row')} in {file['path']}" for file in report["files"]]
    if report["descendants"]:
        lines.append("Flagged:")
        for each in report["descendants"]:
            roles = f" ({', '.join(each['roles'])})" if each["roles"] else ""
            lines.append(f"  {each['ref']}{roles} {each['why']}")
    elif report["revoked"]:
        lines.append("No agent and no reward model learnt from it.")
    if report["plan"]:
        lines.append("To replace what is in service:")
    for step in report["plan"]:
        lines.append(
            f"  {step['agent']}: train from {step['start']} on {step['dataset']}, "
            f"{step['groups'] - step['left_out']} of {step['groups']} groups: {step['command']}"
        )
    erased = report.get("erased")
    if erased:
        lines.append(
            f"Erased on purpose: {_count(len(erased['files']), 'file')}, with cache and remote "
            f"{_count(erased['copies'], 'copy', 'copies')} (ledger entry {erased['entry']})."
        )
    return [*lines, *report.get("scheduled", ())]


def _count(number: int, thing: str, several: str = "") -> str:
    return f"{number:,} {thing if number == 1 else several or thing + 's'}"


@app.command(rich_help_panel=AUDIT)
def reproduce(
    ref: Annotated[str, typer.Argument(help="agent@champion, agent/12 or 12.")] = "agent@champion",
    into: Annotated[
        Path | None, typer.Option(help="Folder of the clean workspace; by default a temporary one.")
    ] = None,
    remote: Annotated[
        str | None, typer.Option(help="URL of the DVC remote, where it is not the recorded one.")
    ] = None,
    from_base: Annotated[
        bool,
        typer.Option(
            "--from-base", help="Train every ancestor again, from the base model on; trust no kept weights."
        ),
    ] = False,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Of metrics, relative; where bits cannot agree (GPU).")
    ] = 0.05,
    unsigned: Annotated[
        bool, typer.Option("--unsigned", help="Go by recipes too that no trusted key signed.")
    ] = False,
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Train an agent again from pinned data, code and settings in a clean workspace, and compare.

    Works in a workspace, and in a plain `git clone` of one with nothing but DVC's remote. Exit code 6 if it differs.

    Examples: `forebay reproduce agent/12` · `forebay reproduce agent@champion --from-base --into /tmp/again`
    """
    from flows.reproduce import reproduce as run

    watch(as_json)
    report = run(
        workspace,
        ref,
        into=into,
        remote=remote,
        from_base=from_base,
        tolerance=tolerance,
        unsigned=unsigned,
    )
    if as_json:
        print_json(report)
    else:
        for each in report["agents"]:
            out.print(f"{each['agent']}: {each['says']}", highlight=False, soft_wrap=True)
    if report["verdict"] == "different":
        raise typer.Exit(6)
