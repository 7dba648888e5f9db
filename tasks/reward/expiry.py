"""When the verdict on a reward model does not hold any more."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from tasks.promotion.policy import RewardModel as Rule


def expired(payload: Mapping[str, Any], now: datetime, policy_version: int, rule: Rule) -> str | None:
    """Return why a recorded verdict holds no more, or None where it holds.

    Args:
        payload: of a `reward.validated` entry.
        now: with a time zone.
        policy_version: registry version of the agent in office, whose answers the reward model is to judge.
    """
    name = f"the reward model {payload['digest'][:12]}"
    days = (now - datetime.fromisoformat(payload["time"])).total_seconds() / 86400
    if days > rule.expires.days:
        return (
            f"{name} was validated {days:.0f} days ago and its verdict holds {rule.expires.days:g}; "
            "run `forebay reward validate`"
        )
    policy = payload["policy"]
    lag = policy_version - policy["version"] if policy else 0
    if lag > rule.expires.versions:
        return (
            f"{name} was validated on answers of agent/{policy['version']}, {lag} versions before "
            f"agent/{policy_version}, and its verdict holds for {rule.expires.versions}; "
            "run `forebay reward validate` on newer answers"
        )
    return None
