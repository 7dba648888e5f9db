"""Put agents in office and take them out; read and recompute the decisions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.console import (
    HERE,
    PROMOTE,
    Json,
    Where,
    app,
    decision_app,
    open_context,
    out,
    print_json,
)

Key = Annotated[
    str | None, typer.Option("--key", metavar="NAME", help="Which of your keys signs, if you have several.")
]


@app.command(rich_help_panel=PROMOTE)
def promote(
    version: Annotated[str, typer.Argument(help="Version that passed the gate, for example agent/3.")],
    reason: Annotated[str, typer.Option(help="Kept in the ledger.")] = "promoted on the command line",
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Make an agent the champion, if its decision says PASS against the champion of now."""
    from flows.champions import promote_agent

    result = promote_agent(open_context(workspace), version, reason)
    if as_json:
        print_json(result)
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

    result = rollback_champion(open_context(workspace), reason)
    if as_json:
        print_json(result)
    else:
        out.print(
            f"agent/{result['to']} is the champion again (was agent/{result['from']}).", highlight=False
        )


@app.command(rich_help_panel=PROMOTE)
def approve(
    version: Annotated[str, typer.Argument(help="Version whose newest decision is approved.")],
    reason: Annotated[str, typer.Option(help="Kept in the ledger.")] = "approved on the command line",
    key: Key = None,
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Let a passed decision act, where the policy asks for a person's approval; signed with your own key."""
    from flows.champions import approve_agent

    result = approve_agent(open_context(workspace), version, reason, key)
    if as_json:
        print_json(result)
    else:
        out.print(
            f"{result['approved']} is approved by {result['by']}; now `forebay promote {result['approved']}`."
        )


@app.command(rich_help_panel=PROMOTE)
def reject(
    version: Annotated[str, typer.Argument(help="Version whose newest decision is rejected.")],
    reason: Annotated[str, typer.Option(help="Why; kept in the ledger.")],
    key: Key = None,
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Never let a decision act, whatever its verdict; signed with your own key."""
    from flows.champions import reject_agent

    result = reject_agent(open_context(workspace), version, reason, key)
    if as_json:
        print_json(result)
    else:
        out.print(f"{result['rejected']} is rejected by {result['by']}; this decision cannot promote it.")


@app.command(rich_help_panel=PROMOTE)
def reconcile(workspace: Where = HERE, as_json: Json = False) -> None:
    """Finish what a crash left open and make MLflow's aliases say what the ledger says."""
    from flows.champions import reconcile_registry

    result = reconcile_registry(open_context(workspace))
    if as_json:
        print_json(result)
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
    sign: Annotated[
        bool, typer.Option("--sign", help="Sign a decision that was made before this workspace had keys.")
    ] = False,
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Verify a decision's signature and decide again from the stored evidence; it must give the same bytes."""
    from flows.judging import replay_decision

    result = replay_decision(open_context(workspace), version, sign)
    if as_json:
        print_json(result)
    else:
        signed = f"signed by {result['signed_by']}" if result["signed_by"] else "not signed"
        out.print(
            f"{result['decision'][:12]}: {result['verdict']} again, the same bytes; {signed}.",
            highlight=False,
        )


@decision_app.command("show")
def decision_show(
    version: Annotated[str, typer.Argument(help="Agent version; default: the newest decision.")] = "",
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Print a decision with its evidence: estimate, interval, n, minimum detectable effect, verdict."""
    from flows.judging import newest_decision
    from flows.show import decision_record, decision_view

    context = open_context(workspace)
    record = decision_record(context, **newest_decision(context, version).payload["record"])
    if as_json:
        print_json(record)
    else:
        out.print(decision_view(record))


@decision_app.command("page")
def decision_page(
    version: Annotated[str, typer.Argument(help="Agent version; default: the newest decision.")] = "",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write it there only, to send or to keep.")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Draw a decision's page (one HTML file) again from the stored evidence, every digest checked.

    It is drawn when the gate decides and attached to the agent's MLflow run; equal evidence gives the same bytes.
    For example `forebay decision page agent/3 --open`, or `forebay decision page --output review.html`.
    """
    from flows.judging import newest_decision
    from flows.pages import make_page

    context = open_context(workspace)
    made = make_page(context, newest_decision(context, version), output)
    if as_json:
        print_json(made)
    else:
        out.print(made["page"], highlight=False, soft_wrap=True)
        if made["mlflow"]:
            out.print(made["mlflow"], highlight=False, soft_wrap=True)
        if made["problem"]:
            out.print(f"Not attached in MLflow: {made['problem']}", highlight=False)
    if show:
        typer.launch(Path(made["page"]).as_uri())


@decision_app.command("list")
def decision_list(workspace: Where = HERE, as_json: Json = False) -> None:
    """List all decisions, oldest first."""
    from flows.show import decisions_table

    entries = [
        {"time": e.time, "agent": e.subject, **e.payload}
        for e in open_context(workspace).ledger.entries("decision.made")
    ]
    if as_json:
        print_json(entries)
    else:
        out.print(decisions_table(entries))
