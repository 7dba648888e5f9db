"""One HTML page for one gate decision: the verdict, the reasons in words, every interval, and how to check it all.

A page is derived: it follows from the decision's record, the evidence files that the record names (their digests are
checked) and what the ledger says about who recorded it, and equal ones give equal bytes. It stands alone: no script, no other
file, no network. What agents wrote is shown as text, cut where it is long.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup

from tasks.core.digest import sha256_bytes
from tasks.core.errors import Corrupt, NotFound
from tasks.evaluation.paired import Pair, PairedOutcomes, read_outcomes
from tasks.evaluation.statistics import Estimate, clustered_mean, wilson
from tasks.promotion import figures
from tasks.promotion.figures import Axis, Interval
from tasks.reward.metrics import Bin, calibration_error, pair_accuracy, reliability

_SHOWN = 3  # tasks that the candidate won, and as many that it lost
_CUT = 700  # characters of an answer
_OUTCOMES = "forebay.outcomes/1"
_UNITS = {"reward model": "share"}  # of records that do not say the unit of an item


@dataclass(frozen=True)
class Recorded:
    """What the ledger says about a decision beside its record. `key` is the id of the key that signed."""

    entry: int
    time: str
    signed_by: str | None = None
    key: str | None = None


def read_record(path: Path) -> bytes:
    """Return the record at evidence/decisions/<digest>.json, whose bytes must be those of its name.

    Raises:
        NotFound, Corrupt: there is none, or it was changed.
    """
    return _checked(path, path.stem)


def render(record: bytes, evidence: Path, recorded: Recorded | None = None) -> str:
    """Return the page of a decision.

    Args:
        record: the bytes of the decision's record, of any version.
        evidence: folder with the evidence files that it names.
        recorded: what the ledger says about it; None where it is in no ledger.

    Raises:
        NotFound, Corrupt: an evidence file is missing, or is not what its digest says.
    """
    decision = json.loads(record)
    sources = dict(_sources(decision["inputs"], evidence))
    outcomes = next((s.outcomes for s in sources.values() if s.outcomes is not None), None)
    agents = tuple(f"agent/{decision[side]['version']}" for side in ("candidate", "champion"))
    page: str = _template().render(
        style=Markup(figures.STYLE),
        decision=decision,
        digest=sha256_bytes(record),
        candidate=agents[0],
        champion=agents[1],
        recorded=recorded,
        time=None
        if recorded is None
        else datetime.fromisoformat(recorded.time).strftime("%Y-%m-%d %H:%M:%S UTC"),
        mark=figures.verdict_mark,
        headline=headline(decision),
        lead=lead(decision),
        score=None if outcomes is None else _score(outcomes),
        steps=next_steps(decision),
        forest=forest(decision["evidence"]),
        slices=None if outcomes is None else _slices(outcomes, decision["policy"]),
        differences=None if outcomes is None else _differences(outcomes),
        answers=None if outcomes is None else _answers(outcomes),
        budgets=_budgets(decision),
        reports=[_report(name, s, decision["policy"]) for name, s in sources.items() if s.outcomes is None],
        policy=yaml.safe_dump(decision["policy"], sort_keys=False),
        digests=_digests(decision, sha256_bytes(record)),
    )
    return page


def headline(decision: Mapping[str, Any]) -> str:
    """Say the verdict in one sentence: who is (not) promoted over whom, and why."""
    candidate, champion = (f"agent/{decision[side]['version']}" for side in ("candidate", "champion"))
    counted = [item for item in decision["evidence"] if item["counts"]]
    deciding = [item["name"] for item in counted if item["verdict"] == decision["verdict"]]
    if decision["verdict"] == "PASS":
        condition = " once a person approves" if decision["policy"].get("approval") == "required" else ""
        passes = (
            "the only required piece of evidence passes"
            if len(counted) == 1
            else f"all {len(counted)} required pieces of evidence pass"
        )
        return f"{candidate} may replace {champion}{condition}: {passes}."
    what = "failed" if decision["verdict"] == "FAIL" else "left the question open"
    of = "" if len(counted) <= 1 else f"of {len(counted)} required pieces of evidence, "
    return f"{candidate} is not promoted over {champion}: {of}{_and(deciding)} {what}."


def lead(decision: Mapping[str, Any]) -> list[str]:
    """Return the sentences behind the verdict: all that stand in the way, or the gain where nothing does."""
    if decision["verdict"] != "PASS":
        return list(decision["reasons"])
    gains = [item["says"] for item in decision["evidence"] if item["name"] == "quality"]
    return gains or list(decision["reasons"][:1])


def next_steps(decision: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what a reader can do now: (command, what it does)."""
    candidate, champion = (f"agent/{decision[side]['version']}" for side in ("candidate", "champion"))
    if decision["verdict"] != "PASS":
        retry = (
            "Trains another candidate on new experience; the gate asks again."
            if decision["verdict"] == "FAIL"
            else "Brings more experience and another candidate. More tasks in `evaluation.tasks` find smaller gains."
        )
        return [
            ("forebay status", f"Who is in office: this decision changes nothing, {champion} stays."),
            ("forebay retrain --collect always", retry),
        ]
    steps = [
        (f"forebay promote {candidate}", f"Puts it in office, if {champion} is still the champion."),
        ('forebay rollback --reason "…"', f"Puts {champion} back afterwards, with a record."),
        (f'forebay reject {candidate} --reason "…"', "Never lets this decision act, whatever its verdict."),
    ]
    if decision["policy"].get("approval") == "required":
        return [(f"forebay approve {candidate}", "A person signs with their own key; needed first."), *steps]
    return [("forebay status", "Who is in office now: a cycle promotes by itself."), *steps]


# ------------------------------------------------------------------------------------------- all evidence


@dataclass(frozen=True)
class Row:
    """One item of evidence with a number, as a line of a forest plot."""

    name: str
    verdict: str
    counts: bool
    figure: Markup
    value: str
    n: str
    mde: str
    margin: str


@dataclass(frozen=True)
class Group:
    """The items of one unit, on one axis."""

    title: str
    rows: tuple[Row, ...]
    ruler: Markup


def forest(items: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Return the forest plot: items with an estimate by unit, in the order in which the gate weighed them."""
    return [_group(unit, members) for unit, members in _by_unit(items).items()]


def forest_picture(items: Sequence[Mapping[str, Any]]) -> str:
    """Return the forest plot as one SVG file with its own colours, for places that show a picture only."""
    return figures.forest(
        [
            (_unit_title(unit), _axis(members), _ends(unit), [_item(unit, item) for item in members])
            for unit, members in _by_unit(items).items()
        ]
    )


def _by_unit(items: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for item in items:
        if item.get("estimate") is not None:
            unit = item.get("unit") or _UNITS.get(item["name"], "mean reward")
            groups.setdefault(unit, []).append(item)
    return dict(
        sorted(groups.items(), key=lambda group: group[0] != "mean reward")
    )  # what it is about comes first


def _axis(items: Sequence[Mapping[str, Any]]) -> Axis:
    """Return one axis for all items of a unit; it holds zero, so that lengths can be compared."""
    return Axis.over([0.0, *(item.get(x) for item in items for x in ("estimate", "low", "high", "margin"))])


def _group(unit: str, items: Sequence[Mapping[str, Any]]) -> Group:
    axis, signed = _axis(items), unit == "mean reward"
    left, right = _ends(unit)
    rows = []
    for item in items:
        line = _item(unit, item)
        rows.append(
            Row(
                item["name"],
                item["verdict"],
                item["counts"],
                figures.strip(axis, line),
                line.words,
                "" if item.get("n") is None else f"{item['n']:,}",
                "" if item.get("mde") is None else number(item["mde"], unit, signed=False),
                "" if item.get("margin") is None else number(item["margin"], unit),
            )
        )
    return Group(_unit_title(unit), tuple(rows), figures.ruler(axis, left=left, right=right, signed=signed))


def _item(unit: str, item: Mapping[str, Any]) -> figures.Item:
    margin, mde = item.get("margin"), item.get("mde")
    return figures.Item(
        name=item["name"],
        verdict=item["verdict"],
        value=Interval(item["estimate"], item.get("low"), item.get("high")),
        margin=margin,
        found=margin + mde if margin is not None and mde is not None else None,
        words=_interval(item, unit),
    )


def _unit_title(unit: str) -> str:
    return "Mean reward, candidate less champion" if unit == "mean reward" else unit[:1].upper() + unit[1:]


def _ends(unit: str) -> tuple[str, str]:
    return ("champion better", "candidate better") if unit == "mean reward" else ("", "")


def _interval(item: Mapping[str, Any], unit: str) -> str:
    estimate, low, high = (item.get(name) for name in ("estimate", "low", "high"))
    if low is None and high is None:
        return number(estimate, unit)
    if low is None or high is None:
        return f"{number(estimate, unit)} [{'≤' if low is None else '≥'} {number(high if low is None else low, unit)}]"
    return f"{number(estimate, unit)} [{number(low, unit)}, {number(high, unit)}]"


def number(value: float | None, unit: str = "", *, signed: bool | None = None) -> str:
    """Write a number of a unit: differences of reward with their sign, large ones without decimals."""
    if value is None:
        return ""
    plus = "+" if (unit == "mean reward" if signed is None else signed) and value else ""
    text = f"{value:{plus},.0f}" if abs(value) >= 1000 else f"{value:{plus}.{1 if abs(value) >= 100 else 3}f}"
    return text.replace("-", "−")


def _score(outcomes: PairedOutcomes) -> str:
    candidate, champion, _ = outcomes.rewards()
    constant = _mean_baseline(outcomes)
    beside = "" if constant is None else f", the best constant answers {constant:.3f}"
    return (
        f"On {len(candidate):,} held-out tasks the candidate earns {candidate.mean():.3f} of 1, "
        f"the champion {champion.mean():.3f}{beside}."
    )


# ------------------------------------------------------------------------------------------- the outcomes


def _slices(outcomes: PairedOutcomes, policy: Mapping[str, Any]) -> dict[str, Any]:
    alpha = policy.get("guards", {}).get("alpha", 0.05)
    axis = Axis(-0.02, 1.02)
    rows = []
    for env in [*outcomes.slices(), None]:
        candidate, champion, clusters = outcomes.rewards(env)
        sides = [clustered_mean(x, clusters, alpha=alpha, support=(0.0, 1.0)) for x in (candidate, champion)]
        gain = outcomes.difference(env, alpha=alpha)
        constant = outcomes.baselines.get(env) if env else None
        baseline = constant.score if constant else _mean_baseline(outcomes) if env is None else None
        label = (
            f"{env or 'all tasks'}: candidate {sides[0].estimate:.3f}, champion {sides[1].estimate:.3f}"
            + ("" if baseline is None else f", constant answer {baseline:.3f}")
        )
        rows.append(
            {
                "env": env,
                "n": len(candidate),
                "candidate": sides[0],
                "champion": sides[1],
                "baseline": baseline,
                "answer": None if constant is None else plain(constant.answer)[:40],
                "gain": _words(gain),
                "won": int((candidate > champion).sum()),
                "lost": int((candidate < champion).sum()),
                "tied": int((candidate == champion).sum()),
                "figure": figures.means(
                    axis, _as_interval(sides[0]), _as_interval(sides[1]), baseline, label
                ),
            }
        )
    return {"rows": rows, "confidence": 1 - 2 * alpha, "ruler": figures.ruler(axis)}


def _mean_baseline(outcomes: PairedOutcomes) -> float | None:
    scores = [outcomes.baselines.get(pair.env) for pair in outcomes.pairs]
    known = [found.score for found in scores if found is not None]
    return sum(known) / len(known) if len(known) == len(scores) else None


def _differences(outcomes: PairedOutcomes) -> dict[str, Any]:
    candidate, champion, _ = outcomes.rewards()
    found = np.round(candidate - champion, 9)
    differing = found[found != 0]
    whole = bool(np.isin(found, (-1.0, 0.0, 1.0)).all())
    edges = np.linspace(-1, 1, 21)
    counts = np.histogram(differing, bins=edges)[0]
    n, ties = len(found), int((found == 0).sum())
    label = f"{n} paired answers: {ties} alike, {int((found > 0).sum())} won, {int((found < 0).sum())} lost"
    return {
        "n": n,
        "ties": ties,
        "won": int((found > 0).sum()),
        "lost": int((found < 0).sum()),
        "whole": whole,
        "label": label,
        "figure": None if whole else figures.histogram(edges.tolist(), counts.tolist(), label),
    }


def _answers(outcomes: PairedOutcomes) -> list[dict[str, Any]]:
    """Return a few tasks that the candidate won and a few that it lost: the greatest differences, spread over environments."""
    sides = []
    for title, sign in (("Won by the candidate", 1), ("Lost by the candidate", -1)):
        rank: dict[str, int] = {}
        ranked = []
        for pair in sorted((p for p in outcomes.pairs if sign * _gain(p) > 0), key=_telling):
            rank[pair.env] = rank.get(pair.env, 0) + 1
            ranked.append((rank[pair.env], pair.env, pair))
        ranked.sort(key=lambda found: found[:2])
        shown = [
            {
                "env": plain(pair.env),
                "task": plain(pair.task_id.removeprefix(f"{pair.env}/")),
                "sides": [
                    (pair.champion_reward, *_cut(pair.champion_response)),
                    (pair.candidate_reward, *_cut(pair.candidate_response)),
                ],
            }
            for _, _, pair in ranked[:_SHOWN]
        ]
        sides.append({"title": title, "count": len(ranked), "shown": shown})
    return sides


def _gain(pair: Pair) -> float:
    return pair.candidate_reward - pair.champion_reward


def _telling(pair: Pair) -> tuple[float, str]:
    """Order by how much the agents differ; among equals by a digest, which no one has chosen."""
    return -abs(_gain(pair)), sha256_bytes(f"{pair.env}/{pair.task_id}/{pair.sample}".encode())


def _cut(response: str) -> tuple[str, int]:
    """Return the first part of an answer as plain text, and how many characters were left out."""
    return plain(response[:_CUT]), max(0, len(response) - _CUT)


def plain(text: str) -> str:
    """Return text in which every character is one that a reader can see: controls are named, nothing turns its direction."""
    return "".join(
        char
        if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn")
        else f"⟨{ord(char):04X}⟩"
        for char in text
    )


# ------------------------------------------------------------------------------------ budgets and reports


def _budgets(decision: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the two accounts that a decision draws on, as they were after it; older records have none."""
    spent, policy = decision["inputs"].get("spent"), decision["policy"]
    if spent is None or "errors" not in policy:
        return []
    alpha, uses = policy["errors"]["alpha"], policy["evaluation_set"]["uses"]
    error = decision.get("error", 0.0)
    return [
        {
            "name": "Error of the gate against this champion",
            "says": f"{spent['error']:.4g} spent before, {error:.4g} by this decision, "
            f"{max(0.0, alpha - spent['error'] - error):.4g} of {alpha:.4g} left",
            "figure": figures.gauge(
                [(spent["error"], "champion", "spent before"), (error, "candidate", "this decision")],
                alpha,
                f"error budget: {spent['error'] + error:.4g} of {alpha:.4g} spent",
            ),
        },
        {
            "name": "Uses of the held-out tasks",
            "says": f"{spent['uses']} before, this is use {spent['uses'] + 1} of {uses}",
            "figure": figures.gauge(
                [(spent["uses"], "champion", "uses before"), (1, "candidate", "this decision")],
                max(uses, spent["uses"] + 1),
                f"evaluation set: {spent['uses'] + 1} of {uses} uses",
            ),
        },
    ]


def _report(name: str, source: _Source, policy: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section about an evidence file; a format that this version does not know is named and not guessed at."""
    draw = _REPORTS.get(source.schema)
    title = name[:1].upper() + name[1:].replace("_", " ")
    empty = dict.fromkeys(("says", "checks", "slices", "charts"))
    section = {**empty, "title": title, "schema": source.schema, "path": source.path}
    return section if draw is None else {**section, **draw(source.content, policy)}


def _reward_pairs(report: Mapping[str, Any], policy: Mapping[str, Any]) -> dict[str, Any]:
    """Draw a reward model's margins on held-out pairs (forebay.reward/1)."""
    pairs = report["pairs"]
    if not pairs:
        return {"title": "Reward model", "says": "There was no held-out pair to validate it on."}
    rule = policy["reward_model"]
    margins, groups = [p["margin"] for p in pairs], [p["group_id"] for p in pairs]
    bars = reliability(margins)
    accuracy = pair_accuracy(margins, groups, alpha=rule["alpha"])
    axis, rows = Axis(-0.02, 1.02), []
    for env in [*sorted({p["env"] for p in pairs}), None]:
        of = [i for i, p in enumerate(pairs) if env in (None, p["env"])]
        part = pair_accuracy([margins[i] for i in of], [groups[i] for i in of], alpha=rule["alpha"])
        verdict = (
            "PASS"
            if part.low > rule["min_accuracy"]
            else "FAIL"
            if part.high < rule["min_accuracy"]
            else "INCONCLUSIVE"
        )
        words = _words(part, signed=False)
        line = figures.Item(
            env or "all pairs", verdict, _as_interval(part), rule["min_accuracy"], None, words
        )
        rows.append(
            {"name": env or "all pairs", "n": part.n, "words": words, "figure": figures.strip(axis, line)}
        )
    return {
        "title": "Reward model",
        "says": f"The right answer scored higher in {accuracy.estimate:.3f} of {accuracy.n} pairs of prompts "
        f"that the model was not trained on; expected calibration error {calibration_error(bars):.3f}, "
        f"allowed {rule['max_ece']:.2f}.",
        "charts": [
            {
                "figure": figures.reliability_diagram(
                    [(bar.confidence, _right(bar, rule["alpha"]), bar.n) for bar in bars],
                    "reliability: "
                    + "; ".join(
                        f"{b.confidence:.2f} sure, {b.accuracy:.2f} right, {b.n} pairs" for b in bars
                    ),
                ),
                "caption": "Calibration: on the dashed line the model is right exactly as often as it says. "
                f"Wilson intervals of {1 - 2 * rule['alpha']:.0%}; the numbers count pairs.",
            }
        ],
        "slices": {"rows": rows, "ruler": figures.ruler(axis), "confidence": 1 - 2 * rule["alpha"]},
    }


def _right(bar: Bin, alpha: float) -> Interval:
    """Return the share right of a bar's pairs; a tie is half right, so the count may be a half and is rounded."""
    return Interval(bar.accuracy, *wilson(round(bar.accuracy * bar.n), bar.n, alpha=alpha))


_REPORTS = {"forebay.reward/1": _reward_pairs}


# -------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class _Source:
    """An evidence file that was read with its digest checked."""

    path: str
    schema: str
    outcomes: PairedOutcomes | None
    content: Any


def _sources(inputs: Mapping[str, Any], evidence: Path) -> Iterator[tuple[str, _Source]]:
    """Yield every evidence file that the inputs of a decision name, at whatever depth."""
    for name, value in inputs.items():
        if not isinstance(value, Mapping):
            continue
        if value.keys() >= {"path", "sha256"}:
            yield name, _source(evidence / value["path"], value)
        else:
            yield from _sources(value, evidence)


def _source(path: Path, ref: Mapping[str, str]) -> _Source:
    data = _checked(path, ref["sha256"])
    try:
        content = json.loads(data if path.suffix == ".json" else data.split(b"\n", 1)[0])
    except ValueError:
        content = None
    schema = content.get("schema", "") if isinstance(content, Mapping) else ""
    if schema == _OUTCOMES:
        return _Source(ref["path"], schema, read_outcomes(path, ref["sha256"]), None)
    return _Source(ref["path"], schema or f"{path.suffix} file", None, content)


def _checked(path: Path, sha256: str) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"There is no {path.name} in {path.parent}; restore it from a backup.") from None
    if sha256_bytes(data) != sha256:
        raise Corrupt(
            f"{path} was changed: its bytes are not those of the digest {sha256[:12]}…, so no page is drawn from it."
        )
    return data


def _digests(decision: Mapping[str, Any], digest: str) -> list[tuple[str, str]]:
    """Return (what, SHA-256) of everything the decision names; evidence that lies in one file has one line."""
    found = {
        digest: ["decision"],
        decision["candidate"]["digest"]: [f"agent/{decision['candidate']['version']}, candidate"],
        decision["champion"]["digest"]: [f"agent/{decision['champion']['version']}, champion"],
        decision["policy_digest"]: ["policy"],
    }
    for item in decision["evidence"]:
        if item["digest"]:
            found.setdefault(item["digest"], []).append(item["name"])
    for env, tasks in decision.get("tasks", {}).items():
        found.setdefault(tasks, []).append(f"held-out tasks of {env}")
    return [(plain(", ".join(names)), value) for value, names in found.items()]


def _as_interval(found: Estimate) -> Interval:
    return Interval(found.estimate, found.low, found.high)


def _words(found: Estimate, *, signed: bool = True) -> str:
    values = (number(x, signed=signed) for x in (found.estimate, found.low, found.high))
    return "{} [{}, {}]".format(*values)


def _and(names: Sequence[str]) -> str:
    return (
        names[0]
        if len(names) == 1
        else f"{', '.join(names[:-1])} and {names[-1]}"
        if names
        else "no evidence"
    )


@lru_cache(maxsize=1)
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["plain"] = plain
    return environment.from_string((files("tasks.promotion") / "page.html.jinja").read_text("utf-8"))
