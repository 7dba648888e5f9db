"""Recovery checkpoints: everything a killed run needs to go on as if nothing had happened.

A checkpoint is a directory `step-<updates>` with weights and optimizer moments as safetensors and the rest
as JSON. It is written aside, flushed to disk and renamed, so it is whole or absent; its state names the
SHA-256 of its files and of itself, so bytes that went bad later are noticed and the one before is used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tasks.core.atomic import whole_directory
from tasks.core.digest import canonical_json, digest_json, sha256_file
from tasks.core.errors import Conflict

KEPT = 2


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was read: updates made, what else the run knows as JSON values, weights and moments by name."""

    step: int
    progress: Mapping[str, Any]
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]


def save(
    root: Path,
    step: int,
    progress: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    inputs: str,
    *,
    good: int | None = None,
) -> None:
    """Write the checkpoint after `step` updates under `root` and drop all but the last two.

    Args:
        progress: JSON values, kept as they are.
        inputs: digest of what the run is made from.
        good: the newest one of fewer updates is kept as well.

    Raises:
        Unavailable: the disk is full; nothing is left behind.
    """
    target = root / f"step-{step:08d}"
    with whole_directory(target) as aside:
        for name, content in {"weights": weights, "moments": moments}.items():
            save_file({k: v.contiguous() for k, v in content.items()}, aside / f"{name}.safetensors")
        state = {"step": step, "progress": progress, "inputs": inputs, "files": _digests(aside)}
        (aside / "state.json").write_bytes(canonical_json({"state": state, "sha256": digest_json(state)}))
    old = _steps(root)[:-KEPT]
    spared = [path for path in old if good is not None and _number(path) < good][-1:]
    for path in old:
        if path not in spared:
            shutil.rmtree(path)


def drop_after(root: Path, step: int) -> None:
    """Remove the checkpoints of more than `step` updates, newest first: a run went back, and goes another way."""
    for path in reversed(_steps(root)):
        if _number(path) > step:
            shutil.rmtree(path)


def load(root: Path, inputs: str, *, before: int | None = None) -> Checkpoint | None:
    """Read the newest intact checkpoint (of fewer than `before` updates); None if there is none.

    Raises:
        Conflict: it belongs to a run of other `inputs`.
    """
    for path in reversed(_steps(root)):
        state = _intact_state(path)
        if state is None or (before is not None and state["step"] >= before):
            continue
        if state["inputs"] != inputs:
            raise Conflict(
                f"{root.parent} holds an unfinished run of other weights, shards, settings or seed; "
                "give this run its own folder."
            )
        weights, moments = (load_file(path / f"{name}.safetensors") for name in ("weights", "moments"))
        return Checkpoint(state["step"], state["progress"], weights, moments)
    return None


def _steps(root: Path) -> list[Path]:
    return sorted(root.glob("step-*"))


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _intact_state(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads((path / "state.json").read_bytes())
        state: dict[str, Any] = document["state"]
        intact = digest_json(state) == document["sha256"] and _digests(path) == state["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return state if intact else None


def _digests(path: Path) -> dict[str, str]:
    """SHA-256 of the tensor files; hashing leaves the interpreter's lock, so they are read side by side."""
    files = sorted(path.glob("*.safetensors"))
    with ThreadPoolExecutor() as pool:
        return dict(zip((file.name for file in files), pool.map(sha256_file, files), strict=True))
