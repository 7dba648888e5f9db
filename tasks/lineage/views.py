"""Answers about history as a terminal shows them."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tasks.lineage.questions import Diff, Found, Moment, Term

_DIGITS = 12
_LISTED = 8  # versions, shards or runs that are named one by one


def moment_view(found: Moment) -> RenderableType:
    """Say who held each office at a moment, since when, by whom, and why."""
    note = (
        [
            Text(
                "Some entries before it say a later time: a clock ran backwards; the ledger's order counts.",
                style="yellow",
            )
        ]
        if found.backwards
        else []
    )
    return Group(
        Text(f"At {found.time}, after ledger entry {found.entry}:"),
        *note,
        *(_term(term) for term in found.terms),
    )


def _term(term: Term) -> RenderableType:
    if term.subject is None:
        return Text(
            f"{term.office}: nobody held this office"
            + (f" until {_minute(term.until)}" if term.until else "")
        )
    table = _fields()
    table.add_row("digest", term.digest or "")
    table.add_row("since", f"{_minute(term.since)} (ledger entry {term.seq}, {term.word} by {term.by})")
    table.add_row("until", _minute(term.until) if term.until else "now")
    table.add_row("why", term.reason or "")
    if term.decision:
        table.add_row("decision", f"{term.verdict} {term.decision[:_DIGITS]}")
        for reason in term.reasons:
            table.add_row("", reason)
    return Group(Text(f"{term.office}@champion was {term.subject}", style="bold cyan"), table)


def diff_view(found: Diff) -> RenderableType:
    """Draw what changed between two agents, what did not, and which data they share."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", found.first, found.second):
        table.add_column(name, overflow="fold")
    settings = [change for change in found.changes if change.what.startswith("settings.")]
    lone = all(c.first is None for c in settings) or all(c.second is None for c in settings)
    for change in found.changes:
        if not (lone and change in settings):
            table.add_row(change.what, _short(change.first), _short(change.second))
    if lone and settings:  # one of the two was not trained: there is nothing to compare
        sides = [
            f"{len(settings)} (--json)" if side else "none"
            for side in (settings[0].first is not None, settings[0].second is not None)
        ]
        table.add_row("settings", *sides)
    data = Table(box=None, pad_edge=False, header_style="bold")
    data.add_column("data")
    for name in ("shards", "groups", "rows"):
        data.add_column(name, justify="right")
    for name, counts in found.data.items():
        told = name.replace("first", found.first).replace("second", found.second)
        data.add_row(told, *(f"{counts[n]:,}" for n in ("shards", "groups", "rows")))
    return Group(
        table, Text(), data, Text(), Text(f"The same: {', '.join(found.same) or 'nothing'}.", style="dim")
    )


def found_view(found: Found) -> RenderableType:
    """Say where a thing lies and whom it shaped."""
    table = _fields()
    facts = found.node.facts
    if found.node.digest:
        table.add_row("digest", found.node.digest)
    for name in ("rows", "groups", "sources", "licences", "environments"):
        if name in facts:
            value = facts[name]
            table.add_row(name, ", ".join(value) if isinstance(value, list) else f"{value:,}")
    shards = [f"{path} (erased)" if path in found.erased else path for path in found.shards]
    for name, values in (("versions", found.versions), ("shards", shards), ("learnt by", found.runs)):
        short = [value[:_DIGITS] if name == "learnt by" else value for value in values]
        more = f" and {len(short) - _LISTED} more" if len(short) > _LISTED else ""
        table.add_row(name, (", ".join(short[:_LISTED]) + more) or "none")
    agents = [f"{name} ({', '.join(roles)})" if roles else name for name, roles in found.agents.items()]
    table.add_row("shaped", ", ".join(agents) or "no agent")
    return Group(Text(found.what, style="bold"), table)


def _fields() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _minute(time: str | None) -> str:
    return (time or "")[:16].replace("T", " ")


def _short(value: Any) -> str:
    if value is None:
        return "none"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text[:_DIGITS] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text
