"""PROV-JSON: valid by the schema of the submission, readable by the reference library, whole as a graph."""

from __future__ import annotations

from collections import defaultdict

import pytest

from tasks.lineage.standards.prov import document
from tests.lineage.standards.official import prov_faults

ENDS = {
    "wasGeneratedBy": ("prov:entity", "prov:activity"),
    "used": ("prov:activity", "prov:entity"),
    "wasDerivedFrom": ("prov:generatedEntity", "prov:usedEntity"),
    "wasInfluencedBy": ("prov:influencee", "prov:influencer"),
    "hadMember": ("prov:collection", "prov:entity"),
    "wasAssociatedWith": ("prov:activity", "prov:agent"),
}


@pytest.fixture
def made(material):
    return document(material)


def test_it_fits_the_official_schema_and_is_read(made):
    assert prov_faults(made) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: next(iter(d["wasDerivedFrom"].values())).pop("prov:usedEntity"),
        lambda d: next(iter(d["entity"].values())).update({"forebay:x": {"nested": 1}}),
        lambda d: next(iter(d["activity"].values())).update({"prov:startTime": "yesterday"}),
        lambda d: d.update(madeUp={"_:1": {}}),
        lambda d: d["entity"].update({"unknown:x": {}}),
    ],
)
def test_a_broken_one_is_refused(made, spoil):
    spoil(made)
    try:
        faults = prov_faults(made)
    except Exception as error:  # the reader of the reference library has many
        faults = [str(error)]
    assert faults


def test_every_end_of_a_relation_is_declared(made):
    declared = {"prov:entity": made["entity"], "prov:activity": made["activity"], "prov:agent": made["agent"]}
    declared |= dict.fromkeys(
        (e for ends in ENDS.values() for e in ends if e not in declared), made["entity"]
    )
    for relation, ends in ENDS.items():
        for one in made[relation].values():
            assert all(one[end] in declared[end] for end in ends), one


def test_walking_it_gives_the_ancestors(world, made):
    behind = defaultdict(set)
    for relation, (source, target) in ENDS.items():
        for one in made[relation].values():
            behind[one[source]].add(one[target])
    reached = ["fb:agent/3"]
    for name in reached:
        reached += [target for target in sorted(behind[name]) if target not in reached]
    for name in world.ancestors("agent/3"):
        if not name.startswith(("run ", "decision ")):
            assert f"fb:{name.replace(' ', '/', 1)}" in reached
    assert not any(name.startswith("fb:agent/4") for name in reached)


def test_what_only_judges_is_no_origin(made):
    """A decision follows from policy and evidence, which is no derivation of an agent from its rival."""
    derived = {
        (one["prov:generatedEntity"], one["prov:usedEntity"]) for one in made["wasDerivedFrom"].values()
    }
    assert ("fb:dataset/main/v2", "fb:agent/2") in derived
    assert not any(source.startswith("fb:decision") for source, _ in derived)
    influenced = {one["prov:influencer"].split("/")[0] for one in made["wasInfluencedBy"].values()}
    assert {"fb:policy", "fb:evaluation", "fb:agent"} <= influenced


def test_people_answer_for_what_they_did(made):
    names = {about["prov:label"] for about in made["agent"].values()}
    assert names == {"ada", "lee"}  # who promoted, who approved


def test_facts_and_digests_are_attributes(world, made):
    agent = made["entity"]["fb:agent/3"]
    assert agent["forebay:digest"] == world.agents[3]["digest"]
    assert len(agent["forebay:files"]) == 2
    (run,) = [about for name, about in made["activity"].items() if world.agents[3]["parents"]["run"] in name]
    assert run["forebay:checkpoint"] == world.agents[3]["digest"]
    assert run["forebay:settings"] == '{"objective":"vespo","steps":60}'


def test_the_same_ledger_gives_the_same_document(material, made):
    assert document(material) == made
