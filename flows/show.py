"""What the command line draws: tables and panels from plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from flows.context import Context
from tasks.arena.floors import beside
from tasks.core.digest import sha256_file
from tasks.core.errors import Corrupt
from tasks.core.ledger import Entry

_COLOURS = {"PASS": "green", "FAIL": "red", "INCONCLUSIVE": "yellow"}


def verdict(word: str) -> Text:
    """Return the verdict in its colour."""
    return Text(word, style=f"bold {_COLOURS.get(word, 'default')}")


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        name, _, kind = column.partition(":")
        table.add_column(name, justify="right" if kind == "n" else "left", overflow="fold")
    return table


def checks_table(report: Mapping[str, Any]) -> RenderableType:
    """Draw the checks of a dataset."""
    table = _table(
        "check",
        "ok",
        "failed:n",
        "of:n",
        "detail",
        title=f"dataset {report['root'][:12]}: {report['verdict']}",
    )
    for check in report["checks"]:
        sign = Text("yes", style="green") if check["ok"] else Text("NO", style="bold red")
        table.add_row(check["name"], sign, str(check["failed"]), str(check["of"]), check["detail"])
    return table


def schedules_table(found: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Draw the schedules."""
    if not found:
        return Text('No schedules; add one with `forebay schedule retrain --cron "0 3 * * *"`.')
    table = _table("name", "flow", "when", "timezone", "overrides")
    for row in found:
        when = row["when"]
        table.add_row(
            row["name"], row["flow"], when, row.get("timezone") or "", " ".join(row.get("overrides") or ())
        )
    return table


def ledger_table(entries: Sequence[Entry]) -> RenderableType:
    """Draw ledger entries."""
    table = _table("seq:n", "time", "kind", "subject", "digest")
    for entry in entries:
        subject = entry.subject if len(entry.subject) < 40 else entry.subject[:12]
        table.add_row(str(entry.seq), entry.time[:19], entry.kind, subject, entry.digest[:12])
    return table


def decisions_table(entries: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Draw the list of decisions."""
    table = _table("time", "agent", "against", "verdict", "decision")
    for entry in entries:
        table.add_row(
            entry["time"][:19],
            entry["agent"],
            f"agent/{entry['champion']['version']}",
            verdict(entry["verdict"]),
            entry["decision"][:12],
        )
    return table


def rewards_table(found: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Draw the registered reward models."""
    if not found:
        return Text("No reward models; make one with `forebay reward train`.")
    table = _table("reward", "kind", "office", "validated", "licences", "digest")
    for row in found:
        said = verdict(row["verdict"]) if row["verdict"] else Text("never", style="dim")
        licences = ", ".join(row["licences"])
        table.add_row(row["reward"], row["kind"], " ".join(row["roles"]), said, licences, row["digest"][:12])
    return table


def reward_view(found: Mapping[str, Any]) -> RenderableType:
    """Draw one reward model: what it is, what it was made of, what is said of it."""
    table = _table("", "")
    for name, value in found.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items() if v is not None)
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        table.add_row(Text(name, style="dim"), "none" if value in (None, "") else str(value))
    return table


def reward_checks(report: Mapping[str, Any]) -> RenderableType:
    """Draw the validation of a reward model; what does not count is dim."""
    table = _table(
        "check",
        "verdict",
        "what was found",
        title=f"reward model {report['digest'][:12]}: {report['verdict']}",
    )
    for check in report["checks"]:
        word = verdict(check["verdict"]) if check["counts"] else Text(check["verdict"].lower(), style="dim")
        style = "" if check["counts"] else "dim"
        table.add_row(Text(check["name"], style=style), word, Text(check["says"], style=style))
    return table


def keys_table(found: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Draw the trusted keys."""
    table = _table("name", "role", "key", "", "private key")
    for key in found:
        removed = "" if key["removed"] is None else f"removed after entry {key['removed']}"
        table.add_row(key["name"], key["role"], key["id"][:12], removed, key["private"] or "not here")
    return table


def decision_record(context: Context, path: str, sha256: str) -> dict[str, Any]:
    """Return a stored decision record.

    Raises:
        Corrupt: the record's bytes differ from the digest in the ledger.
    """
    file = context.workspace.root / path
    if not file.exists() or sha256_file(file) != sha256:
        raise Corrupt(
            f"The decision record {path} is missing or changed; `forebay verify` says what else is."
        )
    return dict(json.loads(file.read_text()))


def decision_view(record: Mapping[str, Any]) -> RenderableType:
    """Draw a decision: evidence by evidence in the gate's order; it fits 100 columns."""
    table = _table("evidence", "verdict", "estimate:n", "interval", "margin:n", "n:n", "mde:n")
    for item in record["evidence"]:
        unit = item.get("unit", "mean reward")
        signed = unit == "mean reward"
        numbers = {name: _number(item.get(name), signed) for name in ("estimate", "low", "high", "margin")}
        bounds = (
            f"[{numbers['low'] or '-∞'}, {numbers['high'] or '∞'}]"
            if numbers["low"] or numbers["high"]
            else ""
        )
        named = "" if bounds or not numbers["estimate"] or unit == "mean reward" else unit
        table.add_row(
            Text(item["name"]) if item["counts"] else Text(f"{item['name']} (not required)", style="dim"),
            verdict(item["verdict"]),
            numbers["estimate"],
            f"{bounds} {named}".strip(),
            numbers["margin"],
            "" if item.get("n") is None else f"{item['n']:,}",
            _number(item.get("mde")),
        )
    agents = [f"agent/{record[side]['version']}" for side in ("candidate", "champion")]
    lines: list[RenderableType] = [table, *(Text(f"· {reason}") for reason in record["reasons"])]
    lines.append(Text(f"forebay decision page {agents[0]} --open   shows it with plots", style="dim"))
    title = f"{agents[0]} against {agents[1]}: {record['verdict']}"
    style = _COLOURS.get(record["verdict"], "default")
    return Panel(Group(*lines), title=title, border_style=style, title_align="left")


def _number(value: float | None, signed: bool = False) -> str:
    """Write a number in about six characters, whatever its unit."""
    if value is None:
        return ""
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 3
    value = round(value, digits) + 0.0  # no sign before a zero
    return f"{value:{'+' if signed and value else ''}.{digits}f}"


def verify_view(report: Mapping[str, Any]) -> RenderableType:
    """Draw the result of a verification: what differs, then what could not be looked at, then what is no fault."""
    parts: list[RenderableType] = []
    if report["problems"]:
        table = _table("problem", "what", "belongs to", "expected", "found", title="differences")
        for kind in report["by_problem"].values():
            for item in kind:
                table.add_row(
                    Text(item["problem"], style="bold red"),
                    item["path"],
                    item["owner"],
                    item["expected"][:12],
                    (item["found"] or "")[:12],
                )
        parts.append(table)
    if report["unreachable"]:
        table = _table("unreachable", "belongs to", "why", title="not verified")
        for item in report["unreachable"]:
            table.add_row(Text(item["path"], style="yellow"), item["owner"], item["reason"])
        parts.append(table)
    if report["erased"]:
        table = _table("erased on purpose", "belonged to", "digest", "why", "entry:n", title="no fault")
        for item in report["erased"]:
            table.add_row(
                item["path"], item["owner"], item["sha256"][:12], item["reason"], str(item["entry"])
            )
        parts.append(table)
    line = _verified(report)
    parts.append(Text(line, style="green") if report["ok"] else Text(line, style="dim"))
    if report["unsigned"]:
        n = len(report["unsigned"])
        since = (
            " before this workspace had keys" if report["signatures"] else "; `forebay keys init` makes keys"
        )
        parts.append(Text(f"unsigned: {n} {'entry' if n == 1 else 'entries'}{since}", style="dim"))
    parts += (Text(f"note: {note}", style="dim") for note in report["notes"])
    return Group(*parts)


def _verified(report: Mapping[str, Any]) -> str:
    """Say what was checked, and how much of it was read."""
    signed = f", {report['signatures']} signatures hold" if report["signatures"] else ""
    read = f"{report['bytes'] / 1e6:,.0f} MB read"
    if report["cached"]:
        read += (
            f" from {report['read']} files, {report['cached']} unchanged ones not read (--full reads them)"
        )
    if report["ok"]:
        return f"verified: {report['checked']} digests agree{signed}, {read}."
    counts = [f"{len(found)} {word}" for word, found in report["by_problem"].items() if found]
    counts += [f"{len(report['unreachable'])} unreachable"] if report["unreachable"] else []
    return f"not verified: {', '.join(counts)}, of {report['checked']} digests, {read}."


def audit_view(made: Mapping[str, Any]) -> RenderableType:
    """Say what an audit came to, and where its page is."""
    colours = {"VERIFIED": "green", "DIFFERS": "red"}
    flags = [Text(f"open: {flag}", style="yellow") for flag in made["open"]] or [
        Text("open flags: none", style="dim")
    ]
    where = [Text(made["page"])] + ([Text(made["mlflow"])] if made["mlflow"] else [])
    if made["problem"]:
        where.append(Text(f"Not attached in MLflow: {made['problem']}", style="yellow"))
    told = Text.assemble(
        (made["verdict"], f"bold {colours.get(made['verdict'], 'yellow')}"), f" {made['says']}"
    )
    return Group(Text(made["headline"], style="bold"), told, *flags, *where)


def export_view(report: Mapping[str, Any]) -> RenderableType:
    """Draw the result of the check of an export."""
    if report["ok"]:
        line = f"checked: {report['signatures']} signatures hold, {report['digests']} digests agree."
        gone = [f"\nerased on purpose: {item['subject']}" for item in report["erased"]]
        return Text(line + "".join(gone), style="green")
    table = _table("attestation", "what", "what is wrong", title="does not fit")
    for item in report["misfits"]:
        table.add_row(item["attestation"], item["subject"] or "", item["says"])
    return table


def baselines(row: Mapping[str, Any]) -> str:
    """Say what the tasks of `row` give without any skill, or why it is not known."""
    return beside(row["constant"], row.get("random"), row.get("baseline_error", ""))


def scores_table(evaluation: Mapping[str, Any]) -> RenderableType:
    """Draw candidate, champion and both baselines side by side, per environment; why one has none stands below."""
    table = _table(
        "held-out tasks", "n:n", "constant answer:n", "random:n", "champion:n", "candidate:n", "difference:n"
    )
    for name, row in evaluation["slices"].items():
        table.add_row(
            name,
            str(row["n"]),
            *("–" if value is None else f"{value:.3f}" for value in (row["constant"], row.get("random"))),
            f"{row['champion']:.3f}",
            f"{row['candidate']:.3f}",
            f"{row['candidate'] - row['champion']:+.3f}",
        )
    lacking = [
        Text(f"{name}: {baselines(row)}", style="dim")
        for name, row in evaluation["slices"].items()
        if row.get("baseline_error")
    ]
    return Group(table, *lacking) if lacking else table


def cycle_report(context: Context, result: Mapping[str, Any]) -> RenderableType:
    """Draw how a cycle ended."""
    parts: list[RenderableType] = []
    if result["found"]:
        parts.append(Text(f"Nothing to do: {result['reason']}", style="dim"))
    if result.get("evaluation"):
        parts += [Text(), scores_table(result["evaluation"]), Text()]
    if result.get("decision_record"):
        parts.append(decision_view(decision_record(context, **result["decision_record"])))
    if not result["found"]:
        parts.append(Text(result["reason"], style="bold"))
    return Group(*parts)
