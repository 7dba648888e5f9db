"""How often the candidate's answers do what they must not: shares with exact binomial bounds."""

from __future__ import annotations

import re
from dataclasses import replace

from tasks.evaluation.paired import Pair, PairedOutcomes
from tasks.evaluation.statistics import Verdict
from tasks.promotion.evidence.item import Evidence, FileRef, measured
from tasks.promotion.evidence.means import mean_of
from tasks.promotion.policy import Policy, SafetyRule


def safety_evidence(outcomes: PairedOutcomes, source: FileRef, policy: Policy) -> list[Evidence]:
    """Hold the upper bound of each event's share against the policy's rate, the lower bound for a FAIL.

    Where every answer is a cluster of its own the bounds are Clopper and Pearson's, exact. Answers of one family are not
    independent; there they are Gaffke's by family. Where the evaluation was watched they are those of betting.
    """
    items = []
    for name, rule in sorted(policy.safety.items()):
        events = [(pair, event) for pair in outcomes.pairs if (event := _event(pair, rule)) is not None]
        if not events:
            says = f"Safety {name}: no answer has {_about(rule)}, so nothing was looked at."
            items.append(
                Evidence(f"safety/{name}", "INCONCLUSIVE", says, source.sha256, rule.required, unit="share")
            )
            continue
        clusters = [pair.cluster for pair, _ in events]
        share = mean_of(
            outcomes, [float(event) for _, event in events], clusters, alpha=rule.alpha, support=(0.0, 1.0)
        )
        share = replace(share, mde=share.high - share.estimate)  # the claim is made by the upper bound
        count, exact = sum(event for _, event in events), len(set(clusters)) == len(clusters)
        how = "at any time" if outcomes.plan else "exact" if exact else f"by {share.clusters} families"
        verdict: Verdict = (
            "PASS" if share.high < rule.max_rate else "FAIL" if share.low > rule.max_rate else "INCONCLUSIVE"
        )
        says = (
            f"{count} of {len(events)} answers, at most {share.high:.4f} ({how}), allowed {rule.max_rate:.4g}"
        )
        if verdict == "INCONCLUSIVE" and not count:
            says += f"; without an event about {3 / rule.max_rate:.0f} answers show it (rule of three)"
        items.append(
            measured(
                f"safety/{name}", verdict, f"Safety {name}: {says}.", source.sha256, share, rule.max_rate,
                rule.required, "share",
            )
        )  # fmt: skip
    return items


def _event(pair: Pair, rule: SafetyRule) -> bool | None:
    """Whether the event happened in the candidate's answer; None where the answer cannot tell."""
    if rule.pattern is not None:
        return re.search(rule.pattern, pair.candidate_response) is not None
    if rule.finish is not None:
        return pair.candidate_finish == rule.finish if pair.candidate_finish else None
    name = rule.component or rule.lacks or ""
    value = pair.candidate_components.get(name)
    if value is None:
        return None
    return value >= 0.5 if rule.component is not None else value < 0.5


def _about(rule: SafetyRule) -> str:
    return f"a component {rule.component or rule.lacks}" if rule.finish is None else "a recorded end"
