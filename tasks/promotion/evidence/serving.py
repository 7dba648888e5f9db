"""What serving the candidate costs, beside what the champion cost in the same job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.evaluation.serving import Serving
from tasks.evaluation.statistics import Verdict
from tasks.promotion.evidence.item import Evidence, FileRef, rounded
from tasks.promotion.policy import Policy


def serving_evidence(report: Mapping[str, Any] | None, source: FileRef | None, policy: Policy) -> Evidence:
    """Weigh a `forebay.serving/1` file: that the agent serves at all, and each budget.

    What a machine may be to blame for (time was over, the process was killed) leaves it open; the rest fails.
    """
    rule = policy.serving
    if report is None or source is None:
        says = "Serving: not measured."
        return Evidence("serving", "INCONCLUSIVE", says, None, rule.required, unit="seconds")
    candidate, champion = (Serving.from_json(report[side]) for side in ("candidate", "champion"))
    if not candidate.ok:
        verdict: Verdict = "FAIL" if candidate.fault == "agent" else "INCONCLUSIVE"
        says = f"Serving: the candidate does not serve: {candidate.problem}."
        return Evidence("serving", verdict, says, source.sha256, rule.required, unit="seconds")
    p95, memory = candidate.answer_seconds(0.95), candidate.gpu_mib or candidate.memory_mib
    over = [
        f"{what} is {value:.4g}, allowed {limit:.4g}"
        for what, value, limit in (
            ("loading in seconds", candidate.load_seconds, rule.max_load_seconds),
            ("the 95th percentile of an answer in seconds", p95, rule.max_p95_seconds),
            ("memory in MiB", memory, rule.max_memory_mib),
        )
        if limit is not None and value > limit
    ]
    verdict, relative = "PASS", ""
    if rule.vs_champion is not None and champion.ok:
        ratio = candidate.cost() / champion.cost()
        relative = f", {ratio:.2f} times the champion's work (allowed {rule.vs_champion:.2f})"
        if ratio > rule.vs_champion:
            over.append(f"equal work takes {ratio:.2f} times the champion's time")
    elif rule.vs_champion is not None:
        verdict, relative = "INCONCLUSIVE", f"; the champion could not be measured: {champion.problem}"
    if over:
        verdict = "FAIL"
    says = (
        f"Serving: loads in {candidate.load_seconds:.2f} s, answers in {candidate.answer_seconds(0.5):.3f} s "
        f"(p95 {p95:.3f}) and the same twice, {memory:.0f} MiB{relative}"
    )
    says = "; ".join([says, *over])
    return Evidence(
        "serving", verdict, f"{says}.", source.sha256, rule.required, rounded(p95),
        n=len(candidate.tokens), margin=rule.max_p95_seconds, unit="seconds",
    )  # fmt: skip
