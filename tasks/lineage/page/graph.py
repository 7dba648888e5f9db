"""The graph of a page: a picture whose boxes are links to cards, and one card for each thing in it.

Without the script the links still lead to the cards, and print has both.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.lineage.picture import GAP, HEIGHT, WIDTH, Box, Drawing, layout
from tasks.lineage.render import INVERSE
from tasks.lineage.types import SHAPING, Edge, Kind, Lineage, Node, Ref
from tasks.pages.parts import plain

DRAWN = 150  # boxes; a graph with more is cut to what is nearest to the audited thing
CARDS = 1500  # things that are described one by one; a page with more opens slowly

_TONES: Mapping[Kind, str] = {
    "agent": "agent", "source": "agent", "base": "origin", "outside": "origin", "run": "run", "dataset": "data", "shard": "data",
    "preferences": "data", "environment": "data", "origin": "data", "licence": "data", "decision": "judged",
    "promotion": "judged", "policy": "judged", "reward": "proof", "evaluation": "proof", "validation": "proof",
    "tasks": "proof",
}  # fmt: skip
TITLES: Mapping[Kind, str] = {
    "source": "reward model", "origin": "source", "base": "base model", "outside": "outside policy",
    "validation": "data validation", "reward": "reward report", "tasks": "held-out tasks", "lock": "packages",
}  # fmt: skip
"""Kinds that people call by another word."""
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[.\d]*\+00:00")  # as the ledger writes it
_LONG = 300  # characters of a single fact
_EDGES = 12  # of one relation that a card names one by one
_FILES = 40


@dataclass(frozen=True)
class Shape:
    """A box of the picture: `number` names its card; `x`, `y` are its upper left corner."""

    number: int
    x: float
    y: float
    tone: str
    title: str
    note: str
    label: str


@dataclass(frozen=True)
class Path:
    """A line between the boxes `source` and `target` (numbers): which follows from which, and how."""

    source: int
    target: int
    d: str
    shaping: bool
    says: str


@dataclass(frozen=True)
class Picture:
    """Boxes and lines within `width` x `height` units; `hidden` things are in the list only."""

    width: float
    height: float
    shapes: tuple[Shape, ...]
    paths: tuple[Path, ...]
    hidden: int


@dataclass(frozen=True)
class Fact:
    """A name and a value as text, or the facts within."""

    name: str
    text: str
    inner: tuple[Fact, ...] = ()


@dataclass(frozen=True)
class Link:
    """How a thing is tied to others: the relation in words, their (number, name), and how many are not named."""

    says: str
    others: tuple[tuple[int, str], ...]
    more: int


@dataclass(frozen=True)
class Card:
    """What is known of one thing. `files` are (path, SHA-256), `more` of them are not named."""

    number: int
    kind: str
    tone: str
    name: str
    roles: str
    digest: str
    known: bool
    facts: tuple[Fact, ...]
    files: tuple[tuple[str, str], ...]
    more: int
    links: tuple[Link, ...]


def numbers(found: Lineage) -> dict[Ref, int]:
    """Number the things of a graph; the audited one is 0."""
    return {ref: at for at, ref in enumerate(found.nodes)}


def picture(found: Lineage, most: int = DRAWN) -> Picture:
    """Place the boxes and lines of a graph."""
    drawing, of = layout(found, most), numbers(found)
    boxes = {box.ref: box for box in drawing.boxes}
    shapes = tuple(_shape(box, of[box.ref]) for box in drawing.boxes)
    paths = tuple(
        Path(
            of[line.source],
            of[line.target],
            _curve(boxes[line.source], boxes[line.target]),
            line.relation in SHAPING,
            f"{boxes[line.source].title} {line.relation} {boxes[line.target].title}",
        )
        for line in drawing.lines
    )
    return Picture(*_size(drawing), shapes, paths, drawing.hidden)


def cards(found: Lineage, most: int = CARDS) -> list[Card]:
    """Describe the things of a graph, nearest to the audited one first."""
    of = numbers(found)
    coming: dict[Ref, list[Edge]] = defaultdict(list)
    for edge in found.edges:
        coming[edge.target].append(edge)
    kept = list(found.nodes.items())[:most]
    return [_card(found, of, ref, node, coming[ref], most) for ref, node in kept]


def name_of(node: Node) -> str:
    """Return what people call a thing, without its kind."""
    return node.name if node.kind != "shard" else node.name.rpartition("/")[2]


def called(node: Node) -> str:
    """Return what people call a thing, with its kind where the name alone does not tell it."""
    name, kind = name_of(node), kind_of(node)
    return name if kind == name or node.kind in ("agent", "dataset", "source") else f"{kind} {name}"


def kind_of(node: Node) -> str:
    """Return the word for its kind."""
    return TITLES.get(node.kind, node.kind)


def _size(drawing: Drawing) -> tuple[float, float]:
    return round(drawing.width, 1), round(drawing.height, 1)


def _shape(box: Box, number: int) -> Shape:
    kind = "" if box.title.startswith(box.kind) else f"{TITLES.get(box.kind, box.kind)} "
    label = f"{kind}{box.title}, {box.note}"
    x, y = round(box.x - WIDTH / 2, 1), round(box.y - HEIGHT / 2, 1)
    return Shape(number, x, y, _TONES.get(box.kind, "run"), plain(box.title), plain(box.note), plain(label))


def _curve(source: Box, target: Box) -> str:
    down = source.y < target.y
    y1 = source.y + (HEIGHT / 2 if down else -HEIGHT / 2)
    y2 = target.y - (HEIGHT / 2 if down else -HEIGHT / 2)
    bend = min(abs(y2 - y1) / 2, 2 * GAP + 20) * (1 if down else -1)
    return f"M{source.x:.1f},{y1:.1f}C{source.x:.1f},{y1 + bend:.1f} {target.x:.1f},{y2 - bend:.1f} {target.x:.1f},{y2:.1f}"


def _card(
    found: Lineage, of: Mapping[Ref, int], ref: Ref, node: Node, coming: Sequence[Edge], most: int
) -> Card:
    known = {name: value for name, value in node.facts.items() if name not in ("roles", "digest")}
    leaving = found.following.get(ref, ())
    links = [*_links(found, of, leaving, False, most), *_links(found, of, coming, True, most)]
    return Card(
        number=of[ref],
        kind=kind_of(node),
        tone=_TONES.get(node.kind, "run"),
        name=plain(name_of(node)),
        roles=", ".join(node.facts.get("roles", ())),
        digest=node.digest or "",
        known=node.known,
        facts=facts(known),
        files=tuple((plain(file.path), file.sha256) for file in node.files[:_FILES]),
        more=max(0, len(node.files) - _FILES),
        links=tuple(links),
    )


def _links(found: Lineage, of: Mapping[Ref, int], edges: Sequence[Edge], back: bool, most: int) -> list[Link]:
    by: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for edge in edges:
        other = edge.source if back else edge.target
        node = found.nodes[other]
        says = INVERSE[edge.relation] if back else edge.relation
        by[says].append((of[other], plain(called(node))))
    return [
        Link(says, tuple(o for o in others if o[0] < most)[:_EDGES], max(0, len(others) - _EDGES))
        for says, others in by.items()
    ]


def facts(values: Mapping[str, Any]) -> tuple[Fact, ...]:
    """Write values of any depth as text."""
    return tuple(_fact(str(name), value) for name, value in values.items() if value not in (None, "", [], {}))


def _fact(name: str, value: Any) -> Fact:
    name = plain(name.replace("_", " "))
    if isinstance(value, Mapping):
        return Fact(name, "", facts(value))
    if isinstance(value, list | tuple):
        if any(isinstance(item, Mapping | list) for item in value):
            return Fact(name, "", tuple(_fact(_entitled(at, item), item) for at, item in enumerate(value)))
        return Fact(name, _text(", ".join(map(_scalar, value))))
    return Fact(name, _text(_scalar(value)))


def _entitled(at: int, item: Any) -> str:
    return str(item.get("name", at + 1)) if isinstance(item, Mapping) else str(at + 1)


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value[:10]} {value[11:19]} UTC" if _TIME.fullmatch(str(value)) else str(value)


def _text(text: str) -> str:
    return plain(text if len(text) <= _LONG else f"{text[:_LONG]}… ({len(text) - _LONG:,} more characters)")
