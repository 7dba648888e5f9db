from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import make_tiny_model
from tests.training.replay import make_episodes


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", seed=1)


@pytest.fixture(scope="session")
def episodes(tiny):
    return make_episodes(tiny)
