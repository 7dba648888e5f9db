"""How a run and a dataset version were made, as SLSA provenance v1 in signed in-toto statements.

Method: https://slsa.dev/spec/v1.0/provenance and https://github.com/in-toto/attestation (Statement v1,
ResourceDescriptor v1). `sha256` stands only where it is the digest of the bytes of one file. Forebay's digests over
several files have names of their own: `forebayFiles` (of {path: SHA-256}) and `forebayRoot` (of a dataset version).
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from tasks.core.digest import canonical_json, sha256_bytes
from tasks.core.dsse import sign
from tasks.core.keys import PrivateKey
from tasks.lineage.standards.material import Material, beside, name_of, utc
from tasks.lineage.types import File, Node, Ref

RUN = "https://forebay/training-run/v1"
DATASET = "https://forebay/replay-snapshot/v1"
_Descriptor = dict[str, Any]


def builder(key_id: str) -> str:
    """Return the URI of who vouches for the provenance: the workspace's service with this key."""
    return f"https://forebay/service/{key_id}"


def attest(material: Material, key: PrivateKey) -> dict[str, bytes]:
    """Return the envelopes of all runs, dataset versions and signed decisions of the lineage, by file name.

    Those of runs and dataset versions are signed now; those of decisions are the ones that were made with them.
    """
    envelopes: dict[str, bytes] = {}
    for ref, _ in material.of("run", "dataset"):
        make = run_provenance if ref[0] == "run" else dataset_provenance
        subjects, predicate = make(material, ref, builder(key.id))
        envelopes[file_name(ref)] = sign("provenance", subjects, predicate, key)
    envelopes |= {file_name(ref): envelope for ref, envelope in material.signatures.items()}
    return dict(sorted(envelopes.items()))


def file_name(ref: Ref) -> str:
    """Return the name of an attestation's file: "run-0123456789ab.dsse.json", "dataset-main-v2.dsse.json"."""
    kind, key = ref
    short = key if kind == "dataset" else key[:12]
    return f"{kind}-{short.replace('/', '-')}.dsse.json"


def run_provenance(material: Material, ref: Ref, builder_id: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the subjects {path: SHA-256} and the SLSA predicate of a training run.

    Subjects are the files of the checkpoint. Whatever it was made from is a resolved dependency: the dataset with every
    shard, the agent it started from with every file, the base model, the code and the lock file.
    """
    node = material.node(ref)
    facts, folder = node.facts, f"{node.facts['path']}/"
    predicate = {
        "buildDefinition": {
            "buildType": RUN,
            "externalParameters": {"settings": facts["settings"], "seed": facts["seed"]},
            "internalParameters": {
                "device": facts["device"],
                "dtype": facts["dtype"],
                "outside_code": facts["outside_code"],
            },
            "resolvedDependencies": [*_run_dependencies(material, ref)],
        },
        "runDetails": {
            "builder": {"id": builder_id},
            "metadata": {
                "invocationId": node.digest,
                "startedOn": utc(facts["started"]),
                "finishedOn": utc(facts["finished"]),
            },
            "byproducts": [
                _json("metrics", facts["metrics"]),
                *_flags(material, ref),
                *(_shard(material, file) for file in beside(node)),
            ],
        },
    }
    return {file.path: file.sha256 for file in node.files if file.path.startswith(folder)}, predicate


def dataset_provenance(
    material: Material, ref: Ref, builder_id: str
) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the subjects {path: SHA-256} and the SLSA predicate of a dataset version.

    Subjects are its manifest and the shards that it added; the manifest names those of its parent. Resolved dependencies
    are the parent version and the policies from which the new episodes were sampled.
    """
    node, manifest = material.node(ref), material.manifests[ref]
    added = [file for shard in material.behind(ref, "holds") for file in material.node(shard).files]
    subjects = {file.path: file.sha256 for file in (*node.files, *added)}
    parents = [*material.behind(ref, "continues"), *material.behind(ref, "scored from")]
    policies = [*material.behind(ref, "sampled from"), *material.behind(ref, "rewarded by")]
    predicate = {
        "buildDefinition": {
            "buildType": DATASET,
            "externalParameters": {"dataset": manifest.name, "version": manifest.version},
            "internalParameters": {
                "root": manifest.root,
                "rows": manifest.rows,
                "groups": manifest.groups,
                "new_rows": manifest.new_rows,
                "shards_left_out": material.without(ref),
                "shards_erased": {
                    s.path: why for s in manifest.shards if (why := material.erased.get(s.path))
                },
                "git_commit": node.facts["git_commit"],
                "dvc": node.facts["dvc"],
            },
            "resolvedDependencies": [
                *(_dataset(material, parent) for parent in dict.fromkeys(parents)),
                *(_files(material.node(policy), policy) for policy in dict.fromkeys(policies)),
            ],
        },
        "runDetails": {
            "builder": {"id": builder_id},
            "metadata": {"invocationId": manifest.root, "finishedOn": utc(node.facts["sealed"])},
        },
    }
    return subjects, predicate


def _run_dependencies(material: Material, ref: Ref) -> Iterator[_Descriptor]:
    for dataset in material.behind(ref, "trained on"):
        yield _dataset(material, dataset)
        yield from (_file(file) for file in material.node(dataset).files)
        if dataset in material.manifests:
            yield from (_shard(material, File(s.path, s.sha256)) for s in material.manifests[dataset].shards)
    for init in material.behind(ref, "started from"):
        flag = material.flag(init)
        yield {**_files(material.node(init), init), **({"annotations": {"flag": flag}} if flag else {})}
        yield from (_file(file) for file in material.node(init).files)
        if init[0] == "agent":
            yield from (_base(material, base) for base in material.bases(init))
    for code in material.behind(ref, "run by code"):
        yield _code(material.node(code))
    for lock in material.behind(ref, "with packages"):
        yield {"name": material.node(lock).name, "digest": {"sha256": lock[1]}}


def _dataset(material: Material, ref: Ref) -> _Descriptor:
    return {"name": name_of(ref), "digest": {"forebayRoot": material.node(ref).digest or ref[1]}}


def _files(node: Node, ref: Ref) -> _Descriptor:
    named: _Descriptor = {"name": name_of(ref)}
    return (
        {**named, "digest": {"forebayFiles": node.digest}}
        if node.digest
        else {**named, "uri": f"outside:{quote(node.name)}"}
    )


def _base(material: Material, ref: Ref) -> _Descriptor:
    node = material.node(ref)
    return {**_files(node, ref), "annotations": {"source": node.facts.get("source", {})}}


def _code(node: Node) -> _Descriptor:
    digest: Mapping[str, str] = {"forebayFiles": node.digest or ""}
    if node.facts["commit"]:
        digest = {**digest, "gitCommit": node.facts["commit"]}
    return {"name": "code", "digest": digest, "annotations": {"changed_since_commit": node.facts["changed"]}}


def _flags(material: Material, run: Ref) -> Iterator[_Descriptor]:
    """Say of the agents that a run made that they learnt from revoked data.

    SLSA's metadata has no room for it and refuses other fields, so it stands beside the metrics.
    """
    made = [agent for agent, _ in material.of("agent") if run in material.behind(agent, "trained by")]
    said = {agent[1]: why for agent in made if (why := material.flag(agent)) is not None}
    if said:
        yield _json("open flags", said)


def _json(name: str, value: Mapping[str, Any]) -> _Descriptor:
    data = canonical_json(value)
    return {
        "name": name,
        "digest": {"sha256": sha256_bytes(data)},
        "mediaType": "application/json",
        "content": base64.b64encode(data).decode(),
    }


def _shard(material: Material, file: File) -> _Descriptor:
    why = material.erased.get(file.path)
    return {**_file(file), **({"annotations": {"erased": why}} if why else {})}


def _file(file: File) -> _Descriptor:
    return {"name": file.path, "digest": {"sha256": file.sha256}}
