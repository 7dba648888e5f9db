"""Whether an evaluation that is watched may stop: its verdict stands, or cannot become a promotion any more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tasks.evaluation.paired import PairedOutcomes, Plan
from tasks.evaluation.sequential import Stream, final_p
from tasks.promotion.evidence.conduct import conduct_evidence
from tasks.promotion.evidence.hacking import hacking_evidence
from tasks.promotion.evidence.item import Evidence, FileRef
from tasks.promotion.evidence.means import stream_of
from tasks.promotion.evidence.quality import guard_evidence, quality_evidence
from tasks.promotion.evidence.safety import safety_evidence
from tasks.promotion.policy import Policy

_NOWHERE = FileRef("", "")


def stop_reason(outcomes: PairedOutcomes, policy: Policy) -> str | None:
    """Return why no further answer is needed, in words, or None where the evaluation has to go on.

    It is judged by the gate's own functions, on the wealth after the last answer. Bets allow that at any time and any
    number of times (Ville's inequality), so the decision, which judges the same answers again, errs no more than it says.

    Raises:
        ValueError: the outcomes have no plan.
    """
    plan = outcomes.plan
    if plan is None:
        raise ValueError("outcomes without a plan are all there; nothing can be stopped")
    items = _items(outcomes, policy)
    # A sign of hacking fails only for want of a shown gain, which the answers to come may still show.
    failed = [i for i in items if i.verdict == "FAIL" and not i.name.startswith("hacking/")]
    if failed:
        return failed[0].says
    everywhere = set(outcomes.slices()) == set(plan.tasks)
    if everywhere and all(item.verdict == "PASS" for item in items):
        return "every claim about the answers is shown"
    return _futile(outcomes, plan, policy)


def running_gain(outcomes: PairedOutcomes, policy: Policy) -> Evidence:
    """Return the quality item as it stands, for whoever watches."""
    return quality_evidence(outcomes, _NOWHERE, policy)


def _items(outcomes: PairedOutcomes, policy: Policy) -> Sequence[Evidence]:
    """All that is counted and rests on the answers alone."""
    items = [
        quality_evidence(outcomes, _NOWHERE, policy),
        *guard_evidence(outcomes, _NOWHERE, policy),
        *safety_evidence(outcomes, _NOWHERE, policy),
        *conduct_evidence(outcomes, _NOWHERE, policy),
        *(hacking_evidence(outcomes, _NOWHERE, None, None, policy) if policy.hacking.required else ()),
    ]
    return [item for item in items if item.counts]


def _futile(outcomes: PairedOutcomes, plan: Plan, policy: Policy) -> str | None:
    """Suppose every task to come is won outright, each a cluster of its own: no wealth could be greater."""
    quality = (None, policy.superiority.threshold, policy.errors.share, "a gain")
    claims: list[tuple[str | None, float, float, str]] = [quality]
    claims += [(env, -policy.guards.margin, policy.guards.alpha, f"no loss in {env}") for env in plan.tasks]
    for env, margin, alpha, what in claims:
        answered = {pair.task_id for pair in outcomes.pairs if env in (None, pair.env)}
        planned = plan.total if env is None else plan.tasks[env]
        best = _won(outcomes, env, planned - len(answered))
        if final_p(best, margin) > alpha:
            return f"{what} could not be shown any more, were all {planned - len(answered)} tasks left won"
    return None


def _won(outcomes: PairedOutcomes, env: str | None, left: int) -> Stream:
    stream, samples = stream_of(outcomes, env), 1 + max((pair.sample for pair in outcomes.pairs), default=0)
    more = np.full(left, samples / (outcomes.largest(env) or 1))
    return Stream(np.append(stream.sums, more), np.append(stream.shares, more), stream.support)
