"""Small figures as inline SVG: strips with intervals, histograms, a reliability diagram, curves, gauges.

Places are percentages of the width, so a figure is as wide as its column while text and marks keep their size. Colours are
the page's (`STYLE`): marks carry a class and draw in `currentColor`, so dark mode and print follow by themselves. Verdicts
differ by shape as well as by colour. Nothing here knows of decisions; equal values give equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal
from xml.etree import ElementTree

from markupsafe import Markup

Tone = Literal["pass", "fail", "open", "candidate", "champion", "baseline", "plain"]

# Okabe and Ito's bluish green, vermilion and blue, darkened (or lightened) until text in them can be read.
STYLE = """
:root { --paper: #fff; --ink: #1b1f24; --soft: #57606a; --line: #d5dbe1; --wash: #f5f7f9;
  --pass: #00725a; --fail: #b5420b; --open: #5c6672; --candidate: #0a62a9; --champion: #6f7985; --baseline: #8f5a00; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e4e8ec; --soft: #9ca6b1; --line: #343b43;
  --wash: #1d2126; --pass: #45c4a4; --fail: #ff9a6b; --open: #a9b3be; --candidate: #6cb4f5; --champion: #98a2ad;
  --baseline: #d9a441; } }
@media print { :root { --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --wash: #fff; --pass: #00725a;
  --fail: #b5420b; --open: #5c6672; --candidate: #0a62a9; --champion: #6f7985; --baseline: #8f5a00; } }
svg { display: block; overflow: visible; color: var(--ink); font: 12px/1 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
svg text { fill: var(--soft); stroke: none; } svg text.strong { fill: var(--ink); }
svg .pass { color: var(--pass); } svg .fail { color: var(--fail); } svg .open { color: var(--open); }
svg .candidate { color: var(--candidate); } svg .champion { color: var(--champion); } svg .baseline { color: var(--baseline); }
svg .mark { fill: currentColor; stroke: currentColor; stroke-width: 1.5; }
svg .hollow { fill: var(--paper); stroke: currentColor; stroke-width: 2; }
svg .bar { stroke: currentColor; stroke-width: 2; } svg .fill { fill: currentColor; stroke: none; }
svg .grid { stroke: var(--line); stroke-width: 1; shape-rendering: crispEdges; }
svg .zero { stroke: var(--soft); stroke-width: 1; shape-rendering: crispEdges; }
svg .margin { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 3 2; }
svg .margin.baseline { stroke: currentColor; } svg .margin.blind { stroke-dasharray: 1.5 3; } .faint { opacity: 0.5; }
"""
_SHAPES = {
    "circle": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0Z",
    "square": "M-4.2 -4.2h8.4v8.4h-8.4Z",
    "diamond": "M0 -5.4L5.4 0L0 5.4L-5.4 0Z",
    "triangle": "M0 -3L3.2 2.6H-3.2Z",
}
_VERDICTS: dict[str, tuple[Tone, str]] = {
    "PASS": ("pass", "circle"),
    "FAIL": ("fail", "square"),
    "INCONCLUSIVE": ("open", "diamond"),
}
_STRIP = 26  # height of a row, in pixels
_POINTS = 240  # of a course; longer ones are drawn as means of neighbouring steps
_DOTTED = 12  # points of a course that are marked one by one; more are a line


@dataclass(frozen=True)
class Axis:
    """A horizontal axis from `low` to `high`, `low` < `high`."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Iterable[float | None], *, room: float = 0.06) -> Axis:
        """Return an axis that holds all finite values, with `room` (a share of its length) on both sides."""
        known = [value for value in values if value is not None and math.isfinite(value)] or [0.0, 1.0]
        low, high = min(known), max(known)
        reach = (high - low) or abs(high) or 1.0
        return cls(low - room * reach, high + room * reach)

    def at(self, value: float) -> str:
        """Return the place of a value as a percentage of the width; values outside stand at the edge."""
        return _percent((value - self.low) / (self.high - self.low))

    def ticks(self, count: int = 5) -> list[float]:
        """Return about `count` round values within the axis: steps of 1, 2 or 5 times a power of ten."""
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * k for k in (1, 2, 5, 10) if power * k >= 0.75 * rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


@dataclass(frozen=True)
class Interval:
    """An estimate with its bounds; a bound that is None (a one-sided interval) reaches the edge of the axis."""

    estimate: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Item:
    """One row of a forest plot.

    Attributes:
        margin: which value the interval is held against, a dashed line.
        found: the smallest true value that would have been found, a small triangle.
        words: the numbers as text.
        idle: it is not required and drawn fainter.
    """

    name: str
    verdict: str
    value: Interval
    margin: float | None
    found: float | None
    words: str
    idle: bool = False


def verdict_mark(verdict: str, size: int = 12) -> Markup:
    """Draw the sign of a verdict: a disc for PASS, a square for FAIL, a hollow diamond for INCONCLUSIVE.

    It stands beside the word, so it is no picture of its own for people who cannot see it.
    """
    picture = _element("svg", width=size, height=size, aria_hidden="true")
    picture.append(_verdict_shape(verdict, "50%", size / 2))
    return _text(picture)


def strip(axis: Axis, item: Item) -> Markup:
    """Draw one row of a forest plot."""
    picture = _picture(_STRIP, f"{item.name}: {item.verdict}, {item.words}")
    if item.idle:
        picture.set("class", "faint")
    picture.extend(_strip(axis, item))
    return _text(picture)


def _strip(axis: Axis, item: Item) -> list[ElementTree.Element]:
    middle, value = _STRIP / 2, item.value
    tone = _VERDICTS.get(item.verdict, _VERDICTS["INCONCLUSIVE"])[0]
    parts = _grid(axis, 0, _STRIP)
    if item.margin is not None:
        parts.append(_line(axis.at(item.margin), 1, axis.at(item.margin), _STRIP - 1, "margin"))
    if item.found is not None and axis.low <= item.found <= axis.high:
        place = _element("svg", x=axis.at(item.found), y=_STRIP - 4)
        place.append(_element("path", d=_SHAPES["triangle"], class_="fill faint"))
        parts.append(place)
    if value.low is not None or value.high is not None:
        low, high = (
            axis.low if value.low is None else value.low,
            axis.high if value.high is None else value.high,
        )
        parts.append(_line(axis.at(low), middle, axis.at(high), middle, f"bar {tone}"))
        ends = [end for end in (value.low, value.high) if end is not None]
        parts += [_line(axis.at(end), middle - 4, axis.at(end), middle + 4, f"bar {tone}") for end in ends]
    parts.append(_verdict_shape(item.verdict, axis.at(value.estimate), middle, f"{item.name}: {item.words}"))
    return parts


def ruler(axis: Axis, *, left: str = "", right: str = "", signed: bool = False) -> Markup:
    """Draw the numbers under the rows, and what lies to the left and the right of zero."""
    picture = _picture(34 if left or right else 18, f"scale from {axis.low:.3g} to {axis.high:.3g}")
    picture.extend(_ruler(axis, left=left, right=right, signed=signed))
    return _text(picture)


def _ruler(axis: Axis, *, left: str = "", right: str = "", signed: bool = False) -> list[ElementTree.Element]:
    parts = []
    for tick, word in zip(axis.ticks(), _numbers(axis.ticks(), signed), strict=True):
        parts += [
            _line(axis.at(tick), 0, axis.at(tick), 4, "zero"),
            _words(axis.at(tick), 15, word, "middle"),
        ]
    if left or right:
        zero = axis.at(0.0)
        parts += [_words(zero, 31, f"← {left}", "end", dx=-8), _words(zero, 31, f"{right} →", "start", dx=8)]
    return parts


def forest(groups: Sequence[tuple[str, Axis, tuple[str, str], Sequence[Item]]]) -> str:
    """Draw a whole forest plot as one SVG file with its own colours, for places that show a picture only.

    Args:
        groups: (title, axis, (left of zero, right of zero), rows).
    """
    names, numbers, width, top = 210, 190, 900, 12
    middle = width - names - numbers
    picture = ElementTree.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "font-family": "sans-serif"})
    style = ElementTree.SubElement(picture, "style")
    style.text = f"{STYLE}text {{ font: 12px/1 system-ui, sans-serif; }}"
    picture.append(_element("rect", width="100%", height="100%", style="fill: var(--paper)"))
    for title, axis, (left, right), items in groups:
        picture.append(_words("16", top + 14, title, "start", class_="strong"))
        top += 26
        for item in items:
            tone = "" if item.idle else "strong"
            picture.append(_words("16", top + 17, item.name, "start", class_=tone))
            picture.append(_within(names, top, middle, _strip(axis, item)))
            if item.idle:
                picture[-1].set("class", "faint")
            picture.append(_words(f"{width - 16}", top + 17, item.words, "end", class_=tone))
            top += _STRIP
        picture.append(_within(names, top, middle, _ruler(axis, left=left, right=right, signed=bool(left))))
        top += 48
    for name, value in {"width": width, "height": top, "viewBox": f"0 0 {width} {top}"}.items():
        picture.set(name, str(value))
    return ElementTree.tostring(picture, encoding="unicode")


def means(
    axis: Axis,
    candidate: Interval,
    champion: Interval,
    baselines: tuple[float | None, float | None],
    label: str,
) -> Markup:
    """Draw two agents' means with intervals, one above the other; as lines a constant answer (dashed) and a blind choice (dotted)."""
    height = 36
    picture = _picture(height, label)
    picture.extend(_grid(axis, 0, height))
    for baseline, dashes in zip(baselines, ("margin baseline", "margin baseline blind"), strict=True):
        if baseline is not None:
            picture.append(_line(axis.at(baseline), 2, axis.at(baseline), height - 2, dashes))
    for value, y, tone, shape in ((candidate, 11, "candidate", "mark"), (champion, 25, "champion", "hollow")):
        if value.low is not None and value.high is not None:
            picture.append(_line(axis.at(value.low), y, axis.at(value.high), y, f"bar {tone}"))
        place = _element("svg", x=axis.at(value.estimate), y=y)
        place.append(_element("path", d=_SHAPES["circle"], class_=f"{shape} {tone}"))
        place[-1].append(_title(f"{tone} {value.estimate:.3f}"))
        picture.append(place)
    return _text(picture)


def histogram(edges: Sequence[float], counts: Sequence[int], label: str) -> Markup:
    """Draw how many values lie between neighbouring `edges`; those below zero in another colour than those above.

    Args:
        edges: [n + 1] rising.
        counts: [n].
    """
    height, top, foot = 150, 18, 20
    axis, most = Axis(edges[0], edges[-1]), max([*counts, 1])
    picture = _picture(height, label)
    floor = height - foot
    for (low, high), count in zip(pairwise(edges), counts, strict=True):
        if not count:
            continue
        tall = max(1.0, (floor - top) * count / most)
        tone = "candidate" if low + high > 0 else "champion"
        width = _percent((high - low) / (axis.high - axis.low) * 0.86)
        left = axis.at(low + 0.07 * (high - low))
        bar = _element("rect", x=left, y=floor - tall, width=width, height=tall, class_=f"fill {tone}")
        bar.append(_title(f"{count} between {low:+.2f} and {high:+.2f}"))
        picture.append(bar)
        picture.append(_words(axis.at((low + high) / 2), floor - tall - 5, f"{count}", "middle"))
    picture.append(_line("0%", floor, "100%", floor, "zero"))
    picture.append(_within(0, floor, "100%", _ruler(axis, signed=True)))
    return _text(picture)


def reliability_diagram(points: Sequence[tuple[float, Interval, int]], label: str) -> Markup:
    """Draw how often a model is right against how sure it is; on the diagonal it is exactly as sure as it is right.

    Args:
        points: (confidence in [0.5, 1], share right with its interval, pairs), in order of confidence.
    """
    lowest = min(
        [
            0.5,
            *(right.estimate for _, right, _ in points),
            *(r.low for _, r, _ in points if r.low is not None),
        ]
    )
    chart = _Chart(Axis(0.48, 1.02), math.floor(lowest * 10) / 10, 1.0, 230)
    picture = _picture(chart.height + 36, label)
    picture.extend(chart.frame("how sure", "how often right"))
    picture.append(_line(chart.axis.at(0.5), chart.y(0.5), chart.axis.at(1.0), chart.y(1.0), "margin"))
    for sure, right, n in points:
        place = chart.axis.at(sure)
        if right.low is not None and right.high is not None:
            picture.append(_line(place, chart.y(right.low), place, chart.y(right.high), "bar candidate"))
        words = f"{n} pairs: {sure:.2f} sure, {right.estimate:.2f} right"
        picture.append(chart.dot(sure, right.estimate, "mark candidate", words))
        picture.append(_words(place, chart.height - 7, f"{n}", "middle", dx=11))
    return _text(picture)


def curves(
    xs: Sequence[int],
    series: Sequence[tuple[Tone, Sequence[Interval]]],
    label: str,
    *,
    below: str,
    beside: str,
) -> Markup:
    """Draw values with intervals over whole numbers on a logarithmic axis; the first series has full marks.

    Args:
        xs: [n] rising, at least 1.
        series: (colour, [n] values).
        below, beside: what the axes count.
    """
    places = [math.log2(x) for x in xs]
    span = Axis.over(
        [end for _, values in series for v in values for end in (v.estimate, v.low, v.high)], room=0.08
    )
    chart = _Chart(Axis(places[0] - 0.15, places[-1] + 0.15), span.low, span.high, 210)
    picture = _picture(chart.height + 36, label)
    picture.extend(chart.frame(below, beside, [(place, str(x)) for place, x in zip(places, xs, strict=True)]))
    for order, (tone, values) in enumerate(series):
        picture.extend(chart.joined([(p, v.estimate) for p, v in zip(places, values, strict=True)], tone))
        for place, x, v in zip(places, xs, values, strict=True):
            if v.low is not None and v.high is not None:
                x_at = chart.axis.at(place)
                picture.append(_line(x_at, chart.y(v.low), x_at, chart.y(v.high), f"bar {tone} faint"))
            kind = "hollow" if order else "mark"
            picture.append(chart.dot(place, v.estimate, f"{kind} {tone}", f"{x}: {v.estimate:.3f}"))
    return _text(picture)


def course(
    points: Sequence[tuple[float, float]], label: str, *, below: str, marked: float | None = None
) -> Markup:
    """Draw how one value went over steps; those that are not finite are left out, and of very many means are drawn.

    Args:
        points: (step, value) in order of steps.
        marked: a step that is marked by an upright line.
    """
    known = _thinned([(x, y) for x, y in points if math.isfinite(y)])
    span = Axis.over([y for _, y in known], room=0.08)
    chart = _Chart(Axis.over([x for x, _ in known], room=0.01), span.low, span.high, 120)
    picture = _picture(chart.height + 36, label)
    ticks = [tick for tick in chart.axis.ticks(4) if tick == round(tick)]
    picture.extend(chart.frame(below, "", [(tick, f"{tick:,.0f}") for tick in ticks]))
    picture.extend(chart.joined(known, "candidate"))
    if marked is not None:
        picture.append(_line(chart.axis.at(marked), 0, chart.axis.at(marked), chart.height, "margin"))
    if len(known) <= _DOTTED:
        picture.extend(chart.dot(x, y, "mark candidate", f"{x:,.0f}: {y:.4g}") for x, y in known)
    return _text(picture)


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return means of neighbours where there are more points than pixels tell apart."""
    size = -(-len(points) // _POINTS)
    parts = (points[at : at + size] for at in range(0, len(points), size or 1))
    return [(part[len(part) // 2][0], sum(y for _, y in part) / len(part)) for part in parts]


def gauge(parts: Sequence[tuple[float, Tone, str]], total: float, label: str) -> Markup:
    """Draw shares of a whole, one beside the other; the rest stays empty.

    Args:
        parts: (size, colour, words for the tooltip).
    """
    picture = _picture(14, label)
    picture.append(_element("rect", x="0%", y=2, width="100%", height=10, rx=2, style="fill: var(--line)"))
    start = 0.0
    for size, tone, words in parts:
        piece = _element("rect", x=_percent(start / total), y=2, width=_percent(size / total), height=10)
        piece.set("class", f"fill {tone}")
        piece.append(_title(words))
        picture.append(piece)
        start += size
    return _text(picture)


@dataclass(frozen=True)
class _Chart:
    """A plane with a horizontal axis by percentage and a vertical one by pixels."""

    axis: Axis
    low: float
    high: float
    height: int

    def y(self, value: float) -> float:
        return round(self.height - self.height * (value - self.low) / (self.high - self.low), 2)

    def frame(
        self, below: str, beside: str, named: Sequence[tuple[float, str]] | None = None
    ) -> list[ElementTree.Element]:
        ticks, parts = Axis(self.low, self.high).ticks(4), []
        for tick, word in zip(ticks, _numbers(ticks), strict=True):
            parts.append(_line("0%", self.y(tick), "100%", self.y(tick), "grid"))
            parts.append(_words("0%", self.y(tick) + 4, word, "end", dx=-8))
        parts.append(_line("0%", self.height, "100%", self.height, "zero"))
        for place, word in named or [(tick, f"{tick:.1f}") for tick in self.axis.ticks()]:
            parts.append(
                _line(self.axis.at(place), self.height, self.axis.at(place), self.height + 4, "zero")
            )
            parts.append(_words(self.axis.at(place), self.height + 16, word, "middle"))
        parts.append(_words("100%", self.height + 32, f"{below} →", "end"))
        if beside:
            parts.append(_words("0%", -8, f"↑ {beside}", "start", dx=-24))
        return parts

    def joined(self, points: Sequence[tuple[float, float]], tone: str) -> list[ElementTree.Element]:
        ends = [(self.axis.at(x), self.y(y)) for x, y in points]
        return [_line(*a, *b, f"bar {tone}") for a, b in pairwise(ends)]

    def dot(self, x: float, y: float, class_: str, words: str) -> ElementTree.Element:
        found = _element("circle", cx=self.axis.at(x), cy=self.y(y), r=4, class_=class_)
        found.append(_title(words))
        return found


def _picture(height: float, label: str) -> ElementTree.Element:
    return _element("svg", width="100%", height=height, role="img", aria_label=label)


def _grid(axis: Axis, top: float, bottom: float) -> list[ElementTree.Element]:
    ticks = axis.ticks()
    return [_line(axis.at(t), top, axis.at(t), bottom, "zero" if t == 0 else "grid") for t in ticks]


def _verdict_shape(verdict: str, x: str, y: float, label: str = "") -> ElementTree.Element:
    tone, shape = _VERDICTS.get(verdict, _VERDICTS["INCONCLUSIVE"])
    place = _element("svg", x=x, y=y)
    form = _element("path", d=_SHAPES[shape], class_=f"{'hollow' if tone == 'open' else 'mark'} {tone}")
    if label:
        form.append(_title(label))
    place.append(form)
    return place


def _within(
    x: float, y: float, width: float | str, parts: Iterable[ElementTree.Element]
) -> ElementTree.Element:
    place = _element("svg", x=x, y=y, width=width, height=1)
    place.extend(parts)
    return place


def _numbers(ticks: Sequence[float], signed: bool = False) -> list[str]:
    """Write tick labels with as many decimals as their step needs."""
    decimals = max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9)) if len(ticks) > 1 else 2
    return [f"{tick:{'+' if signed and tick else ''},.{decimals}f}".replace("-", "−") for tick in ticks]


def _line(x1: str, y1: float, x2: str, y2: float, class_: str) -> ElementTree.Element:
    return _element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def _words(x: str, y: float, words: str, anchor: str, dx: float = 0, class_: str = "") -> ElementTree.Element:
    found = _element("text", x=x, y=y, text_anchor=anchor)
    if dx:
        found.set("dx", f"{dx:g}")
    if class_:
        found.set("class", class_)
    found.text = words
    return found


def _title(words: str) -> ElementTree.Element:
    found = ElementTree.Element("title")
    found.text = words
    return found


def _element(tag: str, **attributes: str | float) -> ElementTree.Element:
    named = {
        name.rstrip("_").replace("_", "-"): value if isinstance(value, str) else f"{value:g}"
        for name, value in attributes.items()
    }
    return ElementTree.Element(tag, named)


def _percent(share: float) -> str:
    return f"{100 * min(1.0, max(0.0, share)):.2f}%"


def _text(picture: ElementTree.Element) -> Markup:
    return Markup(ElementTree.tostring(picture, encoding="unicode"))
