from __future__ import annotations

from pathlib import Path

import pytest

from tasks.core.ledger import Ledger
from tasks.core.workspace import Workspace
from tests.replay.support import make_workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path / "ws")


@pytest.fixture
def ledger(workspace: Workspace) -> Ledger:
    return Ledger(workspace.ledger_url)
