"""Who learnt from revoked rows, through every kind of link; a brute-force walk over the same rows agrees."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.core.digest import canonical_json, sha256_bytes, sha256_file
from tasks.core.errors import Corrupt, ForebayError, NotFound, Refused, UsageError
from tasks.core.ledger import Ledger
from tasks.core.workspace import Workspace
from tasks.lineage import erasure
from tasks.lineage.erasure import Shards, keep_facts
from tasks.lineage.flagged import descendants_of, left_out, retrain_plan
from tasks.lineage.revocation import Target, find_hit, foresee, require_not_erased, revoked, write_lists
from tasks.reward.preferences import fraction

COLUMNS = (
    "episode_id",
    "group_id",
    "prompt_sha256",
    "source",
    "licence",
    "behaviour_digest",
    "reward_digest",
)


@dataclass
class Rows:
    """A workspace of ledger entries and shards of nothing but ids; `facts` is the test's own account."""

    workspace: Workspace
    ledger: Ledger
    shards: list[dict[str, Any]] = field(default_factory=list)
    facts: list[dict[str, str]] = field(default_factory=list)
    agents: int = 0
    sources: int = 0
    versions: int = 0

    def seal(self, rows: list[dict[str, str]]) -> str:
        path = self.workspace.replay / "main" / "shards" / f"{len(self.shards)}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(
            pa.Table.from_pylist(rows, schema=pa.schema([(c, pa.string()) for c in COLUMNS])), path
        )
        self.shards.append(
            {
                "path": self.workspace.relative(path),
                "sha256": sha256_file(path),
                "rows": len(rows),
                "groups": 1,
            }
        )
        self.facts += rows
        self.versions += 1
        root = sha256_bytes(f"root {self.versions}".encode())
        payload = {"name": "main", "version": self.versions, "root": root, "shards": list(self.shards)}
        payload["groups"] = len({row["group_id"] for row in self.facts})
        self.ledger.append("dataset.sealed", f"main/v{self.versions}", payload)
        return root

    def train(self, init: int | None, root: str | None, groups: list[str], digest: str = "") -> int:
        self.agents += 1
        digest = digest or agent(self.agents)
        parents = {"init": init and f"agent/{init}", "dataset": root, "run": None, "base": None}
        if root is not None:
            parents["run"] = key = f"run {self.agents}"
            started = {"dataset": root, "init": {"agent": f"agent/{init}", "digest": agent(init)}}
            self.ledger.append("run.started", key, started)
            self.ledger.append("run.finished", key, {"outputs": {"groups": groups}})
        self.ledger.append(
            "agent.registered",
            f"agent/{self.agents}",
            {"version": self.agents, "digest": digest, "parents": parents},
        )
        return self.agents

    def learn(self, pairs: list[tuple[str, str]], backbone: str | None = None, source: str = "here") -> int:
        self.sources += 1
        rows = [
            {
                "prompt": a, "chosen": a, "rejected": b, "group": f"p{n}", "slice": "", "source": source,
                "licence": "", "chosen_id": a, "rejected_id": b,
            }
            for n, (a, b) in enumerate(pairs)
        ]  # fmt: skip
        data = b"".join(canonical_json(row) + b"\n" for row in rows)
        name = sha256_bytes(data)
        path = self.workspace.preferences / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        root = self.ledger.last("dataset.sealed")
        origin = {"dataset": root and root.payload["root"]}
        self.ledger.append(
            "preferences.made", name, {"path": self.workspace.relative(path), "origin": origin}
        )
        parents = {"preferences": name, "backbone": backbone and {"digest": backbone}}
        values = {"version": self.sources, "digest": reward(self.sources), "parents": parents, "holdout": 0.5}
        self.ledger.append("reward.registered", f"reward/{self.sources}", values)
        return self.sources

    def erase(self, group: str) -> None:
        """Write the newest shard anew without a group, as an erasure does."""
        old = self.shards[0]
        path = self.workspace.root / old["path"]
        gone = [f for f in self.facts if f["group_id"] == group]
        left = [f for f in self.facts if f["group_id"] != group][: old["rows"] - len(gone)]
        schema = pa.schema([(c, pa.string()) for c in COLUMNS])
        new = None
        if left:
            aside = path.with_name(f"{path.stem}e.parquet")
            pq.write_table(pa.Table.from_pylist(left, schema=schema), aside)
            new = {"path": self.workspace.relative(aside), "sha256": sha256_file(aside), "rows": len(left)}
        self.facts = [f for f in self.facts if f["group_id"] != group]
        facts = keep_facts(self.workspace, {old["sha256"]: pa.Table.from_pylist(gone, schema=schema)})
        path.unlink(missing_ok=True)
        if new:
            self.shards[0] = new
        pair = {"name": "main", "replaces": [{"old": old, "new": new}]}
        self.ledger.append("data.erasing", f"group:{group}", {"datasets": [pair], "facts": facts})

    def crown(self, version: int, over: int | None = None) -> None:
        payload = {"to": version, "from": over, "decision": None, "reason": "", "by": "ada"}
        entry = self.ledger.append("promotion.intent", f"agent/{version}", payload)
        self.ledger.append("promotion.committed", f"agent/{version}", {**payload, "intent_seq": entry.seq})

    def revoke(self, what: str) -> None:
        target = Target.parse(what)
        lists = write_lists(self.workspace, find_hit(self.ledger, self.workspace, target))
        self.ledger.append("data.revoked", what, {"what": what, "lists": lists})

    def flagged(self, what: str) -> list[str]:
        target = Target.parse(what)
        now = foresee(target, find_hit(self.ledger, self.workspace, target))
        return [d.ref for d in descendants_of(self.ledger, self.workspace, now)]


def agent(version: int | None) -> str:
    return sha256_bytes(f"agent {version}".encode())


def reward(version: int) -> str:
    return sha256_bytes(f"reward {version}".encode())


def row(
    episode: str, group: str, by: str = "outside", rewarded: str = "verifier", **more: str
) -> dict[str, str]:
    plain = {"prompt_sha256": f"prompt of {group}", "source": "arena", "licence": "MIT"}
    named = {"episode_id": episode, "group_id": group, "behaviour_digest": by, "reward_digest": rewarded}
    return {**plain, **named, **more}


@pytest.fixture
def made(tmp_path: Path) -> Rows:
    workspace = Workspace(tmp_path)
    return Rows(workspace, Ledger(workspace.ledger_url))


def test_each_kind_of_link_leads_to_a_flag_and_nothing_else_does(made: Rows):
    trained = next(f"p{n}" for n in range(9) if fraction(f"p{n}") >= 0.5)
    held = next(n for n in range(9) if fraction(f"p{n}") < 0.5)
    base = made.train(None, None, [])
    first = made.seal([row("a1", "a"), row("a2", "a"), row("b1", "b"), row("c1", "c", source="forum")])
    used = made.train(base, first, ["a", "b"])
    other = made.train(base, first, ["b"])
    after = made.train(used, first, ["b"])  # started from one that learnt
    place = int(trained[1:])
    pairs = [("x", "y")] * (place + 1)
    made.learn([*pairs[:place], ("a1", "b1")])
    made.learn(
        [("a2", "b1") if n == held else (f"x{n}", f"y{n}") for n in range(held + 1)]
    )  # held out: not learnt
    made.learn([("q", "r")], backbone=agent(used))
    second = made.seal([row("d1", "d", by=agent(used)), row("e1", "e", rewarded=reward(1)), row("f1", "f")])
    sampled = made.train(base, second, ["d"])
    rewarded = made.train(base, second, ["e"])
    clean = made.train(base, second, ["f"])
    assert clean
    assert set(made.flagged("episode:a1")) == {f"agent/{n}" for n in (used, after, sampled, rewarded)} | {
        "reward/1",
        "reward/3",
    }
    assert "reward/1" not in made.flagged("episode:a2")
    assert set(made.flagged("group:a")) == set(made.flagged("episode:a1"))
    assert f"agent/{other}" in made.flagged("prompt:prompt of b")
    assert made.flagged("source:forum") == []
    made.crown(after)
    assert made.flagged("episode:a1")[0] == f"agent/{after}"  # the champion first


def test_what_flagged_agents_sampled_is_left_out_for_those_who_are_not(made: Rows):
    base = made.train(None, None, [])
    first = made.seal([row("a1", "a"), row("b1", "b")])
    used = made.train(base, first, ["a"])
    made.crown(base)
    made.crown(used, base)
    second = made.seal([row("c1", "c", by=agent(used)), row("d1", "d", by=agent(base))])
    made.revoke("episode:a1")
    look = (made.ledger, made.workspace, second)
    assert left_out(*look) == left_out(*look, agent(used)) == ("a",)
    assert left_out(*look, agent(base)) == ("a", "c")
    (step,) = retrain_plan(made.ledger, made.workspace)
    assert (step.agent, step.start, step.dataset) == ("agent/2", "agent/1", "main/v2")
    assert (step.groups, step.left_out) == (4, 2)
    clean = made.train(base, second, ["b", "d"])
    now = revoked(made.ledger, made.workspace)
    assert f"agent/{clean}" not in [d.ref for d in descendants_of(made.ledger, made.workspace, now)]


def test_what_comes_in_later_is_revoked_by_its_source_too(made: Rows):
    made.seal([row("a1", "a", source="forum"), row("b1", "b")])
    made.revoke("source:forum")
    later = made.seal([row("c1", "c", source="forum"), row("c2", "c"), row("d1", "d")])
    assert left_out(made.ledger, made.workspace, later) == ("a", "c")


@pytest.mark.parametrize("seed", range(20))
def test_a_brute_force_walk_over_the_same_rows_agrees(made: Rows, seed: int):
    """Closed loops of random size: each agent trains on random groups, and samples some of the next ones."""
    random_ = random.Random(seed)
    made.train(None, None, [])
    used: dict[int, tuple[int, list[str]]] = {}
    for turn in range(8):
        writer = random_.randint(1, made.agents)
        root = made.seal(
            [row(f"{turn}-{g}-{k}", f"{turn}-{g}", by=agent(writer)) for g in range(3) for k in range(2)]
        )
        known = sorted({fact["group_id"] for fact in made.facts})
        groups = random_.sample(known, random_.randint(1, min(3, len(known))))
        init = random_.randint(1, made.agents)
        used[made.train(init, root, groups)] = (init, groups)
    fact = random_.choice(made.facts)
    flagged: set[int] = set()
    writers = {f["group_id"]: f["behaviour_digest"] for f in made.facts}
    for version, (init, groups) in sorted(used.items()):
        taught = any(g == fact["group_id"] or writers[g] in {agent(v) for v in flagged} for g in groups)
        if taught or init in flagged:
            flagged.add(version)
    assert set(made.flagged(f"episode:{fact['episode_id']}")) == {f"agent/{v}" for v in flagged}


def test_a_list_that_was_changed_or_lost_stops_everything(made: Rows):
    root = made.seal([row("a1", "a")])
    made.revoke("group:a")
    entry = made.ledger.last("data.revoked")
    assert entry is not None
    path = made.workspace.root / entry.payload["lists"]["path"]
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"a1", b"a2"))
    with pytest.raises(Corrupt):
        left_out(made.ledger, made.workspace, root)
    path.unlink()
    with pytest.raises(NotFound):
        left_out(made.ledger, made.workspace, root)


@pytest.mark.parametrize("text", ["", "episode", "episode:", "agent:3", ":x"])
def test_what_is_no_target_is_refused(text: str):
    with pytest.raises(UsageError, match="cannot be revoked"):
        Target.parse(text)


def test_a_version_whose_bytes_are_being_erased_is_not_used(made: Rows):
    made.seal([row("a1", "a")])
    old = made.shards[0]
    intent = {
        "what": "group:a",
        "reason": "asked",
        "datasets": [{"name": "main", "replaces": [{"old": old}]}],
    }
    require_not_erased(made.ledger, "main/v1", made.shards)
    made.ledger.append("data.erasing", "group:a", intent)
    with pytest.raises(Refused, match="main/v1 was erased on purpose"):
        require_not_erased(made.ledger, "main/v1", made.shards)


def test_a_shard_that_is_missing_but_was_not_erased_is_missed_aloud(made: Rows):
    base = made.train(None, None, [])
    root = made.seal([row("a1", "a", source="forum")])
    made.seal([row("b1", "b", source="forum")])
    used = made.train(base, root, ["a"])
    made.revoke("source:forum")
    (made.workspace.root / made.shards[0]["path"]).unlink()
    with pytest.raises(ForebayError):
        left_out(made.ledger, made.workspace, root)
    with pytest.raises(ForebayError):
        made.flagged("source:forum")
    made.erase("a")
    assert left_out(made.ledger, made.workspace, root) == ("a",)
    assert made.flagged("source:forum") == [f"agent/{used}"]


def test_facts_of_a_shard_that_was_rewritten_twice_are_still_whole(made: Rows):
    made.seal([row("a1", "a"), row("b1", "b"), row("c1", "c")])
    first = made.shards[0]
    made.erase("a")
    made.erase("b")
    facts = Shards(made.ledger, made.workspace).facts(first)
    assert sorted(facts["episode_id"].to_pylist()) == ["a1", "b1", "c1"]
    assert Shards(made.ledger, made.workspace).with_heirs([first["sha256"]]) > {first["sha256"]}
    (evidence,) = {e.payload["facts"]["path"] for e in made.ledger.entries("data.erasing")[:1]}
    (made.workspace.root / evidence).write_bytes(b"other")
    erasure._kept.cache_clear()
    with pytest.raises(Corrupt, match="was changed"):
        Shards(made.ledger, made.workspace).facts(first)


def test_sources_known_from_preferences_only_or_not_at_all_can_be_revoked(made: Rows):
    made.seal([row("a1", "a")])
    made.learn([(f"x{n}", f"y{n}") for n in range(9)], source="forum")
    assert made.flagged("source:forum") == ["reward/1"]
    for what in ("source:nowhere", "licence:none", f"prompt:{sha256_bytes(b'?')}"):
        assert made.flagged(what) == []
    for what in ("prompt:what is it?", "group:nobody"):
        with pytest.raises(NotFound):
            made.flagged(what)


def test_shards_of_runs_that_did_not_end_well_are_found(made: Rows):
    path = made.workspace.runs / "0123" / "fresh" / "groups-000000-000001.parquet"
    path.parent.mkdir(parents=True)
    schema = pa.schema([(c, pa.string()) for c in COLUMNS])
    pq.write_table(pa.Table.from_pylist([row("f1", "f")], schema=schema), path)
    hit = find_hit(made.ledger, made.workspace, Target.parse("episode:f1"))
    assert [place.path for place in hit.places] == [made.workspace.relative(path)]
