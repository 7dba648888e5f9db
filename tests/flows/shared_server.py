"""One Prefect server for all commands of a test process; starting one takes a command seconds."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil

from flows.environment import LOOPBACK, environment, get, prepare_prefect
from flows.processes import Process, record, recorded
from tasks.core.workspace import Workspace


@contextmanager
def prefect_up(folder: Path) -> Iterator[None]:
    """Let commands in the workspace at `folder` find a Prefect server up, as after `forebay up`, for this block."""
    workspace = Workspace(folder)
    if not workspace.state.exists() or recorded(workspace):
        yield
        return
    record(workspace, [_server()])
    try:
        yield
    finally:
        record(workspace, [])


@cache
def _server() -> Process:
    """Start the server; it ends when this process does, which holds its standard input."""
    workspace = Workspace(Path(tempfile.mkdtemp(prefix="prefect-")))
    workspace.locks.mkdir(parents=True)
    prepare_prefect(workspace)
    log = workspace.servers / "prefect.log"
    with socket.socket() as listener, log.open("wb") as stream:
        listener.bind((LOOPBACK, 0))
        listener.listen(128)
        url = f"http://{LOOPBACK}:{listener.getsockname()[1]}"
        server = subprocess.Popen(
            [sys.executable, "-m", "flows.private_server", str(listener.fileno())],
            env={**environment(workspace, f"{url}/api"), "PREFECT_UI_ENABLED": "false"},
            pass_fds=(listener.fileno(),),
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    get(f"{url}/api/health", 120)
    _kept.append(server)
    return Process(
        name="prefect", pid=server.pid, started=psutil.Process(server.pid).create_time(), url=url, log=log
    )


_kept: list[subprocess.Popen[bytes]] = []
