"""A signed history whose shards are real tables of episodes, and what the exports are made of."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from copy import deepcopy

import pytest

from tasks.core.keys import write_trust
from tasks.lineage.standards.material import Material, gather
from tasks.replay.manifest import Behaviour
from tests.lineage.tables import shard_bytes
from tests.lineage.test_signatures import SignedWorld
from tests.promotion.support import TRUST


class Tables(SignedWorld):
    """Each shard holds a group of the calculator and an imported one of another source and licence."""

    def shard(self, number: int, sampled: Sequence[Behaviour]) -> bytes:
        return shard_bytes(f"g{number}", sampled)


@pytest.fixture(scope="session")
def history(tmp_path_factory) -> Tables:
    """agent/1 (base) -> agent/2 -> agent/3, the champion; main/v1 and main/v2. Not to be changed."""
    world = Tables(tmp_path_factory.mktemp("history") / "workspace")
    write_trust(world.workspace.trust, TRUST)
    for key in TRUST.keys:
        world.ledger.append("key.trusted", f"key/{key.name}", {"name": key.name, "id": key.id})
    world.crown(world.base())
    world.generation(1)
    world.generation(2)
    return world


@pytest.fixture
def world(history, tmp_path) -> Tables:
    """A copy of the history that a test may spoil."""
    copy = Tables(tmp_path / "workspace")
    shutil.copytree(history.workspace.root, copy.workspace.root)
    for name in ("agents", "manifests", "parents", "shards"):
        setattr(copy, name, deepcopy(getattr(history, name)))
    return copy


@pytest.fixture(scope="session")
def material(history) -> Material:
    return gather(history.ledger, history.workspace, "agent@champion")
