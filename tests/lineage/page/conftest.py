from __future__ import annotations

import shutil
from copy import deepcopy

import pytest

from tests.lineage.page.world import ToldWorld, told_world


@pytest.fixture(scope="session")
def told(tmp_path_factory) -> ToldWorld:
    """A history to look at."""
    return told_world(tmp_path_factory.mktemp("told"))


@pytest.fixture
def world(told, tmp_path) -> ToldWorld:
    """A copy that a test may spoil."""
    copy = ToldWorld(tmp_path / "workspace")
    shutil.copytree(told.workspace.root, copy.workspace.root)
    for name in ("agents", "manifests", "parents", "shards"):
        setattr(copy, name, deepcopy(getattr(told, name)))
    return copy
