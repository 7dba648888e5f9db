"""The page of a decision as one HTML file.

A page is derived: it follows from the decision's record, the evidence files that the record names (their digests are
checked) and what the ledger says about who recorded it, and equal ones give equal bytes. It stands alone: no script, no other
file, no network. What agents wrote is shown as text, cut where it is long.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup
from pydantic import ValidationError

from tasks.core.digest import sha256_bytes
from tasks.core.errors import Corrupt, NotFound, Refused
from tasks.evaluation.paired import PairedOutcomes, read_outcomes
from tasks.pages import figures
from tasks.pages.parts import Chart, Section, Strips, listed, plain
from tasks.pages.templates import template
from tasks.promotion.page import answers
from tasks.promotion.page.forest import forest
from tasks.promotion.page.reports import ORDER, report_section
from tasks.promotion.policy import Policy
from tasks.promotion.promote import Office

_OUTCOMES = "forebay.outcomes/"
_REWARDS = "forebay.reward_decision/"
_NOBODY = "nobody"  # whom the first reward model in office is compared with


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
        Refused: the record's policy is none that this version understands.
    """
    decision = json.loads(record)
    policy = policy_of(decision)
    found = list(_sources(decision["inputs"], evidence))
    outcomes = next((source.outcomes for _, source in found if source.outcomes is not None), None)
    page: str = template("tasks.promotion.page", "page.html.jinja").render(
        decision=decision,
        digest=sha256_bytes(record),
        agents=_agents(decision),
        recorded=recorded,
        time=None if recorded is None else _moment(recorded.time),
        headline=headline(decision),
        lead=lead(decision),
        steps=next_steps(decision, sha256_bytes(record)),
        power=policy.superiority.power,
        forest=forest(decision["evidence"]),
        confidence=1 - 2 * policy.guards.alpha,
        outcomes=outcomes and _Outcomes.of(outcomes, decision["evidence"], policy),
        reports=_reports(found, policy),
        budgets=_budgets(decision, policy),
        policy=yaml.safe_dump(decision["policy"], sort_keys=False),
        digests=_digests(decision, sha256_bytes(record)),
    )
    return page


def headline(decision: Mapping[str, Any]) -> str:
    """Say the verdict in one sentence: who is (not) promoted over whom, and why."""
    candidate, champion = _agents(decision)
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
    return f"{candidate} is not promoted over {champion}: {of}{listed(deciding) or 'no evidence'} {what}."


def lead(decision: Mapping[str, Any]) -> list[str]:
    """Return the sentences behind the verdict: all that stand in the way, or the gain where nothing does."""
    if decision["verdict"] != "PASS":
        return list(decision["reasons"])
    gains = [item["says"] for item in decision["evidence"] if item["name"] == "quality"]
    return gains or list(decision["reasons"][:1])


def next_steps(decision: Mapping[str, Any], digest: str) -> list[tuple[str, str]]:
    """Return what a reader can do now: (command, what it does)."""
    candidate, champion = _agents(decision)
    if _office(decision) == "reward":
        return _reward_steps(decision, digest)
    if decision["verdict"] != "PASS":
        retry = "Brings new experience and another candidate; the gate asks again."
        if any(e["verdict"] == "INCONCLUSIVE" and _about_tasks(e["name"]) for e in decision["evidence"]):
            retry += " More tasks in `evaluation.tasks` find smaller gains."
        return [
            ("forebay status", f"Who is in office: this decision changes nothing, {champion} stays."),
            ("forebay retrain --collect always", retry),
        ]
    steps = [
        (f"forebay promote {candidate}", f"Puts it in office, if {champion} is still the champion."),
        ('forebay rollback --reason "…"', f"Puts {champion} back afterwards, with a record."),
        (f'forebay reject {candidate} --reason "…"', "Never lets this decision act, whatever its verdict."),
    ]
    first = _approving(decision, digest) or [
        ("forebay status", "Who is in office now: a cycle promotes by itself.")
    ]
    return first + steps


def _reward_steps(decision: Mapping[str, Any], digest: str) -> list[tuple[str, str]]:
    candidate, champion = _agents(decision)
    if decision["verdict"] != "PASS":
        return [
            ("forebay reward list", f"Who is in office: this decision changes nothing, {champion} stays."),
            (f"forebay reward validate {candidate}", "Validates it again; then `forebay reward decide`."),
        ]
    back = (
        []
        if champion == _NOBODY
        else [('forebay reward rollback --reason "…"', f"Puts {champion} back afterwards, with a record.")]
    )
    return [
        *_approving(decision, digest),
        (f"forebay reward promote {candidate}", f"Puts it in office, if {champion} is still in it."),
        *back,
        (f'forebay reject {candidate} --reason "…"', "Never lets this decision act, whatever its verdict."),
    ]


def _approving(decision: Mapping[str, Any], digest: str) -> list[tuple[str, str]]:
    if decision["policy"].get("approval") != "required":
        return []
    elsewhere = "The same where your key is and no workspace: prints one signed line for `forebay answer` or the run's page."
    return [
        (f"forebay approve {_agents(decision)[0]}", "A person signs with their own key; needed first."),
        (f"forebay approve {digest} --print", elsewhere),
    ]


def _about_tasks(name: str) -> bool:
    return name == "quality" or name.startswith("guard/")


def _agents(decision: Mapping[str, Any]) -> tuple[str, str]:
    """Return the names of candidate and champion: of agents, or of reward models and whom they meet in office."""
    office, champion = _office(decision), decision["champion"]["version"]
    return f"{office}/{decision['candidate']['version']}", f"{office}/{champion}" if champion else _NOBODY


def _office(decision: Mapping[str, Any]) -> Office:
    return "reward" if str(decision.get("schema", "")).startswith(_REWARDS) else "agent"


def policy_of(decision: Mapping[str, Any]) -> Policy:
    """Return the policy in a decision's record.

    Raises:
        Refused: it is none that this version understands.
    """
    try:
        return Policy.model_validate(decision["policy"])
    except ValidationError:
        raise Refused(
            f"The record is a {decision['schema']} with a policy that this version of Forebay does not know; draw its page "
            "with the version that wrote it."
        ) from None


def _moment(time: str) -> str:
    return datetime.fromisoformat(time).strftime("%Y-%m-%d %H:%M:%S UTC")


@dataclass(frozen=True)
class _Outcomes:
    """All that the page shows of the answers."""

    score: str
    environments: Strips
    without_baselines: list[str]
    says: str
    chart: Chart | None
    examples: list[answers.Examples]

    @classmethod
    def of(cls, outcomes: PairedOutcomes, evidence: Any, policy: Policy) -> _Outcomes:
        return cls(
            answers.score(outcomes),
            answers.environments(outcomes, evidence, policy.guards.alpha),
            answers.without_baselines(outcomes),
            *answers.differences(outcomes),
            answers.examples(outcomes),
        )


def _reports(found: Iterable[tuple[str, _Source]], policy: Policy) -> list[Section]:
    ordered = sorted(found, key=lambda one: (ORDER.index(one[0]) if one[0] in ORDER else len(ORDER), one[0]))
    return [
        report_section(name, source.schema, source.content, policy)
        for name, source in ordered
        if source.outcomes is None
    ]


def _budgets(decision: Mapping[str, Any], policy: Policy) -> list[tuple[str, str, Markup]]:
    """Return the two accounts that a decision draws on, as they were after it; older records have none."""
    spent = decision["inputs"].get("spent")
    if spent is None:
        return []
    alpha, uses, error = policy.errors.alpha, policy.evaluation_set.uses, decision.get("error", 0.0)
    left = max(0.0, alpha - spent["error"] - error)
    return [
        (
            "Error of the gate against this champion",
            f"{spent['error']:.4g} spent before, {error:.4g} by this decision, {left:.4g} of {alpha:.4g} left",
            figures.gauge(
                [(spent["error"], "champion", "spent before"), (error, "candidate", "this decision")],
                max(alpha, spent["error"] + error),
                f"error budget: {spent['error'] + error:.4g} of {alpha:.4g} spent",
            ),
        ),
        (
            "Uses of the held-out tasks",
            f"{spent['uses']} before, this is use {spent['uses'] + 1} of {uses}",
            figures.gauge(
                [(spent["uses"], "champion", "uses before"), (1, "candidate", "this decision")],
                max(uses, spent["uses"] + 1),
                f"evaluation set: {spent['uses'] + 1} of {uses} uses",
            ),
        ),
    ]


def _digests(decision: Mapping[str, Any], digest: str) -> list[tuple[str, str]]:
    """Return (what, SHA-256) of everything the decision names; evidence that lies in one file has one line."""
    candidate, champion = _agents(decision)
    found = {
        digest: ["decision"],
        decision["candidate"]["digest"]: [f"{candidate}, candidate"],
        decision["champion"]["digest"]: [f"{champion}, champion"],
        decision["policy_digest"]: ["policy"],
    }
    found.pop("", None)  # nobody has no digest
    for item in decision["evidence"]:
        if item["digest"]:
            found.setdefault(item["digest"], []).append(item["name"])
    for env, tasks in decision.get("tasks", {}).items():
        found.setdefault(tasks, []).append(f"held-out tasks of {env}")
    return [(plain(", ".join(names)), value) for value, names in found.items()]


# -------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class _Source:
    """An evidence file that was read with its digest checked."""

    schema: str
    outcomes: PairedOutcomes | None
    content: Any


def _sources(inputs: Mapping[str, Any], evidence: Path) -> Iterator[tuple[str, _Source]]:
    """Yield every evidence file that the inputs of a decision name, at whatever depth."""
    for name, value in inputs.items():
        if not isinstance(value, Mapping):
            continue
        if value.keys() >= {"path", "sha256"}:
            yield name, _source(evidence / value["path"], value["sha256"])
        else:
            yield from _sources(value, evidence)


def _source(path: Path, sha256: str) -> _Source:
    data = _checked(path, sha256)
    try:
        content = json.loads(data if path.suffix == ".json" else data.split(b"\n", 1)[0])
    except ValueError:
        content = None
    schema = content.get("schema", "") if isinstance(content, Mapping) else ""
    if schema.startswith(_OUTCOMES):
        return _Source(schema, read_outcomes(path, sha256), None)
    return _Source(schema or f"{path.suffix} file", None, content)


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
