"""What both cards of an agent say, the bill of materials and the model card: verdicts, limits, licences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tasks.core.errors import UsageError
from tasks.lineage.standards.material import NOT_RECORDED, Material
from tasks.lineage.types import Ref

_UNMEASURED: Mapping[str, Any] = dict.fromkeys(("estimate", "low", "high", "n", "margin")) | {
    "counts": True, "says": "", "unit": "",
}  # fmt: skip
"""An item of evidence in a record of an earlier release, which wrote less."""


def agent_of(material: Material) -> Ref:
    """Return the agent that a card or a bill of materials is about.

    Raises:
        UsageError: the lineage is of something else.
    """
    root = material.lineage.root
    if root[0] != "agent":
        raise UsageError(
            f"Model cards and bills of materials are made of agents, and this is a {root[0]}; ask for agent/N or "
            "agent@champion, or export it with --as intoto, openlineage or prov."
        )
    return root


def items(material: Material, decision: Ref | None) -> list[Mapping[str, Any]]:
    """Return the evidence items of a decision's record, in the order in which the gate weighed them."""
    return (
        []
        if decision is None
        else [{**_UNMEASURED, **item} for item in material.records[decision]["evidence"]]
    )


def policy_of(material: Material, decision: Ref) -> str:
    """Return the digest of the policy by which a decision was made."""
    return material.behind(decision, "under policy")[0][1]


def metric_of(item: Mapping[str, Any]) -> tuple[str, str]:
    """Return the name of a measured item, and the slice of tasks that it is about ("" for all)."""
    name, _, part = item["name"].partition("/")
    return (name, part) if name == "guard" else (item["name"], "")


def base_licence(material: Material, agent: Ref) -> tuple[str | None, str]:
    """Return the licence of the base model, None where it is not known, and words that say where it stands."""
    for base in material.bases(agent):
        said = (
            material.node(base).facts.get("source", {}).get("licence")
        )  # not in ledgers of earlier releases
        if said:
            return said["name"], f"{said['name']}, by {said['written_in']}"
    return None, NOT_RECORDED


def headline(material: Material, agent: Ref, decision: Ref | None) -> str:
    """Say in a sentence what an agent was judged on, which bounds what it is known to be good for."""
    if decision is None:
        return f"{agent[1]} was not judged by a decision; what it is good for is {NOT_RECORDED}."
    facts = material.node(decision).facts
    slices = sorted(name for name in scores(material, decision) if name != "all")
    on = f"the held-out tasks of {', '.join(slices)}" if slices else "held-out tasks"
    return (
        f"{agent[1]} was judged on {on}; the decision says {facts['verdict']}. Other uses are {NOT_RECORDED}."
    )


def not_held(material: Material, decision: Ref | None) -> list[str]:
    """Say what the newest decision did not find held: its failed, undecided and unrequired items."""
    if decision is None:
        return ["No decision was made, so no evaluation is recorded."]
    return [
        f"{item['verdict']}{'' if item['counts'] else ' (not required)'}: {item['says']}"
        for item in items(material, decision)
        if item["verdict"] != "PASS"
    ]


def scores(material: Material, decision: Ref | None) -> dict[str, Mapping[str, Any]]:
    """Return {slice of tasks: {candidate, champion, n, …}}, mean rewards of the evaluation behind a decision."""
    found: dict[str, Mapping[str, Any]] = {}
    for ref in [] if decision is None else material.behind(decision, "rests on"):
        if ref[0] == "evaluation":
            found |= material.node(ref).facts["slices"]
    return found


def spdx(licences: Iterable[str]) -> str | None:
    """Return one SPDX expression that requires all these licences, None where one is no SPDX licence."""
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    try:
        parts = [canonicalize_license_expression(licence) for licence in licences]
    except InvalidLicenseExpression:
        return None
    grouped = [f"({part})" if " OR " in part and len(parts) > 1 else part for part in parts]
    return " AND ".join(grouped) or None
