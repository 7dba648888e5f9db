"""The gate: evidence and a policy in, a decision out. No clock, no store: equal inputs give equal bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tasks.core.digest import canonical_json, digest_json, sha256_bytes, write_atomic
from tasks.core.errors import Corrupt, NotFound, Refused
from tasks.evaluation.paired import Agent, PairedOutcomes, read_outcomes
from tasks.evaluation.sequential import betting_mean
from tasks.evaluation.statistics import Estimate, Verdict, clustered_mean, holm, judge, mcnemar
from tasks.promotion.budget import Spent
from tasks.promotion.policy import Policy
from tasks.reward.checks import judge_report, reasons

SCHEMA = "forebay.decision/2"
_TINY = 1e-9  # of an error: twenty shares of a twentieth are the whole, however they round
_DIGITS = 10  # of a number in the record: below what another build of numpy may change


@dataclass(frozen=True)
class FileRef:
    """An evidence file: its path relative to the evidence folder, and its SHA-256."""

    path: str
    sha256: str


@dataclass(frozen=True)
class Finding:
    """What another station found about `subject` (a digest); `digest` is that of its evidence."""

    verdict: Verdict
    subject: str
    digest: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inputs:
    """All a decision rests on. None means the evidence does not exist."""

    outcomes: FileRef
    reward: FileRef | None = None
    data: Finding | None = None
    integrity: Finding | None = None
    spent: Spent = field(default_factory=Spent)
    reward_expired: str = ""  # why the reward model's verdict holds no more; the gate has no clock of its own

    def question(self, policy: Policy) -> str:
        """Return the digest of all evidence and the policy, whatever was spent before."""
        evidence = {name: value for name, value in asdict(self).items() if name != "spent"}
        return digest_json({"inputs": evidence, "policy": policy.digest()})


@dataclass(frozen=True)
class Evidence:
    """One item weighed by the gate. `counts` is False where the policy does not require it.

    Numbers are mean rewards, or accuracies for the reward model; None where the item has none.
    """

    name: str
    verdict: Verdict
    says: str
    digest: str | None
    counts: bool = True
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    mde: float | None = None
    margin: float | None = None


@dataclass(frozen=True)
class Decision:
    """What the gate said about replacing `champion` by `candidate`, with all needed to say it again.

    Attributes:
        tasks: {environment: digest of its held-out tasks}.
        error: the one-sided error it took from the champion's budget; 0.0 where a budget was spent before.
    """

    candidate: Agent
    champion: Agent
    verdict: Verdict
    reasons: tuple[str, ...]
    evidence: tuple[Evidence, ...]
    policy: Policy
    inputs: Inputs
    tasks: Mapping[str, str]
    error: float

    @cached_property
    def record(self) -> bytes:
        """The canonical JSON of the decision."""
        return canonical_json(
            {
                "schema": SCHEMA,
                "candidate": asdict(self.candidate),
                "champion": asdict(self.champion),
                "verdict": self.verdict,
                "reasons": list(self.reasons),
                "evidence": [asdict(item) for item in self.evidence],
                "policy": self.policy.model_dump(mode="json"),
                "policy_digest": self.policy.digest(),
                "inputs": asdict(self.inputs),
                "tasks": dict(self.tasks),
                "error": self.error,
            }
        )

    @property
    def digest(self) -> str:
        """The SHA-256 of the record."""
        return sha256_bytes(self.record)

    def payload(self, record: str) -> dict[str, Any]:
        """Return the payload of `decision.made`; `record` is the record's path as the ledger has it."""
        return {
            "decision": self.digest,
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "record": {"path": record, "sha256": self.digest},
            "policy_digest": self.policy.digest(),
            "approval": self.policy.approval,
            "candidate": asdict(self.candidate),
            "champion": asdict(self.champion),
            "question": self.inputs.question(self.policy),
            "spent": asdict(self.inputs.spent),
            "error": self.error,
            "tasks": dict(self.tasks),
            "evidence": [{"name": e.name, "verdict": e.verdict, "digest": e.digest} for e in self.evidence],
        }


def decide(evidence: Path, inputs: Inputs, policy: Policy) -> Decision:
    """Read the evidence files under the folder `evidence`, check their digests, and apply the policy.

    Raises:
        NotFound, Corrupt: an evidence file is missing or is not what its digest says.
    """
    outcomes = read_outcomes(evidence / inputs.outcomes.path, inputs.outcomes.sha256)
    reward = (
        None if inputs.reward is None else _read_json(evidence / inputs.reward.path, inputs.reward.sha256)
    )
    budgets = budget_evidence(inputs.spent, policy)
    items = [
        _finding("integrity", inputs.integrity, policy.integrity.required),
        _finding("data", inputs.data, policy.data.required),
        reward_evidence(reward, inputs.reward, policy, inputs.reward_expired),
        *budgets,
        quality_evidence(outcomes, inputs.outcomes, policy),
        *guard_evidence(outcomes, inputs.outcomes, policy),
    ]
    verdict, reasons = conclude(items)
    error = policy.errors.share if all(item.verdict == "PASS" for item in budgets) else 0.0
    return Decision(
        outcomes.candidate,
        outcomes.champion,
        verdict,
        reasons,
        tuple(items),
        policy,
        inputs,
        outcomes.tasks(),
        error,
    )


def conclude(items: Sequence[Evidence]) -> tuple[Verdict, tuple[str, ...]]:
    """Return the verdict over all evidence that counts, and the sentences behind it.

    One FAIL fails; else one INCONCLUSIVE leaves it open; a PASS needs every item to pass.
    """
    counted = [item for item in items if item.counts]
    for verdict in ("FAIL", "INCONCLUSIVE", "PASS"):
        said = tuple(item.says for item in counted if item.verdict == verdict)
        if said:
            return verdict, said
    return "INCONCLUSIVE", ("There is no evidence.",)


def budget_evidence(spent: Spent, policy: Policy) -> list[Evidence]:
    """Look whether the champion's error budget and the held-out tasks have something left for this decision."""
    errors, uses = policy.errors, policy.evaluation_set.uses
    enough = spent.error + errors.share <= errors.alpha + _TINY
    says = (
        f"decision {spent.decisions + 1} against this champion errs at most {errors.share:.4g}; "
        f"{spent.error:.4g} of {errors.alpha:.4g} was spent before"
        if enough
        else f"{spent.decisions} decisions against this champion spent {spent.error:.4g} of {errors.alpha:.4g}; "
        f"raise errors.alpha in the policy to let more candidates try, at the risk that it names"
    )
    fresh = spent.uses < uses
    left = (
        f"use {spent.uses + 1} of {uses}"
        if fresh
        else f"these held-out tasks served {spent.uses} decisions, the policy allows {uses}; "
        "raise evaluation.rotation by 1 to draw others"
    )
    return [
        Evidence("errors", "PASS" if enough else "INCONCLUSIVE", f"Errors: {says}.", None),
        Evidence("evaluation set", "PASS" if fresh else "INCONCLUSIVE", f"Evaluation set: {left}.", None),
    ]


def quality_evidence(outcomes: PairedOutcomes, source: FileRef, policy: Policy) -> Evidence:
    """Weigh superiority over all tasks.

    By the t interval, with which the exact McNemar test must agree: that interval is too short where the agents differ on
    few tasks, or where great losses are rare. By betting nothing else has to agree.
    """
    rule, alpha = policy.superiority, policy.errors.share
    candidate, champion, clusters = outcomes.rewards()
    estimate = betting_mean if rule.test == "betting" else clustered_mean
    gain = estimate(candidate - champion, clusters, alpha=alpha, support=(-1.0, 1.0), power=rule.power)
    verdict = judge(gain.low, gain.high, rule.margin)
    says = f"{_words(gain)}, needed above {rule.margin:.3f}"
    if gain.clusters < rule.min_tasks:
        verdict, says = (
            "INCONCLUSIVE",
            f"{gain.clusters} tasks are too few, the policy asks for {rule.min_tasks}",
        )
    elif verdict == "PASS" and rule.test == "t":
        p = mcnemar(candidate, champion, outcomes.noise())
        if p > alpha:
            verdict = "INCONCLUSIVE"
            says += f"; too few tasks differ to be sure (exact p = {p:.4f}, needed {alpha:.4g})"
    if verdict == "INCONCLUSIVE" and gain.clusters >= rule.min_tasks:
        says += f"; a true gain of {rule.margin + gain.mde:.3f} would be found {rule.power:.0%} of the time"
    return _measured("quality", verdict, f"Quality: {says}.", source.sha256, gain, rule.margin)


def guard_evidence(outcomes: PairedOutcomes, source: FileRef, policy: Policy) -> list[Evidence]:
    """Weigh non-inferiority in each environment, with Holm's correction over environments."""
    rule = policy.guards
    names = outcomes.slices()
    gains = [outcomes.difference(env, alpha=rule.alpha, power=policy.superiority.power) for env in names]
    harmless = holm([gain.p_above(-rule.margin) for gain in gains])
    harmful = holm([gain.p_below(-rule.margin) for gain in gains])
    items = []
    for env, gain, p_good, p_bad in zip(names, gains, harmless, harmful, strict=True):
        verdict: Verdict = (
            "PASS" if p_good <= rule.alpha else "FAIL" if p_bad <= rule.alpha else "INCONCLUSIVE"
        )
        claim = {"PASS": "is no worse", "FAIL": "is worse", "INCONCLUSIVE": "may be worse"}[verdict]
        says = f"Guard {env}: the candidate {claim}, {_words(gain)}, needed above {-rule.margin:.3f}."
        items.append(_measured(f"guard/{env}", verdict, says, source.sha256, gain, -rule.margin))
    return items


def reward_evidence(
    report: Mapping[str, Any] | None, source: FileRef | None, policy: Policy, expired: str = ""
) -> Evidence:
    """Weigh the reward model by its stored report, judged again; a verdict that has expired is a veto.

    The numbers are the accuracy on held-out pairs; what the other checks found is in the sentence.
    """
    rule = policy.reward_model
    if report is None or source is None:
        says = "Reward model: none was validated."
        return Evidence("reward model", "INCONCLUSIVE", says, None, rule.required)
    verdict, checks = judge_report(report, rule)
    accuracy, counted = checks[0], [check for check in checks if check.counts]
    said = reasons(verdict, checks)
    if verdict == "PASS":
        said = (accuracy.says, f"All {len(counted)} checks pass.")
    if expired:
        verdict, said = "FAIL", (f"The verdict has expired: {expired}.", *said)
    return Evidence(
        "reward model",
        verdict,
        f"Reward model: {' '.join(said)}",
        source.sha256,
        rule.required,
        accuracy.estimate,
        accuracy.low,
        accuracy.high,
        accuracy.n,
        None,
        accuracy.limit,
    )


def write_decision(evidence: Path, decision: Decision) -> Path:
    """Write the record to evidence/decisions/<digest>.json and return its path."""
    path = evidence / "decisions" / f"{decision.digest}.json"
    write_atomic(path, decision.record)
    return path


def read_decision(path: Path) -> Decision:
    """Read a decision from its record without looking at the evidence again.

    Raises:
        NotFound: there is no such record.
        Corrupt: its bytes are not those of the digest that names it.
        Refused: another version of Forebay wrote it.
    """
    record = _read_json(path, path.stem)
    if record["schema"] != SCHEMA:
        raise Refused(
            f"{path.name} is a {record['schema']}; this version of Forebay recomputes {SCHEMA}, use the one that wrote it."
        )
    inputs = record["inputs"]
    return Decision(
        Agent(**record["candidate"]),
        Agent(**record["champion"]),
        record["verdict"],
        tuple(record["reasons"]),
        tuple(Evidence(**item) for item in record["evidence"]),
        Policy.model_validate(record["policy"]),
        Inputs(
            FileRef(**inputs["outcomes"]),
            inputs["reward"] and FileRef(**inputs["reward"]),
            _read_finding(inputs["data"]),
            _read_finding(inputs["integrity"]),
            Spent(**inputs["spent"]),
            inputs["reward_expired"],
        ),
        record["tasks"],
        record["error"],
    )


def recompute_decision(path: Path) -> Decision:
    """Decide again from the evidence beside the record at `path` (evidence/decisions/<digest>.json).

    Raises:
        NotFound: the record or an evidence file is missing.
        Corrupt: bytes differ from their digest, or the evidence leads to another decision than the recorded
        one.
    """
    recorded = read_decision(path)
    again = decide(path.parent.parent, recorded.inputs, recorded.policy)
    if again.record != path.read_bytes():
        raise Corrupt(
            f"The decision {path.stem[:12]}… does not follow from its evidence: recorded {recorded.verdict}, "
            f"recomputed {again.verdict} ({again.reasons[0]})"
        )
    return again


def _finding(name: str, finding: Finding | None, required: bool) -> Evidence:
    if finding is None:
        return Evidence(name, "INCONCLUSIVE", f"{name.capitalize()}: not checked.", None, required)
    plainly = {"PASS": "sound", "FAIL": "refused", "INCONCLUSIVE": "unclear"}[finding.verdict]
    why = "; ".join(finding.reasons) or plainly
    says = f"{name.capitalize()} of {finding.subject[:12]}…: {why}."
    return Evidence(name, finding.verdict, says, finding.digest, required)


def _measured(
    name: str, verdict: Verdict, says: str, digest: str, by: Estimate, margin: float, counts: bool = True
) -> Evidence:
    estimate, low, high, mde = map(_rounded, (by.estimate, by.low, by.high, by.mde))
    return Evidence(name, verdict, says, digest, counts, estimate, low, high, by.n, mde, margin)


def _rounded(x: float) -> float:
    return float(f"{x:.{_DIGITS}g}")


def _words(gain: Estimate) -> str:
    return f"{gain.estimate:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] on {gain.n} paired answers"


def _read_finding(value: Mapping[str, Any] | None) -> Finding | None:
    return None if value is None else Finding(**{**value, "reasons": tuple(value["reasons"])})


def _read_json(path: Path, sha256: str) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"There is no {path.name} in {path.parent}; restore it from a backup.") from None
    if sha256_bytes(data) != sha256:
        raise Corrupt(f"{path} was changed: its bytes are not those of the digest {sha256[:12]}….")
    return json.loads(data)
