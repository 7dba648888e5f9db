"""Exports of a cycle that really ran: valid by the official schemas, checked against the workspace's files."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
from huggingface_hub import ModelCard

from tests.flows.conftest import forebay, loads
from tests.lineage.standards.official import (
    SPEC,
    cyclonedx_fault,
    open_statement,
    openlineage_faults,
    prov_faults,
    read_event,
    read_provenance,
)


def test_a_real_agents_exports(cycled, tmp_path):
    root, out = cycled.workspace.root, tmp_path / "out"
    made = loads(forebay(root, "export", "agent@champion", "--output", str(out), "--json"))
    assert made["unsigned"] == []
    checked = loads(forebay(root, "export", "--check", str(out), "--json"))
    assert (checked["ok"], checked["misfits"]) == (True, [])

    bom = json.loads((out / "bom.cdx.json").read_text())
    assert cyclonedx_fault(bom) is None
    assert prov_faults(json.loads((out / "prov.json").read_text())) == []
    events = [json.loads(line) for line in (out / "openlineage.ndjson").read_text().splitlines()]
    for event in events:
        read_event(event)
        assert SPEC is None or list(openlineage_faults(event)) == []
    statements = [open_statement(path.read_bytes()) for path in (out / "attestations").iterdir()]
    builds = [s["predicate"] for s in statements if s["predicateType"] == "https://slsa.dev/provenance/v1"]
    assert len(builds) == 2
    for predicate in builds:
        read_provenance(predicate)

    champion = cycled.agent("champion").payload
    subjects = {item["name"]: item["digest"]["sha256"] for s in statements for item in s["subject"]}
    assert subjects.items() >= {f"{champion['path']}/{n}": d for n, d in champion["files"].items()}.items()
    settings = cycled.ledger.last("run.started").payload["settings"]
    assert settings in [p["buildDefinition"]["externalParameters"].get("settings") for p in builds]

    card = ModelCard((out / "README.md").read_text())
    sealed = cycled.ledger.last("dataset.sealed").payload
    rows = sum(pq.read_metadata(root / shard["path"]).num_rows for shard in sealed["shards"])
    assert f"{sealed['name']}/v{sealed['version']}: {rows:,} episodes" in card.text
    assert card.data.eval_results
    for name, value in settings.items():
        assert isinstance(value, dict) or f"| {name} |" in card.text
