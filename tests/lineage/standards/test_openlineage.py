"""OpenLineage events: valid by the project's own classes and schemas, whole runs, the graph of the lineage."""

from __future__ import annotations

import uuid
from collections import defaultdict

import pytest

from tasks.core.errors import Unavailable, UsageError
from tasks.lineage.standards.collector import post
from tasks.lineage.standards.openlineage import events, to_lines
from tests.lineage.standards.collectors import Collector
from tests.lineage.standards.official import SPEC, openlineage_faults, read_event


@pytest.fixture
def found(material):
    return events(material)


def test_the_projects_own_classes_take_every_event(found):
    assert len(found) == 32
    for event in found:
        read_event(event)


@pytest.mark.skipif(
    SPEC is None, reason="set FOREBAY_OPENLINEAGE_SPEC to the folder spec of a clone of OpenLineage"
)
def test_every_event_and_facet_fits_the_official_schemas(found):
    assert [fault for event in found for fault in openlineage_faults(event)] == []
    found[0]["run"]["runId"] = "no uuid"
    del found[1]["job"]["namespace"]
    found[2]["job"]["facets"]["jobType"].pop("integration")
    assert all(list(openlineage_faults(event)) for event in found[:3])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda e: e["run"].update(runId="no uuid"),
        lambda e: e.update(eventTime="yesterday"),
        lambda e: e.update(eventType="DONE"),
        lambda e: e["job"].pop("namespace"),
        lambda e: e["job"]["facets"]["jobType"].pop("integration"),
        lambda e: e["job"]["facets"]["jobType"].update(unknown=1),
        lambda e: e["job"]["facets"]["jobType"].update(
            _schemaURL="https://openlineage.io/x#/$defs/JobTypeJobFacet"
        ),
    ],
)
def test_a_broken_event_is_refused(found, spoil):
    read_event(found[0])
    spoil(found[0])
    with pytest.raises((ValueError, TypeError, AssertionError)):
        read_event(found[0])


def test_each_run_starts_and_completes_once(found):
    states = defaultdict(list)
    for event in found:
        states[event["run"]["runId"], event["job"]["name"]].append(event["eventType"])
        assert uuid.UUID(event["run"]["runId"]).version == 5
    assert set(map(tuple, states.values())) == {("START", "COMPLETE")}
    assert [event["eventTime"] for event in found] == sorted(event["eventTime"] for event in found)


def test_following_the_events_back_gives_the_lineage(world, found):
    made_of = defaultdict(set)
    for event in found:
        for output in event["outputs"]:
            made_of[output["name"]] |= {item["name"] for item in event["inputs"]} - {output["name"]}
    reached, waiting = set(), ["agent/3"]
    for name in waiting:
        waiting += made_of[name] - reached
        reached |= made_of[name]
    assert reached >= {"agent/2", "agent/1", "dataset/main/v1", "dataset/main/v2"}
    assert "agent/3" not in reached
    assert made_of["dataset/main/v2"] == {"dataset/main/v1", "agent/2"}
    assert made_of["agent/3"] == {"dataset/main/v2", "agent/2"}
    assert "agent/3" in made_of["agent@champion"]


def test_a_decision_is_a_run_of_tests(world, found):
    decided = [e for e in found if e["job"]["name"] == "decide" and e["eventType"] == "COMPLETE"]
    tests = {t["name"]: t for t in decided[-1]["run"]["facets"]["test"]["tests"]}
    quality = tests["quality"]
    assert (quality["status"], quality["severity"], quality["actual"]) == ("pass", "error", "1.0")
    assert quality["params"]["low"] < 1.0
    assert tests["replay value"]["status"] == "skip"
    assert tests["replay value"]["severity"] == "warn"


def test_dataset_versions_carry_digest_size_and_licences(world, found):
    sealed = next(e for e in found if e["outputs"] and e["outputs"][0]["name"] == "dataset/main/v2")
    (output,) = sealed["outputs"]
    manifest = world.manifests["main"]
    assert output["facets"]["version"]["datasetVersion"] == manifest.root
    size = output["outputFacets"]["outputStatistics"]
    assert (size["rowCount"], size["size"], size["fileCount"]) == (64, manifest.total_bytes, 4)
    tags = {tag["key"]: tag["value"] for tag in output["facets"]["tags"]["tags"]}
    assert tags["licences"] == "Apache-2.0, CC-BY-4.0"


def test_the_same_ledger_gives_the_same_bytes(material, found):
    assert to_lines(found) == to_lines(events(material))


def test_a_collector_gets_every_event_in_order(found):
    with Collector() as collector:
        assert post(collector.url, found) == len(found)
    assert collector.bodies == found
    assert collector.paths == {"/api/v1/lineage"}
    with Collector() as collector:
        post(f"{collector.url}/api/other", found[:1])
    assert collector.paths == {"/api/other"}


def test_a_collector_that_fails_is_named_with_the_event(found):
    with (
        Collector(fail_at=3) as collector,
        pytest.raises(Unavailable, match=r"refused event 3 of 32: HTTP 500 .*no room"),
    ):
        post(collector.url, found)
    assert len(collector.bodies) == 2


def test_a_collector_that_is_away_or_no_address(found):
    with Collector() as collector:
        url = collector.url
    with pytest.raises(Unavailable, match="did not take event 1 of 32"):
        post(url, found)
    for odd in ("localhost:5000", "ftp://there", "http://", "http://there:port"):
        with pytest.raises(UsageError, match="no address of a collector"):
            post(odd, found)


def test_a_password_in_the_address_is_not_printed(found):
    with Collector(fail_at=1) as collector, pytest.raises(Unavailable) as caught:
        post(collector.url.replace("http://", "http://me:secret@"), found)
    assert "secret" not in str(caught.value)
