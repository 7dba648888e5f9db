"""The import contracts of pyproject.toml hold: layers, and one adapter for each platform."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


def test_import_contracts():
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([command], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_folders_of_payload_hold_no_code():
    assert not [*(PROJECT / "mlflow").rglob("*.py"), *(PROJECT / "data").rglob("*.py")]
