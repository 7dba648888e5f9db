"""Histories that are not the usual one: every export of them is valid, and says what is not known."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict

import pytest

from tasks.core.digest import canonical_json, digest_json, sha256_bytes
from tasks.core.errors import Corrupt
from tasks.core.keys import write_trust
from tasks.lineage.standards.attestations import attest
from tasks.lineage.standards.cyclonedx import bom
from tasks.lineage.standards.material import gather
from tasks.lineage.standards.model_card import card
from tasks.lineage.standards.openlineage import events
from tasks.lineage.standards.prov import document
from tasks.replay.manifest import dataset_root
from tests.lineage.page.world import revoke
from tests.lineage.standards.conftest import Tables
from tests.lineage.standards.official import (
    cyclonedx_fault,
    open_statement,
    prov_faults,
    read_event,
    read_provenance,
)
from tests.promotion.support import SERVICE, TRUST


def exports(world, ref):
    """Return every export of `ref`, each found valid."""
    material = gather(world.ledger, world.workspace, ref)
    made = {"prov": document(material), "events": events(material)}
    assert prov_faults(made["prov"]) == []
    for event in made["events"]:
        read_event(event)
    made["statements"] = [open_statement(data) for data in attest(material, SERVICE).values()]
    for statement in made["statements"]:
        if "slsa" in statement["predicateType"]:
            read_provenance(statement["predicate"])
    if material.lineage.root[0] == "agent":
        made |= {"bom": bom(material), "card": card(material)}
        assert cyclonedx_fault(made["bom"]) is None
    return made


def seal_again(world, **changes):
    """Seal the newest version of the dataset once more, as main/v9 with these changes."""
    sealed = dict(world.ledger.last("dataset.sealed").payload) | {"version": 9, "parent": None} | changes
    world.append("dataset.sealed", "main/v9", sealed)


def run_again(world, name, **changes):
    """Enter a run like that of agent/3, and agent/9 that it made."""
    key = digest_json([name])
    started = world.ledger.entries("run.started")[-1].payload
    finished = world.ledger.entries("run.finished")[-1].payload
    outputs = finished["outputs"] | changes.pop("outputs", {})
    if not changes.pop("lost", False):
        world.append("run.started", key, {**started, **changes, "key": key})
        world.append("run.finished", key, {"key": key, "outputs": outputs})
    agent = world.ledger.last("agent.registered", "agent/3").payload
    parents = agent["parents"] | {"run": key}
    world.append("agent.registered", "agent/9", {**agent, "version": 9, "parents": parents, "digest": key})


def test_experience_from_outside(world):
    seal_again(world, behaviour=[{"version": "GPT x (v1) 100%", "digest": ""}])
    root = world.ledger.last("dataset.sealed").payload["root"]
    run_again(world, "imported", dataset=root)
    made = exports(world, "dataset:main/v9")
    (dataset,) = [s for s in made["statements"] if s["predicate"]["buildDefinition"]]
    named = dataset["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert named == [{"name": "outside/GPT x (v1) 100%@", "uri": "outside:GPT%20x%20%28v1%29%20100%25"}]
    assert any(name.startswith("fb:outside/GPT%20x") for name in made["prov"]["entity"])


def test_a_hybrid_run_counts_what_it_sampled_itself(world):
    data = world.shard(99, world.manifests["main"].behaviour)
    fresh = world.put(world.workspace.runs / "hybrid" / "fresh" / "00000.parquet", data)
    run_again(world, "hybrid", outputs={"fresh": [fresh]})
    made = exports(world, "agent/9")
    table = made["card"].partition("Sampled by the run itself")[2]
    assert "| rollout | Apache-2.0 | calculator 1 | train | 8 | 1 |" in table
    (run,) = [s for s in made["statements"] if digest_json(["hybrid"]) in str(s["predicate"])]
    assert fresh["path"] not in {item["name"] for item in run["subject"]}
    products = {item["name"]: item["digest"] for item in run["predicate"]["runDetails"]["byproducts"]}
    assert products[fresh["path"]] == {"sha256": fresh["sha256"]}
    said = {p["name"]: p["value"] for p in made["bom"]["metadata"]["component"]["modelCard"]["properties"]}
    inside = {c["name"]: c["hashes"] for c in made["bom"]["metadata"]["component"]["components"]}
    assert inside[fresh["path"]] == [{"alg": "SHA-256", "content": fresh["sha256"]}]
    assert said["forebay:fresh.portion.1"].startswith("8 rows in 1 groups; source rollout")


def test_a_run_says_which_groups_it_learnt_from(world):
    groups = world.put(world.workspace.runs / "listed" / "groups.txt", b"g1-0\ng2-0\n")
    run_again(world, "listed", outputs={"groups": {**groups, "count": 2}})
    made = exports(world, "agent/9")
    assert "| Groups it learnt from | 2 |" in made["card"]
    (run,) = [s for s in made["statements"] if digest_json(["listed"]) in str(s["predicate"])]
    products = {item["name"]: item["digest"] for item in run["predicate"]["runDetails"]["byproducts"]}
    assert products[groups["path"]] == {"sha256": groups["sha256"]}
    assert "Sampled by the run itself" not in made["card"]


def test_a_version_without_shards_of_its_parent_says_so(world):
    parent = world.manifests["main"]
    kept = parent.shards[1:]
    manifest = parent.to_dict() | {
        "version": 9, "parent": parent.root, "root": dataset_root(kept), "shards": [asdict(shard) for shard in kept],
        "rows": 48, "groups": 6, "new_rows": 0,
    }  # fmt: skip
    file = world.put(world.workspace.replay / "main" / "manifests" / "v00009.json", canonical_json(manifest))
    seal_again(world, **{**manifest, "manifest": file["path"], "manifest_sha256": file["sha256"]})
    run_again(world, "without", dataset=manifest["root"])
    made = exports(world, "agent/9")
    lost = parent.shards[0].path
    assert f"Of its parent version it leaves out: {lost}." in made["card"]
    assert "| rollout | Apache-2.0 | calculator 1 | train | 24 | 3 |" in made["card"]
    (run,) = [s for s in made["statements"] if digest_json(["without"]) in str(s["predicate"])]
    named = {item["name"] for item in run["predicate"]["buildDefinition"]["resolvedDependencies"]}
    assert {shard.path for shard in kept} <= named
    assert lost not in named


def test_a_run_that_the_ledger_lacks(world):
    run_again(world, "lost", lost=True)
    made = exports(world, "agent/9")
    assert f"The run `{digest_json(['lost'])}` is not in the ledger." in made["card"]
    assert made["statements"] == []


def test_a_dataset_that_the_ledger_lacks(world):
    run_again(world, "data lost", dataset="e" * 64)
    made = exports(world, "agent/9")
    assert f"{'e' * 64}: not in the ledger." in made["card"]
    (data,) = [c for c in made["bom"]["components"] if c["bom-ref"] == f"dataset/{'e' * 64}"]
    assert {p["name"]: p["value"] for p in data["properties"]}["forebay:known"] == "false"


def test_a_record_of_an_earlier_release_has_fewer_fields(world):
    made = dict(world.ledger.entries("decision.made")[-1].payload)
    record = json.loads((world.workspace.root / made["record"]["path"]).read_text())
    record["evidence"] = [{"name": item["name"], "verdict": item["verdict"]} for item in record["evidence"]]
    data = canonical_json(record)
    file = world.put(world.workspace.evidence / "decisions" / f"{sha256_bytes(data)}.json", data)
    world.ledger.append(
        "decision.made",
        "agent/3",
        {**made, "decision": file["sha256"], "record": file, "signature": made["signature"]},
    )
    made = exports(world, "agent/3")
    assert "| quality | PASS |  |  |  |  |  |" in made["card"]


def test_a_shard_that_is_no_table_is_named(world):
    put = world.put(world.workspace.replay / "main" / "shards" / "odd.parquet", b"no table")
    manifest = world.manifests["main"].to_dict() | {"version": 9}
    manifest["shards"] = [{**put, "rows": 1, "groups": 1, "bytes": 8}]
    file = world.put(world.workspace.replay / "main" / "manifests" / "odd.json", canonical_json(manifest))
    seal_again(world, shards=manifest["shards"], manifest=file["path"], manifest_sha256=file["sha256"])
    with pytest.raises(Corrupt, match=r"odd\.parquet is no table of episodes"):
        exports(world, "dataset:main/v9")


@pytest.fixture
def rewarded(world):
    """A reward model that learnt from imported preferences rewards episodes of main/v1, which main/v3 holds."""
    preferences = world.put(world.workspace.preferences / "p.jsonl", b"{}\n")
    about = {
        "digest": preferences["sha256"], "path": preferences["path"], "name": "helpful", "pairs": 7, "groups": 5,
        "slices": {}, "sources": ["people"], "licences": ["MIT", "the usual terms"], "origin": {"file": "x"},
    }  # fmt: skip
    world.append("preferences.imported", preferences["sha256"], about)
    files = world.model(world.workspace.models / "reward-x", "reward")
    digest = digest_json(files)
    world.append(
        "reward.registered",
        "reward/1",
        {
            "version": 1, "digest": digest, "files": files, "kind": "head", "path": ".forebay/models/reward-x",
            "mlflow": {}, "holdout": 0.2, "licences": about["licences"], "serving": {},
            "parents": {
                "preferences": preferences["sha256"], "dataset": None,
                "backbone": {"agent": "agent/1", "base": None, "digest": world.agents[1]["digest"]},
            },
        },
    )  # fmt: skip
    first = world.ledger.entries("dataset.sealed")[0].payload
    world.append("dataset.scored", "dataset:main", {"root": first["root"], "reward": "reward/1"})
    world.seal([1])
    return world


def test_a_model_that_rewarded_the_data_is_part_of_it(rewarded):
    made = exports(rewarded, "dataset:main/v3")
    wanted = {"dataset": "main", "version": 3}
    (dataset,) = [
        s for s in made["statements"] if wanted in s["predicate"].get("buildDefinition", {}).values()
    ]
    named = [item["name"] for item in dataset["predicate"]["buildDefinition"]["resolvedDependencies"]]
    assert {"reward/1", "dataset/main/v1"} <= set(named)
    jobs = {event["job"]["name"]: event for event in made["events"]}
    assert [item["name"] for item in jobs["train-reward"]["inputs"]] == [
        f"preferences/{rewarded.ledger.last('preferences.imported').subject}", "agent/1",
    ]  # fmt: skip


def test_a_bill_names_the_reward_model_and_its_preferences(rewarded):
    root = rewarded.ledger.last("dataset.sealed").payload["root"]
    run_again(rewarded, "rewarded", dataset=root)
    made = exports(rewarded, "agent/9")
    parts = {c["name"]: c for c in made["bom"]["components"]}
    assert parts["reward/1"]["licenses"] == parts["helpful"]["licenses"]
    assert parts["helpful"]["licenses"] == [
        {"license": {"name": "MIT"}}, {"license": {"name": "the usual terms"}},
    ]  # fmt: skip


def test_exports_of_a_reward_model(rewarded):
    made = exports(rewarded, "reward/1")
    assert "reward/1" in {item["name"] for event in made["events"] for item in event["outputs"]}


def test_an_agent_that_learnt_from_revoked_data_is_flagged_in_every_format(world):
    own, earlier = "started from agent/2", "trained on group g1-0, revoked by group:g1-0"
    assert "Open flag" not in str(exports(world, "agent/3"))
    revoke(world, "group:g1-0", ["g1-0"])
    made = exports(world, "agent/3")
    section = made["card"].partition("## Revoked data")[2].partition("##")[0]
    assert f"- agent/3 {own}.\n- agent/2 {earlier}." in section
    component = made["bom"]["metadata"]["component"]
    limits = component["modelCard"]["considerations"]["technicalLimitations"]
    assert limits[:2] == [f"Open flag: agent/3 {own}.", f"Open flag: agent/2 {earlier}."]
    assert {"name": "forebay:flag", "value": own} in component["properties"]
    (parent,) = [part for part in made["bom"]["components"] if part["name"] == "agent/2"]
    assert {"name": "forebay:flag", "value": earlier} in parent["properties"]
    assert made["prov"]["entity"]["fb:agent/2"]["forebay:flag"] == earlier
    assert "forebay:flag" not in made["prov"]["entity"]["fb:agent/1"]
    tags = [tag for e in made["events"] for out in e["outputs"] for tag in _tags(out)]
    assert {"key": "flag", "value": earlier, "source": "FOREBAY"} in tags
    runs = [s["predicate"] for s in made["statements"] if "startedOn" in str(s["predicate"])]
    said = [
        json.loads(base64.b64decode(item["content"]))
        for run in runs
        for item in run["runDetails"]["byproducts"]
        if item["name"] == "open flags"
    ]
    assert sorted(map(str, said)) == sorted(map(str, ({"agent/2": earlier}, {"agent/3": own})))
    (of,) = [
        item["annotations"]
        for run in runs
        for item in run["buildDefinition"]["resolvedDependencies"]
        if item["name"] == "agent/2"
    ]
    assert of == {"flag": earlier}
    before = exports(world, "agent/1")
    assert "nothing that it learnt from was revoked" in before["card"]
    assert "flag" not in str(before["bom"])


def _tags(dataset):
    return dataset["facets"].get("tags", {}).get("tags", [])


def test_what_was_erased_is_said_and_not_counted(world):
    shard = world.manifests["main"].shards[0]
    entry = revoke(world, "group:g1-0", ["g1-0"])
    files = [{"path": shard.path, "sha256": shard.sha256}]
    payload = {
        "what": "group:g1-0",
        "revocation": entry,
        "intent": 0,
        "reason": "a person asked",
        "by": "lee",
    }
    world.ledger.append("data.erased", "group:g1-0", {**payload, "files": files})
    (world.workspace.root / shard.path).unlink()
    made = exports(world, "agent/3")
    assert f"- {shard.path} (group:g1-0: a person asked)" in made["card"]
    assert "that the workspace lacks" not in made["card"]
    assert '{"name": "forebay:erased", "value": "1 shards, on purpose"}' in json.dumps(made["bom"])
    assert made["prov"]["entity"][f"fb:shard/{shard.path}"]["forebay:erased"] == "group:g1-0: a person asked"
    assert {"key": "erased", "value": shard.path, "source": "FOREBAY"} in [
        tag for e in made["events"] for out in e["outputs"] for tag in _tags(out)
    ]
    erased = [
        s["predicate"]["buildDefinition"]["internalParameters"].get("shards_erased")
        for s in made["statements"]
        if "slsa" in s["predicateType"]
    ]
    assert erased.count({shard.path: "group:g1-0: a person asked"}) == 2  # v1 holds it, and v2 holds it still


class Elsewhere(Tables):
    """As `init` and `seal` record what lies on this machine: by absolute paths."""

    def append(self, kind, subject, payload):
        if kind == "agent.registered":
            payload = {**payload, "source": {**payload["source"], "name": str(self.workspace.root / "tiny")}}
        elif kind == "dataset.sealed":
            payload = {**payload, "dvc": {**payload["dvc"], "remote": str(self.workspace.root / "remote")}}
        return super().append(kind, subject, payload)


def test_no_path_of_this_machine_leaves_with_an_export(tmp_path):
    world = Elsewhere(tmp_path / "ws")
    write_trust(world.workspace.trust, TRUST)
    world.crown(world.base())
    world.generation(1)
    for ref in ("agent/1", "agent/2"):
        made = exports(world, ref)
        assert str(tmp_path) not in str(made)
        assert "| Base model | tiny |" in made["card"]
    assert world.agents[1]["digest"] in str(made)
