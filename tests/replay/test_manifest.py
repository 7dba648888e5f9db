from __future__ import annotations

import json

from tasks.core.digest import digest_json, merkle_root
from tasks.replay.manifest import Behaviour, Manifest, Shard, dataset_root

A = Shard("a.parquet", "aa" * 32, 3, 1, 100)
B = Shard("b.parquet", "bb" * 32, 5, 2, 200)
ONE, TWO = Behaviour("agent/1", "11" * 32), Behaviour("agent/2", "22" * 32)


def test_a_version_adds_to_its_parent() -> None:
    first = Manifest.append("main", None, [A], {ONE}, "2026-01-02")
    second = Manifest.append("main", first, [B], {TWO, ONE}, "2026-01-01")
    assert (first.version, first.parent, first.rows, first.groups, first.total_bytes) == (1, None, 3, 1, 100)
    assert (second.version, second.parent, second.rows, second.groups, second.total_bytes) == (
        2,
        first.root,
        8,
        3,
        300,
    )
    assert second.new_rows == 5
    assert second.shards == (A, B)
    assert second.behaviour == (ONE, TWO)
    assert second.created_at == "2026-01-02"
    assert second.subject == "main/v2"


def test_the_identity_is_the_schema_and_the_shards_in_order() -> None:
    assert dataset_root([A, B]) == digest_json(
        {"schema_version": 1, "merkle_root": merkle_root([A.sha256, B.sha256])}
    )
    assert len({dataset_root(shards) for shards in ([A], [B], [A, B], [B, A], [])}) == 5
    assert (
        Manifest.append("x", None, [A], {ONE}, "1").root == Manifest.append("y", None, [A], {TWO}, "2").root
    )


def test_it_survives_json() -> None:
    manifest = Manifest.append("main", None, [A, B], {ONE}, "2026")
    assert Manifest.from_dict({**json.loads(manifest.to_bytes()), "more": 1}) == manifest
