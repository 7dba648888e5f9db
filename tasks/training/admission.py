"""Which groups may be learnt from: those with a signal, recent enough, and close enough to the policy.

A group whose rewards are all equal has no advantage and no gradient; leaving it out beforehand is the dynamic
sampling of DAPO (arXiv 2503.14476, section 3.2) for data that exists already. Staleness is judged twice: by the
version counter, which is free, and by the divergence that a forward pass measures, which is what counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tasks.core.errors import Refused
from tasks.training.groups import GroupTable
from tasks.training.settings import Admission

# Equal rewards may have a standard deviation that is not quite 0 in floating point.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Report:
    """Groups admitted, and refused by reason; every group is counted once, under its first reason."""

    admitted: int
    refused: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.refused.items() if count)
        groups = self.admitted + sum(self.refused.values())
        return f"{self.admitted} of {groups} groups admitted" + (f"; refused: {reasons}" if reasons else "")

    def metrics(self) -> dict[str, float]:
        """The counts under the names of metrics."""
        refused = {f"groups_refused_{reason}": float(count) for reason, count in self.refused.items()}
        return {"groups_admitted": float(self.admitted)} | refused

    def then(self, later: Report) -> Report:
        """This filter and, of what it admitted, `later`."""
        return Report(later.admitted, self.refused | later.refused)


def passes(table: GroupTable, settings: Admission) -> np.ndarray:
    """[G] bool, the groups that may be learnt from by what is known before they are read."""
    passing = np.ones(len(table), bool)
    for _, rule, _ in _rules(table, settings):
        passing &= rule
    return passing


def admit(table: GroupTable, settings: Admission) -> tuple[GroupTable, Report]:
    """The groups that `passes` lets through, and why the others are left out.

    Raises:
        Refused: none is left; the sentence says which setting to change.
    """
    return _filter(table, _rules(table, settings))


def admit_measured(
    table: GroupTable, settings: Admission, divergence: np.ndarray
) -> tuple[GroupTable, Report]:
    """Of those, the groups close enough to the initial policy.

    Args:
        table: G groups.
        settings: `max_divergence`; None admits all.
        divergence: [G] k3 estimate of KL(behaviour || initial policy), mean over a group's trained tokens, nats.
            A value that is no finite number is refused.

    Raises:
        Refused: none is left; the sentence says which setting to change.
    """
    if settings.max_divergence is None:
        return table, Report(len(table))
    near = np.isfinite(divergence) & (divergence <= settings.max_divergence)
    advice = f"raise training.admission.max_divergence ({settings.max_divergence:g})"
    return _filter(table, [("divergence", near, advice)])


def _rules(table: GroupTable, settings: Admission) -> list[tuple[str, np.ndarray, str]]:
    """(reason to refuse, groups that pass, what to do if none is left)."""
    least = settings.min_reward_std
    floor = -1.0 if least is None else least + _ROUNDING * np.maximum(1, np.abs(table.reward_mean))
    newest = np.iinfo(np.int32).max if settings.max_lag is None else settings.max_lag
    spread = (
        f"lower training.admission.min_reward_std ({least:g})"
        if least
        else "collect on harder or easier tasks, for within these groups all rewards are equal"
    )
    kept_back = f"lower training.admission.holdout ({settings.holdout:g})"
    return [
        *([("held_out", ~held_out(table.ids, settings.holdout), kept_back)] if settings.holdout else []),
        ("no_tokens", table.trained > 0, "none of the answers has a token that the policy may learn from"),
        ("reward_std", table.reward_std > floor, spread),
        ("lag", table.lag <= newest, f"raise training.admission.max_lag ({settings.max_lag})"),
    ]


def held_out(ids: Sequence[str] | np.ndarray, share: float) -> np.ndarray:
    """[G] bool, the groups that no training may ever see: a threshold on the SHA-256 of their ids, whatever the seed."""
    fractions = (
        int(hashlib.sha256(f"held out/{name}".encode()).hexdigest()[:13], 16) / 16**13 for name in ids
    )
    return np.fromiter((fraction < share for fraction in fractions), bool, len(ids))


def _filter(table: GroupTable, rules: Sequence[tuple[str, np.ndarray, str]]) -> tuple[GroupTable, Report]:
    """Apply (reason, groups that pass, what to do if none is left) in turn."""
    left = np.ones(len(table), bool)
    refused = {}
    for reason, passes, _ in rules:
        refused[reason] = int(np.count_nonzero(left & ~passes))
        left &= passes
    report = Report(int(np.count_nonzero(left)), refused)
    if not report.admitted:
        advice = [text for reason, _, text in rules if refused[reason]] or [
            "collect and seal experience first"
        ]
        raise Refused(f"{report}, so there is nothing to train on; {', or '.join(advice)}.")
    return table.where(left), report
