"""Lineage as OpenLineage run events, for a file of JSON lines or a collector such as Marquez.

Method: https://openlineage.io/spec/2-0-2/OpenLineage.json and the core facets. Every activity of the lineage is a run
with a START and a COMPLETE event; agents, dataset versions, decisions and models are its datasets. Only core facets
are used, so a collector needs to know nothing of Forebay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tasks.core.digest import canonical_json
from tasks.lineage.standards.cards import items, policy_of
from tasks.lineage.standards.material import Material, name_of, utc
from tasks.lineage.types import Kind, Node, Ref

PRODUCER = "https://forebay/openlineage/v1"
_SPEC = "https://openlineage.io/spec"
_EVENT = f"{_SPEC}/2-0-2/OpenLineage.json#/$defs/RunEvent"
_VERSIONS: Mapping[str, str] = {
    "DatasetTypeDatasetFacet": "1-0-1",
    "DatasetVersionDatasetFacet": "1-0-1",
    "ExecutionParametersRunFacet": "1-0-0",
    "JobTypeJobFacet": "2-0-4",
    "OutputStatisticsOutputDatasetFacet": "1-0-2",
    "ProcessingEngineRunFacet": "1-1-1",
    "TagsDatasetFacet": "1-0-0",
    "TagsRunFacet": "1-0-0",
    "TestRunFacet": "1-0-1",
}
_STATUS = {"PASS": "pass", "FAIL": "fail", "INCONCLUSIVE": "skip"}
_TYPES: Mapping[Kind, str] = {"agent": "MODEL", "base": "MODEL", "source": "MODEL", "outside": "MODEL"}
_Facets = dict[str, dict[str, Any]]
_Event = dict[str, Any]


def events(material: Material) -> list[_Event]:
    """Return the run events of a lineage in the order of time, each activity's START before its COMPLETE."""
    made = [event for ref, _ in material.of(*_RUNS) for event in _RUNS[ref[0]](material, ref)]
    return sorted(made, key=lambda event: event["eventTime"])  # stable: of equal times the order stays


def to_lines(found: Sequence[_Event]) -> bytes:
    """Return events as JSON lines."""
    return b"".join(canonical_json(event) + b"\n" for event in found)


def _train(material: Material, ref: Ref) -> Iterator[_Event]:
    node = material.node(ref)
    facts = node.facts
    agents = [agent for agent, _ in material.of("agent") if ref in material.behind(agent, "trained by")]
    code = [material.node(code) for code in material.behind(ref, "run by code")]
    tags = {"seed": facts["seed"], "device": facts["device"], "dtype": facts["dtype"]}
    tags |= {node.kind: node.digest for node in code}
    tags |= dict(material.behind(ref, "with packages"))
    tags |= {"stop_reason": facts["stop_reason"], "steps": facts["steps"]}
    facets = {
        "executionParameters": _facet(
            "ExecutionParametersRunFacet", parameters=_parameters(facts["settings"])
        ),
        "tags": _tags("TagsRunFacet", tags),
    }
    if code and code[0].facts["commit"]:
        facets["processing_engine"] = _facet(
            "ProcessingEngineRunFacet", name="Forebay", version=code[0].facts["commit"]
        )
    yield from _pair(
        material, ref, "train", (facts["started"], facts["finished"]), facets,
        [*material.behind(ref, "trained on"), *material.behind(ref, "started from")], agents,
    )  # fmt: skip


def _seal(material: Material, ref: Ref) -> Iterator[_Event]:
    sealed = material.node(ref).facts["sealed"]
    inputs = [
        target
        for relation in ("continues", "scored from", "rewarded by", "sampled from")
        for target in material.behind(ref, relation)
    ]
    yield from _pair(material, ref, "seal", (sealed, sealed), {}, inputs, [ref])


def _convert(material: Material, ref: Ref) -> Iterator[_Event]:
    bases, time = material.behind(ref, "converted from"), material.node(ref).facts["registered"]
    if bases:  # trained agents are what their run made
        yield from _pair(material, ref, "convert", (time, time), {}, bases, [ref])


def _learn(material: Material, ref: Ref) -> Iterator[_Event]:
    time = material.node(ref).facts["registered"]
    inputs = [*material.behind(ref, "learnt from"), *material.behind(ref, "reads states of")]
    yield from _pair(material, ref, "train-reward", (time, time), {}, inputs, [ref])


def _prefer(material: Material, ref: Ref) -> Iterator[_Event]:
    time = material.node(ref).facts["time"]
    yield from _pair(
        material, ref, "make-preferences", (time, time), {}, material.behind(ref, "made from"), [ref]
    )


def _promote(material: Material, ref: Ref) -> Iterator[_Event]:
    node = material.node(ref)
    facts = node.facts
    held = [who for who, _ in material.of("agent", "source") if ref in material.behind(who, "in office")]
    decided: list[Ref] = [("decision", facts["decision"])] if facts["decision"] else []
    tags = {"by": facts["by"], "reason": facts["reason"], "ledger.entry": facts["seq"]}
    facets = {"tags": _tags("TagsRunFacet", tags)}
    office: list[Ref] = [(who[0], f"{who[1].partition('/')[0]}@champion") for who in held]
    yield from _pair(
        material, ref, node.name, (facts["time"], facts["time"]), facets, [*held, *decided], office
    )


def _validate(material: Material, ref: Ref) -> Iterator[_Event]:
    time = material.node(ref).facts["time"]
    datasets = [
        dataset for dataset, _ in material.of("dataset") if ref in material.behind(dataset, "checked by")
    ]
    inputs = [*datasets, *material.behind(ref, "trained on"), *material.behind(ref, "judges")]
    name = "validate-data" if ref[0] == "validation" else "validate-reward"
    test = {"name": name, "status": _STATUS[material.node(ref).facts["verdict"]], "severity": "error"}
    yield from _pair(
        material, ref, name, (time, time), {"test": _facet("TestRunFacet", tests=[test])}, inputs, [ref]
    )


def _evaluate(material: Material, ref: Ref) -> Iterator[_Event]:
    facts = material.node(ref).facts
    inputs: list[Ref] = [("agent", f"agent/{facts[side]}") for side in ("candidate", "champion")]
    inputs += material.behind(ref, "asks")
    yield from _pair(material, ref, "evaluate", (facts["time"], facts["time"]), {}, inputs, [ref])


def _decide(material: Material, ref: Ref) -> Iterator[_Event]:
    facts = material.node(ref).facts
    judged = [
        agent for agent, _ in material.of("agent", "source") if ref in material.behind(agent, "judged by")
    ]
    inputs = [*judged, *material.behind(ref, "compared with"), *material.behind(ref, "rests on")]
    tests = [_test(item) for item in items(material, ref)]
    facets = {
        "test": _facet("TestRunFacet", tests=tests),
        "tags": _tags("TagsRunFacet", {"verdict": facts["verdict"], "policy": policy_of(material, ref)}),
    }
    yield from _pair(material, ref, "decide", (facts["time"], facts["time"]), facets, inputs, [ref])


_RUNS: Mapping[Kind, Callable[[Material, Ref], Iterator[_Event]]] = {
    "agent": _convert,
    "preferences": _prefer,
    "source": _learn,
    "dataset": _seal,
    "validation": _validate,
    "run": _train,
    "reward": _validate,
    "evaluation": _evaluate,
    "decision": _decide,
    "promotion": _promote,
}


def _pair(
    material: Material,
    ref: Ref,
    job: str,
    times: tuple[str, str],
    facets: _Facets,
    inputs: Sequence[Ref],
    outputs: Sequence[Ref],
) -> Iterator[_Event]:
    """Yield the START and the COMPLETE event of an activity; both say the same, so each can be read alone."""
    kind = _facet("JobTypeJobFacet", processingType="BATCH", integration="FOREBAY", jobType="TASK")
    for state, time in zip(("START", "COMPLETE"), times, strict=True):
        yield {
            "eventType": state,
            "eventTime": utc(time),
            "producer": PRODUCER,
            "schemaURL": _EVENT,
            "run": {"runId": material.uuid("run", name_of(ref)), "facets": facets},
            "job": {"namespace": material.namespace, "name": job, "facets": {"jobType": kind}},
            "inputs": [_dataset(material, target) for target in dict.fromkeys(inputs)],
            "outputs": [_output(material, target) for target in dict.fromkeys(outputs)],
        }


def _dataset(material: Material, ref: Ref) -> dict[str, Any]:
    facets: _Facets = {
        "datasetType": _facet("DatasetTypeDatasetFacet", datasetType=_TYPES.get(ref[0], "FILE"))
    }
    node = material.lineage.nodes.get(ref)
    if node is not None:
        if node.digest:
            facets["version"] = _facet("DatasetVersionDatasetFacet", datasetVersion=node.digest)
        tags = _dataset_tags(material, ref, node)
        if tags:
            facets["tags"] = _tags("TagsDatasetFacet", tags)
    return {"namespace": material.namespace, "name": name_of(ref), "facets": facets}


def _output(material: Material, ref: Ref) -> dict[str, Any]:
    output, node = _dataset(material, ref), material.lineage.nodes.get(ref)
    if ref in material.manifests:
        manifest = material.manifests[ref]
        size = {"rowCount": manifest.rows, "size": manifest.total_bytes, "fileCount": len(manifest.shards)}
    elif node is not None and node.files:
        size = {"fileCount": len(node.files)}
    else:
        return output
    return {
        **output,
        "outputFacets": {"outputStatistics": _facet("OutputStatisticsOutputDatasetFacet", **size)},
    }


def _dataset_tags(material: Material, ref: Ref, node: Node) -> dict[str, Any]:
    facts = node.facts
    flag = material.flag(ref)
    if ref in material.manifests:
        made_of = material.composition(ref)
        return {
            **({"erased": ", ".join(made_of.erased)} if made_of.erased else {}),
            "licences": ", ".join(made_of.licences),
            "sources": ", ".join(made_of.sources),
            "git.commit": facts["git_commit"],
            "dvc.md5": facts["dvc"]["md5"],
        }
    if ref[0] == "agent" and node.known:
        mlflow = facts["mlflow"]
        tags = {
            f"mlflow.{name}": mlflow[name] for name in ("model_id", "run_id", "version") if mlflow.get(name)
        }
        return {**tags, "origin": facts["origin"], **({"flag": flag} if flag else {})}
    if flag:
        return {"flag": flag}
    return {"verdict": facts["verdict"]} if "verdict" in facts else {}


def _test(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return an item of evidence as a test: what it found, and what the policy held it against."""
    test = {
        "name": item["name"],
        "status": _STATUS[item["verdict"]],
        "severity": "error" if item["counts"] else "warn",
        "description": item["says"],
    }
    if item["margin"] is not None:
        test["expected"] = repr(item["margin"])
    if item["estimate"] is not None:
        test["actual"] = repr(item["estimate"])
        test["params"] = {name: item[name] for name in ("low", "high", "n", "unit")}
    return test


def _parameters(settings: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {"key": key, "value": value if isinstance(value, str) else canonical_json(value).decode()}
        for key, value in sorted(settings.items())
    ]


def _tags(facet: str, values: Mapping[str, Any]) -> dict[str, Any]:
    tags = [
        {"key": key, "value": str(value), "source": "FOREBAY"} for key, value in values.items() if value != ""
    ]
    return _facet(facet, tags=tags)


def _facet(name: str, /, **values: Any) -> dict[str, Any]:
    url = f"{_SPEC}/facets/{_VERSIONS[name]}/{name}.json#/$defs/{name}"
    return {"_producer": PRODUCER, "_schemaURL": url, **values}
