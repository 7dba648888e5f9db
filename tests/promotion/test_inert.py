"""What can run code when it is loaded is refused by name, before anything loads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.core.digest import digest_tree
from tasks.core.errors import Refused
from tasks.promotion.inert import require_inert


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "optimizer.pt",
        "a/head.PKL",
        "modeling_own.py",
        "kernel.so",
        "weights.of_tomorrow",
        "run",
    ],
)
def test_a_file_that_can_run_code_is_refused(tmp_path: Path, name: str):
    (tmp_path / "a").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(Refused, match="may run code when it is loaded"):
        require_inert(tmp_path, digest_tree(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_configuration_that_names_code_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).write_text('{"auto_map": {"AutoModel": "modeling_own.Model"}}')
    with pytest.raises(Refused, match=f"{name} has an `auto_map`"):
        require_inert(tmp_path, digest_tree(tmp_path))


def test_a_real_model_is_inert(tiny: Path):
    require_inert(tiny, digest_tree(tiny))
