"""When the verdict on a reward model does not hold any more."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any


def expired(verdict: Mapping[str, Any], now: datetime | None = None) -> str:
    """Return why a verdict holds no more, "" where it holds.

    Args:
        verdict: payload of `reward.validated`; `expires` (ISO-8601, UTC) is when it ends, where it says so.
    """
    until = verdict.get("expires")
    if not until or (now or datetime.now(UTC)) < datetime.fromisoformat(until):
        return ""
    return f"it held until {until}"
