"""A cycle on an environment of one's own, named by module:factory, and on one with a memory, through the command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tasks.evaluation.paired import read_outcomes
from tests.flows.conftest import ENVIRONMENT, environment, lay_workspace
from tests.flows.shared_server import prefect_up

PAGE = Path(__file__).parents[2] / "docs" / "environments.md"
NAME = "my_tasks:doubles"
REMEMBERED = "memory_1/feedback/letter"


@pytest.mark.slow
def test_a_cycle_collects_from_them_and_judges_on_them(tmp_path: Path, tiny_base: Path) -> None:
    root = lay_workspace(tmp_path / "ws", tiny_base).workspace.root
    (code,) = re.findall(r"```python\n(# my_tasks\.py\n.*?)```", PAGE.read_text(), re.DOTALL)
    (root / "my_tasks.py").write_text(code)
    settings = {
        "collect.environments": {NAME: 4, ENVIRONMENT: 24, REMEMBERED: 4},
        "evaluation.tasks": {NAME: 10, ENVIRONMENT: 30, REMEMBERED: 10},
        "training.steps": 4,
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    path = os.pathsep.join([str(root), environment()["PYTHONPATH"]])
    with prefect_up(root):
        told = subprocess.run(
            [sys.executable, "-m", "flows.cli", "retrain", "--json", *words],
            cwd=root, env={**environment(), "PYTHONPATH": path}, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
    assert told.returncode in (0, 5), told.stderr
    (file,) = (root / ".forebay" / "evidence" / "outcomes").glob("*.jsonl")
    outcomes = read_outcomes(file, file.stem)
    assert sum(pair.env == NAME for pair in outcomes.pairs) == 10
    assert sum(pair.env == REMEMBERED for pair in outcomes.pairs) == 10
    rows = [row for path in root.glob("data/**/*.parquet") for row in pq.read_table(path).to_pylist()]
    kept = [row for row in rows if row["env"] == REMEMBERED]
    assert len(kept) == 4 * 8
    assert {json.loads(row["reward_components"])["memory_turns"] for row in kept} == {1}
    assert max(row["turn_ids"][-1] for row in kept) == 3
