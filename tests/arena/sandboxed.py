"""Whether code can be run in a sandbox on this machine: as root without namespaces it cannot where `nobody` reads no Python."""

from __future__ import annotations

from functools import cache

from tasks.arena.sandbox import run_python
from tasks.core.errors import Unavailable


@cache
def isolation() -> str:
    """Which isolation is in force; empty where no sandbox starts."""
    try:
        return str(run_python("").isolation)
    except Unavailable:
        return ""
