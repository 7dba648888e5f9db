"""Agents are data: a folder with anything in it that runs when it is loaded is not registered and not loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tasks.core.errors import Refused

_RUNS = frozenset(
    [
        ".bin",
        ".ckpt",
        ".dill",
        ".dll",
        ".dylib",
        ".h5",
        ".joblib",
        ".keras",
        ".msgpack",
        ".npy",
        ".npz",
        ".pickle",
        ".pkl",
        ".pt",
        ".pth",
        ".py",
        ".pyc",
        ".pyd",
        ".so",
    ]
)  # formats that are, or may hold, a pickle; code; and libraries


def require_inert(folder: Path, names: Iterable[str]) -> None:
    """Accept weights as safetensors, text and JSON only, and no configuration that names code to import.

    Raises:
        Refused: a file can run code when it is loaded; it is named.
    """
    for name in sorted(names):
        if Path(name).suffix.lower() in _RUNS:
            raise Refused(
                f"{folder / name} can run code when it is loaded; agents are safetensors and JSON only: save the "
                "model with `save_pretrained(safe_serialization=True)` and leave other files out."
            )
        if name.endswith("config.json") and _names_code(folder / name):
            raise Refused(
                f"{folder / name} has an `auto_map`, which makes libraries run code from the folder or a hub; "
                "use a model whose classes are part of transformers."
            )


def _names_code(path: Path) -> bool:
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        return False  # whoever loads it will say what is wrong
    return isinstance(value, dict) and "auto_map" in value
