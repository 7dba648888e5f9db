"""Lineage as W3C PROV-JSON: what was made (entities), how (activities), and who answers for it (agents).

Method: https://www.w3.org/submissions/prov-json/ over PROV-DM. A run, the sealing of a dataset version, an evaluation,
a decision and a promotion are activities; agents in Forebay's sense are entities, for they are made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from tasks.core.digest import canonical_json
from tasks.lineage.standards.material import Material, name_of, utc
from tasks.lineage.types import SHAPING, Edge, Kind, Node, Ref

_PROV = "http://www.w3.org/ns/prov#"
_SEALING, _EVALUATING, _DECIDING = "sealing", "evaluating", "deciding"
_ACTIVITIES: frozenset[Kind] = frozenset({"run", "promotion"})
_MADE_BY: Mapping[Kind, str] = {
    "dataset": _SEALING, "evaluation": _EVALUATING, "decision": _DECIDING, "validation": "validating", "reward": "validating",
}  # fmt: skip


_DERIVED = SHAPING - {"gathered in", "comes from", "licensed under"}
"""By these an entity was made from another; whatever else is said of it is an influence (a policy, a licence)."""


def document(material: Material) -> dict[str, Any]:
    """Return the lineage as a PROV-JSON document."""
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    found["prefix"] = {"forebay": "https://forebay/prov#", "fb": f"{material.namespace}/"}  # type: ignore[dict-item]
    for ref, node in material.lineage.nodes.items():
        _add_node(found, ref, node, _revoked(material, ref, node))
    for edge in material.lineage.edges:
        _add_edge(found, edge)
    return {part: dict(found[part]) for part in sorted(found)}


def _revoked(material: Material, ref: Ref, node: Node) -> dict[str, str]:
    """Return as attributes that a thing learnt from revoked data, or that its bytes were erased on purpose."""
    erased = "; ".join(material.erased[file.path] for file in node.files if file.path in material.erased)
    said = {"forebay:flag": material.flag(ref), "forebay:erased": erased}
    return {name: words for name, words in said.items() if words}


def _add_node(
    found: dict[str, dict[str, dict[str, Any]]], ref: Ref, node: Node, more: Mapping[str, str]
) -> None:
    label = node.name if node.kind in ("agent", "source") else f"{node.kind} {node.name}"
    about: dict[str, Any] = {"prov:label": label, "prov:type": _types(node.kind), **_facts(node), **more}
    if node.files:
        about["forebay:files"] = [f"{file.path} sha256:{file.sha256}" for file in node.files]
    if not node.known:
        about["forebay:known"] = False
    if node.kind not in _ACTIVITIES:
        found["entity"][_id(ref)] = about
    elif node.kind == "run" and node.known:
        times = {"prov:startTime": utc(node.facts["started"]), "prov:endTime": utc(node.facts["finished"])}
        found["activity"][_id(ref)] = {**about, **times}
    else:
        time = (
            {"prov:startTime": utc(node.facts["time"]), "prov:endTime": utc(node.facts["time"])}
            if node.known
            else {}
        )
        found["activity"][_id(ref)] = {**about, **time}
    if node.kind in _MADE_BY and node.known:
        _add_making(found, ref, node)
    for name, by in _people(node):
        found["agent"][by] = {"prov:label": name, "prov:type": _typed("person or service")}
        doing = _id(ref) if node.kind == "promotion" else _making(ref)
        _relate(found, "wasAssociatedWith", {"prov:activity": doing, "prov:agent": by})


def _facts(node: Node) -> dict[str, Any]:
    """Return the digest and all facts as attributes; what is no plain value as JSON text."""
    names = {"digest": "checkpoint"} if node.kind == "run" else {}  # its own digest is its key
    facts = {
        f"forebay:{names.get(key, key)}": value for key, value in node.facts.items() if value is not None
    }
    plain = {
        key: value if isinstance(value, str | int | float) else canonical_json(value).decode()
        for key, value in facts.items()
    }
    return {**plain, **({"forebay:digest": node.digest} if node.digest else {})}


def _add_making(found: dict[str, dict[str, dict[str, Any]]], ref: Ref, node: Node) -> None:
    time = utc(node.facts["sealed" if node.kind == "dataset" else "time"])
    made = _making(ref)
    found["activity"][made] = {
        "prov:type": _typed(_MADE_BY[node.kind]),
        "prov:startTime": time,
        "prov:endTime": time,
    }
    _relate(found, "wasGeneratedBy", {"prov:entity": _id(ref), "prov:activity": made, "prov:time": time})


def _add_edge(found: dict[str, dict[str, dict[str, Any]]], edge: Edge) -> None:
    source, target = edge.source, edge.target
    role = {"prov:role": _typed(edge.relation.replace(" ", "-"))}
    if edge.relation == "trained by":
        _relate(found, "wasGeneratedBy", {"prov:entity": _id(source), "prov:activity": _id(target)})
    elif edge.relation == "in office":
        _relate(found, "used", {"prov:activity": _id(target), "prov:entity": _id(source), **role})
    elif edge.relation in ("judged by", "checked by"):
        _relate(found, "used", {"prov:activity": _making(target), "prov:entity": _id(source), **role})
    elif edge.relation == "holds":
        _relate(found, "hadMember", {"prov:collection": _id(source), "prov:entity": _id(target)})
    elif source[0] in _ACTIVITIES:
        _relate(found, "used", {"prov:activity": _id(source), "prov:entity": _id(target), **role})
    else:
        if source[0] in _MADE_BY:
            _relate(found, "used", {"prov:activity": _making(source), "prov:entity": _id(target), **role})
        about = {"prov:type": _typed(edge.relation.replace(" ", "-"))}
        if edge.relation in _DERIVED:
            ends = {"prov:generatedEntity": _id(source), "prov:usedEntity": _id(target)}
            _relate(found, "wasDerivedFrom", {**ends, **about})
        else:
            ends = {"prov:influencee": _id(source), "prov:influencer": _id(target)}
            _relate(found, "wasInfluencedBy", {**ends, **about})


def _people(node: Node) -> Iterator[tuple[str, str]]:
    if node.kind == "promotion" and node.known:
        names = [node.facts["by"]]
    elif node.kind == "decision" and node.known:
        names = [answer["by"] for answer in (*node.facts["approvals"], *node.facts["rejections"])]
    else:
        names = []
    for name in names:
        yield name, f"fb:by/{quote(name, safe='')}"


def _relate(found: dict[str, dict[str, dict[str, Any]]], kind: str, values: dict[str, Any]) -> None:
    found[kind][f"_:{kind}{len(found[kind]) + 1}"] = values


def _id(ref: Ref) -> str:
    return f"fb:{quote(name_of(ref), safe='/@')}"


def _making(ref: Ref) -> str:
    return f"{_id(ref)}/made"


def _types(kind: Kind) -> dict[str, str] | list[dict[str, str]]:
    """Return the type of a node; a dataset version is a collection of shards too."""
    collection = {"$": "prov:Collection", "type": "prov:QUALIFIED_NAME"}
    return [_typed(kind), collection] if kind == "dataset" else _typed(kind)


def _typed(name: str) -> dict[str, str]:
    return {"$": f"forebay:{name.replace(' ', '-')}", "type": "prov:QUALIFIED_NAME"}
