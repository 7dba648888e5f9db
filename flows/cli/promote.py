"""Put agents in office and take them out; read and recompute the decisions."""

from __future__ import annotations

import sys
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

Answered = Annotated[
    str, typer.Argument(help="Version whose newest decision is meant, or the digest of a decision.")
]
Print = Annotated[
    bool,
    typer.Option("--print", help="Only print the signed statement, for `forebay answer` or the run's page."),
]


@app.command(rich_help_panel=PROMOTE)
def promote(
    version: Annotated[str, typer.Argument(help="Version that passed the gate, for example agent/3.")],
    reason: Annotated[str, typer.Option(help="Kept in the ledger.")] = "promoted on the command line",
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Make an agent the champion, if its decision says PASS against the champion of now."""
    from flows.champions import promote_agent, says_promoted

    result = promote_agent(open_context(workspace), version, reason)
    if as_json:
        print_json(result)
    else:
        out.print(says_promoted(result), highlight=False)


@app.command(rich_help_panel=PROMOTE)
def rollback(
    reason: Annotated[
        str, typer.Option(help="Why; kept in the ledger.", prompt=False)
    ] = "rolled back on the command line",
    flagged: Annotated[
        bool, typer.Option("--flagged", help="Also one that learnt from revoked data; the ledger keeps it.")
    ] = False,
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Put the previous champion back, with a record."""
    from flows.champions import rollback_champion

    result = rollback_champion(open_context(workspace), reason, flagged)
    if as_json:
        print_json(result)
    else:
        out.print(
            f"agent/{result['to']} is the champion again (was agent/{result['from']}), "
            f"after {result['seconds']:.1f} s."
            + (f" It is flagged: it {result['flag']}." if "flag" in result else ""),
            highlight=False,
        )


@app.command(rich_help_panel=PROMOTE)
def approve(
    version: Answered,
    reason: Annotated[str, typer.Option(help="Kept in the ledger.")] = "approved on the command line",
    key: Key = None,
    only_print: Print = False,
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Let a passed decision act, where the policy asks for a person's approval; signed with your own key.

    Examples: `forebay approve agent/3 --reason "read 40 answers"` · `forebay approve DIGEST --print --key kim`
    """
    from flows.champions import approve_agent, statement_of

    if only_print:
        sys.stdout.write(statement_of(workspace, "approval", version, reason, key) + "\n")
        return
    result = approve_agent(open_context(workspace), version, reason, key)
    if as_json:
        print_json(result)
    else:
        out.print(
            f"{result['approved']} is approved by {result['by']}; now `forebay promote {result['approved']}`."
        )


@app.command(rich_help_panel=PROMOTE)
def reject(
    version: Answered,
    reason: Annotated[str, typer.Option(help="Why; kept in the ledger.")],
    key: Key = None,
    only_print: Print = False,
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Never let a decision act, whatever its verdict; signed with your own key.

    Examples: `forebay reject agent/3 --reason "answers too long"` · `forebay reject DIGEST --reason "…" --print`
    """
    from flows.champions import reject_agent, statement_of

    if only_print:
        sys.stdout.write(statement_of(workspace, "rejection", version, reason, key) + "\n")
        return
    result = reject_agent(open_context(workspace), version, reason, key)
    if as_json:
        print_json(result)
    else:
        out.print(f"{result['rejected']} is rejected by {result['by']}; this decision cannot promote it.")


@app.command(rich_help_panel=PROMOTE)
def answer(
    statement: Annotated[
        str, typer.Argument(help="The line that `approve --print` or `reject --print` gave.")
    ],
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Record a signed answer that was made elsewhere; an approval of a passed decision promotes.

    Example: `forebay answer "$(forebay approve DIGEST --print --key kim)"`
    """
    from flows.champions import answer_decision, says_promoted

    result = answer_decision(open_context(workspace), statement)
    if as_json:
        print_json(result)
    elif result["promoted"]:
        out.print(
            f"{result['agent']} is approved by {result['by']}. {says_promoted(result['promoted'])}",
            highlight=False,
        )
    else:
        out.print(
            f"{result['agent']} is rejected by {result['by']}; this decision cannot promote it.",
            highlight=False,
        )


@app.command(rich_help_panel=PROMOTE)
def reconcile(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only look; nothing is written.")] = False,
    workspace: Where = HERE,
    as_json: Json = False,
) -> None:
    """Finish what a crash left open, and deal with what somebody changed in MLflow by hand, as the policy says.

    Examples: `forebay reconcile` · `forebay reconcile --dry-run` · `forebay schedule reconcile --interval 10m`
    """
    from flows.registry import reconcile_registry

    result = reconcile_registry(open_context(workspace), dry_run)
    if as_json:
        print_json(result)
        return
    for drift in result["drift"]:
        out.print(f"drift: {drift['says']}", highlight=False)
    for line in result["did"]:
        out.print(line, highlight=False)
    if result["drift"] and (dry_run or result["policy"] == "report"):
        out.print(f"Nothing was changed; the policy is registry.on_drift: {result['policy']}.")
    for change in result["finished"]:
        out.print(f"finished: {change['kind']} of {change['agent']}", highlight=False)
    for repair in result["repairs"]:
        out.print(f"alias {repair['alias']}: {repair['found']} → {repair['wrote']}", highlight=False)
    if not (result["drift"] or result["finished"] or result["repairs"]):
        out.print("The registry says what the ledger says.")


@app.command(rich_help_panel=PROMOTE)
def canary(workspace: Where = HERE, as_json: Json = False) -> None:
    """Compare the new champion with its predecessor on what both did in service; roll back if it is worse.

    The predecessor has to have traffic too: `forebay collect --version previous`, or imported with --written-by.

    Examples: `forebay canary` · `forebay schedule canary --on dataset.sealed`
    """
    from flows.registry import settle
    from flows.service import watch_canary

    context = open_context(workspace)
    settle(context)
    result = watch_canary(context)
    if as_json:
        print_json(result)
        return
    if not result["running"]:
        out.print(result["says"], highlight=False)
        return
    out.print(
        f"{result['verdict']}: {result['agent']} against {result['against']}, {result['new']} and {result['old']} "
        f"groups; {result['says']}.",
        highlight=False,
    )
    if result["rolled_back"]:
        out.print(f"agent/{result['rolled_back']['to']} is the champion again.", highlight=False)


@app.command(rich_help_panel=PROMOTE)
def rehearse(workspace: Where = HERE, as_json: Json = False) -> None:
    """Try out the way back: verify the predecessor's files, load it in a clean process, let it answer.

    Exit code 5 if it does not serve. Every cycle does this by itself, once a day at most.

    Examples: `forebay rehearse` · `forebay schedule rehearse --cron "0 6 * * *"`
    """
    from flows.registry import settle
    from flows.service import rehearse as act

    context = open_context(workspace)
    settle(context)
    result = act(context)
    if as_json:
        print_json(result)
    elif result["agent"] is None:
        out.print(result["says"])
    elif result["ok"]:
        out.print(
            f"{result['agent']} would serve after {result['total_seconds']:.1f} s: loaded in "
            f"{result['load_seconds']:.1f} s, answers in {result['answer_seconds']:.2f} s.",
            highlight=False,
        )
    else:
        out.print(f"{result['agent']} does not serve: {result['problem']}", highlight=False)
    if result.get("registry"):
        out.print(result["registry"], highlight=False)
    if result["agent"] is not None and not result["ok"]:
        raise typer.Exit(5)


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
