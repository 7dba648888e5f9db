"""A workspace whose servers are really up, for the tests that need them."""

from __future__ import annotations

import json
import os
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil

from flows.environment import prepare_prefect, request
from flows.processes import running_url
from flows.servers import down, up
from tasks.core.settings import Servers
from tasks.core.workspace import Workspace

T = TypeVar("T")

FLOWS = {"retrain": "tests.flows.sample:retrain", "collect": "tests.flows.sample:collect"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def lay(folder: Path) -> Workspace:
    """Lay the part of a workspace that the servers need."""
    workspace = Workspace(folder.resolve())
    workspace.root.mkdir(parents=True)
    prepare_prefect(workspace)
    return workspace


def ports() -> Servers:
    return Servers(prefect_port=free_port(), mlflow_port=free_port())


@contextmanager
def servers(workspace: Workspace, settings: Servers) -> Iterator[list[str]]:
    """Keep the servers up for the block; yield what `up` said."""
    said: list[str] = []
    up(workspace, settings, said.append, flows=FLOWS)
    try:
        yield said
    finally:
        down(workspace)
        assert processes_of(workspace) == []
        down(workspace, said.append)
        assert said[-1] == "Nothing is running."


def ask(workspace: Workspace, path: str, body: Any = None) -> Any:
    """Post to the Prefect API of the workspace."""
    url = f"{running_url(workspace, 'prefect')}/api{path}"
    data = json.dumps(body or {}).encode()
    return json.loads(request(urllib.request.Request(url, data, {"Content-Type": "application/json"}), 30))


def until(look: Callable[[], T], seconds: float = 60) -> T:
    """Return the first true value of `look`."""
    deadline = time.monotonic() + seconds
    while not (value := look()):
        assert time.monotonic() < deadline, f"still {value!r} after {seconds} s"
        time.sleep(0.2)
    return value


def processes_of(workspace: Workspace) -> list[str]:
    """Return the command lines of everything that was started for the workspace and still runs."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = process.environ().get("PREFECT_HOME", "").startswith(str(workspace.root))
            if ours and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found
