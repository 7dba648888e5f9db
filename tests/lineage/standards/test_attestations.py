"""Attestations of runs and dataset versions: valid by in-toto and SLSA, signed, and true to the files."""

from __future__ import annotations

import pytest
from google.protobuf.json_format import ParseError

from tasks.core.digest import sha256_file
from tasks.core.dsse import open_envelope, sign
from tasks.lineage.standards.attestations import attest, builder, run_provenance
from tests.lineage.standards.official import open_statement, read_provenance
from tests.promotion.support import SERVICE, TRUST

SLSA = "https://slsa.dev/provenance/v1"


@pytest.fixture
def statements(material):
    return {name: open_statement(data) for name, data in attest(material, SERVICE).items()}


def of(statements, build_type):
    found = [
        s
        for s in statements.values()
        if s["predicate"].get("buildDefinition", {}).get("buildType") == build_type
    ]
    return sorted(found, key=lambda s: s["predicate"]["runDetails"]["metadata"]["finishedOn"])


def test_each_run_dataset_version_and_decision_has_one(material, statements):
    wanted = [ref for ref, _ in material.of("run", "dataset", "decision")]
    assert len(statements) == len(wanted) == 6
    assert sorted(s["predicateType"] for s in statements.values()).count(SLSA) == 4


def test_the_service_signed_each_of_them(material):
    for data in attest(material, SERVICE).values():
        said = open_envelope(data, ("provenance", "gate-decision"), TRUST, "service")
        assert said.key.name == "service"


def test_a_provenance_is_one_by_the_protobuf_of_slsa(statements):
    read = [read_provenance(s["predicate"]) for s in statements.values() if s["predicateType"] == SLSA]
    assert len(read) == 4
    assert all(one.run_details.builder.id == builder(SERVICE.id) for one in read)
    assert all(one.run_details.metadata.finished_on.seconds > 0 for one in read)


def test_subjects_and_dependencies_are_the_files_of_the_workspace(world, statements):
    checked = 0
    for statement in statements.values():
        if statement["predicateType"] != SLSA:
            continue
        dependencies = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
        assert statement["subject"]
        for item in (*statement["subject"], *dependencies):
            path = world.workspace.root / item["name"]
            if "sha256" in item.get("digest", {}) and item["name"] != "constraints.txt":
                assert sha256_file(path) == item["digest"]["sha256"], item
                checked += 1
    assert checked == 4 + (2 + 1) * 2 + (1 + 2 + 2) + (
        1 + 4 + 2
    )  # subjects of runs, of versions, dependencies


def test_a_run_says_what_it_was_made_from(world, statements):
    _, last = of(statements, "https://forebay/training-run/v1")
    build = last["predicate"]["buildDefinition"]
    started = world.ledger.entries("run.started")[-1].payload
    assert build["externalParameters"] == {"settings": started["settings"], "seed": started["seed"]}
    named = {item["name"]: item["digest"] for item in build["resolvedDependencies"]}
    assert named["dataset/main/v2"] == {"forebayRoot": started["dataset"]}
    assert named["agent/2"] == {"forebayFiles": world.agents[2]["digest"]}
    assert named[f"base/{world.agents[1]['digest']}"] == {"forebayFiles": world.agents[1]["digest"]}
    assert named["code"] == {"gitCommit": "c" * 40, "forebayFiles": started["code"]}
    assert named["constraints.txt"] == {"sha256": started["lock"]}
    assert {name for name in named if name.startswith("data/")} == {
        "data/replay/main/manifests/v00002.json", *(shard.path for shard in world.manifests["main"].shards)
    }  # fmt: skip
    subjects = {item["name"]: item["digest"]["sha256"] for item in last["subject"]}
    assert subjects == {f"{world.agents[3]['path']}/{n}": d for n, d in world.agents[3]["files"].items()}
    times = last["predicate"]["runDetails"]["metadata"]
    assert times["startedOn"] < times["finishedOn"]
    assert times["startedOn"].endswith("Z")


def test_a_dataset_version_says_parent_and_policies(world, statements):
    first, second = of(statements, "https://forebay/replay-snapshot/v1")
    named = [item["name"] for item in second["predicate"]["buildDefinition"]["resolvedDependencies"]]
    assert named == ["dataset/main/v1", "agent/2"]
    assert {item["name"] for item in first["subject"]} & {item["name"] for item in second["subject"]} == set()
    together = {item["name"] for item in (*first["subject"], *second["subject"])}
    assert {shard.path for shard in world.manifests["main"].shards} <= together


def test_the_same_ledger_gives_the_same_bytes(material):
    assert attest(material, SERVICE) == attest(material, SERVICE)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: p["buildDefinition"].update(buildtype="misspelled"),
        lambda p: p["runDetails"]["metadata"].update(startedOn="yesterday"),
        lambda p: p["buildDefinition"].update(resolvedDependencies={"name": "no list"}),
        lambda p: p["buildDefinition"]["resolvedDependencies"][0]["digest"].update(sha256=7),
    ],
)
def test_a_broken_provenance_is_refused(material, spoil):
    ref = next(ref for ref, _ in material.of("run"))
    _, predicate = run_provenance(material, ref, builder(SERVICE.id))
    read_provenance(predicate)
    spoil(predicate)
    with pytest.raises(ParseError):
        read_provenance(predicate)


def test_a_statement_without_subjects_is_refused():
    with pytest.raises(ValueError, match="subject"):
        open_statement(sign("provenance", {}, {"buildDefinition": {}}, SERVICE))
