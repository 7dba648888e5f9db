"""When a run began to collapse, and what drives it, read from the metrics of its own updates.

ARLArena (arXiv 2602.21534) finds what precedes a collapse: the push moves to tokens with a negative advantage that the policy has
nearly given up, the policy runs away from its data, gradients grow, entropy vanishes. Each of these is one signal here, followed by a one-sided cumulative sum (Page, Biometrika 41, 1954): excesses over what is still healthy
add up, anything less takes off again. A signal that reaches the alarm began to depart where its sum last left 0: that is
the onset, and the signal that departed first names the driver.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any, Literal

Driver = Literal[
    "stale negatives",
    "policy drift",
    "gradient explosion",
    "entropy collapse",
    "length growth",
    "format loss",
]
Dimension = Literal["aggregation", "clipping", "filtering", "advantage"]
"""Where policy-gradient methods differ (arXiv 2602.21534, section 3)."""


@dataclass(frozen=True, slots=True)
class Signal:
    """A metric that departs in a collapse.

    Attributes:
        driver: what it tells of.
        metric: its name in the metrics of an update.
        healthy: up to which value it is harmless; with `relative`, the factor by which it may grow since the start of the
            run (or shrink, where it is below 1).
        advice: what to do about it.
        dimensions: of a method, that are known to bring it about: where to look first, no proof. Tolerant clipping lets stale
            negatives be pushed, and drift, gradient and format follow (ARLArena, section 4); filtering removes groups that
            all fail, whose penalties teach the form, and only an advantage that takes penalties passes them on; the mean
            over each sequence makes long bad answers cheap (Dr. GRPO, arXiv 2503.20783); a symmetric band takes entropy
            (DAPO, 2503.14476, section 3.1).
        relative: it is held against the start of the run, and judged after it: what a policy learns at first is no collapse.
    """

    driver: Driver
    metric: str
    healthy: float
    advice: str
    dimensions: tuple[Dimension, ...]
    relative: bool = False


SIGNALS: tuple[Signal, ...] = (
    Signal(
        "stale negatives",
        "far_negative",
        0.03,
        "bad answers that the policy has nearly given up are still pushed down: mask them (correction.sequence_mask) or take "
        "VESPO or SAMPO as the objective; fresher data help too (mixture)",
        ("clipping",),
    ),
    Signal(
        "policy drift",
        "kl_k3",
        0.2,
        "the policy has left its data behind: fewer updates on them (steps), fresher ones (mixture), or penalties.kl",
        ("clipping",),
    ),
    Signal(
        "gradient explosion",
        "grad_norm",
        8.0,
        "lower the learning rate or grad_clip",
        ("clipping",),
        relative=True,
    ),
    Signal(
        "entropy collapse",
        "entropy",
        1 / 8,
        "the policy answers the same whatever it is asked: penalties.entropy, clip-higher (dapo), diversity, or other prompts",
        ("clipping",),
        relative=True,
    ),
    Signal(
        "length growth",
        "response_length",
        2.0,
        "answers grow without end: overlong.longest or overlong.mask",
        ("aggregation",),
        relative=True,
    ),
    Signal(
        "format loss",
        "valid_format",
        0.75,
        "actions lose the form that the environment asks for: pay for it (advantage_options.penalty, with gigpo or "
        "group_norm_per_turn), or start from behaviour cloning",
        ("advantage", "filtering", "clipping"),
        relative=True,
    ),
)


@dataclass(frozen=True, slots=True)
class Rule:
    """How much must add up. The sum is in units of what is healthy.

    Attributes:
        alarm: the sum at which a departure is told.
        start: updates at the beginning of a run whose median is the start of a signal.
        most: the most that one update adds, so that no single outlier is a collapse.
    """

    alarm: float = 5.0
    start: int = 10
    most: float = 2.0


@dataclass(frozen=True, slots=True)
class Finding:
    """A departure.

    Attributes:
        onset: the update with which it began.
        noticed: the update at which it was told.
        before, after: median of the metric before the onset and from then to the end.
    """

    driver: Driver
    metric: str
    onset: int
    noticed: int
    before: float
    after: float
    advice: str


def find_collapse(curve: Sequence[Mapping[str, float]], rule: Rule = Rule()) -> tuple[Finding, ...]:
    """Return what departed in a run, first onset first; empty for a healthy one. The first names the likely driver.

    Args:
        curve: metrics of the updates in order, each with its `step`. A signal that is in none of them is not looked at; where
            only some have it (evaluations), those are looked at.
    """
    found = [finding for signal in SIGNALS if (finding := _followed(curve, signal, rule)) is not None]
    return tuple(sorted(found, key=lambda one: one.onset))  # of equal onsets the order of SIGNALS stands


def _followed(curve: Sequence[Mapping[str, float]], signal: Signal, rule: Rule) -> Finding | None:
    points = [(int(row["step"]), float(row[signal.metric])) for row in curve if signal.metric in row]
    if not points:
        return None
    start = median(value for _, value in points[: rule.start])
    total, onset = 0.0, 0
    for step, value in points[rule.start if signal.relative else 0 :]:
        onset = onset if total > 0 else step
        total = max(0.0, total + min(departure(value, start, signal) - 1, rule.most))
        if total >= rule.alarm:
            before = [v for s, v in points if s < onset] or [start]
            after = [v for s, v in points if s >= onset]
            return Finding(
                signal.driver, signal.metric, onset, step, median(before), median(after), signal.advice
            )
    return None


@dataclass(frozen=True, slots=True)
class Trace:
    """One signal, followed update by update: `find_collapse` without its memory of the whole curve.

    Attributes:
        first: its first values, up to `Rule.start` of them; until all are there a relative signal is not judged.
        total, onset: the cumulative sum, and the update at which it last left 0.
        noticed: the update at which it reached the alarm.
    """

    first: tuple[float, ...] = ()
    total: float = 0.0
    onset: int = 0
    noticed: int | None = None


@dataclass(frozen=True, slots=True)
class Watch:
    """All signals of a run while it goes on; by their metrics."""

    traces: Mapping[str, Trace] = field(default_factory=dict)

    def seen(self, step: int, metrics: Mapping[str, float], rule: Rule = Rule()) -> Watch:
        """The watch after update `step`; a metric that is not in `metrics` stays as it was."""
        seen = {
            signal.metric: _after(
                self.traces.get(signal.metric, Trace()), step, metrics[signal.metric], signal, rule
            )
            for signal in SIGNALS
            if signal.metric in metrics
        }
        return Watch({**self.traces, **seen})

    def anew(self) -> Watch:
        """The watch of a run that does something about a collapse: the same starts, nothing added up."""
        return Watch({metric: Trace(trace.first) for metric, trace in self.traces.items()})

    def suspected(self) -> int | None:
        """The earliest update since which a signal is above what is healthy; weights from before it are good."""
        return min((trace.onset for trace in self.traces.values() if trace.total > 0), default=None)

    def collapse(self) -> tuple[Driver, int] | None:
        """The likely driver and the onset, once a signal has reached the alarm."""
        found = [
            (trace.onset, signal.driver)
            for signal in SIGNALS
            if (trace := self.traces.get(signal.metric)) is not None and trace.noticed is not None
        ]
        if not found:
            return None
        onset, driver = min(found, key=lambda one: one[0])
        return driver, onset

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json`."""
        return {metric: asdict(trace) for metric, trace in self.traces.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Watch:
        """The watch of which `values` are the `to_json`."""
        return cls({metric: Trace(**{**one, "first": tuple(one["first"])}) for metric, one in values.items()})


def _after(trace: Trace, step: int, value: float, signal: Signal, rule: Rule) -> Trace:
    if trace.noticed is not None:
        return trace
    if len(trace.first) == rule.start:
        return _added(trace, step, value, signal, rule)
    trace = replace(trace, first=(*trace.first, value))
    return trace if signal.relative else _added(trace, step, value, signal, rule)


def _added(trace: Trace, step: int, value: float, signal: Signal, rule: Rule) -> Trace:
    if trace.noticed is not None:
        return trace
    onset = trace.onset if trace.total > 0 else step
    excess = min(departure(value, median(trace.first), signal) - 1, rule.most)
    total = max(0.0, trace.total + excess)
    return replace(trace, total=total, onset=onset, noticed=step if total >= rule.alarm else None)


def departure(value: float, start: float, signal: Signal) -> float:
    """Return how far a value is from harmless, 1 at the border: a quotient, or with `relative` one of logarithms.

    What is no number is infinitely far.
    """
    if not math.isfinite(value):
        return math.inf
    if not signal.relative:
        return value / signal.healthy
    return math.log(max(value, _TINY) / max(start, _TINY)) / math.log(signal.healthy)


_TINY = 1e-12  # in place of 0, of which there is no logarithm
