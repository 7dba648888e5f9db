"""The forest plot: every item of evidence that has a number, on one axis a unit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tasks.pages import figures
from tasks.pages.figures import Axis, Interval, Item
from tasks.pages.parts import Group, Row, Strips, bounded, number

_REWARD = "mean reward"  # a difference, candidate less champion
_SHARE = "share"
_ENDS = ("champion better", "candidate better")

Record = Mapping[str, Any]


def forest(items: Sequence[Record]) -> Strips:
    """Return the plot of items of evidence as a record has them: the reward first, then the gate's order.

    A number alone, without bounds or a margin to hold it against, says no more on an axis; those stand at the end.
    """
    groups = []
    for unit, members in _groups(filter(_drawn, items)):
        axis, signed = _axis(members), unit == _REWARD
        left, right = _ENDS if signed else ("", "")
        ruler = figures.ruler(axis, left=left, right=right, signed=signed)
        rows = tuple(_row(item, figures.strip(axis, _item(unit, item))) for item in members)
        groups.append(Group(rows, ruler, _title(unit)))
    alone = tuple(_row(item, None) for item in items if item.get("estimate") is not None and not _drawn(item))
    if alone:
        groups.append(Group(alone, None, "Without an interval or a margin"))
    return Strips(("evidence", "estimate [interval]", "margin", "n", "detectable"), tuple(groups))


def forest_picture(items: Sequence[Record]) -> str:
    """Return the plot as one SVG file with its own colours, for places that show a picture only."""
    return figures.forest(
        [
            (
                _title(unit),
                _axis(members),
                _ENDS if unit == _REWARD else ("", ""),
                [_item(unit, item) for item in members],
            )
            for unit, members in _groups(filter(_drawn, items))
        ]
    )


def _groups(items: Iterable[Record]) -> list[tuple[str, list[Record]]]:
    """Gather rewards and shares, which can be compared; anything else has an axis of its own."""
    found: dict[tuple[str, str], list[Record]] = {}
    for item in items:
        unit = _unit(item)
        found.setdefault((unit, "" if unit in (_REWARD, _SHARE) else item["name"]), []).append(item)
    return sorted(
        ((unit, members) for (unit, _), members in found.items()), key=lambda group: group[0] != _REWARD
    )


def _unit(item: Record) -> str:
    return item.get("unit") or _REWARD


def _drawn(item: Record) -> bool:
    return item.get("estimate") is not None and any(
        item.get(x) is not None for x in ("low", "high", "margin")
    )


def _axis(items: Sequence[Record]) -> Axis:
    """Return one axis for all items; it holds zero, so that lengths can be compared."""
    return Axis.over([0.0, *(item.get(x) for item in items for x in ("estimate", "low", "high", "margin"))])


def _row(item: Record, figure: Markup | None) -> Row:
    unit = _unit(item)
    words = _item(unit, item).words
    return Row(
        item["name"],
        figure,
        (
            words if figure else f"{words} {unit}",
            number(item.get("margin"), signed=unit == _REWARD),
            "" if item.get("n") is None else f"{item['n']:,}",
            number(item.get("mde")),
        ),
        item["verdict"],
        "" if item["counts"] else "not required",
    )


def _item(unit: str, item: Record) -> Item:
    margin, mde = item.get("margin"), item.get("mde")
    value = Interval(item["estimate"], item.get("low"), item.get("high"))
    return Item(
        name=item["name"],
        verdict=item["verdict"],
        value=value,
        margin=margin,
        found=margin + mde if margin is not None and mde is not None else None,
        words=bounded(value, signed=unit == _REWARD),
        idle=not item["counts"],
    )


def _title(unit: str) -> str:
    return "Mean reward, candidate less champion" if unit == _REWARD else unit[:1].upper() + unit[1:]
