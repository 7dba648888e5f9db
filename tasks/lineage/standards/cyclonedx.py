"""An agent's bill of materials for machine learning: CycloneDX 1.6 as JSON.

Method: https://cyclonedx.org/docs/1.6/json/. The agent is the component that is described, with a model card; what it was
made from (earlier agents, base model, dataset versions, models that rewarded them, code, lock file) are components,
joined by `dependencies`. A component's `hashes` are of the bytes of one file, so a model's stand at its files; digests
over several files are properties.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from tasks.core.digest import canonical_json, digest_json
from tasks.lineage.standards.cards import (
    agent_of,
    base_licence,
    headline,
    items,
    metric_of,
    not_held,
    policy_of,
    scores,
    spdx,
)
from tasks.lineage.standards.material import NOT_RECORDED, Composition, Material, fresh_of, name_of
from tasks.lineage.types import File, Kind, Ref, Relation

SPEC = "1.6"
_Component = dict[str, Any]
_MADE_FROM: frozenset[Relation] = frozenset({
    "trained by", "converted from", "descends from",  # an agent
    "run by code", "with packages", "trained on", "started from",  # its run
    "continues", "sampled from", "scored from", "rewarded by",  # the dataset
    "learnt from", "reads states of", "made from",  # the model that rewarded it
})  # fmt: skip


def bom(material: Material) -> dict[str, Any]:
    """Return the bill of materials of the agent at the root of the lineage.

    Raises:
        UsageError: the root is no agent.
    """
    agent = agent_of(material)
    needed: dict[Ref, list[Ref]] = {}  # of each component, breadth first
    waiting = [agent]
    for ref in waiting:
        if ref not in needed:
            needed[ref] = _needs(material, ref)
            waiting += needed[ref]
    content: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": SPEC,
        "version": 1,
        "metadata": {
            "timestamp": material.time,
            "tools": {"components": [{"type": "application", "name": "Forebay"}]},
            "component": {**_agent(material, agent), "modelCard": _model_card(material, agent)},
            "properties": _properties({"ledger": material.ledger}),
        },
        "components": [_MAKE[ref[0]](material, ref) for ref in needed if ref != agent],
        "dependencies": [
            {"ref": name_of(ref), "dependsOn": sorted(map(name_of, targets))}
            for ref, targets in needed.items()
        ],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_URL, f"{material.namespace}/bom/{digest_json(content)}")
    return {
        **content,
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC}.schema.json",
        "serialNumber": f"urn:uuid:{serial}",
    }


def _needs(material: Material, ref: Ref) -> list[Ref]:
    """Return the components that one was made from, looking through the run of an agent."""
    found: list[Ref] = []
    for edge in material.lineage.following[ref]:
        if edge.relation not in _MADE_FROM:
            continue
        found += _needs(material, edge.target) if edge.target[0] == "run" else [edge.target]
    return list(dict.fromkeys(found))


def _agent(material: Material, ref: Ref) -> _Component:
    node = material.node(ref)
    if not node.known:
        return _model(material, ref, ref[1], (), {})
    facts = node.facts
    origin = {
        "origin": facts["origin"],
        "source": facts["source"]["name"],
        "roles": ", ".join(facts["roles"]),
    }
    mlflow = {f"mlflow.{key}": value for key, value in facts["mlflow"].items()}
    digests = {name: facts[name] for name in ("tokenizer_digest",)}
    flag = {"flag": material.flag(ref)}
    component = _model(material, ref, ref[1], node.files, {**origin, **mlflow, **digests, **flag})
    for run in material.known(ref, "trained by"):
        component["components"] += [_part("data", ref, file) for file in fresh_of(material.node(run))]
    licence = (
        base_licence(material, ref)[0] if facts["origin"] == "base" else None
    )  # nobody licensed a trained one
    return {**component, **_licences([licence] if licence else [])}


def _base(material: Material, ref: Ref) -> _Component:
    node = material.node(ref)
    source = node.facts.get("source", {})
    about = {f"source.{key}": value for key, value in source.items()}
    licence = source.get("licence")
    return {**_model(material, ref, node.name, (), about), **_licences([licence["name"]] if licence else [])}


def _source(material: Material, ref: Ref) -> _Component:
    node = material.node(ref)
    about = {"kind": node.facts.get("kind"), "role": "reward model", "flag": material.flag(ref)}
    component = _model(material, ref, ref[1], node.files, about)
    return {**component, **_licences(node.facts.get("licences", ()))}


def _outside(material: Material, ref: Ref) -> _Component:
    return _model(
        material, ref, material.node(ref).name, (), {"origin": "outside; its episodes were imported"}
    )


def _model(
    material: Material, ref: Ref, name: str, files: Iterable[File], about: Mapping[str, Any]
) -> _Component:
    node = material.node(ref)
    component: _Component = {"type": "machine-learning-model", "bom-ref": name_of(ref), "name": name}
    properties = _properties({"digest": node.digest or NOT_RECORDED, **about})
    parts = [_part("file", ref, file) for file in files]
    weights = [file for file in files if PurePosixPath(file.path).suffix == ".safetensors"]
    if len(weights) == 1:
        component["hashes"] = _hashes(weights[0].sha256)
        properties += _properties({"hashes_of": weights[0].path})
    return {**component, "properties": properties, **({"components": parts} if parts else {})}


def _dataset(material: Material, ref: Ref) -> _Component:
    node = material.node(ref)
    component: _Component = {"type": "data", "bom-ref": name_of(ref), "name": ref[1]}
    if ref not in material.manifests:
        return {**component, "properties": _properties({"digest": node.digest or ref[1], "known": False})}
    manifest, made_of = material.manifests[ref], material.composition(ref)
    about = {
        "digest": manifest.root, "rows": manifest.rows, "groups": manifest.groups, "bytes": manifest.total_bytes,
        "shards": len(manifest.shards), "shards_left_out": material.without(ref) or None,
        "git.commit": node.facts["git_commit"], "dvc.md5": node.facts["dvc"]["md5"], **_made_of(made_of),
    }  # fmt: skip
    data = {"type": "dataset", "name": ref[1], "contents": {"properties": _properties(about)}}
    added = [file for shard in material.behind(ref, "holds") for file in material.node(shard).files]
    return {
        **component,
        "version": str(manifest.version),
        "hashes": _hashes(node.files[0].sha256),
        **_licences(made_of.licences),
        "properties": _properties({"digest": manifest.root, "hashes_of": node.files[0].path}),
        "data": [data],
        "components": [
            _part("data", ref, file) for file in added
        ],  # it depends on its parent, which has the others
    }


def _preferences(material: Material, ref: Ref) -> _Component:
    node = material.node(ref)
    facts = node.facts
    about = {
        "pairs": facts.get("pairs"),
        "groups": facts.get("groups"),
        "sources": ", ".join(facts.get("sources", ())),
    }
    return {
        "type": "data",
        "bom-ref": name_of(ref),
        "name": node.name,
        "hashes": _hashes(ref[1]),
        **_licences(facts.get("licences", ())),
        "data": [{"type": "dataset", "name": node.name, "contents": {"properties": _properties(about)}}],
    }


def _code(material: Material, ref: Ref) -> _Component:
    node = material.node(ref)
    about = {"digest": node.digest, "changed_since_commit": node.facts["changed"]}
    version = {"version": node.facts["commit"]} if node.facts["commit"] else {}
    return {
        "type": "application", "bom-ref": name_of(ref), "name": "Forebay", **version, "properties": _properties(about),
    }  # fmt: skip


def _lock(material: Material, ref: Ref) -> _Component:
    node = material.node(ref)
    data = {"type": "configuration", "name": node.name}
    return {
        "type": "data", "bom-ref": name_of(ref), "name": node.name, "hashes": _hashes(ref[1]), "data": [data],
        "description": "the pinned Python packages with which the agent was trained",
    }  # fmt: skip


_MAKE: Mapping[Kind, Callable[[Material, Ref], _Component]] = {
    "agent": _agent,
    "base": _base,
    "outside": _outside,
    "source": _source,
    "dataset": _dataset,
    "preferences": _preferences,
    "code": _code,
    "lock": _lock,
}


def _model_card(material: Material, agent: Ref) -> dict[str, Any]:
    runs = material.known(agent, "trained by")
    datasets = [dataset for run in runs for dataset in material.behind(run, "trained on")]
    parameters: dict[str, Any] = {"task": "text-generation"}
    properties: dict[str, Any] = {}
    for run in runs:
        facts = material.node(run).facts
        parameters |= {"approach": {"type": "reinforcement-learning"}}
        properties |= {
            "run": run[1],
            "seed": facts["seed"],
            "device": facts["device"],
            "dtype": facts["dtype"],
        }
        properties |= {"steps": facts["steps"], "stop_reason": facts["stop_reason"]}
        properties |= {"groups_learnt_from": facts.get("groups")}
        properties |= {f"training.{key}": value for key, value in facts["settings"].items()}
        properties |= {f"metric.{key}": value for key, value in facts["metrics"].items()}
        properties |= {f"fresh.{key}": value for key, value in _made_of(material.composition(run)).items()}
    if datasets:
        parameters["datasets"] = [{"ref": name_of(dataset)} for dataset in datasets]
    decision = material.newest_decision(agent)
    if decision is not None:
        facts = material.node(decision).facts
        properties |= {"decision": decision[1], "verdict": facts["verdict"]}
        properties |= {"policy": policy_of(material, decision)}
        for kind in ("approvals", "rejections"):
            properties |= {
                f"{kind}.{i}": f"{a['by']}: {a['reason']}" for i, a in enumerate(facts[kind], start=1)
            }
        for reward in (ref for ref in material.behind(decision, "rests on") if ref[0] == "reward"):
            node = material.node(reward)
            properties |= {"reward_model": node.digest, "reward_model.verdict": node.facts["verdict"]}
    metrics: list[dict[str, Any]] = [
        {"type": "mean reward", "value": repr(row["candidate"]), "slice": name}
        for name, row in scores(material, decision).items()
    ]
    metrics += [_metric(item) for item in items(material, decision) if item["estimate"] is not None]
    card: dict[str, Any] = {"modelParameters": parameters}
    if metrics:
        card["quantitativeAnalysis"] = {"performanceMetrics": metrics}
    limits = [
        *(f"Open flag: {said}." for said in material.open_flags()),
        *not_held(material, decision),
        f"Licence of the base model: {base_licence(material, agent)[1]}.",
    ]
    card["considerations"] = {
        "useCases": [headline(material, agent, decision)],
        "technicalLimitations": limits,
    }
    return {**card, "properties": _properties(properties)}


def _metric(item: Mapping[str, Any]) -> dict[str, Any]:
    name, part = metric_of(item)
    metric: dict[str, Any] = {"type": f"{name} ({item['unit']})", "value": repr(item["estimate"])}
    if part:
        metric["slice"] = part
    if item["low"] is not None and item["high"] is not None:
        metric["confidenceInterval"] = {"lowerBound": repr(item["low"]), "upperBound": repr(item["high"])}
    return metric


def _part(kind: str, whole: Ref, file: File) -> _Component:
    """Return a file as a component inside another."""
    return {
        "type": kind, "bom-ref": f"{name_of(whole)}#{file.path}", "name": file.path, "hashes": _hashes(file.sha256),
    }  # fmt: skip


def _made_of(made_of: Composition) -> dict[str, Any]:
    about = {
        f"portion.{number}": (
            f"{p.rows} rows in {p.groups} groups; source {p.source}; licence {p.licence}; "
            f"environment {p.env} {p.env_version}; split {p.split}"
        )
        for number, p in enumerate(made_of.portions, start=1)
    }
    if made_of.erased:
        about["erased"] = f"{len(made_of.erased)} shards, on purpose"
    if made_of.absent:
        about["not_counted"] = f"{len(made_of.absent)} shards that are not in the workspace"
    return about


def _licences(names: Iterable[str]) -> dict[str, Any]:
    """Return `licenses` as one SPDX expression, or name by name where one is not of SPDX; nothing where none is known."""
    found = sorted(set(names))
    expression = spdx(found)
    if not found:
        return {}
    return {
        "licenses": [{"expression": expression}]
        if expression
        else [{"license": {"name": name}} for name in found]
    }


def _hashes(sha256: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": sha256}]


def _properties(values: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "name": f"forebay:{key}",
            "value": value if isinstance(value, str) else canonical_json(value).decode(),
        }
        for key, value in values.items()
        if value is not None
    ]
