"""Descendants where histories are odd: rewritten, fresh, scored and renamed data, equal bytes, preferences from elsewhere."""

from __future__ import annotations

import threading
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest

from tasks.core.digest import canonical_json, sha256_bytes, sha256_file
from tasks.core.errors import Corrupt, NotFound
from tasks.core.ledger import Ledger
from tasks.lineage.descent import descendants
from tasks.lineage.graph import lineage, open_index
from tasks.lineage.index import Index
from tasks.lineage.questions import find, path
from tasks.replay.manifest import Manifest, Shard
from tests.lineage.world import World


def shaped(world: World, ref: str, kind: str = "agent") -> set[str]:
    return {key for k, key in descendants(world.ledger, world.workspace, ref).nodes if k == kind}


def payload_of(world: World, manifest: Manifest, **more) -> dict:
    return {
        **manifest.to_dict(),
        "manifest": f"data/replay/{manifest.name}/manifests/v{manifest.version:05d}.json",
        "manifest_sha256": sha256_bytes(manifest.to_bytes()),
        "git_commit": "d" * 40,
        "dvc": {"path": f"data/replay/{manifest.name}/shards", "md5": "e" * 32, "remote": "remote"},
        **more,
    }


def write_shard(world: World, path: Path, table: pa.Table) -> Shard:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    groups = len(set(table["group_id"].to_pylist()))
    return Shard(
        world.workspace.relative(path), sha256_file(path), table.num_rows, groups, path.stat().st_size
    )


@pytest.fixture
def erased(world: World) -> World:
    """Of main/v1's first shard (g1-0, g1-1), group g1-1 was erased: main/v4 holds what is left; agent/5 learnt from it."""
    shaped(world, "group:g1-1")  # so that the index of rows has it
    old = world.manifests["main"].shards[0]
    table = pq.read_table(world.workspace.root / old.path)
    left = table.filter(pa.compute.equal(table["group_id"], "g1-0"))
    new = write_shard(world, world.workspace.replay / "main" / "shards" / "e00001.parquet", left)
    manifest = Manifest.rewrite(world.manifests["main"], {old.sha256: new}, world.manifests["main"].behaviour)
    replaces = [{"path": old.path, "sha256": old.sha256, "by": asdict(new)}]
    world.append(
        "dataset.sealed", manifest.subject, payload_of(world, manifest, erasing=1, replaces=replaces)
    )
    (world.workspace.root / old.path).unlink()
    world.manifests["main"] = manifest
    world.learnt = lambda manifest: ["g1-0"]  # type: ignore[method-assign]
    world.train(1, seed=5)
    return world


@pytest.mark.parametrize("lost", [False, True])
def test_rewritten_shards(erased: World, lost: bool):
    if lost:  # the indices may be deleted at any time
        shaped(erased, "group:g1-0")
        (erased.workspace.state / "replay" / "main.db").unlink()
        (erased.workspace.state / "lineage.db").unlink()
    everybody = {"agent/2", "agent/3", "agent/4", "agent/5"}
    assert shaped(erased, "group:g1-0") == everybody  # those of before, and of after
    assert shaped(erased, "episode:g1-0-3") == everybody
    new = erased.manifests["main"].shards[0].path
    assert "main/v4" in shaped(erased, f"shard:{new}", "dataset")
    assert ("shard", new) in lineage(erased.ledger, erased.workspace, "dataset:main/v4").nodes


def test_a_version_without_an_erased_row_does_not_hold_it(erased: World):
    old, heir = (erased.workspace.relative(erased.workspace.replay / "main" / "shards" / name) for name in ("00001.parquet", "e00001.parquet"))  # fmt: skip
    erased.append("data.erased", "group:g1-1", {"what": "group:g1-1", "files": [{"path": old}]})
    gone = find(erased.ledger, erased.workspace, "group:g1-1")
    assert (gone.versions, gone.shards, gone.erased) == (("main/v1", "main/v2", "main/v3"), (old,), (old,))
    left = find(erased.ledger, erased.workspace, "group:g1-0")
    assert left.versions == ("main/v1", "main/v2", "main/v3", "main/v4")
    assert (set(left.shards), left.erased) == ({old, heir}, (old,))
    assert shaped(erased, f"shard:{old}", "shard") == {old, heir}
    assert shaped(erased, "dataset:main/v4", "shard") == set()  # its own shards do not follow from it
    assert shaped(erased, "dataset:main/v1", "shard") == {heir}


def test_what_was_erased_is_known_by_the_index_and_without_it_by_the_revocation(erased: World):
    lists = canonical_json({"groups": ["g1-1"], "episodes": [f"g1-1-{at}" for at in range(8)]})
    file = erased.put(erased.workspace.evidence / "revoked" / "x.json", lists)
    roots = [e.payload["root"] for e in erased.ledger.entries("dataset.sealed")[:3]]
    erased.append("data.revoked", "group:g1-1", {"what": "group:g1-1", "lists": file, "roots": roots})
    for _ in range(2):
        assert {"agent/2", "agent/3", "agent/4"} <= shaped(erased, "episode:g1-1-0")
        assert "agent/5" not in shaped(erased, "episode:g1-1-0")
        (erased.workspace.state / "replay" / "main.db").unlink()
    with pytest.raises(NotFound):
        shaped(erased, "episode:g9-9-9")


def test_what_a_run_collected_itself(world: World):
    table = pq.read_table(world.workspace.root / world.manifests["main"].shards[0].path)
    renamed = table.set_column(
        table.schema.get_field_index("group_id"), "group_id", pa.array(["fresh"] * 16)
    ).set_column(
        table.schema.get_field_index("episode_id"), "episode_id", pa.array([f"fresh-{i}" for i in range(16)])
    )
    shard = write_shard(world, world.workspace.runs / "x" / "fresh" / "0.parquet", renamed)
    world.learnt = lambda manifest: []  # type: ignore[method-assign]
    before = world.append
    world.append = lambda kind, subject, payload: before(  # type: ignore[method-assign]
        kind,
        subject,
        {
            **payload,
            "outputs": {**payload["outputs"], "fresh": [{"path": shard.path, "sha256": shard.sha256}]},
        }
        if kind == "run.finished"
        else payload,
    )
    made = world.train(1, seed=9)
    for ref in (
        "group:fresh",
        "episode:fresh-3",
        f"shard:{shard.path}",
        "source:rollout",
        "licence:Apache-2.0",
    ):
        assert f"agent/{made}" in shaped(world, ref)
    assert f"agent/{made}" not in shaped(world, "group:g1-0")


def test_equal_rows_under_two_names(world: World):
    first = world.manifests["main"]
    for version, shards in ((1, first.shards[:2]), (2, first.shards)):
        parent = world.manifests.get("other")
        new = shards[len(parent.shards) :] if parent else shards
        world.manifests["other"] = Manifest.append("other", parent, new, first.behaviour, first.created_at)
        assert world.manifests["other"].version == version
        world.append("dataset.sealed", f"other/v{version}", payload_of(world, world.manifests["other"]))
    made = world.train(1, name="other", seed=3)
    index = open_index(world.ledger, world.workspace)
    (number,) = [index.id(("dataset", "other/v2"))]
    continued = [t for _, relation, t in index.edges([number]) if relation == "continues"]
    assert [ref for ref, _ in index.refs(continued).values()] == [("dataset", "other/v1")]
    for ref in ("dataset:other/v2", "dataset:main/v3"):
        assert f"agent/{made}" in shaped(world, ref)


def test_an_agent_registered_twice_is_told_by_the_name_that_was_used(world: World):
    twin = dict(world.agents[1])
    world.agents[9] = {**twin, "version": 9}
    world.append("agent.registered", "agent/9", world.agents[9])
    made = world.train(9, seed=4)
    assert f"agent/{made}" in shaped(world, "agent/9")


def test_scored_data_whose_scoring_was_cut_short(world: World):
    reward = {
        "version": 1, "digest": "a" * 64, "kind": "verifier", "path": "x", "files": {}, "mlflow": {}, "holdout": None,
        "licences": [], "parents": {"preferences": None, "backbone": None},
    }  # fmt: skip
    world.append("reward.registered", "reward/1", reward)
    root = world.ledger.entries("dataset.sealed")[0].payload["root"]
    world.append(
        "dataset.scoring", "dataset:scored", {"reward": "reward/1", "digest": "a" * 64, "root": root}
    )
    old = world.manifests["main"].shards[0]
    table = pq.read_table(world.workspace.root / old.path)
    at = table.schema.get_field_index("reward_digest")
    table = table.set_column(at, "reward_digest", pa.array(["a" * 64] * table.num_rows))
    shard = write_shard(world, world.workspace.replay / "scored" / "shards" / "0.parquet", table)
    manifest = Manifest.append(
        "scored", None, [shard], world.manifests["main"].behaviour, "2026-01-01T00:00:00"
    )
    world.append("dataset.sealed", "scored/v1", payload_of(world, manifest))
    world.manifests["scored"] = manifest
    world.learnt = lambda manifest: ["g1-1"]  # type: ignore[method-assign]
    made = world.train(1, name="scored", seed=8)
    assert f"agent/{made}" in shaped(world, "reward/1")
    assert f"agent/{made}" in shaped(world, f"shard:{old.path}")  # the same rows, scored anew
    assert f"agent/{made}" in shaped(world, "episode:g1-1-0")
    assert f"agent/{made}" not in shaped(world, "group:g1-0")


def test_preferences_from_elsewhere(world: World):
    pair = {
        "prompt": "Is it?", "chosen": "yes", "rejected": "no", "group": "p", "slice": "", "source": "hh-rlhf",
        "licence": "MIT", "chosen_id": "", "rejected_id": "",
    }  # fmt: skip
    data = canonical_json(pair) + b"\n"
    digest = sha256_bytes(data)
    file = world.put(world.workspace.preferences / f"{digest}.jsonl", data)
    about = {"name": "hh", "pairs": 1, "groups": 1, "slices": {}, "sources": ["hh-rlhf"], "licences": ["MIT"]}
    world.append("preferences.imported", digest, {**about, "path": file["path"], "origin": {}})
    reward = {
        "version": 1, "digest": "a" * 64, "kind": "head", "path": "x", "files": {}, "mlflow": {}, "holdout": 0.2,
        "licences": ["MIT"], "parents": {"preferences": digest, "backbone": None},
    }  # fmt: skip
    world.append("reward.registered", "reward/1", reward)
    for ref in ("source:hh-rlhf", "licence:MIT", "prompt:Is it?"):
        assert shaped(world, ref, "source") == {"reward/1"}
    assert find(world.ledger, world.workspace, "source:hh-rlhf").agents == {}
    (world.workspace.root / file["path"]).write_bytes(data.replace(b"hh-rlhf", b"xx-rlhf"))
    with pytest.raises(Corrupt, match=r"preferences/.*differs from its digest"):
        shaped(world, "source:hh-rlhf")


def test_shards_that_are_not_here_let_nobody_off(world: World):
    clean = shaped(world, f"shard:{world.manifests['main'].shards[-1].path}")
    (world.workspace.state / "replay" / "main.db").unlink()
    for shard in world.manifests["main"].shards:
        (world.workspace.root / shard.path).unlink()
    assert clean <= shaped(world, f"shard:{world.manifests['main'].shards[-1].path}")


def test_entries_that_are_appended_while_the_index_catches_up_are_not_lost(world: World):
    """One writer, two readers: whatever the moment, the next look has everything."""
    stop = threading.Event()

    def write() -> None:
        for seed in range(25):
            world.train(1, seed=100 + seed)
        stop.set()

    def read() -> None:
        while not stop.is_set():
            open_index(Ledger(world.workspace.ledger_url), world.workspace)

    threads = [threading.Thread(target=read) for _ in range(2)] + [threading.Thread(target=write)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = open_index(world.ledger, world.workspace)
    assert sorted(kept.keys("agent")) == sorted(Index.derive(world.ledger).keys("agent"))
    assert len(kept.keys("agent")) == len(world.agents)


def test_a_way_is_of_bytes_unless_a_decision_is_asked_for(world: World):
    sibling, other = world.train(2, seed=7), world.train(2, seed=8)
    world.judge(sibling, other)
    with pytest.raises(NotFound, match="Neither of"):
        path(world.ledger, world.workspace, f"agent/{sibling}", f"agent/{other}")
    decision = world.ledger.last("decision.made").payload["decision"]
    assert path(world.ledger, world.workspace, decision[:16], f"agent/{other}").nodes


def test_the_same_preferences_made_once_more_of_scored_data_are_no_circle(world: World):
    about = {"name": "main", "pairs": 1, "groups": 1, "slices": {}, "sources": [], "licences": []}
    digest = sha256_bytes(b"")
    file = world.put(world.workspace.preferences / f"{digest}.jsonl", b"")
    roots = [e.payload["root"] for e in world.ledger.entries("dataset.sealed")]
    world.append("preferences.made", digest, {**about, "path": file["path"], "origin": {"dataset": roots[0]}})
    reward = {
        "version": 1, "digest": "a" * 64, "kind": "head", "path": "x", "files": {}, "mlflow": {}, "holdout": 0.2,
        "licences": [], "parents": {"preferences": digest, "backbone": None},
    }  # fmt: skip
    world.append("reward.registered", "reward/1", reward)
    world.append(
        "dataset.scored", "dataset:scored", {"reward": "reward/1", "digest": "a" * 64, "root": roots[0]}
    )
    world.seal([1], name="scored")
    newest = world.ledger.last("dataset.sealed").payload["root"]
    world.append("preferences.made", digest, {**about, "path": file["path"], "origin": {"dataset": newest}})
    assert ("source", "reward/1") in lineage(world.ledger, world.workspace, "dataset:scored").nodes
