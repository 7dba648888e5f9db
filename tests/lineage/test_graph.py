from __future__ import annotations

import random
import time

import pytest

from tasks.core.digest import sha256_bytes
from tasks.core.errors import Corrupt, NotFound, UsageError
from tasks.lineage.graph import lineage
from tasks.lineage.types import Lineage
from tests.lineage.world import PaperWorld, World

COUNTED = {"agent", "run", "dataset", "shard", "decision"}


def names(found: Lineage) -> set[str]:
    """The nodes as `World.parents` calls them."""
    called = {
        "agent": lambda key: key,
        "run": lambda key: f"run {key[:12]}",
        "decision": lambda key: f"decision {key}",
        "dataset": lambda key: f"dataset {key}",
        "shard": lambda key: f"shard {key}",
    }
    return {called[kind](key) for kind, key in found.nodes if kind in COUNTED}


def test_champion_reaches_everything_it_follows_from(world):
    found = lineage(world.ledger, world.workspace, "agent@champion")
    assert found.root == ("agent", "agent/3")
    kinds = [kind for kind, _ in found.nodes]
    assert {kind: kinds.count(kind) for kind in sorted(set(kinds))} == {
        "agent": 3, "base": 1, "code": 1, "dataset": 2, "decision": 2, "evaluation": 2, "lock": 1,
        "policy": 1, "promotion": 3, "reward": 2, "run": 2, "shard": 4, "tasks": 1, "validation": 2,
    }  # fmt: skip
    assert names(found) == world.ancestors("agent/3") | {"agent/3"}
    assert "agent/4" not in names(found)


def test_nodes_say_what_the_ledger_says(world):
    found = lineage(world.ledger, world.workspace, "agent/3")
    agent = found.nodes["agent", "agent/3"]
    assert agent.digest == world.agents[3]["digest"]
    assert agent.facts["roles"] == ["champion"]
    assert {file.path: file.sha256 for file in agent.files} == {
        f"{world.agents[3]['path']}/{name}": sha256 for name, sha256 in world.agents[3]["files"].items()
    }
    made = world.ledger.last("decision.made", "agent/3").payload
    assert found.nodes["decision", found_decision(found)].facts["reasons"] == made["reasons"]
    assert found.nodes["decision", found_decision(found)].facts["verdict"] == "PASS"
    dataset = found.nodes["dataset", "main/v2"]
    assert (dataset.digest, dataset.facts["rows"]) == (
        world.ledger.last("dataset.sealed", "main/v2").payload["root"],
        64,
    )
    (base,) = (node for (kind, _), node in found.nodes.items() if kind == "base")
    assert (base.name, base.digest) == ("SmolLM2-135M-Instruct", world.agents[1]["digest"])


def found_decision(found: Lineage) -> str:
    return next(
        edge.target[1] for edge in found.following["agent", "agent/3"] if edge.relation == "judged by"
    )


def test_decision_rests_on_policy_evaluation_reward_and_data(world):
    found = lineage(world.ledger, world.workspace, "agent/3")
    edges = found.following["decision", found_decision(found)]
    assert [(edge.relation, edge.target[0]) for edge in edges] == [
        ("under policy", "policy"),
        ("rests on", "validation"),
        ("rests on", "reward"),
        ("rests on", "evaluation"),
        ("compared with", "agent"),
    ]


@pytest.mark.parametrize(
    ("ref", "root"),
    [
        ("agent@champion", ("agent", "agent/3")),
        ("agent@previous", ("agent", "agent/2")),
        ("agent@candidate", ("agent", "agent/4")),
        ("agent/1", ("agent", "agent/1")),
        ("dataset:main/v2", ("dataset", "main/v2")),
        ("dataset:main", ("dataset", "main/v3")),
    ],
)
def test_names(world, ref, root):
    assert lineage(world.ledger, world.workspace, ref).root == root


def test_rollback_moves_the_champion(world):
    world.crown(2, 3, word="rollback")
    found = lineage(world.ledger, world.workspace, "agent@champion")
    assert found.root == ("agent", "agent/2")
    changes = [found.nodes[e.target].name for e in found.following[found.root] if e.relation == "in office"]
    assert changes == ["promotion", "rollback"]


def test_digest_prefixes(world):
    manifest = world.manifests["main"]
    run = world.ledger.last("run.finished").subject
    decision = world.ledger.last("decision.made").payload["decision"]
    evaluation = world.ledger.last("evaluation.done").subject
    for digest, root in (
        (world.agents[2]["digest"], ("agent", "agent/2")),
        (manifest.root, ("dataset", "main/v3")),
        (manifest.shards[0].sha256, ("shard", manifest.shards[0].path)),
        (run, ("run", run)),
        (decision, ("decision", decision)),
        (evaluation, ("evaluation", evaluation)),
    ):
        assert lineage(world.ledger, world.workspace, digest).root == root
        assert lineage(world.ledger, world.workspace, digest[:12]).root == root


def test_unknown_names_are_answered_with_the_nearest(world):
    with pytest.raises(NotFound, match=r"`agent@champoin`.*agent@champion"):
        lineage(world.ledger, world.workspace, "agent@champoin")
    with pytest.raises(NotFound, match=r"`dataset:main/v9`.*dataset:main/v"):
        lineage(world.ledger, world.workspace, "dataset:main/v9")
    with pytest.raises(NotFound, match="Nothing here is called `ffffffffffff`"):
        lineage(world.ledger, world.workspace, "ffffffffffff")


def test_empty_ledger(tmp_path):
    world = World(tmp_path)
    with pytest.raises(NotFound, match="none yet"):
        lineage(world.ledger, world.workspace, "agent@champion")


def test_ambiguous_prefix_asks_for_more_digits(tmp_path):
    world = PaperWorld(tmp_path)
    world.base()
    for seed in ("abcd1", "abcd2"):
        world.append("preferences.made", seed + "0" * 59, {"origin": {}})
    with pytest.raises(UsageError, match="fits 2 things"):
        lineage(world.publish(), world.workspace, "abcd")


def test_experience_from_outside(world):
    sealed = dict(world.ledger.last("dataset.sealed").payload)
    sealed |= {"version": 9, "behaviour": [{"version": "gpt-x", "digest": ""}], "parent": None}
    world.append("dataset.sealed", "main/v9", sealed)
    found = lineage(world.ledger, world.workspace, "dataset:main/v9")
    (outside,) = (node for (kind, _), node in found.nodes.items() if kind == "outside")
    assert (outside.name, outside.digest, outside.known) == ("gpt-x", None, True)


def test_entry_without_a_field_is_named(world):
    world.append("agent.registered", "agent/9", {"version": 9, "digest": "0" * 64})
    with pytest.raises(Corrupt, match="agent agent/9 is not whole"):
        lineage(world.ledger, world.workspace, "agent/9")


@pytest.mark.parametrize("seed", range(8))
def test_ancestors_agree_with_brute_force(tmp_path, seed):
    draw = random.Random(seed)
    world = PaperWorld(tmp_path)
    world.base()
    for name in ("main", "other"):
        world.seal([1], name=name)
    for _ in range(25):
        name, versions = draw.choice(["main", "other"]), list(world.agents)
        if draw.random() < 0.5:
            world.seal(
                draw.sample(versions, k=min(len(versions), draw.randint(1, 3))),
                name,
                shards=draw.randint(1, 3),
            )
        else:
            version = world.train(draw.choice(versions), name, seed=draw.randint(0, 10**9))
            if draw.random() < 0.7:
                world.judge(version, draw.choice(versions), name)
    ledger = world.publish()
    for version in world.agents:
        expected = world.ancestors(f"agent/{version}") | {f"agent/{version}"}
        assert names(lineage(ledger, world.workspace, f"agent/{version}")) == expected


def test_ten_thousand_entries_take_about_a_second(tmp_path):
    world = PaperWorld(tmp_path)
    champion = world.base()
    world.crown(champion)
    while len(world.rows) < 10_000:
        champion = world.generation(champion)
        for stage in range(9):
            world.append(
                "stage.done", sha256_bytes(f"{champion} {stage}".encode()), {"stage": "x", "outputs": {}}
            )
    ledger = world.publish()
    start = time.process_time()
    found = lineage(ledger, world.workspace, "agent@champion")
    seconds = time.process_time() - start
    assert found.root == ("agent", f"agent/{champion}")
    assert sum(kind == "agent" for kind, _ in found.nodes) == champion
    # 0.9 s alone; a machine that others use takes half as long again, and a walk over all pairs takes minutes.
    assert seconds < 4.0, f"{len(world.rows)} entries, {len(found.nodes)} nodes: {seconds:.2f} s"
