"""What sections of a page are made of, and how numbers and strange text are written in all of them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from tasks.evaluation.statistics import Estimate
from tasks.pages.figures import Interval, Tone


@dataclass(frozen=True)
class Row:
    """A name, a picture on the axis of its group, and what stands beside it. `idle`: it did not decide anything."""

    name: str
    figure: Markup | None
    cells: tuple[str, ...]
    verdict: str = ""
    idle: str = ""


@dataclass(frozen=True)
class Group:
    """Rows on one axis; `ruler` has its numbers, None where nothing is drawn."""

    rows: tuple[Row, ...]
    ruler: Markup | None
    title: str = ""


@dataclass(frozen=True)
class Strips:
    """A table whose rows are drawn; `heads` name the column of names and those of the cells."""

    heads: tuple[str, ...]
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Table:
    """A plain table; the first column has names, the others numbers."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Chart:
    """A figure and what it shows, in a sentence; `keys` name its colours."""

    figure: Markup
    caption: str
    keys: tuple[tuple[Tone, str], ...] = ()


@dataclass(frozen=True)
class Section:
    """What one evidence file has to show."""

    title: str
    says: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    strips: Strips | None = None
    table: Table | None = None
    notes: tuple[str, ...] = ()


def number(value: float | None, *, signed: bool = False) -> str:
    """Write a number with three decimals, a large one with fewer; nothing for None."""
    if value is None:
        return ""
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 3
    value = round(value, digits) + 0.0  # no sign before a zero
    return f"{value:{'+' if signed and value else ''},.{digits}f}".replace("-", "−")


def bounded(value: Interval, *, signed: bool = False) -> str:
    """Write an estimate with its bounds; a bound that is missing is left out."""
    low, high = (number(end, signed=signed) for end in (value.low, value.high))
    estimate = number(value.estimate, signed=signed)
    if not low and not high:
        return estimate
    return f"{estimate} [{f'{low}, {high}' if low and high else f'≥ {low}' if low else f'≤ {high}'}]"


def interval(found: Estimate) -> Interval:
    """Return what a figure draws of an estimate."""
    return Interval(found.estimate, found.low, found.high)


def plain(text: str) -> str:
    """Return text in which every character is one that a reader can see: controls are named, nothing turns its direction."""
    return "".join(
        char
        if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn")
        else f"⟨{ord(char):04X}⟩"
        for char in text
    )


def listed(names: Sequence[str]) -> str:
    """Write names as a sentence does: a, b and c."""
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)


Side = Literal["candidate", "champion"]
SIDES: tuple[Side, Side] = ("candidate", "champion")
