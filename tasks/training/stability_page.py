"""One run on a page: its curves, where it began to collapse, what drives that, and what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tasks.pages import figures
from tasks.pages.parts import Chart, Section, Table, plain
from tasks.pages.templates import template
from tasks.training.stability import Finding

_CURVES = (
    ("reward_estimate", "Reward, estimated for the policy in training"),
    ("far_negative", "Push on bad answers that are nearly given up, a share of all"),
    ("kl_k3", "KL from the policies that sampled, nats a token"),
    ("ess", "Effective sample size, a share of the batch"),
    ("entropy", "Entropy, nats a token"),
    ("grad_norm", "Norm of the gradient"),
    ("mass_negative_below", "Push on tokens with A < 0 and a ratio below 1, a share of all"),
    ("mass_negative_above", "Push on tokens with A < 0 and a ratio above 1"),
    ("mass_positive_below", "Push on tokens with A > 0 and a ratio below 1"),
    ("mass_positive_above", "Push on tokens with A > 0 and a ratio above 1"),
    ("kl_mass_negative_below", "KL on tokens with A < 0 and a ratio below 1, a share of all"),
    ("kl_mass_negative_above", "KL on tokens with A < 0 and a ratio above 1"),
    ("kl_mass_positive_below", "KL on tokens with A > 0 and a ratio below 1"),
    ("kl_mass_positive_above", "KL on tokens with A > 0 and a ratio above 1"),
    (
        "kl_mass_negative_below_high",
        "KL on tokens with A < 0, a ratio below 1 and an entropy above the median",
    ),
    ("clipped_negative", "Tokens with A < 0 without a gradient"),
    ("clipped_positive", "Tokens with A > 0 without a gradient"),
    ("masked_sequences", "Sequences that the sequence mask removed"),
    ("phi_dead", "Sequences that teach nothing"),
    ("response_length", "Tokens an episode"),
    ("valid_format", "Turns whose action had the right form and was possible"),
)
"""What ARLArena tracks (arXiv 2602.21534), as far as every update reports it."""


@dataclass(frozen=True)
class Run:
    """What a page is about: the run's key, how many updates it made, why it ended, and what it is called."""

    key: str
    steps: int
    stop_reason: str
    what: str = "run"


def verdict(findings: Sequence[Finding]) -> str:
    """Return in a sentence what was found."""
    if not findings:
        return "Healthy: no signal of a collapse in its updates."
    first = findings[0]
    return (
        f"It began to collapse at update {first.onset}, by {first.driver}; this could be told at update "
        f"{first.noticed}."
    )


def stability_page(run: Run, curve: Sequence[Mapping[str, float]], findings: Sequence[Finding]) -> str:
    """Return the page as HTML; it loads nothing from elsewhere."""
    onset = findings[0].onset if findings else None
    charts = []
    for name, says in _CURVES:
        points = [(row["step"], row[name]) for row in curve if math.isfinite(row.get(name, math.nan))]
        if len(points) > 1:
            caption = f"{says}: {points[0][1]:.3g} to {points[-1][1]:.3g}."
            charts.append(Chart(figures.course(points, caption, below="update", marked=onset), caption))
    heads = ("driver", "metric", "began", "noticed", "before", "since")
    rows = tuple(
        (f.driver, f.metric, str(f.onset), str(f.noticed), f"{f.before:.4g}", f"{f.after:.4g}")
        for f in findings
    )
    notes = tuple(plain(f"{f.driver}: {f.advice}.") for f in findings)
    departed = Section("What departed, first what began first", table=Table(heads, rows), notes=notes)
    sections = (*([departed] if rows else []), Section("Curves", charts=tuple(charts)))
    page = template("tasks.training", "stability.html.jinja")
    return str(page.render(run=run, says=verdict(findings), bad=bool(findings), sections=sections))
