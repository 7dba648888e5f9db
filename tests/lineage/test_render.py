from __future__ import annotations

import io
import json
import re

from rich.console import Console

from tasks.lineage.graph import lineage
from tasks.lineage.render import to_json, to_tree
from tests.lineage.world import PaperWorld


def drawn(found, width: int = 200) -> str:
    page = io.StringIO()
    Console(width=width, color_system=None, file=page).print(to_tree(found))
    assert len(page.getvalue().splitlines()) > 10
    return page.getvalue()


def test_tree_goes_down_to_shards_base_model_code_policy_and_lock(world):
    text = drawn(lineage(world.ledger, world.workspace, "agent@champion"))
    assert text.startswith(f"agent/3  {world.agents[3]['digest'][:12]}  champion · trained\n")
    for line in (
        "run by code commit cccccccccccc",
        "with packages constraints.txt",
        "trained on main/v2",
        "shard data/replay/main/shards/00001.parquet",
        "descends from base model SmolLM2-135M-Instruct",
        "under policy policy.yaml",
        "judged by decision PASS",
        "rests on reward model PASS",
        "rests on paired evaluation of agent/3 and agent/2",
        "compared with agent/2  see above",
        "in office promotion",
    ):
        assert line in text


def test_each_node_is_drawn_once_and_referred_to_in_the_right_direction(world):
    lines = drawn(lineage(world.ledger, world.workspace, "agent@champion")).splitlines()
    for agent in ("agent/1", "agent/2"):
        whole = [
            i for i, line in enumerate(lines) if re.search(rf"(from|with) {agent}  [0-9a-f]{{12}}", line)
        ]
        assert len(whole) == 1
        for i, line in enumerate(lines):
            if f"{agent}  see" in line:
                assert line.endswith("see below" if i < whole[0] else "see above")


def test_equal_lineages_are_drawn_and_written_alike(world):
    found = [lineage(world.ledger, world.workspace, "agent@champion") for _ in range(2)]
    assert drawn(found[0]) == drawn(found[1])
    assert json.dumps(to_json(found[0])) == json.dumps(to_json(found[1]))


def test_json_holds_the_whole_graph(world):
    found = lineage(world.ledger, world.workspace, "agent@champion")
    value = json.loads(json.dumps(to_json(found)))
    ids = [node["id"] for node in value["nodes"]]
    assert value["root"] == ids[0] == "agent:agent/3"
    assert len(ids) == len(set(ids)) == len(found.nodes)
    assert {edge[end] for edge in value["edges"] for end in ("source", "target")} <= set(ids)


def test_many_shards_are_counted(world):
    world.seal([3], shards=12)
    text = drawn(lineage(world.ledger, world.workspace, "dataset:main"))
    assert "… and 6 more shards with 96 rows" in text


def test_every_reference_leads_to_a_line(tmp_path):
    world = PaperWorld(tmp_path)
    champion = world.base()
    for _ in range(12):
        champion = world.generation(champion)
    found = lineage(world.publish(), world.workspace, "agent@champion")
    lines = drawn(found, width=300).splitlines()
    whole = {
        match[1]: i
        for i, line in enumerate(lines)
        if (match := re.search(r"(?<!and )(agent/\d+|main/v\d+)  [0-9a-f]{12}", line))
    }
    met = set()
    for i, line in enumerate(lines):
        if match := re.search(r"(agent/\d+|main/v\d+)  see (above|below)$", line):
            assert (whole[match[1]] < i) == (match[2] == "above")
            met.add(match[2])
    assert met == {"above", "below"}


def test_long_histories_stay_readable(tmp_path):
    world = PaperWorld(tmp_path)
    champion = world.base()
    for _ in range(200):
        champion = world.generation(champion)
    found = lineage(world.publish(), world.workspace, "agent@champion")
    lines = drawn(found, width=300).splitlines()
    assert len(lines) < 200
    assert any("… earlier: ask for it by name" in line for line in lines)
    assert len(json.dumps(to_json(found))) > 100_000  # and writing it is no deep recursion
