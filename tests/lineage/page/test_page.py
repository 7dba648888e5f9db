"""The page of an audit: complete, escaped, the same from the same facts, drawn also where something is wrong."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from itertools import pairwise

import pytest

from tasks.core.digest import digest_files
from tasks.core.errors import NotFound
from tasks.lineage.page import graph
from tasks.lineage.page.document import build, headline, verdict
from tasks.lineage.picture import WIDTH, layout
from tasks.promotion.attest import answer_payload
from tasks.replay.manifest import Behaviour
from tests.lineage.page.world import NASTY, audit, page, revoke
from tests.lineage.tables import shard_bytes
from tests.lineage.world import PaperWorld, World
from tests.promotion.support import LEE, TRUST
from tests.promotion.test_page import Checked, parsed


@pytest.fixture(scope="module")
def champion(told) -> Checked:
    return parsed(page(told))


def values(found: Checked, name: str) -> list[str]:
    return [value for _, attribute, value in found.attributes if attribute == name and value is not None]


def part(found: Checked, start: str, end: str) -> str:
    """What a reader sees between two phrases, cells apart."""
    text = re.sub(r"\s+", " ", " ".join(found.words))
    return text[text.index(start) : text.index(end, text.index(start))]


def test_it_is_well_formed_and_stands_alone(champion: Checked, told):
    assert len(champion.ids) == len(set(champion.ids))
    inside = [href for href in values(champion, "href") if href.startswith("#")]
    assert {href[1:] for href in inside} <= set(champion.ids)
    assert inside == values(
        champion, "href"
    )  # nothing leads elsewhere, no decision's page lies beside this one
    assert not {"iframe", "link", "img", "object", "base", "form"} & set(champion.tags)
    assert not [
        a for a in champion.attributes if a[1] in ("src", "srcset", "action") or a[1].startswith("on")
    ]
    assert champion.tags["script"] == champion.tags["h1"] == 1
    assert "url(" not in page(told)


def test_only_its_own_script_may_run(told):
    text = page(told)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = policy.replace("&#39;", "'")
    assert f"script-src 'sha256-{digest}';" in allowed
    assert allowed.startswith("default-src 'none';")
    assert "connect-src" not in allowed
    assert len(script.splitlines()) < 200


def test_equal_facts_give_equal_bytes_and_another_time_another_page(told):
    first, second = audit(told), audit(told)
    assert first == second
    assert build(first) == build(second)
    assert build(first) != build(audit(told, verified=False))


def test_the_top_says_what_it_is_whether_it_holds_and_what_is_open(champion: Checked, told):
    day = told.ledger.last("promotion.committed").time[:10]
    top = part(champion, "Forebay · audit", "Where it came from")
    assert f"agent/3 is the champion: put in office {day} by ada." in top
    assert "VERIFIED" in top
    assert "open flags none" in top
    assert "agent/3 may replace agent/2" in top


def test_every_thing_has_a_card_and_every_box_leads_to_one(told):
    found = audit(told)
    checked = parsed(build(found))
    cards = set(values(checked, "data-card"))
    assert cards == {str(i) for i in range(len(found.lineage.nodes))}
    boxes = values(checked, "data-node")
    assert len(boxes) == len(layout(found.lineage).boxes)
    assert set(boxes) <= cards
    ends = [*values(checked, "data-from"), *values(checked, "data-to")]
    assert set(ends) <= set(boxes)
    for node in found.lineage.nodes.values():
        if node.digest:
            assert node.digest in checked.text
        for file in node.files:
            assert file.sha256 in checked.text


def test_strange_words_are_text(told):
    text = page(told)
    checked = parsed(text)
    assert "<img src=x" not in text
    assert "\u202e" not in text
    shown = checked.text
    assert (
        "<script>alert('x')</script>⟨202E⟩gnp.exe \"quotes\" </script><img src=x onerror=alert(1)> ${x} {{ 7 * 7 }}"
        in shown
    )
    assert shown.count("onerror=alert(1)") >= 4  # a source, a reason, a setting, and as a node of the graph
    assert {"onerror", "src"}.isdisjoint(name for _, name, _ in checked.attributes)


def test_data_are_split_by_environment_source_and_licence(told, champion: Checked):
    data = part(champion, "Data The run learnt", "Training 60 steps")
    assert "The run learnt from 1 of these 8 groups" in data
    assert "calculator@1 rollout Apache-2.0 32 4" in data
    assert "CC-BY-NC-4.0 32 4" in data
    assert "main/v2" in data
    assert "cannot be told" not in data
    found = audit(told).data
    assert [version.ref[1] for version in found.versions] == ["main/v2", "main/v1"]
    assert [version.new.rows for version in found.versions] == [32, 32]


def test_curves_settings_and_cost(champion: Checked):
    training = part(champion, "Training 60 steps", "Gate decision PASS")
    assert "2.0 h of processor time, 2,048 MiB at most" in training
    assert "Reward, estimated for the policy in training: 0.02 to 1." in training
    assert "KL from the policy it started from: 0.1 to 0.1." in training
    assert "Entropy" not in training  # not one value is a number
    assert "objective" in training


def test_history_has_approvals_with_the_key_that_signed(champion: Checked):
    history = part(champion, "History Every ledger entry", "Verification VERIFIED")
    assert re.search(r"approved lee good holds lee [0-9a-f]{12}", history)
    assert re.search(r"gate: PASS .* holds service [0-9a-f]{12}", history)
    assert "agent/3 in office ada after agent/2: told so" in history


def test_a_forged_approval_is_an_open_flag(world):
    made = world.ledger.last("decision.made", "agent/3").payload
    forged = {**answer_payload("approval", made["decision"], "fine", LEE, TRUST), "reason": "other words"}
    world.ledger.append("approval.granted", "agent/3", forged)
    found = audit(world)
    assert any("does not hold" in flag.says for flag in found.open)
    assert verdict(found).word == "DIFFERS"


@pytest.mark.parametrize(("path", "gap"), [("decisions", "decision"), ("reward", "reward")])
def test_changed_evidence_is_not_shown_but_told(world, path, gap):
    made = world.ledger.last("decision.made", "agent/3").payload
    record = world.workspace.root / made["record"]["path"]
    file = record if path == "decisions" else world.workspace.root / audit(world).reward.path
    file.write_bytes(file.read_bytes().replace(b'"', b" ", 1))
    found = audit(world)
    assert getattr(found, gap).content is None
    text = parsed(build(found)).text
    assert "NOT SHOWN" in text
    assert "its bytes are not those of the digest in the ledger" in text
    assert "DIFFERS" in text
    assert f"{file.relative_to(world.workspace.root).as_posix()}" in text
    assert "Changed: the bytes are not those of the recorded digest: 1" in text


def test_missing_and_added_files_are_grouped(world):
    agent = world.workspace.root / world.agents[3]["path"]
    (agent / "config.json").unlink()
    (agent / "extra.py").write_text("x")
    text = parsed(page(world)).text
    assert "1 missing and 1 added" in text or "1 added and 1 missing" in text
    assert "Missing: 1" in text
    assert "Added: in a registered folder, but never registered: 1" in text


def test_what_a_cache_or_a_store_left_unread_is_said(told):
    """As the report of a verification that may skip unchanged files, or whose store does not answer."""
    whole = audit(told)
    cached = verdict(replace(whole, report={**whole.report, "cached": 12}))
    assert (cached.word, "12 files not read again" in cached.says) == ("VERIFIED", True)
    away = [{"path": "data/x.parquet", "owner": "dataset main/v1", "reason": "the remote does not answer"}]
    partly = replace(whole, report={**whole.report, "unreachable": away, "ok": False})
    assert verdict(partly).word == "INCOMPLETE"
    assert (
        "Not reached: data/x.parquet (dataset main/v1), the remote does not answer"
        in parsed(build(partly)).text
    )


def test_unverified_says_so(told):
    text = parsed(page(told, verified=False)).text
    assert "NOT VERIFIED" in text
    assert "VERIFIED 1" not in text


def test_revoked_data_that_it_learnt_from_is_an_open_flag_until_reinstated(world):
    entry = revoke(world, "group:g1", ["g1", "g7"])
    (flag,) = audit(world).open
    own, earlier = "agent/3 started from agent/2", "agent/2 trained on group g1, revoked by group:g1"
    when = f"group:g1 was revoked on {world.ledger.last().time[:10]} by lee (a person asked <script>"
    assert flag.says.startswith(f"Revoked data shaped it: {own}, {earlier}; {when}")
    assert audit(world, "agent/2").open[0].says.startswith(f"Revoked data shaped it: {earlier}; {when}")
    run = "run:" + world.agents[2]["parents"]["run"]
    assert audit(world, run).open[0].says.startswith(f"Revoked data shaped it: {earlier}; {when}")
    assert audit(world, "agent/1").open == []  # nothing was learnt before
    assert "<script>alert" not in page(world)
    world.ledger.append("data.reinstated", "group:g1", {"revocation": entry, "what": "group:g1"})
    assert audit(world).open == []


def test_a_reward_model_that_compares_a_revoked_answer_is_flagged(world):
    """As `reward.registered` and `preferences.made` are recorded; that of another answer is left alone."""
    pair = {
        "chosen_id": "e1",
        "rejected_id": "e2",
        "source": "chats",
        "licence": "MIT",
        "prompt": "?",
        "group": "g9",
    }
    data = json.dumps(pair).encode() + b"\n"
    file = world.put(world.workspace.preferences / "pairs.jsonl", data)
    made = {
        "name": "main",
        "pairs": 1,
        "groups": 1,
        "slices": {},
        "sources": {},
        "licences": {},
        "origin": {},
    }
    world.ledger.append("preferences.made", file["sha256"], {**made, "path": file["path"]})
    files = world.model(world.workspace.models / "head", "head")
    parents = {"preferences": file["sha256"], "backbone": None}
    head = {
        "kind": "head",
        "version": 1,
        "digest": digest_files(files),
        "files": files,
        "mlflow": {},
        "holdout": 0.2,
        "licences": {},
    }
    path = world.workspace.relative(world.workspace.models / "head")
    world.ledger.append("reward.registered", "reward/1", {**head, "path": path, "parents": parents})
    revoke(world, "episode:e7", [], ["e7"])
    assert audit(world, "reward/1").open == []
    revoke(world, "episode:e2", [], ["e2"])
    (flag,) = audit(world, "reward/1").open
    assert flag.says == "Revoked data shaped it: reward/1 learnt from a pair of episode e2."
    text = parsed(page(world, "reward/1")).text
    assert "reward/1 was never in office." in text
    assert "audit of reward model" in text


def test_what_was_erased_on_purpose_is_no_difference(world):
    entry = revoke(world, "group:g1", ["g1"])
    shard = world.manifests["main"].shards[0]
    erased = {
        "what": "group:g1",
        "revocation": entry,
        "intent": 0,
        "reason": "a person asked",
        "by": LEE.name,
    }
    world.ledger.append(
        "data.erased", "group:g1", {**erased, "files": [{"path": shard.path, "sha256": shard.sha256}]}
    )
    (world.workspace.root / shard.path).unlink()
    found = audit(world)
    assert verdict(found).word == "VERIFIED"
    assert found.open[0].says.endswith(", its bytes erased.")
    assert [flag.says for flag in found.flags[1:]] == [
        "1 file was erased on purpose; digests and record stay."
    ]
    assert f"Erased on purpose: {shard.path} (dataset main/v1), a person asked" in parsed(build(found)).text


def test_a_revocation_that_it_did_not_learn_from_is_none(world):
    revoke(world, "group:g7", ["g7"])
    assert audit(world).open == []


def test_what_a_run_sampled_itself_and_had_revoked_is_an_open_flag(world):
    """Fresh groups are in no list of what a run learnt from: they are in shards of its own."""
    behaviour = [Behaviour("agent/3", world.agents[3]["digest"])]
    fresh = world.put(world.workspace.runs / "fresh" / "00000.parquet", shard_bytes("f", behaviour))
    started, finished = (world.ledger.entries(f"run.{kind}")[-1].payload for kind in ("started", "finished"))
    outputs = {**finished["outputs"], "groups": [], "fresh": [fresh]}
    world.append("run.started", "f" * 64, {**started, "key": "f" * 64})
    world.append("run.finished", "f" * 64, {"key": "f" * 64, "outputs": outputs})
    agent = world.agents[3]
    parents = {**agent["parents"], "run": "f" * 64}
    registered = {**agent, "version": 9, "digest": "f" * 64, "parents": parents}
    world.append("agent.registered", "agent/9", registered)
    assert audit(world, "agent/9", verified=False).open == []
    revoke(world, "group:f-0", ["f-0"])
    (flag,) = audit(world, "agent/9", verified=False).open
    assert "agent/9 trained on group f-0, revoked by group:f-0; group:f-0 was revoked on" in flag.says
    assert audit(world, "agent/4", verified=False).open == []


def test_a_dataset_that_holds_revoked_rows_is_flagged_with_what_came_in_later(world):
    assert audit(world, "dataset:main/v1").open == []
    revoke(world, "licence:Apache-2.0", ["s1-0"])  # later shards came in, or were, under it too
    (flag,) = audit(world, "dataset:main/v1").open
    first, newest = len(world.manifests["main"].shards) // 3, len(world.manifests["main"].shards)
    assert flag.says.startswith(
        f"{first} groups of it revoked by licence:Apache-2.0: no run learns from them; "
    )
    assert audit(world, "dataset:main/v3").open[0].says.startswith(f"{newest} groups of it revoked")
    assert audit(world, "agent/1").open == []


def test_rows_that_cannot_be_read_are_said(world):
    world.shard = lambda number, sampled: b"no table"
    world.generation(3)
    data = part(parsed(page(world, verified=False)), "Data The run learnt", "Training 60 steps")
    assert "Which of them the run learnt from cannot be told" in data


def test_a_lost_list_of_revoked_groups_is_no_all_clear(world):
    revoke(world, "group:g1", ["g1"])
    file = world.ledger.last("data.revoked").payload["lists"]["path"]
    (world.workspace.root / file).unlink()
    assert "cannot be told" in audit(world).open[0].says


def test_a_missing_licence_is_open(world):
    part = {
        "env": "calculator",
        "env_version": "1",
        "source": "chats",
        "licence": "",
        "rows": 32,
        "groups": 4,
    }
    world.contents = lambda sealed: [part]
    world.generation(3)
    found = audit(world)
    assert [flag.says for flag in found.open] == ["No licence is recorded for rows from chats."]
    assert "not recorded" in parsed(build(found)).text


def test_a_ledger_of_an_earlier_release_says_so(tmp_path):
    world = World(tmp_path / "workspace")
    world.crown(world.base())
    world.generation(1)
    found = audit(world)
    assert [version.parts for version in found.data.versions] == [None]
    text = parsed(build(found)).text
    assert "The ledger does not say of which environments, sources and licences the rows are" in text
    assert "What the rows of main/v1 are was not recorded" in text
    assert "not signed" in text


@pytest.mark.parametrize(
    ("ref", "says", "without"),
    [
        ("dataset:main/v2", "main/v2: 64 rows in 8 groups, sealed", {"training", "gate", "reward"}),
        ("agent/1", "agent/1 was the champion on", {"training", "gate", "reward", "data"}),
        ("agent/4", "agent/4 was never in office.", {"gate", "reward"}),
        ("licence:CC-BY-NC-4.0", "licence CC-BY-NC-4.0", {"training", "gate", "reward", "data"}),
    ],
)
def test_sections_that_do_not_apply_are_left_out(told, ref, says, without):
    found = audit(told, ref)
    assert headline(found).startswith(says)
    checked = parsed(build(found))
    sections = {"training", "gate", "reward", "data"}
    assert sections & set(checked.ids) == sections - without


def test_descendants_are_counted(told):
    text = parsed(page(told, "agent/2")).text
    assert "Shaped by it since:" in text
    assert re.search(r"2 agents", text)
    assert "Nothing was made from it since." in parsed(page(told, "agent/4")).text


def test_a_long_history_is_cut_and_says_so(tmp_path, monkeypatch):
    world = PaperWorld(tmp_path / "workspace")
    world.crown(world.base())
    for generation in range(1, 41):
        world.generation(generation)
    world.publish()
    monkeypatch.setattr(graph.cards, "__defaults__", (200,))
    found = audit(world, verified=False)
    checked = parsed(build(found))
    assert len(found.lineage.nodes) > 300
    assert len(values(checked, "data-node")) == graph.DRAWN
    assert len(values(checked, "data-card")) == 200
    assert "things farther away are not drawn" in checked.text
    assert "of them, the farthest, are not listed" in checked.text
    assert {href[1:] for href in values(checked, "href")} <= set(checked.ids)


def test_boxes_do_not_overlap_and_lie_within(told):
    drawing = layout(audit(told).lineage)
    for y in {box.y for box in drawing.boxes}:
        row = sorted(box.x for box in drawing.boxes if box.y == y)
        assert all(b - a >= WIDTH for a, b in pairwise(row))
    assert all(WIDTH / 2 <= box.x <= drawing.width - WIDTH / 2 for box in drawing.boxes)


def test_a_wrong_name_is_refused(told):
    with pytest.raises(NotFound, match="nearest names"):
        audit(told, "agent/99")


def test_nasty_is_really_in_the_history(told):
    assert NASTY in told.ledger.last("dataset.sealed").payload["contents"][1]["source"]
