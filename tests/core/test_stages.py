"""What counts as the code that computes results."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.core import stages


def test_another_look_of_a_page_is_the_same_code_and_another_station_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("flows/judging", "tasks/promotion/gate", "tasks/pages/figures", "models/packing"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.py").write_text("x = 1")
    monkeypatch.setattr(stages, "_PROJECT", tmp_path)
    monkeypatch.setattr(stages, "_JOINS", ("judging",))
    digest = stages.code_digest.__wrapped__
    before = digest()
    (tmp_path / "tasks/pages/figures.py").write_text("x = 2")
    assert digest() == before
    for name in ("flows/judging", "tasks/promotion/gate", "models/packing"):
        (tmp_path / f"{name}.py").write_text("x = 2")
        assert digest() != before
        (tmp_path / f"{name}.py").write_text("x = 1")
    assert digest() == before
