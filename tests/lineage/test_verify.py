from __future__ import annotations

import json
import shutil
import sqlite3
from dataclasses import asdict

import pytest

from tasks.core.digest import sha256_bytes, sha256_file
from tasks.core.errors import NotFound
from tasks.lineage.verify import VerifyReport, verify
from tests.lineage.world import World


def check(world: World, ref: str = "agent@champion") -> VerifyReport:
    return verify(world.ledger, world.workspace, ref)


def flip(world: World, path: str) -> tuple[str, str]:
    """Flip one bit in the middle of a file; return its digests before and after."""
    file = world.workspace.root / path
    before, data = sha256_file(file), bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return before, sha256_file(file)


def alter(world: World, statement: str, *values: object) -> None:
    with sqlite3.connect(world.workspace.state / "ledger.db") as database:
        assert database.execute(statement, values).rowcount == 1


def payload(world: World, kind: str, subject: str) -> dict:
    entry = world.ledger.last(kind, subject)
    assert entry is not None
    return dict(entry.payload)


def test_intact_history(world):
    report = check(world)
    assert report.ok
    assert report.problems == report.missing == report.changed == ()
    assert report.entries == len(world.ledger.entries())
    assert report.head == world.ledger.head()
    files = {path for path in world.workspace.root.rglob("*") if path.is_file() and path.name != "ledger.db"}
    waiting = world.workspace.root / world.agents[4]["path"]
    newest = world.manifests["main"]
    not_behind = {waiting / name for name in world.agents[4]["files"]}
    not_behind |= {world.workspace.root / shard.path for shard in newest.shards[-2:]}
    not_behind |= {path for path in files if path.name in ("v00003.json", f"{newest.root[:12]}.json")}
    assert report.bytes == sum(path.stat().st_size for path in files - not_behind)  # every byte, each once
    json.dumps(asdict(report))


FILES = {
    "shard": (lambda w: w.manifests["main"].shards[0].path, "dataset main/v1"),
    "model": (lambda w: f"{w.agents[3]['path']}/model.safetensors", "agent/3"),
    "model of an ancestor": (lambda w: f"{w.agents[2]['path']}/config.json", "agent/2"),
    "base model": (lambda w: f"{w.agents[1]['path']}/model.safetensors", "agent/1"),
    "manifest": (lambda w: payload(w, "dataset.sealed", "main/v1")["manifest"], "dataset main/v1"),
    "decision": (lambda w: payload(w, "decision.made", "agent/3")["record"]["path"], "decision PASS"),
    "outcomes": (
        lambda w: w.ledger.last("evaluation.done").payload["outcomes"]["path"],
        "evaluation agent/3",
    ),
    "validation": (
        lambda w: w.ledger.entries("dataset.validated")[0].payload["evidence"]["path"],
        "validation",
    ),
    "reward": (lambda w: w.ledger.last("reward.validated").payload["evidence"]["path"], "reward PASS"),
}


@pytest.mark.parametrize("what", FILES)
def test_flipped_bit_is_found_and_named(world, what):
    find, owner = FILES[what]
    path = find(world)
    before, after = flip(world, path)
    report = check(world)
    assert not report.ok
    (problem,) = report.problems
    assert (problem.problem, problem.path, problem.expected, problem.found) == (
        "changed",
        path,
        before,
        after,
    )
    assert owner in problem.owner
    assert report.changed == (problem,)


@pytest.mark.parametrize("what", FILES)
def test_removed_file_is_found_and_named(world, what):
    find, owner = FILES[what]
    path = world.workspace.root / find(world)
    path.unlink()
    (problem,) = check(world).missing
    assert (problem.path, problem.found) == (find(world), None)
    assert owner in problem.owner


def test_reward_model_must_be_the_validated_one(world):
    validated = world.ledger.last("reward.validated").payload
    flip(world, f"{validated['path']}/model.safetensors")
    (problem,) = check(world).problems
    assert (problem.problem, problem.path, problem.owner) == ("changed", validated["path"], "reward PASS")
    shutil.rmtree(world.workspace.root / validated["path"])
    (problem,) = check(world).missing
    assert (problem.path, problem.expected) == (validated["path"], validated["digest"])


def test_several_differences_are_all_named(world):
    flipped = sorted([world.manifests["main"].shards[1].path, f"{world.agents[2]['path']}/model.safetensors"])
    for path in flipped:
        flip(world, path)
    assert [problem.path for problem in check(world).problems] == flipped


def test_what_is_not_behind_the_reference_is_left_out(world):
    flip(world, f"{world.agents[4]['path']}/model.safetensors")
    flip(world, world.manifests["main"].shards[-1].path)
    assert check(world).ok
    assert len(check(world, "agent/4").problems) == 2
    assert len(check(world, "dataset:main").problems) == 1


def test_file_put_into_an_agents_folder(world):
    added = world.workspace.root / world.agents[3]["path"] / "adapter_config.json"
    added.write_bytes(b"{}")
    (problem,) = check(world).problems
    assert (problem.problem, problem.owner, problem.found) == ("added", "agent/3", sha256_bytes(b"{}"))
    assert problem.path.endswith("/adapter_config.json")


def test_altered_row_is_found_though_its_text_is_plausible(world):
    entry = world.ledger.last("promotion.committed")
    alter(world, "UPDATE ledger SET payload = replace(payload, 'ada', 'eve') WHERE seq = ?", entry.seq)
    (problem,) = check(world).problems
    assert problem.path == "ledger"
    assert f"altered at entry {entry.seq}" in problem.owner
    assert check(world).head == ""


def test_removed_row_is_found(world):
    alter(world, "DELETE FROM ledger WHERE seq = ?", 5)
    assert "altered at entry 5" in check(world).problems[0].owner


def test_unreadable_row_is_a_finding_not_a_crash(world):
    seq = world.ledger.last("agent.registered").seq
    alter(world, "UPDATE ledger SET payload = '{' WHERE seq = ?", seq)
    report = check(world)
    assert not report.ok
    assert f"altered at entry {seq}" in report.problems[0].owner


def test_forged_chain_still_contradicts_the_files(world):
    """A ledger written anew, chain and all, still cannot make a changed shard follow from its manifest."""
    shard = world.manifests["main"].shards[0]
    _, after = flip(world, shard.path)
    forged = World(world.workspace.root)
    entries = world.ledger.entries()
    with sqlite3.connect(world.workspace.state / "ledger.db") as database:
        database.execute("DELETE FROM ledger")
    for entry in entries:
        text = json.dumps(dict(entry.payload))
        if entry.kind == "dataset.sealed":
            text = text.replace(shard.sha256, after)
        forged.append(entry.kind, entry.subject, json.loads(text))
    report = check(world)
    assert report.entries == len(entries)
    assert {problem.path for problem in report.problems} == {shard.path}
    assert report.problems[0].expected == shard.sha256  # as the manifest has it


def test_root_must_follow_from_the_shards_of_the_manifest(world):
    """A manifest that was wrong when it was sealed: its bytes agree with the ledger, its root does not."""
    sealed = payload(world, "dataset.sealed", "main/v3")
    path = world.workspace.root / sealed["manifest"]
    values = json.loads(path.read_bytes())
    values["shards"] = values["shards"][:-1]
    path.write_bytes(json.dumps(values).encode())
    world.append("dataset.sealed", "main/v3", {**sealed, "manifest_sha256": sha256_file(path)})
    (problem,) = check(world, "dataset:main/v3").problems
    assert (problem.path, problem.owner) == (sealed["manifest"], "root of dataset main/v3")
    assert problem.expected == sealed["root"] != problem.found


def test_agent_digest_must_follow_from_its_files(world):
    registered = payload(world, "agent.registered", "agent/4")
    world.append(
        "agent.registered", "agent/5", {**registered, "version": 5, "digest": sha256_bytes(b"another")}
    )
    problems = [problem for problem in check(world, "agent/5").problems if problem.owner == "agent/5"]
    assert [(problem.problem, problem.expected) for problem in problems] == [
        ("changed", sha256_bytes(b"another"))
    ]


def test_what_the_ledger_does_not_know_is_missing(world):
    registered = payload(world, "agent.registered", "agent/4")
    parents = {**registered["parents"], "run": "9" * 64}
    world.append("agent.registered", "agent/5", {**registered, "version": 5, "parents": parents})
    (problem,) = [p for p in check(world, "agent/5").missing if p.path == "ledger"]
    assert (problem.owner, problem.expected) == ("the entry of run 999999999999", "9" * 64)


def test_unknown_reference(world):
    with pytest.raises(NotFound):
        check(world, "agent/77")


def test_progress_counts_every_file(world):
    seen = []
    verify(world.ledger, world.workspace, "agent@champion", lambda *report: seen.append(report))
    totals = {total for _, total, _ in seen}
    assert [done for done, _, _ in seen] == list(range(1, len(seen) + 1))
    assert totals == {len(seen)}
    assert seen[-1][2].endswith("MB read")
