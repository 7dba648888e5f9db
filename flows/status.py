"""Where the workspace stands: champion, candidate, data, schedules, runs, and what is stale."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from flows.context import Context
from flows.cycle import newest_root, sealed_payload
from flows.experience import waiting_groups
from flows.service import canary_status


def status(context: Context) -> dict[str, Any]:
    """Read the ledger, the open segments and the state of the servers; starts nothing, imports nothing heavy."""
    from flows.deployments import schedules
    from flows.servers import active_runs, state
    from tasks.promotion.promote import standing

    now = standing(context.ledger)
    root = newest_root(context)
    dataset = None if root is None else sealed_payload(context, root)
    ended = {e.subject for e in context.ledger.entries("cycle.finished")}
    running = [e for e in context.ledger.entries("cycle.started") if e.subject not in ended]
    last = context.ledger.last("cycle.finished")
    return {
        "workspace": str(context.workspace.root),
        "champion": _agent(context, now.champion),
        "candidate": _agent(context, now.candidate),
        "previous": _agent(context, now.previous),
        "budget": _budget(context, now.champion),
        "drift": _drift(context),
        "canary": canary_status(context),
        "rehearsal": _rehearsal(context, now.previous),
        "dataset": None if dataset is None else {k: dataset[k] for k in ("name", "version", "rows", "root")},
        "waiting_groups": waiting_groups(context),
        "last_cycle": None if last is None else {"time": last.time, **last.payload},
        "unfinished_cycle": running[-1].subject if running else None,
        "schedules": [{**s.model_dump(mode="json"), "when": s.when} for s in schedules(context.workspace)],
        "servers": state(context.workspace),
        "running": active_runs(context.workspace),
        "stale": _stale(context, last, dataset),
        "flags": _flags(context),
    }


def _agent(context: Context, version: int | None) -> dict[str, Any] | None:
    if version is None:
        return None
    entry = context.agent(str(version))
    decision = context.ledger.last("decision.made", entry.subject)
    return {
        "agent": entry.subject,
        "digest": entry.payload["digest"],
        "origin": entry.payload["origin"],
        "registered": entry.time,
        "decision": None if decision is None else decision.payload["verdict"],
    }


def _budget(context: Context, champion: int | None) -> dict[str, Any] | None:
    """Return what the gate has left: error against the champion, uses of the held-out tasks of the last decision."""
    from tasks.promotion.budget import spent

    made = [e for e in context.ledger.entries("decision.made") if e.subject.startswith("agent/")]
    if champion is None or not made:
        return None
    tasks = made[-1].payload.get("tasks", {})
    taken = spent(made, context.agent(str(champion)).payload["digest"], tasks)
    errors, uses = context.policy.errors, context.policy.evaluation_set.uses
    return {
        "decisions": taken.decisions,
        "error_left": round(max(0.0, errors.alpha - taken.error), 10),
        "error": errors.alpha,
        "uses_left": max(0, uses - taken.uses),
        "uses": uses,
    }


def _drift(context: Context) -> dict[str, Any] | None:
    """Return the last thing that somebody changed in MLflow by hand, as `forebay reconcile` found it."""
    last = context.ledger.last("registry.drift")
    if last is None:
        return None
    says = [item["says"] for item in last.payload["found"]]
    return {"time": last.time, "found": says, "policy": last.payload["policy"]}


def _rehearsal(context: Context, previous: int | None) -> dict[str, Any] | None:
    """Return the last rehearsal of a rollback to the present predecessor."""
    last = None if previous is None else context.ledger.last("rollback.rehearsed", f"agent/{previous}")
    return None if last is None else {"time": last.time, **last.payload}


def _stale(context: Context, last: Any, dataset: Any) -> list[str]:
    """Return sentences about what no longer rests on the present settings, policy, code or data."""
    found = []
    if context.ledger.last("promotion.intent") and _open_intent(context):
        found.append("a promotion is half done; run `forebay reconcile`")
    if waiting_groups(context):
        found.append(f"{waiting_groups(context)} groups wait to be sealed; run `forebay seal`")
    if dataset is not None and (last is None or last.payload.get("dataset") != dataset["root"]):
        found.append(f"{dataset['name']}/v{dataset['version']} was not trained on yet; run `forebay retrain`")
    elif last is not None:
        changed = [name for name, pin in context.pins.items() if last.payload["pins"].get(name) != pin]
        if changed:
            found.append(
                f"{' and '.join(changed)} changed since the last cycle; `forebay retrain` would run again"
            )
    return found


def _flags(context: Context) -> list[dict[str, Any]]:
    """Return who learnt from data that is revoked: champions first. Costs one look at the ledger where nothing is."""
    from tasks.lineage.revocation import revision

    if not revision(context.ledger):
        return []
    from tasks.lineage.flagged import open_flags

    return [flag.plain() for flag in open_flags(context.ledger, context.workspace)]


def _open_intent(context: Context) -> bool:
    from tasks.promotion.promote import standing

    return standing(context.ledger).intent is not None


def status_table(value: dict[str, Any]) -> RenderableType:
    """Draw the status."""
    from flows.servers import describe

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("workspace", value["workspace"])
    for role in ("champion", "candidate", "previous"):
        agent = value[role]
        line = Text("none", style="dim")
        if agent:
            line = Text(f"{agent['agent']}  {agent['digest'][:12]}  {agent['origin']}")
            if agent["decision"]:
                line.append(f"  gate: {agent['decision']}")
        table.add_row(role, line)
    budget = value["budget"]
    if budget:
        table.add_row(
            "gate",
            f"error {budget['error_left']:.4g} of {budget['error']:.4g} left against the champion, "
            f"{budget['uses_left']} of {budget['uses']} uses of the held-out tasks left",
        )
    canary = value["canary"]
    if canary:
        groups = f"{canary['groups'][0]} and {canary['groups'][1]} groups"
        table.add_row(
            "canary",
            f"{canary['agent']} against {canary['against']}: {canary['state']}; {groups}; {canary['says']}",
        )
    tried = value["rehearsal"]
    if tried:
        took = (
            f"{tried['agent']} loads in {tried['load_seconds']:.1f} s, answers in {tried['answer_seconds']:.2f} s, "
            f"serves after {tried['total_seconds']:.1f} s"
            if tried["ok"]
            else f"{tried['agent']} does NOT serve: {tried['problem']}"
        )
        lacks = f"; {tried['registry']}" if tried.get("registry") else ""
        table.add_row("rollback", f"rehearsed {tried['time'][:19]}: {took}{lacks}")
    drift = value["drift"]
    if drift:
        table.add_row("registry", f"{drift['time'][:19]}  {'; '.join(drift['found'])} ({drift['policy']})")
    data = value["dataset"]
    table.add_row(
        "dataset",
        f"{data['name']}/v{data['version']}  {data['rows']} episodes  {data['root'][:12]}"
        if data
        else "none",
    )
    table.add_row("open", f"{value['waiting_groups']} groups not sealed yet")
    last = value["last_cycle"]
    table.add_row(
        "last cycle", f"{last['time'][:19]}  {last['outcome']}: {last['reason']}" if last else "none"
    )
    if value["unfinished_cycle"]:
        table.add_row(
            "unfinished", f"cycle {value['unfinished_cycle'][:12]}; `forebay retrain` goes on with it"
        )
    for item in value["schedules"]:
        table.add_row("schedule", f"{item['name']}: {item['flow']} {item['when']}")
    table.add_row("servers", describe(value["servers"]))
    for run in value["running"]:
        table.add_row("running", f"{run['name']}: {run['state']}, started by {run['created_by']}")
    for flag in value["flags"]:
        roles = f" ({', '.join(flag['roles'])})" if flag["roles"] else ""
        table.add_row("flag", Text(f"{flag['ref']}{roles} {flag['why']}", style="red"))
    if value["flags"]:
        table.add_row("", "`forebay revoke --list` says what to train anew")
    for line in value["stale"] or ["nothing"]:
        table.add_row("stale", Text(line, style="yellow" if value["stale"] else "dim"))
    return table
