"""Whether the champion's error budget and the held-out tasks have something left for one more decision."""

from __future__ import annotations

from tasks.promotion.budget import Spent
from tasks.promotion.evidence.item import Evidence
from tasks.promotion.policy import Policy

_TINY = 1e-9  # of an error: twenty shares of a twentieth are the whole, however they round


def budget_evidence(spent: Spent, policy: Policy) -> list[Evidence]:
    """Hold what earlier decisions took against what the policy allows."""
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
