"""Whether a reward model may take the office of the present one: validated, and not surely less accurate.

Both score the same comparisons, none of which either was trained on. The record is made like that of an agent's
decision: evidence files and the policy in, the same bytes out every time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tasks.core.atomic import write_atomic
from tasks.core.digest import canonical_json, digest_json, sha256_bytes
from tasks.core.errors import Corrupt, Refused
from tasks.evaluation.paired import Agent
from tasks.evaluation.statistics import Verdict, clustered_mean
from tasks.promotion.evidence.item import Evidence, FileRef, measured, read_evidence, read_json
from tasks.promotion.gate import conclude, reward_evidence
from tasks.promotion.policy import Policy
from tasks.reward.source import Preference, RewardSource

SCHEMA = "forebay.reward_decision/2"
COMPARISON = "forebay.reward_comparison/1"
NOBODY = Agent(0, "")  # whom the first reward model in office is compared with
_DECIMALS = 6  # of a margin in the evidence


@dataclass(frozen=True)
class RewardInputs:
    """All a decision about a reward model rests on. None means the evidence does not exist.

    Attributes:
        validation: the report of the candidate's newest validation.
        expired: why its verdict holds no more, "" where it holds.
        comparison: margins of candidate and champion on the same comparisons.
        integrity: what is wrong with the candidate's files, "" where nothing is.
        alone: why it cannot be compared with the champion, "" where it can; the validation alone decides then.
    """

    candidate: Agent
    champion: Agent
    validation: FileRef | None
    expired: str
    comparison: FileRef | None
    integrity: str = ""
    alone: str = ""


@dataclass(frozen=True)
class RewardDecision:
    """What the gate said about a reward model, with all needed to say it again."""

    verdict: Verdict
    reasons: tuple[str, ...]
    evidence: tuple[Evidence, ...]
    policy: Policy
    inputs: RewardInputs

    @property
    def candidate(self) -> Agent:
        """Version and digest of the reward model that wants the office."""
        return self.inputs.candidate

    @cached_property
    def record(self) -> bytes:
        """The canonical JSON of the decision."""
        return canonical_json(
            {
                "schema": SCHEMA,
                "candidate": asdict(self.inputs.candidate),
                "champion": asdict(self.inputs.champion),
                "verdict": self.verdict,
                "reasons": list(self.reasons),
                "evidence": [asdict(item) for item in self.evidence],
                "policy": self.policy.model_dump(mode="json"),
                "policy_digest": self.policy.digest(),
                "inputs": asdict(self.inputs),
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
            "candidate": asdict(self.inputs.candidate),
            "champion": asdict(self.inputs.champion),
            "question": digest_json({"inputs": asdict(self.inputs), "policy": self.policy.digest()}),
            "spent": {},
            "error": 0.0,
            "tasks": {},
            "evidence": [{"name": e.name, "verdict": e.verdict, "digest": e.digest} for e in self.evidence],
        }


def compare(candidate: RewardSource, champion: RewardSource, preferences: Sequence[Preference]) -> bytes:
    """Let both score the same comparisons; return the evidence as canonical JSON."""
    answers = [answer for p in preferences for answer in (p.better, p.worse)]
    sides = [source.score(answers) for source in (candidate, champion)]
    margins = [[round(a - b, _DECIMALS) for a, b in zip(s[::2], s[1::2], strict=True)] for s in sides]
    return canonical_json(
        {
            "schema": COMPARISON,
            "candidate": candidate.digest,
            "champion": champion.digest,
            "pairs": [
                {"group_id": p.group, "slice": p.slice, "candidate": ours, "champion": theirs}
                for p, ours, theirs in zip(preferences, *margins, strict=True)
            ],
        }
    )


def decide_office(folder: Path, inputs: RewardInputs, policy: Policy) -> RewardDecision:
    """Read the evidence under `folder`, check its digests, and weigh it.

    Raises:
        NotFound, Corrupt: an evidence file is missing or is not what its digest says, or is about other models.
    """
    report, comparison = (read_evidence(folder, ref) for ref in (inputs.validation, inputs.comparison))
    if report is not None and report["source"]["digest"] != inputs.candidate.digest:
        raise Corrupt("The validation report is about another reward model than the candidate.")
    sound = f"all files of reward/{inputs.candidate.version} are what was registered"
    items = [
        Evidence(
            "integrity",
            "FAIL" if inputs.integrity else "PASS",
            f"Integrity: {inputs.integrity or sound}.",
            inputs.candidate.digest,
        ),
        replace(reward_evidence(report, inputs.validation, policy, inputs.expired), counts=True),
    ]
    if inputs.champion != NOBODY:
        items.append(_accuracy(comparison, inputs, policy))
    verdict, reasons = conclude(items)
    return RewardDecision(verdict, reasons, tuple(items), policy, inputs)


def _accuracy(comparison: dict[str, Any] | None, inputs: RewardInputs, policy: Policy) -> Evidence:
    """Weigh the difference of accuracies: paired, clustered by prompt; only a sure loss fails."""
    name = "accuracy"
    if comparison is None or inputs.comparison is None or not comparison["pairs"]:
        why = inputs.alone or "there is no comparison that both reward models have not seen"
        return Evidence(
            name, "INCONCLUSIVE", f"Accuracy: {why}; the validation alone decides.", None, counts=False
        )
    if (comparison["candidate"], comparison["champion"]) != (inputs.candidate.digest, inputs.champion.digest):
        raise Corrupt("The comparison is about other reward models than the decision.")
    pairs = comparison["pairs"]
    ours, theirs = ((np.sign([pair[side] for pair in pairs]) + 1) / 2 for side in ("candidate", "champion"))
    gain = clustered_mean(
        ours - theirs,
        [pair["group_id"] for pair in pairs],
        alpha=policy.reward_model.alpha,
        support=(-1.0, 1.0),
        power=policy.superiority.power,
    )
    verdict: Verdict = "FAIL" if gain.high < 0 else "PASS"
    says = (
        f"Accuracy: {ours.mean():.3f} against {theirs.mean():.3f} of reward/{inputs.champion.version} on the same "
        f"{gain.n} comparisons, {gain.estimate:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]; only a sure loss counts "
        "against it."
    )
    return measured(name, verdict, says, inputs.comparison.sha256, gain, 0.0, unit="share")


def keep_comparison(folder: Path, data: bytes) -> FileRef:
    """Write a comparison to folder/reward/<digest>.json."""
    digest = sha256_bytes(data)
    name = f"reward/{digest}.json"
    write_atomic(folder / name, data)
    return FileRef(name, digest)


def recompute_office(path: Path) -> RewardDecision:
    """Decide again from the evidence beside the record at `path`.

    Raises:
        NotFound, Corrupt: something is missing or changed, or the evidence leads to another decision.
        Refused: another version of Forebay wrote the record.
    """
    record = read_json(path, path.stem)
    if record["schema"] != SCHEMA:
        raise Refused(f"{path.name} is a {record['schema']}; this version of Forebay recomputes {SCHEMA}.")
    said = record["inputs"]
    inputs = RewardInputs(
        Agent(**said["candidate"]),
        Agent(**said["champion"]),
        said["validation"] and FileRef(**said["validation"]),
        said["expired"],
        said["comparison"] and FileRef(**said["comparison"]),
        said["integrity"],
        said["alone"],
    )
    again = decide_office(path.parent.parent, inputs, Policy.model_validate(record["policy"]))
    if again.record != path.read_bytes():
        raise Corrupt(
            f"The decision {path.stem[:12]}… does not follow from its evidence: recorded {record['verdict']}, "
            f"recomputed {again.verdict} ({json.dumps(again.reasons[0])})."
        )
    return again
