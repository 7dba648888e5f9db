"""Detached processes of a workspace: known again by pid and start time, stopped with all their children.

The state file is a claim, not the truth: what runs is decided by looking at the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from tasks.core.atomic import write_atomic
from tasks.core.digest import canonical_json
from tasks.core.settings import Section
from tasks.core.workspace import Workspace

# A correction of the clock moves start times a little; a pid is never given out again that soon.
_SAME_START_SECONDS = 5.0
_POLL_SECONDS = 0.2
_TAIL_LINES = 15


class Process(Section):
    """A process that outlives the one that started it."""

    name: str
    pid: int
    started: float
    """Seconds since the epoch, as the operating system tells it."""
    url: str | None
    log: Path


def spawn(
    name: str, command: Sequence[str], *, env: Mapping[str, str], log: Path, url: str | None
) -> Process:
    """Start `command` in a session of its own, so that Ctrl-C in this terminal does not reach it.

    The log of the time before is kept beside the new one, as `<log>.1`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        log.replace(log.with_name(f"{log.name}.1"))
    with log.open("wb") as stream:
        child = subprocess.Popen(
            command,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    started = psutil.Process(child.pid).create_time()
    child.returncode = 0  # it is meant to outlive us: keeps Popen from warning when it is collected
    return Process(name=name, pid=child.pid, started=started, url=url, log=log)


def alive(process: Process) -> bool:
    """Tell whether the process runs; another one that got its pid does not count."""
    return _leader(process) is not None


def stop(process: Process, patience: float) -> None:
    """End the process and everything it started: SIGTERM, `patience` seconds, then SIGKILL.

    All get the signal at once: Prefect's runner would else wait for its runs, and they for nobody.
    """
    for send in (psutil.Process.terminate, psutil.Process.kill):
        for member in _session(process):
            with suppress(psutil.NoSuchProcess):
                send(member)
        deadline = time.monotonic() + patience
        while any(_session(process)) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)


def tail(log: Path) -> str:
    """Return the last lines of a log file."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(lines[-_TAIL_LINES:])


def recorded(workspace: Workspace) -> list[Process]:
    """Return the processes that were started for the workspace and not stopped since, running or not."""
    with suppress(FileNotFoundError):
        return [Process.model_validate(value) for value in json.loads(_state_file(workspace).read_text())]
    return []


def record(workspace: Workspace, processes: Iterable[Process]) -> None:
    """Write down which processes belong to the workspace."""
    write_atomic(_state_file(workspace), canonical_json([p.model_dump(mode="json") for p in processes]))


def running_url(workspace: Workspace, name: str) -> str | None:
    """Return the base URL of a server of the workspace if it runs."""
    return next((p.url for p in recorded(workspace) if p.name == name and alive(p)), None)


def ready_mark(workspace: Workspace) -> Path:
    """Return the file into which the runner writes its pid when it serves its deployments."""
    return workspace.servers / "runner.ready"


def wait_while_alive(processes: Sequence[Process]) -> Process:
    """Block until one of the processes has ended; return it."""
    while True:
        for process in processes:
            if not alive(process):
                return process
        time.sleep(_POLL_SECONDS)


def _state_file(workspace: Workspace) -> Path:
    return workspace.servers / "state.json"


def _leader(process: Process) -> psutil.Process | None:
    with suppress(psutil.NoSuchProcess):
        found = psutil.Process(process.pid)
        same = abs(found.create_time() - process.started) < _SAME_START_SECONDS
        if same and found.status() != psutil.STATUS_ZOMBIE:
            return found
    return None


def _session(process: Process) -> Iterator[psutil.Process]:
    """Yield the living members of the session that the process leads, or led until it died."""
    if _leader(process) is None and psutil.pid_exists(process.pid) and not _is_zombie(process.pid):
        return  # the pid has a new owner, and a session of that number would be theirs
    for member in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if os.getsid(member.pid) == process.pid and member.status() != psutil.STATUS_ZOMBIE:
                yield member


def _is_zombie(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    return False
