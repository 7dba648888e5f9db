from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.resume import PLACES


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_like_an_undisturbed_one(tmp_path):
    """In a process of its own: forks of one that has run parallel arithmetic can hang."""
    subprocess.run(
        [sys.executable, "-m", "benchmarks.resume", "--runs", "12", "--json", str(tmp_path / "figures.json")],
        check=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["runs"] == 12
    assert [case["outcomes"] for case in figures["cases"].values()] == [1] * 4
    assert tuple(figures["kills_by_place"]) == PLACES
    assert sum(figures["kills_by_place"].values()) == figures["kills"] >= 12
