"""A lineage as a picture: a layered drawing in SVG, newest at the top, each thing below what follows from it.

Layers by longest path, order within a layer by the barycentre of the neighbours (Sugiyama, Tagawa and Toda, "Methods for
visual understanding of hierarchical system structures", IEEE SMC 11, 1981); then each box goes as near to the middle of its
neighbours as those beside it let it (least squares in a given order, by pooling adjacent violators). Shards of one version are
drawn as one box.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from tasks.lineage.types import SHAPING, Edge, Kind, Lineage, Node, Ref, Relation

WIDTH, HEIGHT, GAP, RISE = 168, 40, 18, 74  # of a box, between boxes, between layers; pixels
_SWEEPS = 8
_LETTERS = 24  # of a name that a box holds
_COLOURS: Mapping[Kind, str] = {
    "agent": "#0e7490", "source": "#0e7490", "base": "#a21caf", "dataset": "#1d4ed8", "shard": "#64748b", "run": "#334155",
    "decision": "#15803d", "promotion": "#15803d", "reward": "#b45309", "evaluation": "#b45309", "validation": "#b45309",
    "preferences": "#1d4ed8", "outside": "#be123c", "episode": "#be123c", "group": "#be123c", "prompt": "#be123c",
}  # fmt: skip


@dataclass(frozen=True)
class Box:
    """Where a node is drawn: its middle; `title` and `note` are its two lines."""

    ref: Ref
    x: float
    y: float
    kind: Kind
    title: str
    note: str


@dataclass(frozen=True)
class Line:
    """An edge between two boxes; `relation` reads from `source` to `target`."""

    source: Ref
    relation: Relation
    target: Ref


@dataclass(frozen=True)
class Drawing:
    """Boxes and lines within `width` x `height` pixels; `hidden` nodes were left out."""

    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]
    width: float
    height: float
    hidden: int


def layout(lineage: Lineage, most: int = 120) -> Drawing:
    """Place the nodes of a lineage.

    Args:
        most: nodes that are drawn; of a larger graph those nearest to the root.
    """
    nodes, edges = _fold(lineage)
    kept = dict(list(nodes.items())[:most])
    edges = [edge for edge in edges if edge.source in kept and edge.target in kept]
    layers = _ordered(_layers(kept, edges), edges)
    across = _places(layers, edges)
    boxes = tuple(
        Box(ref, across[ref], GAP + HEIGHT / 2 + depth * RISE, kept[ref][0].kind, *_words(*kept[ref]))
        for depth, layer in enumerate(layers)
        for ref in layer
    )
    width = max(across.values()) + WIDTH / 2 + GAP
    lines = tuple(Line(edge.source, edge.relation, edge.target) for edge in edges)
    return Drawing(boxes, lines, width, len(layers) * RISE + GAP, len(nodes) - len(kept))


def to_svg(lineage: Lineage, most: int = 120) -> str:
    """Return a whole SVG document; boxes carry `data-node`, lines `data-edge`, both a `<title>`."""
    drawing = layout(lineage, most)
    place = {box.ref: box for box in drawing.boxes}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {drawing.width:.0f} {drawing.height:.0f}" '
        f'width="{drawing.width:.0f}" height="{drawing.height:.0f}" font-family="system-ui, sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for line in drawing.lines:
        a, b = place[line.source], place[line.target]
        y1, y2 = (a.y + HEIGHT / 2, b.y - HEIGHT / 2) if a.y < b.y else (a.y - HEIGHT / 2, b.y + HEIGHT / 2)
        middle = (y1 + y2) / 2
        dash = "" if line.relation in SHAPING else ' stroke-dasharray="4 3"'
        parts.append(
            f'<path data-edge="{escape(":".join(line.source))}|{escape(":".join(line.target))}" fill="none" stroke="#94a3b8"{dash} '
            f'd="M{a.x:.1f},{y1:.1f} C{a.x:.1f},{middle:.1f} {b.x:.1f},{middle:.1f} {b.x:.1f},{y2:.1f}">'
            f"<title>{escape(a.title)} {line.relation} {escape(b.title)}</title></path>"
        )
    for box in drawing.boxes:
        x, y, colour = box.x - WIDTH / 2, box.y - HEIGHT / 2, _COLOURS.get(box.kind, "#475569")
        parts.append(
            f'<g data-node="{escape(":".join(box.ref))}"><title>{escape(box.ref[0])} {escape(box.ref[1])}</title>'
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#ffffff"/>'
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{colour}12" stroke="{colour}"/>'
            f'<text x="{box.x:.1f}" y="{box.y - 3:.1f}" text-anchor="middle" font-weight="600" fill="#0f172a">{escape(box.title)}</text>'
            f'<text x="{box.x:.1f}" y="{box.y + 12:.1f}" text-anchor="middle" fill="#475569">{escape(box.note)}</text></g>'
        )
    if drawing.hidden:
        parts.append(
            f'<text x="{GAP}" y="{drawing.height - 4:.0f}" fill="#475569">{drawing.hidden} more, farther from the root</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def _fold(lineage: Lineage) -> tuple[dict[Ref, tuple[Node, int]], list[Edge]]:
    """Let one shard stand for all shards of a version; return nodes with how many they stand for, and the edges left."""
    stands: dict[Ref, Ref] = {}
    first: dict[Ref, Ref] = {}
    count: dict[Ref, int] = defaultdict(lambda: 1)
    for edge in lineage.edges:
        if (
            edge.relation in ("holds", "collected")
            and edge.target != lineage.root
            and edge.target not in stands
        ):
            stands[edge.target] = first.setdefault(edge.source, edge.target)
            if stands[edge.target] != edge.target:
                count[stands[edge.target]] += 1
    nodes = {ref: (node, count[ref]) for ref, node in lineage.nodes.items() if stands.get(ref, ref) == ref}
    edges = [edge for edge in lineage.edges if edge.source in nodes and edge.target in nodes]
    return nodes, edges


def _layers(nodes: Mapping[Ref, object], edges: Sequence[Edge]) -> list[list[Ref]]:
    """Put each node one layer below the lowest of those that follow from it; edges that would close a circle are passed
    over (two agents may each have been compared with the other).
    """
    follows: dict[Ref, list[Ref]] = defaultdict(list)
    for edge in edges:
        follows[edge.source].append(edge.target)
    state: dict[Ref, int] = {}
    order: list[Ref] = []
    closing: set[tuple[Ref, Ref]] = set()
    for start in nodes:
        stack: list[tuple[Ref, bool]] = [(start, False)]
        while stack:
            ref, left = stack.pop()
            if left:
                state[ref] = 2
                order.append(ref)
            elif ref not in state:
                state[ref] = 1
                stack.append((ref, True))
                for target in follows[ref]:
                    if state.get(target) == 1:
                        closing.add((ref, target))
                    elif target not in state:
                        stack.append((target, False))
    depth = dict.fromkeys(nodes, 0)
    place = {ref: at for at, ref in enumerate(reversed(order))}
    for ref in reversed(order):
        for target in follows[ref]:
            if (ref, target) not in closing and place[target] > place[ref]:
                depth[target] = max(depth[target], depth[ref] + 1)
    layers: list[list[Ref]] = [[] for _ in range(max(depth.values()) + 1)]
    for ref, level in depth.items():
        layers[level].append(ref)
    return layers


def _ordered(layers: list[list[Ref]], edges: Sequence[Edge]) -> list[list[Ref]]:
    """Order each layer by the middle of its neighbours, sweeping down and up."""
    near = _neighbours(edges)
    at = {ref: (i + 0.5) / len(layer) for layer in layers for i, ref in enumerate(layer)}
    for sweep in range(_SWEEPS):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            middle = {
                ref: sum(at[n] for n in near[ref]) / len(near[ref]) if near[ref] else at[ref] for ref in layer
            }
            layer.sort(key=lambda ref, middle=middle: middle[ref])  # type: ignore[misc]
            for i, ref in enumerate(layer):
                at[ref] = (i + 0.5) / len(layer)
    return layers


def _places(layers: Sequence[Sequence[Ref]], edges: Sequence[Edge]) -> dict[Ref, float]:
    """Return the middle of each box, from the left edge; boxes of a layer keep their order and do not overlap."""
    near = _neighbours(edges)
    step = WIDTH + GAP
    at = {ref: i * step - len(layer) * step / 2 for layer in layers for i, ref in enumerate(layer)}
    for sweep in range(_SWEEPS):
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            wished = [
                sum(at[n] for n in near[ref]) / len(near[ref]) if near[ref] else at[ref] for ref in layer
            ]
            at.update(zip(layer, _apart(wished, step), strict=True))
    left = min(at.values()) - WIDTH / 2 - GAP
    return {ref: x - left for ref, x in at.items()}


def _apart(wished: Sequence[float], step: float) -> list[float]:
    """Return the places nearest to those wished for (least squares) that are `step` apart or more, in order."""
    blocks: list[
        tuple[float, int]
    ] = []  # (mean of what its boxes wish, less their offset within the row; how many)
    for i, place in enumerate(wished):
        mean, count = place - i * step, 1
        while blocks and blocks[-1][0] > mean:
            before, many = blocks.pop()
            mean, count = (before * many + mean * count) / (many + count), many + count
        blocks.append((mean, count))
    flat = [mean for mean, count in blocks for _ in range(count)]
    return [mean + i * step for i, mean in enumerate(flat)]


def _neighbours(edges: Sequence[Edge]) -> dict[Ref, list[Ref]]:
    near: dict[Ref, list[Ref]] = defaultdict(list)
    for edge in edges:
        near[edge.source].append(edge.target)
        near[edge.target].append(edge.source)
    return near


def _words(node: Node, count: int) -> tuple[str, str]:
    """Return the two lines of a box: what it is called, and its roles, what it is about, or its digest."""
    facts, name = node.facts, node.name
    if node.kind == "shard":
        return (f"{count} shards" if count > 1 else _cut(name.rpartition("/")[2])), "replay"
    if node.kind == "evaluation":
        return "evaluation", _cut(name)
    alone = ("agent", "source", "dataset", "promotion", "tasks", "policy", "lock", "code")
    notes = {
        "run": facts.get("steps") and f"{facts['steps']:,} steps",
        "decision": _day(facts),
        "promotion": _day(facts),
    }
    note = ", ".join(facts.get("roles", ())) or notes.get(node.kind) or (node.digest or "")[:12] or node.kind
    return _cut(name if node.kind in alone else f"{node.kind} {name}"), note


def _day(facts: Mapping[str, Any]) -> str:
    return str(facts.get("time", ""))[:10]


def _cut(name: str) -> str:
    return name if len(name) <= _LETTERS else name[: _LETTERS - 1] + "…"
