from __future__ import annotations

import shutil
from copy import deepcopy

import pytest

from tests.lineage.world import World


@pytest.fixture(scope="session")
def _history(tmp_path_factory) -> World:
    """Three generations, agent/1 (base) -> agent/2 -> agent/3 (champion), and agent/4 not yet judged."""
    world = World(tmp_path_factory.mktemp("history"))
    world.crown(world.base())
    world.generation(1)
    world.generation(2)
    world.seal([3])
    world.train(3)
    return world


@pytest.fixture
def world(_history, tmp_path) -> World:
    """A copy of the history that a test may spoil."""
    copy = World(tmp_path / "workspace")
    shutil.copytree(_history.workspace.root, copy.workspace.root)
    for name in ("agents", "manifests", "parents", "shards"):
        setattr(copy, name, deepcopy(getattr(_history, name)))
    return copy
