"""Work for processes of its own."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import models
from tasks.core.errors import Refused


def seen(name: str) -> dict[str, Any]:
    """Where this process imports from, and what it knows of its parent's environment."""
    return {
        "models": models.__file__,
        "value": os.environ.get(name),
        "safe": os.environ.get("PYTHONSAFEPATH"),
    }


def refuses() -> dict[str, Any]:
    raise Refused("Not today.")


def breaks() -> dict[str, Any]:
    raise ZeroDivisionError("by nothing")


def unsendable() -> dict[str, Any]:
    return {"lock": threading.Lock()}


def dies() -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def exits() -> dict[str, Any]:
    sys.exit(7)


def lingers() -> dict[str, Any]:
    threading.Thread(target=time.sleep, args=(60,)).start()
    return {"done": True}


def sleeps(begun: str) -> dict[str, Any]:
    Path(begun).touch()
    time.sleep(60)
    return {}
