"""One section for each evidence file beside the answers, by the file's schema. Numbers are computed as the gate does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tasks.evaluation.off_policy import Estimator, Rule, compare
from tasks.evaluation.serving import Serving
from tasks.evaluation.statistics import clopper_pearson
from tasks.pages import figures
from tasks.pages.figures import Axis, Interval, Item
from tasks.pages.parts import (
    SIDES,
    Chart,
    Group,
    Row,
    Section,
    Strips,
    Table,
    bounded,
    number,
    plain,
)
from tasks.promotion.evidence.replay_value import read_log
from tasks.promotion.policy import Policy
from tasks.reward import metrics
from tasks.reward.checks import Check, judge_report

_ESTIMATORS: Mapping[Estimator, str] = {
    "is": "importance sampling",
    "wis": "weighted importance sampling",
    "pdis": "per decision",
    "pdwis": "weighted, per decision",
    "dr": "doubly robust",
    "wdr": "weighted doubly robust",
}
_COUNTED = ("leak", "frame")  # checks whose estimate is a count of findings and no share


def report_section(name: str, schema: str, content: Mapping[str, Any], policy: Policy) -> Section:
    """Return the section of a file; a schema that this version does not know is named and not guessed at."""
    draw = _SECTIONS.get(schema)
    if draw is None:
        title = plain(name[:1].upper() + name[1:].replace("_", " "))
        says = f"Its evidence is a {plain(schema)}, which this version of Forebay does not draw."
        return Section(title, (says, "The sentence above says what the gate made of it."))
    return draw(content, policy)


# ------------------------------------------------------------------------------------------------ reward model


def _reward(report: Mapping[str, Any], policy: Policy) -> Section:
    rule = policy.reward_model
    verdict, checks = judge_report(report, rule)
    counted = [check for check in checks if check.counts]
    source = report["source"]
    says = f"The {source['kind']} {source['digest'][:12]}: {verdict}, by {len(counted)} checks that count of {len(checks)}."
    axis = Axis.over(
        [0.0, 1.0, *(x for c in checks if _drawn(c) for x in (c.low, c.high, c.estimate))], room=0.03
    )
    rows = tuple(_check_row(check, axis) for check in checks)
    strips = Strips(("check", "estimate [interval]", "limit", "n"), (Group(rows, figures.ruler(axis)),))
    charts = [*_reliability(report, rule.alpha), *_best_of_n(report, rule.alpha)]
    notes = [f"{c.name}: {c.says}" for c in checks if c.counts and c.verdict != "PASS"]
    notes += [f"{c.name} does not count: {c.says}" for c in checks if not c.counts]
    return Section("Reward model", (says,), tuple(charts), strips, notes=tuple(map(plain, notes)))


def _drawn(check: Check) -> bool:
    return check.estimate is not None and check.name not in _COUNTED


def _check_row(check: Check, axis: Axis) -> Row:
    figure, words = None, ""
    if check.estimate is not None:
        value = Interval(check.estimate, check.low, check.high)
        words = bounded(value) if _drawn(check) else f"{check.estimate:.0f}"
        if _drawn(check):
            figure = figures.strip(
                axis, Item(check.name, check.verdict, value, check.limit, None, words, not check.counts)
            )
    limit = "" if check.limit is None else f"{check.limit:.0f}" if not _drawn(check) else number(check.limit)
    cells = (words, limit, "" if check.n is None else f"{check.n:,}")
    return Row(plain(check.name), figure, cells, check.verdict, "" if check.counts else "does not count")


def _reliability(report: Mapping[str, Any], alpha: float) -> list[Chart]:
    margins = [pair["margin"] for pair in report["preferences"]]
    if not margins or report["source"]["kind"] in ("verifier", "judge"):
        return []
    bars = metrics.reliability(margins)
    points = []
    for bar in bars:
        bounds = clopper_pearson(round(bar.accuracy * bar.n), bar.n, alpha=alpha)
        points.append((bar.confidence, Interval(bar.accuracy, *bounds), bar.n))
    told = "; ".join(f"{b.confidence:.2f} sure, {b.accuracy:.2f} right, {b.n} pairs" for b in bars)
    return [
        Chart(
            figures.reliability_diagram(points, f"reliability: {told}"),
            "Calibration on held-out pairs: on the dashed line the model is right exactly as often as it says. "
            f"Intervals of {1 - 2 * alpha:.0%} as if pairs were independent; the numbers count pairs.",
            (("candidate", "held-out pairs"),),
        )
    ]


def _best_of_n(report: Mapping[str, Any], alpha: float) -> list[Chart]:
    curve = metrics.best_of_n(report, alpha)
    if len(curve) < 2:
        return []
    xs = [point.n for point in curve]
    gold = [Interval(point.gold, point.low, point.high) for point in curve]
    best = [Interval(point.best) for point in curve]
    prompts = metrics.answers_of(report["samples"])
    spread = [metrics.spread_within(prompts, name) or 1.0 for name in ("score", "gold")]
    liked = [Interval((point.proxy - curve[0].proxy) / spread[0]) for point in curve]
    earned = [Interval((point.gold - curve[0].gold) / spread[1]) for point in curve]
    told = ", ".join(f"n = {point.n}: {point.gold:.3f}" for point in curve)
    return [
        Chart(
            figures.curves(
                xs,
                [("candidate", gold), ("champion", best)],
                f"verified reward of the best of n: {told}",
                below="best of n answers",
                beside="verified reward",
            ),
            "Best of n of the policy's own answers: what choosing by the reward model truly earns, and what choosing by the "
            "verifier would.",
            (("candidate", "by the reward model"), ("champion", "by the verifier")),
        ),
        Chart(
            figures.curves(
                xs,
                [("candidate", earned), ("baseline", liked)],
                "gain over n = 1 by the reward model and by the verifier",
                below="best of n answers",
                beside="gain, in spreads",
            ),
            "Proxy against gold: the gain over n = 1, each in standard deviations within a prompt. "
            "Where the lines part, the reward model is exploited.",
            (("candidate", "verified"), ("baseline", "reward model")),
        ),
    ]


# ------------------------------------------------------------------------------- serving, replay, proxy, training


def _serving(report: Mapping[str, Any], policy: Policy) -> Section:
    sides = {side: Serving.from_json(report[side]) for side in SIDES}
    told = [f"The {side} does not serve: {plain(one.problem)}." for side, one in sides.items() if not one.ok]
    figures_of: tuple[tuple[str, Callable[[Serving], str]], ...] = (
        ("loading, seconds", lambda one: number(one.load_seconds)),
        ("an answer, seconds, median", lambda one: number(one.answer_seconds(0.5))),
        ("an answer, seconds, 95th percentile", lambda one: number(one.answer_seconds(0.95))),
        ("work that is compared, milliseconds", lambda one: number(1000 * one.cost())),
        ("memory, MiB", lambda one: number(one.gpu_mib or one.memory_mib)),
        ("the same answers each time", lambda one: "yes" if one.repeated else "no"),
        ("answers of", lambda one: f"{len(one.tokens)} prompts, {sum(one.tokens):,} tokens"),
    )
    rows = tuple(
        (name, *(show(one) if one.ok else "–" for one in sides.values())) for name, show in figures_of
    )
    where = ", ".join(f"{key} {plain(str(value))}" for key, value in sorted(report["conditions"].items()))
    says = (
        f"Each agent was loaded by a clean process, one after the other, under the same conditions: {where}."
    )
    return Section("Serving", (says, *told), table=Table(("", "candidate", "champion"), rows))


def _replay_value(report: Mapping[str, Any], policy: Policy) -> Section:
    title, rule = "On logged traffic", policy.replay_value
    if report["log"] is None:
        return Section(title, (plain(report["problem"]),))
    log, candidate, champion = read_log(report)
    by = Rule(margin=rule.margin, alpha=rule.alpha, min_ess=rule.min_ess, looks=rule.looks)
    once = rule.looks == "once"
    found = {name: compare(log, candidate, champion, replace(by, estimator=name)) for name in _ESTIMATORS}
    values = {
        name: Interval(e.estimate, *((e.low, e.high) if once else (e.anytime_low, e.anytime_high)))
        for name, e in found.items()
    }
    axis = Axis.over([0.0, rule.margin, *(x for v in values.values() for x in (v.estimate, v.low, v.high))])
    rows = []
    for name, e in found.items():
        words = bounded(values[name], signed=True)
        item = Item(
            _ESTIMATORS[name], e.verdict, values[name], rule.margin, None, words, name != by.estimator
        )
        told = "" if name == by.estimator else "for comparison"
        rows.append(Row(item.name, figures.strip(axis, item), (words,), e.verdict, told))
    weights = found[by.estimator].overlap
    shown: tuple[tuple[str, Callable[[Any], str]], ...] = (
        ("effective answers", lambda o: number(o.ess)),
        ("share of the log that speaks", lambda o: number(o.ess_share)),
        ("effective prompts", lambda o: number(o.prompts)),
        ("weight of the heaviest 1 %", lambda o: number(o.top_share)),
        ("answers with a cut weight", lambda o: number(o.cut)),
        ("share not in the log", lambda o: number(o.missing)),
    )
    e = found[by.estimator]
    return Section(
        title,
        (
            f"What both agents would have earned on {e.n:,} logged answers to {e.prompts:,} prompts that neither was trained "
            f"on, by {len(found)} estimators; the gate's is the {_ESTIMATORS[by.estimator]} one. {' '.join(e.reasons)}",
        ),
        strips=Strips(
            ("estimator", "difference [interval]"),
            (
                Group(
                    tuple(rows),
                    figures.ruler(axis, left="champion better", right="candidate better", signed=True),
                ),
            ),
        ),
        table=Table(
            ("overlap with the log", "candidate", "champion"), tuple((n, *map(f, weights)) for n, f in shown)
        ),
    )


def _proxy(report: Mapping[str, Any], policy: Policy) -> Section:
    margins = np.array([row["candidate"] - row["champion"] for row in report["answers"]])
    edges = np.linspace(-1, 1, 21)
    counts = np.histogram(np.tanh(margins[margins != 0] / 2), bins=edges)[0]
    says = (
        f"The reward model {report['reward'][:12]} scored both answers to {len(margins):,} held-out tasks: it liked the "
        f"candidate's better in {int((margins > 0).sum())}, the champion's in {int((margins < 0).sum())}, neither in "
        f"{int((margins == 0).sum())}."
    )
    caption = (
        "How much it prefers the candidate's answer where it prefers one: +1 surely better, −1 surely worse."
    )
    drawn = (
        (Chart(figures.histogram(edges.tolist(), counts.tolist(), says), caption),) if counts.any() else ()
    )
    return Section("What the reward model thinks of the answers", (says,), drawn)


def _run(report: Mapping[str, Any], policy: Policy) -> Section:
    shown = (
        ("updates", "steps"),
        ("why it stopped", "stop_reason"),
        ("KL from what it learnt from, nats a token", "kl_k3"),
        ("seconds", "seconds"),
        ("seconds of processor time", "cpu_seconds"),
        ("memory, MiB", "memory_mib"),
        ("tokens trained on", "tokens"),
    )
    rows = tuple((name, _value(report[key])) for name, key in shown if report.get(key) is not None)
    return Section("Training", table=Table((f"run {plain(str(report['run']))[:12]}", ""), rows))


def _value(value: Any) -> str:
    return (
        f"{value:,}"
        if isinstance(value, int)
        else number(value)
        if isinstance(value, float)
        else plain(str(value))
    )


_SECTIONS: Mapping[str, Callable[[Mapping[str, Any], Policy], Section]] = {
    "forebay.reward/2": _reward,
    "forebay.serving/1": _serving,
    "forebay.replay_value/1": _replay_value,
    "forebay.proxy/1": _proxy,
    "forebay.run/1": _run,
}
ORDER = ("outcomes", "reward", "proxy", "replay_value", "serving", "run")
"""In which inputs of a decision are shown; others follow."""
