"""How far training went from what it learnt from, and what it used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.promotion.evidence.item import Evidence, FileRef, rounded
from tasks.promotion.policy import Policy


def divergence_evidence(run: Mapping[str, Any] | None, source: FileRef | None, policy: Policy) -> Evidence:
    """Weigh the last k3 estimate of KL(behaviour || candidate) of a `forebay.run/1` file, in nats a token.

    It was measured on the answers that the last update learnt from. Where the champion wrote them, it is KL(champion ||
    candidate) one update before the end.
    """
    limit = policy.divergence.max_nats_per_token
    found = None if run is None else run["kl_k3"]
    if found is None or source is None:
        says = "Divergence: training did not report one."
        return Evidence("divergence", "INCONCLUSIVE", says, None, limit is not None, unit="nats")
    inside = limit is None or found <= limit
    allowed = "not limited" if limit is None else f"allowed {limit:.4g}"
    return Evidence(
        "divergence",
        "PASS" if inside else "FAIL",
        f"Divergence: {found:.4f} nats a token from the policies that wrote the last answers learnt from, {allowed}.",
        source.sha256,
        limit is not None,
        rounded(found),
        margin=limit,
        unit="nats",
    )


def resources_evidence(run: Mapping[str, Any] | None, source: FileRef | None, policy: Policy) -> Evidence:
    """Hold what a `forebay.run/1` file says that training used against the limits; unknown is inconclusive."""
    rule = policy.resources
    limits = (
        ("seconds", rule.max_seconds),
        ("cpu_seconds", rule.max_cpu_seconds),
        ("memory_mib", rule.max_memory_mib),
        ("tokens", rule.max_tokens),
    )
    limited = any(limit is not None for _, limit in limits)
    if run is None or source is None:
        says = "Resources: training did not record any."
        return Evidence("resources", "INCONCLUSIVE", says, None, limited, unit="seconds")
    over = [n for n, limit in limits if limit is not None and run[n] is not None and run[n] > limit]
    unknown = [n for n, limit in limits if limit is not None and run[n] is None]
    used = ", ".join(f"{_amount(run[n])} {_NAMES[n]}" for n, _ in limits)
    told = [
        *(f"{_NAMES[n]} above the {_amount(dict(limits)[n])} allowed" for n in over),
        *(f"{_NAMES[n]} not recorded" for n in unknown),
    ]
    return Evidence(
        "resources",
        "FAIL" if over else "INCONCLUSIVE" if unknown else "PASS",
        f"Resources: training used {used}{'' if limited else ', not limited'}{'; ' if told else ''}{'; '.join(told)}.",
        source.sha256,
        limited,
        None if run["seconds"] is None else rounded(run["seconds"]),
        margin=rule.max_seconds,
        unit="seconds",
    )


_NAMES = {
    "seconds": "s", "cpu_seconds": "s of processor time", "memory_mib": "MiB of memory", "tokens": "tokens",
}  # fmt: skip


def _amount(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}"
