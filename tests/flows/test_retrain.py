"""`forebay retrain` as a user runs it: through Prefect, killed in every stage, by DVC, and by an event on real servers."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from flows.context import Context
from flows.servers import active_runs
from tasks.core.stages import STAGES
from tests.flows import warm
from tests.flows.conftest import environment, forebay, fresh_forebay, lay_workspace, loads

KILLS = 10


def assert_consistent(context: Context) -> None:
    """Nothing twice, nothing lost, ledger and registry agree."""
    ledger = context.ledger
    ledger.verify_chain()
    finished = [entry.subject for entry in ledger.entries("run.finished")]
    assert len(finished) == len(set(finished)) == 1
    assert [e.payload["version"] for e in ledger.entries("agent.registered")] == [1, 2]
    assert [e.subject for e in ledger.entries("dataset.sealed")] == ["main/v1"]
    assert ledger.entries("dataset.sealed")[0].payload["rows"] == 24 * 8
    assert len({e.payload["decision"] for e in ledger.entries("decision.made")}) == 1
    assert len(ledger.entries("promotion.committed")) == 2  # the first champion and the candidate
    assert context.registry.aliases() == {"champion": 2, "previous": 1}


@pytest.mark.server
def test_retrain_through_prefect_then_nothing_to_do(context: Context):
    root = context.workspace.root
    first = loads(fresh_forebay(root, "retrain", "--json"))
    assert first["outcome"] == "promoted"
    assert_consistent(context)
    flow_run = context.ledger.last("run.started").payload["prefect"]
    shown = loads(forebay(root, "lineage", "show", f"prefect:{flow_run}", "--json"))
    assert shown["root"] == f"run:{first['run']}"
    started = time.monotonic()
    again = loads(fresh_forebay(root, "retrain", "--json"))
    seconds = time.monotonic() - started
    assert again["found"] is True
    assert again["run"] == first["run"]
    assert seconds < 15  # a loaded machine; benchmarks/cycle_overhead.py measures it


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.timeout(900)
def test_ten_kills_one_in_every_stage(tmp_path: Path, tiny_base: Path):
    """What one start kept the next does not do again, and the agent has the same bytes as without any kill."""
    whole = lay_workspace(tmp_path / "whole", tiny_base)
    loads(forebay(whole.workspace.root, "retrain", "--json"))
    expected = whole.agent("2").payload["digest"]
    chance = random.Random(20261123)
    kills = rounds = 0
    while kills < KILLS:
        context = lay_workspace(tmp_path / f"ws-{rounds}", tiny_base)
        rounds += 1
        while kills < KILLS and _killed(context.workspace.root, kills, chance):
            kills += 1
        assert loads(forebay(context.workspace.root, "retrain", "--json"))["outcome"] == "promoted"
        assert_consistent(context)
        assert context.agent("2").payload["digest"] == expected
        assert loads(forebay(context.workspace.root, "verify", "agent@champion", "--json"))["ok"]


def _killed(root: Path, stage: int, chance: random.Random) -> bool:
    """Start `forebay retrain` and kill it, children included, at a random moment after the stage began (0: before any).

    Returns:
        False if it was done before.
    """
    told = root.parent / "told.txt"
    # Promotion is over in a tenth of a second.
    delay = chance.uniform(0, 0.5 if stage < len(STAGES) else 0.05)
    with told.open("wb") as out:
        command = warm.Command(
            ["retrain", "-w", str(root)], root, environment(), out, out, warm.warm_address()
        )
        while stage and f"{stage}/{len(STAGES)} {STAGES[stage - 1]}" not in told.read_text():
            with suppress(TimeoutError):
                command.wait(0.02)
                return False
        with suppress(TimeoutError):
            command.wait(delay)
            return False
        return command.kill() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dvc_repro_runs_the_same_chain(context: Context, tmp_path: Path):
    root = context.workspace.root
    script = tmp_path / "bin" / "forebay"
    script.parent.mkdir()
    warmed = f"{sys.executable} -m tests.flows.warm ask {warm.warm_address()}"
    script.write_text(f'#!/bin/sh\nexec {warmed} "$@"\n')
    script.chmod(0o755)
    env = environment() | {"PATH": f"{script.parent}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}

    def repro() -> str:
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "repro"],
            cwd=root,
            env=env,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = repro()
    for stage in STAGES:
        assert f"Running stage '{stage}'" in first
    assert context.ledger.last("cycle.finished").payload["outcome"] == "promoted"
    assert_consistent(context)
    assert "Running stage" not in repro()
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["training"]["steps"] = 9
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    changed = repro()
    assert "Running stage 'train'" in changed
    assert "Running stage 'collect'" not in changed
    assert len(context.ledger.entries("run.finished")) == 2


@pytest.mark.slow
@pytest.mark.server
def test_a_sealed_dataset_leads_to_a_finished_retrain_with_nobody_at_the_keyboard(context: Context):
    root = context.workspace.root
    ports = [_free_port(), _free_port()]
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["servers"] = {"prefect_port": ports[0], "mlflow_port": ports[1]}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    try:
        up = forebay(root, "up")
        assert up.returncode == 0, up.stderr
        scheduled = forebay(root, "schedule", "retrain", "--on", "dataset.sealed")
        assert scheduled.returncode == 0, scheduled.stderr
        assert forebay(root, "collect").returncode == 0
        sealed = loads(forebay(root, "seal", "--json"))
        deadline = time.monotonic() + 150
        seen: set[str] = set()
        while (ended := context.ledger.last("cycle.finished")) is None:
            seen |= {run["created_by"] for run in active_runs(context.workspace)}
            assert time.monotonic() < deadline, (context.workspace.servers / "runner.log").read_text()[-3000:]
            time.sleep(1)
        assert ended.payload["outcome"] == "promoted"
        assert ended.payload["dataset"] == sealed["root"]
        assert seen == {"automation"}
        status = loads(forebay(root, "status", "--json"))
        assert status["champion"]["agent"] == "agent/2"
        assert {name: row["state"] for name, row in status["servers"].items()} == dict.fromkeys(
            ("prefect", "mlflow", "runner"), "running"
        )
    finally:
        down = forebay(root, "down")
    assert down.returncode == 0, down.stderr


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_json_errors_are_json(tmp_path: Path):
    done = fresh_forebay(tmp_path, "status", "--json")
    assert json.loads(done.stdout)["exit_code"] == done.returncode == 3
