"""The official schemas and readers of each standard, from the packages that their makers publish.

Each function raises or returns the faults it finds; none of them knows anything of Forebay.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import pkgutil
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import attr
import jsonschema
import openlineage.client.generated as generated
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf.json_format import ParseDict
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
from in_toto_attestation.v1.statement import Statement
from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent
from openlineage.client.generated.base import BaseFacet
from prov.model import ProvDocument
from referencing import Registry, Resource

SPEC = os.environ.get("FOREBAY_OPENLINEAGE_SPEC")
"""The folder `spec` of a clone of OpenLineage/OpenLineage, whose JSON schemas no package ships."""


def cyclonedx_fault(bom: dict[str, Any]) -> str | None:
    """By the JSON schema of CycloneDX 1.6, strict, as cyclonedx-python-lib ships and applies it."""
    fault = JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bom))
    return None if fault is None else str(fault)


def prov_faults(document: dict[str, Any]) -> list[str]:
    """By the schema of the W3C submission PROV-JSON, as the package prov ships it; then read by that package."""
    schema = json.loads((files("prov") / "tests/schemas/prov-json.schema.json").read_text())
    found = [
        str(error) for error in jsonschema.validators.validator_for(schema)(schema).iter_errors(document)
    ]
    with warnings.catch_warnings(action="error"):  # what its next version will refuse
        ProvDocument.deserialize(content=json.dumps(document), format="json")
    return found


def open_statement(envelope: bytes) -> dict[str, Any]:
    """Return the statement of an envelope after the in-toto package has read and validated it."""
    outer = json.loads(envelope)
    assert outer["payloadType"] == "application/vnd.in-toto+json"
    value = json.loads(base64.b64decode(outer["payload"], validate=True))
    Statement.copy_from_pb(ParseDict(value, Statement([], "x", {}).pb)).validate()
    return value


def read_provenance(predicate: dict[str, Any]) -> Any:
    """Read a predicate by the protobuf of SLSA provenance v1, and validate each of its resource descriptors.

    The protobuf refuses unknown fields and wrong types; what must be there, the specification says in words.
    """
    read = ParseDict(predicate, provenance_pb2.Provenance())
    for resource in (*read.build_definition.resolved_dependencies, *read.run_details.byproducts):
        ResourceDescriptor.copy_from_pb(resource).validate()
    build, details = predicate["buildDefinition"], predicate["runDetails"]
    assert "://" in build["buildType"]
    assert build["externalParameters"]
    assert "://" in details["builder"]["id"]
    return read


@cache
def _facets() -> dict[str, type[BaseFacet]]:
    modules = [
        importlib.import_module(f"{generated.__name__}.{found.name}")
        for found in pkgutil.iter_modules(generated.__path__)
    ]
    classes = {
        name: kind for module in modules for name, kind in vars(module).items() if isinstance(kind, type)
    }
    return {name: kind for name, kind in classes.items() if issubclass(kind, BaseFacet)}


def _facet(value: dict[str, Any]) -> BaseFacet:
    """Build a facet by the class of its name, which refuses unknown and missing fields and other versions."""
    kind = _facets()[value["_schemaURL"].rpartition("/")[2]]
    assert value["_schemaURL"] == kind._get_schema()
    fields = {name: item for name, item in value.items() if name != "_schemaURL"}
    known = {field.alias or field.name for field in attr.fields(kind)} | {"_producer"}
    assert fields.keys() <= known, fields.keys() - known
    return kind(**{("producer" if name == "_producer" else name): item for name, item in fields.items()})


def _named(kind: Any, value: dict[str, Any]) -> Any:
    facets = {
        part: {name: _facet(item) for name, item in value[part].items()}
        for part in ("facets", "inputFacets", "outputFacets")
        if part in value
    }
    return kind(**{**value, **facets})


def read_event(event: dict[str, Any]) -> RunEvent:
    """Build a run event by the classes that the OpenLineage project generates from its schemas."""
    parts: dict[str, Any] = {
        "run": _named(Run, event["run"]),
        "job": _named(Job, event["job"]),
        "inputs": [_named(InputDataset, item) for item in event["inputs"]],
        "outputs": [_named(OutputDataset, item) for item in event["outputs"]],
    }
    from openlineage.client.event_v2 import RunState

    read = RunEvent(
        eventType=RunState(event["eventType"]),
        eventTime=event["eventTime"],
        producer=event["producer"],
        **parts,
    )
    assert event["schemaURL"] == read.schemaURL
    return read


def openlineage_faults(event: dict[str, Any]) -> Iterator[str]:
    """By OpenLineage.json and the schema of every facet, where a clone of the project is at hand."""
    assert SPEC is not None
    schemas = [json.loads(path.read_text()) for path in sorted(Path(SPEC).glob("**/*.json"))]
    registry: Any = Registry().with_resources(
        (schema["$id"], Resource.from_contents(schema)) for schema in schemas if "$id" in schema
    )
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    event_schema = {"$ref": event["schemaURL"]}
    for error in jsonschema.Draft202012Validator(
        event_schema, registry=registry, format_checker=checker
    ).iter_errors(event):
        yield str(error.message)
    for facet in _all_facets(event):
        schema = {"$ref": facet["_schemaURL"]}
        for error in jsonschema.Draft202012Validator(
            schema, registry=registry, format_checker=checker
        ).iter_errors(facet):
            yield str(error.message)


def _all_facets(event: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for holder in (event["run"], event["job"], *event["inputs"], *event["outputs"]):
        for part in ("facets", "inputFacets", "outputFacets"):
            yield from holder.get(part, {}).values()
