"""A workspace with a policy small enough to post-train in seconds, through the same code as the real one.

The tiny model is taught to answer greatest-common-divisor questions with "9" mostly and other digits sometimes. So its
greedy score is near zero, its samples carry a signal, and off-policy training finds the better answers quickly.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext
from functools import cache
from pathlib import Path

import pytest
import yaml

from flows.champions import register_agent
from flows.context import Context
from flows.cycle import Cycle, open_cycle, run_stage
from flows.init import init_workspace
from flows.run import run_stages
from flows.settings import Settings
from tasks.arena.environment import get
from tasks.core.digest import digest_tree
from tasks.core.stages import STAGES
from tests.flows import warm
from tests.flows.shared_server import prefect_up
from tests.tiny import make_tiny_model, teach

ENVIRONMENT = "reasoning_gym/gcd"
PROJECT = Path(__file__).resolve().parents[2]
PARAMS = """
base_model: {base}
compute: {{device: cpu, threads: 1}}
collect: {{environments: {{{env}: 24}}, group_size: 8}}
training: {{steps: 16, groups_per_step: 8, learning_rate: 0.001, checkpoint_every: 2, guards: {{max_kl: 9, min_ess: 0}}}}
evaluation: {{tasks: {{{env}: 60}}}}
validation: {{min_groups: 4}}
"""
# The reward model of a tiny policy has nothing to go by, so its verdict is reported and not required here.
# Serving it takes two fresh processes; one test does that.
_NOT_READ_BY_INIT = {"arena", "collect", "training", "evaluation", "validation", "deep_thinking"}
_MLFLOW_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
POLICY = "version: 1\nreward_model: {required: false}\nserving: {required: false}\n"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    answers = "9929919319"
    tasks = get(ENVIRONMENT).tasks("train", 100, 99)
    lines = [f"{task.prompt} {answers[i % 10]}\n" for i, task in enumerate(tasks)]
    return teach(path, lines, steps=80, learning_rate=4e-3)


def lay_workspace(folder: Path, base: Path, **changes: object) -> Context:
    """Lay a workspace on the tiny model `base`, with these sections of its settings changed."""
    params = yaml.safe_load(PARAMS.format(base=base, env=ENVIRONMENT))
    settings = Settings.model_validate({**params, **changes})
    text = yaml.safe_dump(settings.model_dump(mode="json"))
    if changes.keys() <= _NOT_READ_BY_INIT:
        copy_workspace(_laid(base), folder)
        (folder / "params.yaml").write_text(text)
        return Context.open(folder)
    folder.mkdir(parents=True)
    (folder / "params.yaml").write_text(text)
    (folder / "policy.yaml").write_text(POLICY)
    return init_workspace(folder)


@cache
def _laid(base: Path) -> Path:
    """A workspace as `forebay init` leaves it, to copy: migrating databases takes seconds, copying does not."""
    folder = base.parent / f"{base.name}-laid" / "ws"
    folder.mkdir(parents=True)
    (folder / "params.yaml").write_text(PARAMS.format(base=base, env=ENVIRONMENT))
    (folder / "policy.yaml").write_text(POLICY)
    init_workspace(folder)
    return folder


def copy_workspace(source: Path, target: Path) -> Context:
    """Copy a workspace, with the places where MLflow says its files are."""
    shutil.copytree(source, target, symlinks=True)
    with closing(sqlite3.connect(target / ".forebay" / "mlflow.db")) as store, store:
        for table, column in _MLFLOW_PLACES:
            store.execute(
                f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (f"{source}/", f"{target}/")
            )
    return Context.open(target)


@pytest.fixture
def context(tmp_path: Path, tiny_base: Path) -> Context:
    return lay_workspace(tmp_path / "ws", tiny_base)


@pytest.fixture(scope="session")
def cycled(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Context:
    """A workspace in which one cycle has run to promotion; for looking at, who changes a file puts it back."""
    context = lay_workspace(tmp_path_factory.mktemp("cycled") / "ws", tiny_base)
    cycle = open_cycle(context)
    assert isinstance(cycle, Cycle)
    ended = run_stages(context, cycle)
    assert ended["outcome"] == "promoted", ended
    return context


@pytest.fixture(scope="session")
def decided(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A workspace in which a candidate passed the gate and waits for its promotion; copy it."""
    context = lay_workspace(tmp_path_factory.mktemp("decided") / "ws", tiny_base)
    cycle = open_cycle(context)
    assert isinstance(cycle, Cycle)
    for stage in STAGES[:-1]:
        run_stage(context, cycle, stage)
    assert cycle.receipt("decide")["verdict"] == "PASS"
    return context.workspace.root


def register_rival(context: Context) -> dict:
    """Register a copy of the base model with one file changed as agent/3; return {version, digest}."""
    base = context.agent("1").payload
    folder = context.workspace.models / "rival"
    shutil.copytree(context.workspace.root / base["path"], folder)
    (folder / "NOTICE.txt").write_text("a rival")
    version = register_agent(
        context,
        folder,
        digest_tree(folder),
        origin="trained",
        parents=base["parents"],
        source={"name": "rival"},
        metrics={},
        tokenizer=base["tokenizer_digest"],
        template=base["template_digest"],
    )
    return {"version": version, "digest": context.agent(str(version)).payload["digest"]}


def forebay(folder: Path, *words: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own that has imported the libraries already: see `tests.flows.warm`."""
    flow = words[0] == "retrain" or words[:2] in {("arena", "run"), ("evaluate", "attempts")}
    with prefect_up(folder) if flow else nullcontext():
        return warm.run([*words, *_where(words, folder)], folder, environment(), timeout)


def fresh_forebay(folder: Path, *words: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run the command line in a new process, as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *words, *_where(words, folder)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=folder,
        env=environment(),
    )


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(PROJECT),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "160",
        "HF_HUB_OFFLINE": "1",
    }


def loads(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _where(words: Sequence[str], folder: Path) -> list[str]:
    return (
        []
        if "--workspace" in words or words[0] == "init" or "--help" in words
        else ["--workspace", str(folder)]
    )
