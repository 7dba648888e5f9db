"""One migrated MLflow store for all tests of this folder: migrating takes seconds, copying does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tasks.promotion.registry import Registry
from tests.tiny import make_tiny_model


@pytest.fixture(scope="session")
def migrated(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("store")
    open_registry(root).prepare()
    return root / "mlflow.db"


@pytest.fixture
def registry(migrated, tmp_path) -> Registry:
    shutil.copy(migrated, tmp_path / "mlflow.db")
    return open_registry(tmp_path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def open_registry(root: Path) -> Registry:
    return Registry(f"sqlite:///{root / 'mlflow.db'}", root / "artifacts", root / "locks")
