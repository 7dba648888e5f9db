"""How fast questions about a large history are answered, next to MLflow's own search where it can answer.

    python -m benchmarks.lineage [--streams N] [--generations N] [--candidates N] [--episodes N] [--asks N] [--keep DIR] [--save]

The history is made up, of `streams` datasets that are each sealed `generations` times; each version is sampled from the
stream's champion, and `candidates` agents are trained on it from that champion, one of which is judged and promoted. It
is written by the product's own writers: shards by its schema and Parquet settings, `Manifest.append`,
`Ledger.append` (without fsync), `rows.keep_consumed`, `RowIndex.add_present`. Left out are DVC, git and weights, which no
question reads. Every run learns from a random half of its version's newest groups and a few older ones.

Each question is asked `asks` times about random things in a process of its own, each time from the opening of the index
on, as the command line does. Memory is the largest resident size of that process. MLflow's store gets the same versions
with the dataset's root as a tag, written into its own tables, and is asked which versions carry a root: the one of
these questions that its search can be asked.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import sqlalchemy as sa
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tasks.core.digest import digest_files, digest_json, sha256_bytes, sha256_file
from tasks.core.ledger import Ledger
from tasks.core.workspace import Workspace
from tasks.lineage.rows import keep_consumed
from tasks.replay.index import RowIndex
from tasks.replay.manifest import Behaviour, Manifest, Shard
from tasks.replay.schema import arrow_schema
from tasks.replay.shards import _write_parquet, contents

BASELINE = Path(__file__).parent / "baselines" / "lineage.json"
GROUP = 8
LIMIT_S, LIMIT_MIB = 1.0, 1000
QUESTIONS = ("shard descendants", "episode descendants", "agent ancestors", "diff", "at", "find prompt")


# ---------------------------------------------------------------------------------------------- the history


class History:
    """Writes a long history quickly."""

    def __init__(self, root: Path, sizes: argparse.Namespace) -> None:
        self.workspace = Workspace(root)
        self.ledger = Ledger(self.workspace.ledger_url)
        self.sizes = sizes
        self.draw = random.Random(0)
        self.agents: list[dict[str, Any]] = []
        self.versions: list[Manifest] = []

        @sa.event.listens_for(self.ledger._engine, "connect")
        def without_waiting(connection: Any, record: Any) -> None:
            connection.execute("PRAGMA synchronous = OFF")

        self.ledger._engine.dispose()  # so that every connection is made anew, by the listener

    def write(self, report: Callable[[int, int], None]) -> None:
        base = self.register("base", None, None, None)
        self.change(base, None, None)
        champions = [base] * self.sizes.streams
        newest: list[Manifest | None] = [None] * self.sizes.streams
        total = self.sizes.streams * self.sizes.generations
        for generation in range(self.sizes.generations):
            for stream in range(self.sizes.streams):
                manifest, groups = self.seal(f"s{stream:03d}", newest[stream], champions[stream])
                newest[stream] = manifest
                made = [
                    self.train(champions[stream], manifest, groups, n) for n in range(self.sizes.candidates)
                ]
                best = self.draw.choice(made)
                self.change(best, champions[stream], self.judge(best, champions[stream]))
                champions[stream] = best
                report(generation * self.sizes.streams + stream + 1, total)

    def seal(self, name: str, parent: Manifest | None, agent: dict[str, Any]) -> tuple[Manifest, list[str]]:
        version = parent.version + 1 if parent else 1
        folder = self.workspace.replay / name / "shards"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"v{version:05d}-00000.parquet"
        groups = [f"{name}-{version:05d}-{at:05d}" for at in range(self.sizes.episodes // GROUP)]
        _write_parquet(table(groups, agent), path)
        shard = Shard(
            self.workspace.relative(path),
            sha256_file(path),
            len(groups) * GROUP,
            len(groups),
            path.stat().st_size,
        )
        behaviour = Behaviour(f"agent/{agent['version']}", agent["digest"])
        manifest = Manifest.append(name, parent, [shard], [behaviour], datetime.now(UTC).isoformat())
        self.ledger.append(
            "dataset.sealed",
            manifest.subject,
            {
                **manifest.to_dict(),
                "manifest": f"data/replay/{name}/manifests/v{version:05d}.json",
                "manifest_sha256": sha256_bytes(manifest.to_bytes()),
                "git_commit": "d" * 40,
                "dvc": {"path": f"data/replay/{name}/shards", "md5": "e" * 32, "remote": "remote"},
                "contents": contents(self.workspace, [shard]),
            },
        )
        with RowIndex.open(self.workspace, name) as index:
            index.add_present([shard], manifest.root)
        self.versions.append(manifest)
        return manifest, groups

    def train(self, init: dict[str, Any], manifest: Manifest, groups: list[str], seed: int) -> dict[str, Any]:
        inputs = {
            "dataset": manifest.root,
            "init": {"agent": f"agent/{init['version']}", "digest": init["digest"]},
            "settings": {"objective": "vespo", "steps": 60, "learning_rate": 1e-5 * (1 + seed)},
            "seed": seed,
            "dtype": "float32",
            "code": "c" * 64,
            "lock": "f" * 64,
        }
        key = digest_json(inputs)
        commit = {"commit": "c" * 40, "dirty": False}
        self.ledger.append("run.started", key, {"key": key, **inputs, "commit": commit, "device": "cpu"})
        folder = self.workspace.runs / key[:16]
        older = self.draw.randrange(manifest.version)
        used = self.draw.sample(groups, len(groups) // 2)
        used += [f"{manifest.name}-{older + 1:05d}-{at:05d}" for at in range(0, len(groups), 10)]
        folder.mkdir(parents=True, exist_ok=True)
        files = {"config.json": "a" * 64, "model.safetensors": sha256_bytes(key.encode())}
        outputs = {
            "path": self.workspace.relative(folder / "export"),
            "digest": digest_files(files),
            "files": files,
            "steps": 60,
            "stop_reason": "finished",
            "groups": keep_consumed(self.workspace, folder, set(used)),
            "metrics": {"kl": 0.01},
            "mlflow_run": "m",
        }
        self.ledger.append("run.finished", key, {"key": key, "outputs": outputs})
        return self.register(key, init, manifest.root, files)

    def register(
        self, key: str, init: dict[str, Any] | None, dataset: str | None, files: dict[str, str] | None
    ) -> dict[str, Any]:
        version = len(self.agents) + 1
        files = files or {"model.safetensors": sha256_bytes(key.encode())}
        payload = {
            "version": version,
            "digest": digest_files(files),
            "files": files,
            "origin": "trained" if init else "base",
            "path": f".forebay/runs/{key[:16]}/export",
            "mlflow": {"model_id": f"m-{version}", "run_id": f"r-{version}", "version": version},
            "parents": {
                "base": self.agents[0]["digest"] if init else None,
                "init": f"agent/{init['version']}" if init else None,
                "dataset": dataset,
                "run": key if init else None,
            },
            "tokenizer_digest": "1" * 64,
            "template_digest": "2" * 64,
            "source": {"name": f"run {key[:12]}"},
        }
        self.agents.append(payload)
        self.ledger.append("agent.registered", f"agent/{version}", payload)
        return payload

    def judge(self, candidate: dict[str, Any], champion: dict[str, Any]) -> str:
        pair = {"candidate": candidate["version"], "champion": champion["version"]}
        outcomes = digest_json(pair)
        row = {"candidate": 0.6, "champion": 0.5, "n": 270}
        evidence = {"path": f".forebay/evidence/{outcomes}.jsonl", "sha256": outcomes}
        self.ledger.append(
            "evaluation.done",
            outcomes,
            {**pair, "tasks_digest": "3" * 64, "outcomes": evidence, "slices": {"all": row}},
        )
        decision = digest_json({"decision": pair})
        self.ledger.append(
            "decision.made",
            f"agent/{candidate['version']}",
            {
                "decision": decision,
                "verdict": "PASS",
                "reasons": ["Quality: better."],
                "record": {"path": f".forebay/evidence/decisions/{decision}.json", "sha256": decision},
                "policy_digest": "4" * 64,
                "champion": {"version": champion["version"], "digest": champion["digest"]},
                "evidence": [{"name": "quality", "verdict": "PASS", "digest": outcomes}],
            },
        )
        return decision

    def change(self, to: dict[str, Any], over: dict[str, Any] | None, decision: str | None) -> None:
        subject = f"agent/{to['version']}"
        payload = {
            "to": to["version"],
            "from": over and over["version"],
            "decision": decision,
            "reason": "passed",
            "by": "the service",
        }
        intent = self.ledger.append("promotion.intent", subject, payload)
        self.ledger.append("promotion.committed", subject, {**payload, "intent_seq": intent.seq})


def table(groups: list[str], agent: dict[str, Any]) -> pa.Table:
    """Episodes of these groups: short, with every column of the schema."""
    count = len(groups) * GROUP
    fixed = {
        "env": "calculator", "env_version": "1", "split": "train", "logprob_source": "engine",
        "behaviour_version": f"agent/{agent['version']}", "behaviour_digest": agent["digest"],
        "tokenizer_digest": "1" * 64, "template_digest": "2" * 64, "reward_components": "{}", "reward_digest": "5" * 64,
        "finish_reason": "done", "response_text": "42", "source": "own rollouts", "licence": "Apache-2.0",
        "created_at": "2026-01-01T00:00:00", "seed": 0, "max_new_tokens": 4, "temperature": 1.0, "top_p": 1.0,
    }  # fmt: skip
    names = np.repeat(groups, GROUP)
    numbers = np.tile(np.arange(GROUP), len(groups))
    made = {
        "episode_id": [f"{name}-{number}" for name, number in zip(names, numbers, strict=True)],
        "group_id": names,
        "task_id": names,
        "sample_index": numbers,
        "prompt_sha256": np.repeat([sha256_bytes(name.encode()) for name in groups], GROUP),
        "reward": numbers % 2.0,
        "prompt_ids": [[1, 2, 3, 4]] * count,
        "response_ids": [[5, 6]] * count,
        "loss_mask": [[True, True]] * count,
        "turn_ids": [[0, 0]] * count,
        "behaviour_logprobs": [[-0.5, -0.5]] * count,
    }
    schema = arrow_schema()
    columns = [
        pa.array(made[field.name], field.type)
        if field.name in made
        else pa.repeat(pa.scalar(fixed[field.name], field.type), count)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


# --------------------------------------------------------------------------------------------- the questions


def ask(root: Path, question: str, asks: int, sizes: argparse.Namespace) -> dict[str, Any]:
    """Ask one question about random things; return seconds, how much was found, and memory."""
    from tasks.lineage.descent import descendants
    from tasks.lineage.graph import lineage
    from tasks.lineage.questions import at, diff, find

    workspace = Workspace(root)
    ledger = Ledger(workspace.ledger_url)
    draw = random.Random(question)
    agents = sizes.streams * sizes.generations * sizes.candidates + 1

    def stream() -> str:
        return f"s{draw.randrange(sizes.streams):03d}"

    def group() -> str:
        return f"{stream()}-{draw.randrange(sizes.generations) + 1:05d}-{draw.randrange(sizes.episodes // GROUP):05d}"

    first, last = (ledger.at([seq])[seq].time for seq in (1, ledger.last().seq))  # type: ignore[union-attr]

    def moment() -> str:
        ends = [datetime.fromisoformat(time).timestamp() for time in (first, last)]
        return datetime.fromtimestamp(draw.uniform(*ends), UTC).isoformat()

    def agent() -> str:
        return f"agent/{draw.randrange(agents) + 1}"

    answers: dict[str, Callable[[], int]] = {
        "shard descendants": lambda: len(
            descendants(
                ledger,
                workspace,
                f"shard:data/replay/{stream()}/shards/v{draw.randrange(sizes.generations) + 1:05d}-00000.parquet",
            ).nodes
        ),
        "episode descendants": lambda: len(
            descendants(ledger, workspace, f"episode:{group()}-{draw.randrange(GROUP)}").nodes
        ),
        "agent ancestors": lambda: len(lineage(ledger, workspace, agent()).nodes),
        "diff": lambda: len(diff(ledger, workspace, agent(), agent()).changes),
        "at": lambda: at(ledger, workspace, moment()).entry,
        "find prompt": lambda: len(
            find(ledger, workspace, f"prompt:{sha256_bytes(group().encode())}").agents
        ),
    }
    answers[question]()  # imports, and the first look at the files
    seconds, found = [], []
    for _ in range(asks):
        start = time.perf_counter()
        found.append(answers[question]())
        seconds.append(time.perf_counter() - start)
    return {
        "median_s": float(np.median(seconds)),
        "p95_s": float(np.quantile(seconds, 0.95)),
        "most_s": max(seconds),
        "found_median": float(np.median(found)),
        "found_most": max(found),
        "memory_mib": most_resident_mib(),
    }


def most_resident_mib() -> float:
    """Return the most memory that this process had; `ru_maxrss` would count what started it, too."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def ask_mlflow(root: Path, asks: int) -> dict[str, Any]:
    """Ask MLflow which versions were trained on a dataset's root."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    roots = json.loads((root / "roots.json").read_text())
    draw = random.Random(0)
    seconds, found = [], []
    for _ in range(asks):
        start = time.perf_counter()
        found.append(
            len(client.search_model_versions(f"tags.dataset = '{draw.choice(roots)}'", max_results=1000))
        )
        seconds.append(time.perf_counter() - start)
    return {
        "median_s": float(np.median(seconds)),
        "p95_s": float(np.quantile(seconds, 0.95)),
        "most_s": max(seconds),
        "found_median": float(np.median(found)),
        "found_most": max(found),
        "memory_mib": most_resident_mib(),
    }


def fill_mlflow(root: Path, history: History) -> None:
    """Put the same versions into MLflow's store, by its own tables."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    client.create_registered_model("agent")
    engine = sa.create_engine(f"sqlite:///{root / 'mlflow.db'}")
    meta = sa.MetaData()
    meta.reflect(engine, only=["model_versions", "model_version_tags"])
    versions, tags = meta.tables["model_versions"], meta.tables["model_version_tags"]
    now = int(time.time() * 1000)
    with engine.begin() as connection:
        for start in range(0, len(history.agents), 5000):
            part = history.agents[start : start + 5000]
            connection.execute(
                versions.insert(),
                [
                    {
                        "name": "agent",
                        "version": a["version"],
                        "creation_time": now,
                        "last_updated_time": now,
                        "current_stage": "None",
                        "source": a["path"],
                        "status": "READY",
                    }
                    for a in part
                ],
            )
            connection.execute(
                tags.insert(),
                [
                    {"name": "agent", "version": a["version"], "key": key, "value": value or ""}
                    for a in part
                    for key, value in (("dataset", a["parents"]["dataset"]), ("digest", a["digest"]))
                ],
            )
    (root / "roots.json").write_text(json.dumps([manifest.root for manifest in history.versions]))


# ------------------------------------------------------------------------------------------------------ main


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--generations", type=int, default=100)
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--episodes", type=int, default=1000, help="of one dataset version")
    parser.add_argument("--asks", type=int, default=100)
    parser.add_argument("--keep", type=Path, help="a folder for the history, used again if it is there")
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help=f"write {BASELINE.name}")
    sizes = parser.parse_args()
    if sizes.ask:
        asked = (
            ask_mlflow(sizes.keep, sizes.asks)
            if sizes.ask == "mlflow"
            else ask(sizes.keep, sizes.ask, sizes.asks, sizes)
        )
        sys.stdout.write(json.dumps(asked) + "\n")
        return
    from models.machine import describe  # imports torch, which no question needs

    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        root = (sizes.keep or Path(scratch)).resolve()
        told: dict[str, Any] = {
            "machine": describe(),
            **{n: getattr(sizes, n) for n in ("streams", "generations")},
        }
        made = root / "made.json"
        if not made.exists():
            made.parent.mkdir(parents=True, exist_ok=True)
            made.write_text(json.dumps(_make(root, sizes)))
        told |= json.loads(made.read_text())
        answers = {}
        for question in (*QUESTIONS, "mlflow"):
            words = [sys.executable, "-m", "benchmarks.lineage", "--ask", question, "--keep", str(root)]
            for name in ("streams", "generations", "candidates", "episodes", "asks"):
                words += [f"--{name}", str(getattr(sizes, name))]
            answers[question] = json.loads(
                subprocess.run(words, check=True, capture_output=True, text=True).stdout
            )
    told["questions"] = answers
    view = Table("question", "median s", "p95 s", "most s", "found (median, most)", "memory MiB", box=None)
    for name, row in answers.items():
        view.add_row(
            name,
            f"{row['median_s']:.3f}",
            f"{row['p95_s']:.3f}",
            f"{row['most_s']:.3f}",
            f"{row['found_median']:.0f}, {row['found_most']}",
            f"{row['memory_mib']:.0f}",
        )
    console.print({key: value for key, value in told.items() if key != "questions"})
    console.print(view)
    late = [
        n
        for n, row in answers.items()
        if n != "mlflow" and (row["p95_s"] >= LIMIT_S or row["memory_mib"] >= LIMIT_MIB)
    ]
    console.print(f"Over {LIMIT_S:.0f} s or {LIMIT_MIB} MiB: {', '.join(late) or 'none'}.")
    if sizes.save:
        BASELINE.write_text(json.dumps(told, indent=1) + "\n")


def _make(root: Path, sizes: argparse.Namespace) -> dict[str, Any]:
    from tasks.lineage.graph import open_index

    start = time.perf_counter()
    history = History(root, sizes)
    with Progress() as bar:
        task = bar.add_task("history")
        history.write(lambda done, total: bar.update(task, completed=done, total=total))
    written = time.perf_counter() - start
    start = time.perf_counter()
    open_index(history.ledger, history.workspace)
    indexed = time.perf_counter() - start
    start = time.perf_counter()
    entries = history.ledger.verify_chain()
    chained = time.perf_counter() - start
    fill_mlflow(root, history)
    state = history.workspace.state
    return {
        "agents": len(history.agents),
        "versions": len(history.versions),
        "episodes": sizes.episodes * len(history.versions),
        "entries": entries,
        "written_s": written,
        "index_s": indexed,
        "chain_s": chained,
        "ledger_mb": (state / "ledger.db").stat().st_size / 1e6,
        "index_mb": (state / "lineage.db").stat().st_size / 1e6,
        "row_index_mb": sum(path.stat().st_size for path in (state / "replay").glob("*.db")) / 1e6,
    }


if __name__ == "__main__":
    main()
