"""Five generations made by the real flows; every answer is held against a walk over the raw files."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from flows.context import Context
from flows.cycle import Cycle, open_cycle
from flows.run import run_stages
from tasks.lineage.descent import descendants
from tasks.lineage.flagged import descendants_of
from tasks.lineage.graph import lineage
from tasks.lineage.questions import at, diff, find, path
from tasks.lineage.revocation import Target, find_hit, foresee
from tasks.lineage.types import Lineage
from tests.flows.conftest import ENVIRONMENT, PARAMS, forebay, lay_workspace, loads

GENERATIONS = 5
# Each candidate only has to be about as good: the chain is what matters here, not the gate.
POLICY = """
version: 1
superiority: {claim: non_inferiority, margin: 0.9}
errors: {alpha: 0.4, cycles: 2}
guards: {margin: 0.9}
hacking: {required: false}
safety: {}
reward_model: {required: false}
serving: {required: false}
"""
SETTINGS = {
    "training.steps": 2,
    "training.learning_rate": 1e-5,
    "collect.environments": {ENVIRONMENT: 10},
    "evaluation.tasks": {ENVIRONMENT: 40},
    "validation.min_groups": 2,
}

pytestmark = pytest.mark.timeout(600)


@dataclass
class Raw:
    """What the files say, read without any of the product's code for reading them."""

    root: Path
    agents: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    used: dict[str, set[str]] = field(default_factory=dict)
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, pa.Table] = field(default_factory=dict)
    changes: list[tuple[str, int]] = field(default_factory=list)

    @classmethod
    def read(cls, root: Path) -> Raw:
        raw = cls(root)
        with sqlite3.connect(root / ".forebay" / "ledger.db") as database:
            entries = database.execute(
                "SELECT kind, subject, payload, time FROM ledger ORDER BY seq"
            ).fetchall()
        for kind, subject, text, when in entries:
            payload = json.loads(text)
            if kind == "agent.registered":
                raw.agents[subject] = payload
            elif kind == "run.started":
                raw.runs[subject] = payload
            elif kind == "run.finished":
                kept = payload["outputs"]["groups"]
                raw.used[subject] = set((root / kept["path"]).read_text().split())
            elif kind == "dataset.sealed":
                raw.datasets[subject] = payload
                for shard in payload["shards"]:
                    raw.rows[shard["path"]] = pq.read_table(root / shard["path"])
            elif kind in ("promotion.committed", "rollback.committed"):
                raw.changes.append((when, payload["to"]))
        return raw

    def trained_on(self, agent: str) -> str | None:
        run = self.agents[agent]["parents"]["run"]
        return run and next(n for n, d in self.datasets.items() if d["root"] == self.runs[run]["dataset"])

    def table(self, dataset: str) -> pa.Table:
        return pa.concat_tables(self.rows[shard["path"]] for shard in self.datasets[dataset]["shards"])

    def shaped(
        self, first: Callable[[str], bool], groups: Set[str] = frozenset(), versions: Set[str] = frozenset()
    ) -> set[str]:
        """Agents that `first` chooses, those whose run learnt from one of `groups` out of one of `versions` (any where none are
        named), and to a fixed point those that start from one, or learn from a group that one sampled.
        """
        makers = {
            group: digest
            for table in self.rows.values()
            for group, digest in pairs(table, "group_id", "behaviour_digest")
        }
        found = {agent for agent in self.agents if first(agent)}
        while True:
            digests = {self.agents[agent]["digest"] for agent in found}
            more = set()
            for agent, payload in self.agents.items():
                dataset = self.trained_on(agent)
                if dataset is None or agent in found:
                    continue
                used = self.used[payload["parents"]["run"]]
                taught = used & groups and (not versions or dataset in versions)
                if (
                    payload["parents"]["init"] in found
                    or taught
                    or {makers[group] for group in used} & digests
                ):
                    more.add(agent)
            if not more:
                return found
            found |= more

    def groups(self, *shards: str) -> set[str]:
        return {group for shard in shards for group in self.rows[shard]["group_id"].to_pylist()}


def pairs(table: pa.Table, *columns: str) -> list[tuple[str, ...]]:
    return list(zip(*(table[column].to_pylist() for column in columns), strict=True))


def nobody(agent: str) -> bool:
    return False


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Context:
    root = tmp_path_factory.mktemp("chain") / "ws"
    assert "{base}" in PARAMS
    context = lay_workspace(root, tiny_base)
    (root / "policy.yaml").write_text(POLICY)
    overrides = [
        f"{name}={yaml.safe_dump(value, default_flow_style=True).strip().removesuffix('...').strip()}"
        for name, value in SETTINGS.items()
    ]
    for generation in range(GENERATIONS):
        context = Context.open(root, [*overrides, f"seed={generation}"])
        cycle = open_cycle(context, "always")
        assert isinstance(cycle, Cycle)
        ended = run_stages(context, cycle)
        assert ended["outcome"] == "promoted", ended
    return context


@pytest.fixture(scope="module")
def raw(chain: Context) -> Raw:
    found = Raw.read(chain.workspace.root)
    assert len(found.agents) == GENERATIONS + 1
    assert len(found.datasets) == GENERATIONS
    return found


def agents(found: Lineage) -> set[str]:
    return {key for kind, key in found.nodes if kind == "agent"}


def test_descendants_of_every_agent_dataset_and_shard(chain: Context, raw: Raw):
    ask = (chain.ledger, chain.workspace)
    for agent in raw.agents:
        assert agents(descendants(*ask, agent)) == raw.shaped(lambda a, agent=agent: a == agent)
    for name, payload in raw.datasets.items():
        held = [shard["path"] for shard in payload["shards"]]
        later = {n for n, d in raw.datasets.items() if set(held) <= {shard["path"] for shard in d["shards"]}}
        expected = raw.shaped(nobody, raw.groups(*held), later)
        assert agents(descendants(*ask, f"dataset:{name}")) == expected
    for shard in raw.rows:
        found = descendants(*ask, f"shard:{shard}")
        assert agents(found) == raw.shaped(nobody, raw.groups(shard))
        holding = {n for n, d in raw.datasets.items() if shard in {s["path"] for s in d["shards"]}}
        assert {key for kind, key in found.nodes if kind == "dataset"} >= holding


def test_descendants_of_every_episode_group_and_prompt(chain: Context, raw: Raw):
    ask = (chain.ledger, chain.workspace)
    never = 0
    prompts = {g: p for table in raw.rows.values() for g, p in pairs(table, "group_id", "prompt_sha256")}
    for table in raw.rows.values():
        for group, episode in dict(pairs(table, "group_id", "episode_id")).items():
            expected = raw.shaped(nobody, {group})
            found = descendants(*ask, f"group:{group}")
            assert agents(found) == expected
            assert agents(descendants(*ask, f"episode:{episode}")) == expected
            assert found.nodes[found.root].facts["groups"] == 1
            never += not expected
            same = {g for g, prompt in prompts.items() if prompt == prompts[group]}
            assert agents(descendants(*ask, f"prompt:{prompts[group]}")) == raw.shaped(nobody, same)
    assert never  # some group was sealed and never learnt from, else this test shows nothing


def test_revocation_flags_the_same_agents(chain: Context, raw: Raw):
    """Two walks that share no code: one over columns of shards, one over the index."""
    table = next(iter(raw.rows.values()))
    wanted = [f"group:{g}" for g in table["group_id"].unique().to_pylist()[:6]]
    wanted += [f"source:{s}" for s in table["source"].unique().to_pylist()]
    for what in wanted:
        target = Target.parse(what)
        now = foresee(target, find_hit(chain.ledger, chain.workspace, target))
        flagged = {
            d.ref for d in descendants_of(chain.ledger, chain.workspace, now) if d.ref.startswith("agent/")
        }
        assert agents(descendants(chain.ledger, chain.workspace, what)) == flagged


def test_ancestors_reach_back_through_all_generations(chain: Context, raw: Raw):
    newest = f"agent/{GENERATIONS + 1}"
    found = lineage(chain.ledger, chain.workspace, newest)
    assert agents(found) == set(raw.agents)
    assert {key for kind, key in found.nodes if kind == "shard"} == set(raw.rows)
    assert {key for kind, key in found.nodes if kind == "environment"} == {
        f"{ENVIRONMENT}@{found_version(raw)}"
    }
    assert {key for kind, key in found.nodes if kind == "run"} == set(raw.runs)
    assert all(node.known for node in found.nodes.values())


def found_version(raw: Raw) -> str:
    (version,) = {v for table in raw.rows.values() for v in table["env_version"].to_pylist()}
    return version


def test_source_and_licence(chain: Context, raw: Raw):
    table = pa.concat_tables(raw.rows.values())
    for word in ("source", "licence"):
        for value in set(table[word].to_pylist()):
            groups = {group for group, v in pairs(table, "group_id", word) if v == value}
            found = find(chain.ledger, chain.workspace, f"{word}:{value}")
            assert set(found.agents) == raw.shaped(nobody, groups)
            assert found.node.facts["groups"] == len(groups)


def test_who_was_champion_at_any_moment(chain: Context, raw: Raw):
    moments = [datetime.fromisoformat(when) for when, _ in raw.changes]
    for moment in [m + timedelta(microseconds=d) for m in moments for d in (-1, 0, 1)]:
        held = [to for when, to in raw.changes if datetime.fromisoformat(when) <= moment]
        term = at(chain.ledger, chain.workspace, moment.isoformat()).terms[0]
        assert term.subject == (f"agent/{held[-1]}" if held else None)
        if held and held[-1] > 1:
            assert term.verdict == "PASS"
            assert term.reasons


def test_diff_and_path(chain: Context, raw: Raw):
    found = diff(chain.ledger, chain.workspace, "agent/2", "agent/4")
    told = {change.what: (change.first, change.second) for change in found.changes}
    assert told["dataset"] == ("main/v1", "main/v3")
    assert told["weights"] == (raw.agents["agent/2"]["digest"], raw.agents["agent/4"]["digest"])
    assert told["seed"] == (0, 2)
    assert told["started from"] == ("agent/1", "agent/3")
    assert "code" in found.same
    assert "packages" in found.same
    assert found.data["shared"]["rows"] == raw.datasets["main/v1"]["rows"]
    assert (
        found.data["second only"]["rows"] == raw.datasets["main/v3"]["rows"] - raw.datasets["main/v1"]["rows"]
    )
    way = path(chain.ledger, chain.workspace, "agent/1", "agent/4")
    assert way.root == ("agent", "agent/4")
    assert list(way.nodes)[-1] == ("agent", "agent/1")
    steps = list(way.nodes)
    pairs = {(edge.source, edge.target) for edge in way.edges}
    assert all(step in pairs for step in pairwise(steps))


def test_on_the_command_line(chain: Context, raw: Raw):
    root = chain.workspace.root
    episode = next(iter(raw.rows.values()))["episode_id"].to_pylist()[0]
    told = loads(forebay(root, "lineage", "find", f"episode:{episode}", "--json"))
    assert set(told["agents"]) == agents(descendants(chain.ledger, chain.workspace, f"episode:{episode}"))
    table = forebay(root, "lineage", "descendants", "dataset:main/v2").stdout
    assert f"agent/{GENERATIONS + 1}" in table
    assert "champion" in table
    picture = forebay(root, "lineage", "show", "--as", "picture", "-o", "l.svg")
    assert picture.returncode == 0
    assert f">agent/{GENERATIONS + 1}</text>" in (root / "l.svg").read_text()
    wrong = forebay(root, "lineage", "descendants", "episode:nobody")
    assert (wrong.returncode, "Traceback" in wrong.stderr) == (3, False)


def test_whether_a_run_was_healthy(chain: Context):
    root = chain.workspace.root
    found = json.loads(forebay(root, "stability", "agent/2", "--json", "-o", "stability.html").stdout)
    assert (found["findings"], found["stop_reason"]) == ([], "finished")
    run = chain.agent("2").payload["parents"]["run"]
    assert found["run"] == run
    assert "no signal of a collapse" in (root / "stability.html").read_text()
    newest = forebay(root, "stability").stdout
    assert chain.agent(str(GENERATIONS + 1)).payload["parents"]["run"][:12] in newest
    base = forebay(root, "stability", "agent/1")
    assert (base.returncode, "was not trained here" in base.stderr) == (2, True)
    assert forebay(root, "stability", "agent/99").returncode == 3
    curve = chain.workspace.runs / run[:16] / "metrics.jsonl"
    kept = curve.read_bytes()
    rows = [json.loads(line) for line in kept.splitlines()]
    ill = [{**rows[0], "step": step, "kl_k3": 2.0 if step > 20 else 0.01} for step in range(1, 41)]
    curve.write_text("".join(json.dumps(row) + "\n" for row in ill))
    told = forebay(root, "stability", f"run:{run}").stdout
    curve.write_bytes(kept)
    assert "It began to collapse at update 21, by policy drift" in told


def test_a_lost_list_of_groups_is_named_and_the_indices_can_be_lost(chain: Context, raw: Raw):
    ask = (chain.ledger, chain.workspace)
    group = next(iter(raw.rows.values()))["group_id"].to_pylist()[0]
    before = agents(descendants(*ask, f"group:{group}"))
    for database in (chain.workspace.state / "lineage.db", chain.workspace.state / "replay" / "main.db"):
        database.write_bytes(
            b"SQLite format 3\x00" + b"rubbish" * 1000
        ) if database.name == "lineage.db" else database.unlink()
    assert agents(descendants(*ask, f"group:{group}")) == before
    run = next(run for run, used in raw.used.items() if group in used) if before else next(iter(raw.used))
    kept = next(e for e in chain.ledger.entries("run.finished") if e.subject == run).payload["outputs"][
        "groups"
    ]
    file = chain.workspace.root / kept["path"]
    data = file.read_bytes()
    file.write_bytes(data.replace(b"\n", b"\n0", 1))
    told = forebay(chain.workspace.root, "lineage", "descendants", f"group:{group}")
    file.write_bytes(data)
    assert told.returncode == 6
    assert kept["path"] in told.stderr
