"""Agents are data: a folder with anything in it that runs when it is loaded is not registered and not loaded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tasks.core.errors import Refused

_DATA = frozenset({".json", ".safetensors", ".jinja", ".txt", ".model"})
"""Weights, configuration, chat templates, word lists and SentencePiece models: formats that only ever hold data."""


def require_inert(folder: Path, names: Iterable[str]) -> None:
    """Accept weights as safetensors, text and JSON only, and no configuration that names code to import.

    Raises:
        Refused: a file is, or may be, something else; it is named.
    """
    for name in sorted(names):
        if Path(name).suffix.lower() not in _DATA:
            raise Refused(
                f"{folder / name} may run code when it is loaded; agents are safetensors, JSON and text only: save "
                "the model with `save_pretrained(safe_serialization=True)` and leave other files out."
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
