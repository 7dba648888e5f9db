"""What both agents would have earned on logged prompts that neither was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tasks.evaluation.off_policy import Log, Rule, compare
from tasks.promotion.evidence.item import Evidence, FileRef, rounded
from tasks.promotion.policy import Policy


def replay_value_evidence(
    report: Mapping[str, Any] | None, source: FileRef | None, policy: Policy
) -> Evidence:
    """Weigh a `forebay.replay_value/1` file: the log and both policies' log ratios, judged anew."""
    rule, name = policy.replay_value, "replay value"
    if report is None or source is None:
        return Evidence(name, "INCONCLUSIVE", "Replay value: not estimated.", None, rule.required)
    if report["log"] is None:
        says = f"Replay value: {report['problem']}"
        return Evidence(name, "INCONCLUSIVE", says, source.sha256, rule.required)
    log, candidate, champion = read_log(report)
    found = compare(
        log,
        candidate,
        champion,
        Rule(margin=rule.margin, alpha=rule.alpha, min_ess=rule.min_ess, looks=rule.looks),
    )
    once = rule.looks == "once"
    low, high = (found.low, found.high) if once else (found.anytime_low, found.anytime_high)
    says = (
        f"Replay value: {found.estimate:+.3f} [{low:+.3f}, {high:+.3f}] on {found.n} logged answers to {found.prompts} "
        f"prompts, worth {found.overlap[0].ess:.0f} of the candidate's and {found.overlap[1].ess:.0f} of the champion's, "
        f"needed above {rule.margin:+.3f}; {' '.join(found.reasons)}"
    )
    return Evidence(
        name, found.verdict, says, source.sha256, rule.required,
        rounded(found.estimate), rounded(low), rounded(high), found.n, rounded(found.mde), rule.margin,
    )  # fmt: skip


def read_log(report: Mapping[str, Any]) -> tuple[Log, np.ndarray, np.ndarray]:
    """Return the log and the log ratios [B, T] of candidate and champion that an evidence file holds."""
    log = report["log"]
    return (
        Log(
            np.array(log["rewards"], dtype=np.float64),
            np.array(log["turns"], dtype=np.int64),
            tuple(log["prompts"]),
            tuple(log["environments"]),
        ),
        np.array(report["candidate_ratios"], dtype=np.float64),
        np.array(report["champion_ratios"], dtype=np.float64),
    )
