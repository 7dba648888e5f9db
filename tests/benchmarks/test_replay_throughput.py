"""The benchmark of replay: the made-up rows are admitted, and every contestant reads the same episodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import replay_throughput
from benchmarks.replay_throughput import CONTESTANTS, GROUP, GROUPS_PER_STEP, PEERS

STEPS = 3


def test_every_contestant_reads_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="the peer of this comparison is not installed")

    def read_some(_: float, read: Callable[[int], tuple[int, int]]) -> dict[str, Any]:
        return {"read": [read(step) for step in range(STEPS)]}

    monkeypatch.setattr(replay_throughput, "read_for", read_some)
    replay_throughput.generate(tmp_path, 2 * STEPS * GROUPS_PER_STEP * GROUP, lambda *_: None)
    CONTESTANTS["decode"](tmp_path, 0.0)
    ours = CONTESTANTS["forebay"](tmp_path, 0.0)["read"]
    assert [episodes for episodes, _ in ours] == [GROUPS_PER_STEP * GROUP] * STEPS
    for how in PEERS:
        assert CONTESTANTS[f"datasets-{how}"](tmp_path, 0.0)["read"] == ours
