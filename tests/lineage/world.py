"""A workspace with a history: real files, real manifests, real gate decisions, models of a few bytes."""

from __future__ import annotations

import io
import sqlite3
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.core.digest import canonical_json, digest_files, digest_json, sha256_bytes
from tasks.core.ledger import GENESIS, Ledger, _digest
from tasks.core.workspace import Workspace
from tasks.evaluation.paired import Agent, Baseline, pair_outcomes, write_outcomes
from tasks.promotion.gate import FileRef, Finding, Inputs, decide, write_decision
from tasks.promotion.policy import Policy
from tasks.replay.manifest import Behaviour, Manifest, Shard
from tests.promotion.support import serving_file
from tests.reward.report import make_report

CODE = {"commit": "c" * 40, "dirty": False, "digest": sha256_bytes(b"code"), "lock": sha256_bytes(b"lock")}


@dataclass(frozen=True)
class Answer:
    task_id: str
    env: str
    reward: float
    response_text: str


class World:
    """Writes history as the flows do. `parents` is its own account of what follows from what."""

    shards_a_version = 2

    def __init__(self, root: Path) -> None:
        self.workspace = Workspace(root)
        self.ledger = Ledger(self.workspace.ledger_url)
        self.agents: dict[int, dict[str, Any]] = {}
        self.manifests: dict[str, Manifest] = {}
        self.parents: dict[str, set[str]] = defaultdict(set)
        self.shards = 0

    def append(self, kind: str, subject: str, payload: Mapping[str, Any]) -> int:
        return self.ledger.append(kind, subject, payload).seq

    def put(self, path: Path, data: bytes) -> dict[str, str]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return self.file(path, data)

    def file(self, path: Path, data: bytes) -> dict[str, str]:
        return {"path": path.relative_to(self.workspace.root).as_posix(), "sha256": sha256_bytes(data)}

    def model(self, folder: Path, seed: str) -> dict[str, str]:
        contents = {
            "config.json": b'{"seed": "%s"}' % seed.encode(),
            "model.safetensors": seed.encode() * 100,
        }
        return {name: self.put(folder / name, data)["sha256"] for name, data in contents.items()}

    def shard(self, number: int, sampled: Sequence[Behaviour]) -> bytes:
        """The bytes of a shard with 16 rows in 2 groups; the second policy, where there is one, sampled the second."""
        groups = [f"g{number}-{at}" for at in (0, 1)]
        makers = [sampled[0].digest, sampled[-1].digest] if sampled else ["", ""]
        columns = {
            "episode_id": [f"{group}-{at}" for group in groups for at in range(8)],
            "group_id": [group for group in groups for _ in range(8)],
            "prompt_sha256": [sha256_bytes(group.encode()) for group in groups for _ in range(8)],
            "env": ["calculator"] * 16,
            "source": ["rollout"] * 16,
            "licence": ["Apache-2.0"] * 16,
            "behaviour_digest": [maker for maker in makers for _ in range(8)],
            "reward_digest": ["verifier"] * 16,
        }
        to = io.BytesIO()
        pq.write_table(
            pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()}), to
        )
        return to.getvalue()

    def base(self) -> int:
        return self._register(
            self.workspace.models / "base", self.model(self.workspace.models / "base", "base"), "base"
        )

    def seal(self, behaviours: Sequence[int], name: str = "main", shards: int = 2) -> str:
        """Seal the next version of a dataset sampled from agents; return its subject."""
        parent = self.manifests.get(name)
        sampled = [Behaviour(f"agent/{v}", self.agents[v]["digest"]) for v in behaviours]
        made = []
        for _ in range(shards):
            self.shards += 1
            data = self.shard(self.shards, sampled)
            put = self.put(self.workspace.replay / name / "shards" / f"{self.shards:05d}.parquet", data)
            made.append(Shard(put["path"], put["sha256"], rows=16, groups=2, bytes=len(data)))
        manifest = Manifest.append(name, parent, made, sampled, f"2026-01-01T00:00:{self.shards % 60:02d}")
        path = self.workspace.replay / name / "manifests" / f"v{manifest.version:05d}.json"
        put = self.put(path, manifest.to_bytes())
        self.append(
            "dataset.sealed",
            manifest.subject,
            {
                **manifest.to_dict(),
                "manifest": put["path"],
                "manifest_sha256": put["sha256"],
                "git_commit": "d" * 40,
                "dvc": {"path": f"data/replay/{name}/shards", "md5": "e" * 32, "remote": "remote"},
            },
        )
        self.manifests[name] = manifest
        here = f"dataset {manifest.subject}"
        self.parents[here] |= {f"shard {shard.path}" for shard in made} | {
            f"agent/{b.version[6:]}" for b in sampled
        }
        self.parents[here] |= {f"dataset {parent.subject}"} if parent else set()
        self.parents[here] |= {f"agent/{b.version[6:]}" for b in manifest.behaviour}
        self._validate(manifest)
        return manifest.subject

    def train(self, init: int, name: str = "main", seed: int = 0) -> int:
        """Train the next agent from `init` on the newest version of a dataset; return its version."""
        manifest = self.manifests[name]
        inputs = {
            "dataset": manifest.root,
            "init": {"agent": f"agent/{init}", "digest": self.agents[init]["digest"]},
            "settings": {"objective": "vespo", "steps": 60},
            "seed": seed,
            "dtype": "float32",
            "code": CODE["digest"],
            "lock": CODE["lock"],
        }
        key = digest_json([inputs, len(self.agents)])
        self.append("run.started", key, {"key": key, **inputs, "commit": CODE, "device": "cpu"})
        folder = self.workspace.runs / key[:16] / "export"
        files = self.model(folder, key)
        outputs = {
            "path": folder.relative_to(self.workspace.root).as_posix(),
            "digest": digest_files(files),
            "files": files,
            "steps": 60,
            "stop_reason": "finished",
            "groups": self.learnt(manifest),
            "metrics": {"kl": 0.01},
            "mlflow_run": "m",
        }
        self.append("run.finished", key, {"key": key, "outputs": outputs})
        version = self._register(folder, files, "trained", init=init, dataset=manifest.root, run=key)
        self.parents[f"agent/{version}"].add(f"run {key[:12]}")
        self.parents[f"run {key[:12]}"] |= {f"agent/{init}", f"dataset {manifest.subject}"}
        return version

    def learnt(self, manifest: Manifest) -> list[str]:
        """The groups that a run learns from: all of the version's."""
        return [f"g{int(Path(shard.path).stem)}-{at}" for shard in manifest.shards for at in (0, 1)]

    def judge(self, candidate: int, champion: int, name: str = "main") -> dict[str, Any]:
        """Evaluate and decide; the candidate is right everywhere, the champion nowhere."""
        manifest, evidence = self.manifests[name], self.workspace.evidence
        reward = self._reward(manifest)
        tasks = [f"t{i}" for i in range(40)]
        sides = [
            [Answer(t, "calculator", r, f"{v} says {r}") for t in tasks]
            for v, r in ((candidate, 1.0), (champion, 0.0))
        ]
        agents = [Agent(v, self.agents[v]["digest"]) for v in (candidate, champion)]
        paired = pair_outcomes(*sides, (agents[0], agents[1]), {"calculator": Baseline("4", 0.1)})
        path, sha256 = write_outcomes(evidence, paired)
        row = {"candidate": 1.0, "champion": 0.0, "n": 40}
        outcomes = {"path": self.workspace.relative(path), "sha256": sha256}
        self.append(
            "evaluation.done",
            sha256,
            {
                "candidate": candidate,
                "champion": champion,
                "tasks_digest": digest_json(tasks),
                "outcomes": outcomes,
                "slices": {"all": row, "calculator": row},
            },
        )
        validated = self.ledger.last("dataset.validated", manifest.root)
        assert validated is not None
        inputs = Inputs(
            FileRef(path.relative_to(evidence).as_posix(), sha256),
            FileRef(Path(reward["path"]).relative_to(".forebay/evidence").as_posix(), reward["sha256"]),
            Finding("PASS", manifest.root, validated.payload["evidence"]["sha256"]),
            Finding("PASS", agents[0].digest, sha256_bytes(b"integrity")),
            serving_file(evidence),
        )
        decision = decide(evidence, inputs, Policy())
        payload = decision.payload(self.workspace.relative(write_decision(evidence, decision)))
        self.append("decision.made", f"agent/{candidate}", payload)
        self._judged(candidate, champion, payload["decision"])
        return payload

    def crown(
        self, version: int, over: int | None = None, decision: str | None = None, word: str = "promotion"
    ) -> None:
        payload = {"to": version, "from": over, "decision": decision, "reason": "told so", "by": "ada"}
        seq = self.append(f"{word}.intent", f"agent/{version}", payload)
        self.append(f"{word}.committed", f"agent/{version}", {**payload, "intent_seq": seq})

    def generation(self, champion: int) -> int:
        """One whole cycle; return the new champion."""
        self.seal([champion], shards=self.shards_a_version)
        candidate = self.train(champion)
        decision = self.judge(candidate, champion)
        self.crown(candidate, champion, decision["decision"])
        return candidate

    def ancestors(self, name: str) -> set[str]:
        """By brute force, from this class's own account."""
        found: set[str] = set()
        while True:
            more = {parent for child in (*found, name) for parent in self.parents[child]} - found
            if not more:
                return found
            found |= more

    def _judged(self, candidate: int, champion: int, decision: str) -> None:
        self.parents[f"agent/{candidate}"].add(f"decision {decision}")
        self.parents[f"decision {decision}"].add(f"agent/{champion}")

    def _register(
        self, folder: Path, files: Mapping[str, str], origin: str, init=None, dataset=None, run=None
    ) -> int:
        version = len(self.agents) + 1
        base = None if init is None else self.agents[1]["digest"]
        self.agents[version] = payload = {
            "version": version,
            "digest": digest_files(files),
            "files": dict(files),
            "origin": origin,
            "path": folder.relative_to(self.workspace.root).as_posix(),
            "mlflow": {"model_id": "m-1", "run_id": "r-1", "version": version},
            "parents": {"base": base, "init": init and f"agent/{init}", "dataset": dataset, "run": run},
            "tokenizer_digest": sha256_bytes(b"tokenizer"),
            "template_digest": sha256_bytes(b"template"),
            "source": {"name": "SmolLM2-135M-Instruct", "digest": sha256_bytes(b"source")},
        }
        self.append("agent.registered", f"agent/{version}", payload)
        return version

    def _validate(self, manifest: Manifest) -> None:
        data = canonical_json({"root": manifest.root, "verdict": "PASS"})
        evidence = self.put(self.workspace.evidence / "data" / f"{manifest.root[:12]}.json", data)
        check = {"name": "groups", "ok": True, "failed": 0, "of": manifest.groups, "detail": ""}
        payload = {
            "root": manifest.root,
            "verdict": "PASS",
            "reasons": [],
            "checks": [check],
            "evidence": evidence,
        }
        self.append("dataset.validated", manifest.root, payload)

    def _reward(self, manifest: Manifest) -> dict[str, str]:
        data = canonical_json(make_report([4.0] * 30, dataset=manifest.root))
        evidence = self.put(self.workspace.evidence / "reward" / f"{manifest.root[:12]}.json", data)
        plot = self.put(self.workspace.evidence / "reward" / f"{manifest.root[:12]}.png", b"PNG " + data)
        folder = self.workspace.models / f"reward-{manifest.root[:12]}"
        digest = digest_files(self.model(folder, f"reward of {manifest.root}"))
        payload = {
            "digest": digest,
            "dataset": manifest.root,
            "verdict": "PASS",
            "reasons": ["right on every pair"],
            "evidence": evidence,
            "plot": plot,
            "accuracy": {"estimate": 1.0, "low": 0.9, "high": 1.0, "n": 30},
            "ece": 0.1,
            "path": folder.relative_to(self.workspace.root).as_posix(),
        }
        self.append("reward.validated", digest, payload)
        return evidence


class PaperWorld(World):
    """The same history without files, for long histories: the ledger is written in one go by `publish`."""

    shards_a_version = 1

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.rows: list[tuple[Any, ...]] = []

    def append(self, kind: str, subject: str, payload: Mapping[str, Any]) -> int:
        row = {
            "seq": len(self.rows) + 1,
            "time": "2026-01-01T00:00:00.000000+00:00",
            "kind": kind,
            "subject": subject,
            "payload": canonical_json(dict(payload)).decode(),
            "prev": self.rows[-1][-1] if self.rows else GENESIS,
        }
        self.rows.append((*row.values(), _digest(row)))
        return len(self.rows)

    def put(self, path: Path, data: bytes) -> dict[str, str]:
        return self.file(path, data)

    def judge(self, candidate: int, champion: int, name: str = "main") -> dict[str, Any]:
        manifest = self.manifests[name]
        reward = self._reward(manifest)
        outcomes = self.put(
            self.workspace.evidence / f"{candidate}.jsonl", f"{candidate} {champion}".encode()
        )
        row = {"candidate": 1.0, "champion": 0.0, "n": 40}
        done = {
            "candidate": candidate,
            "champion": champion,
            "tasks_digest": "0",
            "outcomes": outcomes,
            "slices": {"all": row},
        }
        self.append("evaluation.done", outcomes["sha256"], done)
        digest = sha256_bytes(f"{candidate} over {champion}".encode())
        payload = {
            "decision": digest,
            "verdict": "PASS",
            "reasons": ["Quality: better."],
            "record": {"path": f".forebay/evidence/decisions/{digest}.json", "sha256": digest},
            "policy_digest": Policy().digest(),
            "approval": "none",
            "candidate": {"version": candidate, "digest": self.agents[candidate]["digest"]},
            "champion": {"version": champion, "digest": self.agents[champion]["digest"]},
            "evidence": [
                {"name": "quality", "verdict": "PASS", "digest": outcomes["sha256"]},
                {"name": "reward model", "verdict": "PASS", "digest": reward["sha256"]},
            ],
        }
        self.append("decision.made", f"agent/{candidate}", payload)
        self._judged(candidate, champion, digest)
        return payload

    def publish(self) -> Ledger:
        assert self.ledger.entries() == []  # makes the table
        with sqlite3.connect(self.workspace.state / "ledger.db") as database:
            database.executemany("INSERT INTO ledger VALUES (?, ?, ?, ?, ?, ?, ?)", self.rows)
        return self.ledger
