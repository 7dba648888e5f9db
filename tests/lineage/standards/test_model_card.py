"""The model card: readable by huggingface_hub, and every figure one of the ledger, the record or the shards."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard
from yaml import YAMLError

from tasks.core.errors import Corrupt, NotFound, UsageError
from tasks.lineage.standards.cyclonedx import bom
from tasks.lineage.standards.material import gather
from tasks.lineage.standards.model_card import card
from tests.lineage.standards.conftest import Tables
from tests.lineage.standards.official import cyclonedx_fault


def made(world, ref="agent/3"):
    return card(gather(world.ledger, world.workspace, ref))


def section(text, title):
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def rows(text):
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| --- ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_huggingface_reads_it(world, material):
    read = ModelCard(made(world))
    record = material.records[material.newest_decision(("agent", "agent/3"))]
    measured = {item["name"]: item["estimate"] for item in record["evidence"] if item["estimate"] is not None}
    results = read.data.eval_results
    assert {(r.metric_type, r.dataset_config): r.metric_value for r in results} == {
        ("mean_reward", None): 1.0,
        ("mean_reward", "calculator"): 1.0,
        ("reward_model", None): measured["reward model"],
        ("quality", None): measured["quality"],
        ("guard", "calculator"): measured["guard/calculator"],
        ("safety_empty", None): measured["safety/empty"],
        ("hacking_length", None): measured["hacking/length"],
        ("hacking_format", None): measured["hacking/format"],
        ("serving", None): measured["serving"],
    }
    assert read.data.library_name == "transformers"
    assert read.data.to_dict().get("license") is None


@pytest.mark.parametrize(
    ("old", "new"),
    [("model-index:", "model-index: ["), ("    dataset:\n", "    data:\n"), ("---\nlib", "---\n- lib")],
)
def test_a_broken_one_is_refused(world, old, new):
    text = made(world)
    assert old in text
    with pytest.raises((ValueError, KeyError, YAMLError)):
        ModelCard(text.replace(old, new))


def test_data_is_counted_in_the_shards(world):
    table = rows(section(made(world), "Training data"))
    assert table[1:] == [
        ["rollout", "Apache-2.0", "calculator 1", "train", "32", "4"],
        ["support \\| desk", "CC-BY-4.0", "chat 1", "train", "32", "4"],
    ]
    assert world.manifests["main"].root in section(made(world), "Training data")


def test_training_is_that_of_the_run(world):
    text = section(made(world), "Training")
    assert world.agents[3]["parents"]["run"] in text
    assert world.agents[2]["digest"] in text
    assert ["objective", "vespo"] in rows(text)
    assert ["Seed", "0"] in rows(text)
    assert ["kl", "0.01"] in rows(text)
    assert ["Earlier agents", "agent/2, agent/1"] in rows(made(world))


def test_evaluation_has_every_item_with_its_interval(world, material):
    text = section(made(world), "Evaluation")
    record = material.records[material.newest_decision(("agent", "agent/3"))]
    assert rows(text)[1:3] == [["all", "1.0", "0.0", "40"], ["calculator", "1.0", "0.0", "40"]]
    assert len(rows(text)) == 3 + 1 + len(record["evidence"])
    (quality,) = [item for item in record["evidence"] if item["name"] == "quality"]
    assert [
        "quality",
        "PASS",
        "1.0",
        f"[{quality['low']}, {quality['high']}]",
        "40",
        "0.0",
        "mean reward",
    ] in rows(text)
    assert "Approved by lee" in text


def test_what_is_not_known_is_said(world):
    text = made(world)
    assert ["Licence of the base model", "not recorded"] in rows(text)
    assert "Intended users and uses beyond that: not recorded." in text
    base = made(world, "agent/1")
    assert "agent/1 was not trained here." in base
    assert "Evaluation: not recorded" in base


def test_the_licence_of_the_base_is_the_recorded_one(tmp_path):
    class Licensed(Tables):
        def append(self, kind, subject, payload):
            if payload.get("origin") == "base":
                said = {"name": "apache-2.0", "written_in": "general.license of a.gguf"}
                payload = {**payload, "source": {**payload["source"], "licence": said}}
            return super().append(kind, subject, payload)

    world = Licensed(tmp_path / "ws")
    world.crown(world.base())
    world.generation(1)
    for ref in ("agent/1", "agent/2"):
        found = made(world, ref)
        assert ["Licence of the base model", "apache-2.0, by general.license of a.gguf"] in rows(found)
        assert ModelCard(found).data.to_dict().get("license") == ("apache-2.0" if ref == "agent/1" else None)
    assert ["Licence of the agent itself", "not recorded"] in rows(made(world, "agent/2"))
    bill = bom(gather(world.ledger, world.workspace, "agent/2"))
    assert cyclonedx_fault(bill) is None
    licensed = {
        c["bom-ref"]: c["licenses"] for c in bill["components"] if "licenses" in c and c["type"] != "data"
    }
    whole = [{"expression": "Apache-2.0"}]
    assert licensed == {"agent/1": whole, f"base/{world.agents[1]['digest']}": whole}


def test_hostile_text_stays_in_its_cell(world):
    """The second source of the fixture has a bar and a line break in its name."""
    assert {len(row) for row in rows(section(made(world), "Training data"))} == {6}


def test_a_changed_or_lost_file_is_never_a_fact(world):
    shard = world.workspace.root / world.manifests["main"].shards[0].path
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"x")
    with pytest.raises(Corrupt, match=r"shards/00001\.parquet is not what the ledger says"):
        made(world)
    shard.unlink()
    assert "1 shard that the workspace lacks: not counted above." in made(world)
    shard.write_bytes(whole)
    (world.workspace.replay / "main" / "manifests" / "v00002.json").unlink()
    with pytest.raises(NotFound, match=r"v00002\.json"):
        made(world)


def test_a_dataset_has_none(world):
    with pytest.raises(UsageError, match="made of agents"):
        made(world, "dataset:main/v1")
