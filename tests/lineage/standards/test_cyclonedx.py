"""The bill of materials: valid by CycloneDX 1.6, true to the files, whole as a graph."""

from __future__ import annotations

from collections import Counter

import pyarrow.parquet as pq
import pytest

from tasks.core.digest import sha256_bytes, sha256_file
from tasks.core.errors import UsageError
from tasks.lineage.standards.cards import spdx
from tasks.lineage.standards.cyclonedx import bom
from tasks.lineage.standards.material import gather
from tests.lineage.standards.official import cyclonedx_fault


@pytest.fixture
def made(material):
    return bom(material)


def all_components(made):
    waiting = [made["metadata"]["component"], *made["components"]]
    for component in waiting:
        yield component
        waiting += component.get("components", [])


def properties(part):
    return {item["name"].removeprefix("forebay:"): item["value"] for item in part["properties"]}


def test_it_fits_the_official_schema(made):
    assert cyclonedx_fault(made) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda b: b["metadata"]["component"].update(type="agent"),
        lambda b: b["metadata"]["component"]["modelCard"].update(licence="none"),
        lambda b: b["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"][
            0
        ].update(value=1),
        lambda b: b["components"][0].pop("name"),
        lambda b: b["components"][1].update(hashes=[{"alg": "SHA-256", "content": "abc"}]),
        lambda b: b.update(serialNumber="1"),
        lambda b: b["dependencies"].append(b["dependencies"][0]),
        lambda b: b["metadata"].update(timestamp="yesterday"),
    ],
)
def test_a_broken_one_is_refused(made, spoil):
    spoil(made)
    assert cyclonedx_fault(made) is not None


def test_components_are_what_the_agent_was_made_from(world, made):
    names = {c["bom-ref"] for c in made["components"]}
    assert names >= {
        "agent/1",
        "agent/2",
        "dataset/main/v1",
        "dataset/main/v2",
        f"base/{world.agents[1]['digest']}",
    }
    assert {c["type"] for c in made["components"]} == {"machine-learning-model", "data", "application"}
    (lock,) = [c for c in made["components"] if c["name"] == "constraints.txt"]
    assert lock["hashes"] == [{"alg": "SHA-256", "content": sha256_bytes(b"lock")}]
    (code,) = [c for c in made["components"] if c["name"] == "Forebay"]
    assert code["version"] == "c" * 40


def test_a_rival_of_a_decision_is_no_part(world):
    """agent/4 was started from agent/2 and compared with agent/3, which it was not made from."""
    world.judge(world.train(2), 3)
    made = bom(gather(world.ledger, world.workspace, "agent/4"))
    assert cyclonedx_fault(made) is None
    assert "agent/3" not in {c["bom-ref"] for c in made["components"]}


def test_hashes_are_those_of_the_files(world, made):
    hashed = 0
    for component in all_components(made):
        for item in component.get("hashes", ()):
            named = {p["name"]: p["value"] for p in component.get("properties", ())}
            path = named.get("forebay:hashes_of", component["name"])
            if path != "constraints.txt":
                assert sha256_file(world.workspace.root / path) == item["content"], component["name"]
                hashed += 1
    assert hashed == 3 * (2 + 1) + 4 + 2  # agents: two files and the weights; shards; manifests


def test_every_dependency_is_a_component_and_all_are_reached(made):
    declared = Counter(c["bom-ref"] for c in all_components(made))
    assert set(declared.values()) == {1}
    edges = {entry["ref"]: entry.get("dependsOn", []) for entry in made["dependencies"]}
    assert {name for targets in edges.values() for name in targets} <= declared.keys()
    waiting = ["agent/3"]
    for name in waiting:
        waiting += [target for target in edges[name] if target not in waiting]
    assert set(waiting) == set(edges)
    assert "dataset/main/v1" in edges["dataset/main/v2"]


def test_data_components_say_licences_and_counts(world, made):
    (data,) = [c for c in made["components"] if c["bom-ref"] == "dataset/main/v2"]
    assert data["licenses"] == [{"expression": "Apache-2.0 AND CC-BY-4.0"}]
    tables = [pq.read_table(world.workspace.root / s.path) for s in world.manifests["main"].shards]
    rows = Counter(source for table in tables for source in table["source"].to_pylist())
    said = properties(data["data"][0]["contents"])
    assert said["digest"] == world.manifests["main"].root
    for source, number in rows.items():
        (portion,) = [text for name, text in said.items() if name.startswith("portion") and source in text]
        assert portion.startswith(f"{number} rows in 4 groups;")


def test_the_model_card_has_intervals_of_the_decision(material, made):
    card = made["metadata"]["component"]["modelCard"]
    record = material.records[material.newest_decision(("agent", "agent/3"))]
    (quality,) = [item for item in record["evidence"] if item["name"] == "quality"]
    metrics = {m["type"]: m for m in card["quantitativeAnalysis"]["performanceMetrics"]}
    assert metrics["quality (mean reward)"] == {
        "type": "quality (mean reward)",
        "value": repr(quality["estimate"]),
        "confidenceInterval": {"lowerBound": repr(quality["low"]), "upperBound": repr(quality["high"])},
    }
    assert metrics["guard (mean reward)"]["slice"] == "calculator"
    assert card["modelParameters"]["datasets"] == [{"ref": "dataset/main/v2"}]
    assert properties(card)["training.objective"] == "vespo"
    assert properties(card)["verdict"] == "PASS"
    assert "Licence of the base model: not recorded." in card["considerations"]["technicalLimitations"]


def test_shards_that_are_elsewhere_are_said_to_be_not_counted(world):
    (world.workspace.root / world.manifests["main"].shards[0].path).unlink()
    made = bom(gather(world.ledger, world.workspace, "agent/3"))
    assert cyclonedx_fault(made) is None
    (data,) = [c for c in made["components"] if c["bom-ref"] == "dataset/main/v2"]
    assert properties(data["data"][0]["contents"])["not_counted"].startswith("1 shard")


def test_a_base_alone_has_one_too(world):
    made = bom(gather(world.ledger, world.workspace, "agent/1"))
    assert cyclonedx_fault(made) is None
    assert "quantitativeAnalysis" not in made["metadata"]["component"]["modelCard"]


def test_a_dataset_has_none(world):
    with pytest.raises(UsageError, match="made of agents, and this is a dataset"):
        bom(gather(world.ledger, world.workspace, "dataset:main"))


def test_the_same_ledger_gives_the_same_bill(material, made):
    assert bom(material) == made
    assert made["serialNumber"].startswith("urn:uuid:")


def test_licences_join_to_one_expression_or_stay_names():
    assert spdx(["mit", "apache-2.0"]) == "MIT AND Apache-2.0"
    assert spdx(["MIT OR GPL-2.0-only", "MIT"]) == "(MIT OR GPL-2.0-only) AND MIT"
    assert spdx(["MIT", "the usual terms"]) is None
    assert spdx([]) is None
