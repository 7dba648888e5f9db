"""The gate: evidence and a policy in, a decision out. No clock, no store: equal inputs give equal bytes.

Each kind of evidence has its module under `tasks.promotion.evidence`; here they are put together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from tasks.core.atomic import write_atomic
from tasks.core.digest import canonical_json, digest_json, sha256_bytes
from tasks.core.errors import Corrupt, Refused
from tasks.evaluation.paired import Agent, read_outcomes
from tasks.evaluation.statistics import Verdict
from tasks.promotion.budget import Spent
from tasks.promotion.evidence.budgets import budget_evidence
from tasks.promotion.evidence.conduct import conduct_evidence
from tasks.promotion.evidence.hacking import hacking_evidence
from tasks.promotion.evidence.item import Evidence as Evidence
from tasks.promotion.evidence.item import FileRef as FileRef
from tasks.promotion.evidence.item import read_evidence, read_json
from tasks.promotion.evidence.quality import guard_evidence
from tasks.promotion.evidence.quality import quality_evidence as quality_evidence
from tasks.promotion.evidence.replay_value import replay_value_evidence
from tasks.promotion.evidence.safety import safety_evidence
from tasks.promotion.evidence.serving import serving_evidence
from tasks.promotion.evidence.training import divergence_evidence, resources_evidence
from tasks.promotion.policy import Policy
from tasks.reward.checks import judge_report, reasons

SCHEMA = "forebay.decision/4"
_FILES = ("outcomes", "reward", "serving", "replay_value", "proxy", "run")


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
    serving: FileRef | None = None
    replay_value: FileRef | None = None
    proxy: FileRef | None = None
    run: FileRef | None = None
    spent: Spent = field(default_factory=Spent)
    reward_expired: str = ""  # why the reward model's verdict holds no more; the gate has no clock of its own
    lineage: Finding | None = None  # whether the candidate learnt from what is revoked

    def question(self, policy: Policy) -> str:
        """Return the digest of all evidence and the policy, whatever was spent before."""
        evidence = {name: value for name, value in asdict(self).items() if name != "spent"}
        return digest_json({"inputs": evidence, "policy": policy.digest()})


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
    reward, serving, replay_value, proxy, run = (
        read_evidence(evidence, ref)
        for ref in (inputs.reward, inputs.serving, inputs.replay_value, inputs.proxy, inputs.run)
    )
    budgets = budget_evidence(inputs.spent, policy)
    items = [
        _finding("integrity", inputs.integrity, policy.integrity.required),
        _finding("data", inputs.data, policy.data.required),
        *lineage_evidence(inputs.lineage, policy),
        reward_evidence(reward, inputs.reward, policy, inputs.reward_expired),
        *budgets,
        quality_evidence(outcomes, inputs.outcomes, policy),
        *guard_evidence(outcomes, inputs.outcomes, policy),
        *safety_evidence(outcomes, inputs.outcomes, policy),
        *conduct_evidence(outcomes, inputs.outcomes, policy),
        *hacking_evidence(outcomes, inputs.outcomes, proxy, inputs.proxy, policy),
        serving_evidence(serving, inputs.serving, policy),
        replay_value_evidence(replay_value, inputs.replay_value, policy),
        divergence_evidence(run, inputs.run, policy),
        resources_evidence(run, inputs.run, policy),
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
        verdict, said = "FAIL", (f"The verdict no longer holds: {expired}.", *said)
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
        "share",
    )


def lineage_evidence(finding: Finding | None, policy: Policy) -> list[Evidence]:
    """Weigh whether the candidate learnt from revoked data; nothing where nobody looked: promotion looks again."""
    return [] if finding is None else [_finding("lineage", finding, policy.revocation.block_promotion)]


class Recorded(Protocol):
    """A decision about an agent or a reward model, as it is kept."""

    @property
    def record(self) -> bytes:
        """Its canonical JSON."""

    @property
    def digest(self) -> str:
        """The SHA-256 of the record."""


def write_decision(evidence: Path, decision: Recorded) -> Path:
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
    record = read_json(path, path.stem)
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
            data=_read_finding(inputs["data"]),
            integrity=_read_finding(inputs["integrity"]),
            lineage=_read_finding(inputs["lineage"]),
            spent=Spent(**inputs["spent"]),
            reward_expired=inputs["reward_expired"],
            **{name: inputs[name] and FileRef(**inputs[name]) for name in _FILES},
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


def _read_finding(value: Mapping[str, Any] | None) -> Finding | None:
    return None if value is None else Finding(**{**value, "reasons": tuple(value["reasons"])})
