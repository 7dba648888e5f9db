"""`forebay up` and `forebay down`: the Prefect server, the MLflow server and the runner, on loopback.

They are detached processes with their logs and one state file in `.forebay/servers`.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from flows.deployments import FLOWS, schedules
from flows.environment import LOOPBACK, environment, get, request
from flows.processes import (
    Process,
    alive,
    ready_mark,
    record,
    recorded,
    running_url,
    spawn,
    stop,
    tail,
    wait_while_alive,
)
from tasks.core.errors import Unavailable
from tasks.core.locks import file_lock
from tasks.core.settings import Servers
from tasks.core.workspace import Workspace

Say = Callable[[str], None]

NAMES = ("prefect", "mlflow", "runner")
"""Start order; they stop in reverse, so that a run which is cut off can still report it."""

_TITLES = {"prefect": "Prefect server", "mlflow": "MLflow server", "runner": "runner"}
_HEALTH = {"prefect": "/api/health", "mlflow": "/health"}
_STARTUP_SECONDS = 180.0
_STOP_SECONDS = {"prefect": 10.0, "mlflow": 10.0, "runner": 20.0}
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class _Plan:
    """What to start: a command, and the port it will listen on with the setting that names it."""

    name: str
    command: Sequence[str]
    port: int | None
    setting: str | None


def up(
    workspace: Workspace,
    settings: Servers,
    say: Say = lambda text: None,
    *,
    mlflow_uri: str | None = None,
    flows: Mapping[str, str] = FLOWS,
    foreground: bool = False,
) -> None:
    """Start what does not run yet and return when all of it is healthy.

    Args:
        say: receives one line for each step.
        mlflow_uri: store that the MLflow server shows; that of the workspace by default. An http(s) URL is a
            server already, so none is started.
        flows: what the runner serves, {deployment: "module:function"}.
        foreground: stay, and stop everything on Ctrl-C, SIGTERM or when one of the servers ends.

    Raises:
        UsageError: `schedules.yaml` does not say what it should.
        Unavailable: a port is taken, or a server did not come up; what this call started is stopped again.
    """
    schedules(workspace)  # the runner would find the mistake half a minute later
    with file_lock(workspace.locks / "servers.lock", timeout=5, what=f"the servers of {workspace.root}"):
        _stop(workspace, [p for p in recorded(workspace) if not alive(p)])  # what a dead server left behind
        running = {p.name: p for p in recorded(workspace)}
        if "prefect" not in running and "runner" in running:
            stop(running.pop("runner"), _STOP_SECONDS["runner"])  # it served a Prefect server that is gone
        plans = _plans(workspace, settings, mlflow_uri or workspace.mlflow_uri, flows, running)
        for plan in plans:
            _require_free(plan)
        started: list[Process] = []
        try:
            for plan in plans:
                started.append(_start(workspace, plan, running))
                running[plan.name] = started[-1]
                record(workspace, running.values())
            _wait_until_healthy(workspace, started, say)
        except BaseException:
            _stop(workspace, started)
            raise
    for name in NAMES:
        if name in running:
            fresh = running[name] in started
            say(f"{_TITLES[name]} {'runs' if fresh else 'is already up'}{_at(running[name])}.")
    if foreground:
        hold(workspace, say)


def hold(workspace: Workspace, say: Say = lambda text: None) -> None:
    """Stay until Ctrl-C or SIGTERM, then stop everything.

    Raises:
        Unavailable: a server ended by itself; the others are stopped, the end of its log is in the error.
    """
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # how a supervisor says Ctrl-C
        say("Ctrl-C stops everything.")
        ended = wait_while_alive(recorded(workspace))
    except KeyboardInterrupt:
        down(workspace, say)
    else:
        down(workspace, say)
        raise Unavailable(f"The {_TITLES[ended.name]} ended by itself; {_end(ended)}")


def down(workspace: Workspace, say: Say = lambda text: None) -> None:
    """Stop what `up` started, with everything that it started in turn. Safe to repeat."""
    with file_lock(workspace.locks / "servers.lock", timeout=60, what=f"the servers of {workspace.root}"):
        processes = recorded(workspace)
        if not any(alive(p) for p in processes):
            say("Nothing is running.")
        _stop(workspace, processes, say)


def state(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """Tell what runs, by server: {"state": "running" | "died" | "stopped", "pid", "url", "log"}.

    A server that was started and not stopped, but does not run, has died.
    """
    by_name = {p.name: p for p in recorded(workspace)}
    return {name: _fact(by_name.get(name)) for name in NAMES}


def active_runs(workspace: Workspace) -> list[dict[str, str]]:
    """Return the flow runs that run or wait to run, [{name, state, created_by}]; empty where the server is down."""
    url = running_url(workspace, "prefect")
    if url is None:
        return []
    query = {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}}
    headers = {"Content-Type": "application/json"}
    post = urllib.request.Request(f"{url}/api/flow_runs/filter", json.dumps(query).encode(), headers)
    try:
        found = json.loads(request(post, timeout=5))
    except OSError:
        return []
    return [{"name": row["name"], "state": row["state_name"], "created_by": _starter(row)} for row in found]


def _starter(row: Mapping[str, Any]) -> str:
    return str((row.get("created_by") or {}).get("type") or "person").lower()


def describe(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the result of `state` as one line for a person."""
    if all(row["state"] == "stopped" for row in found.values()):
        return "down; `forebay up` starts them"
    return ", ".join(_words(name, row) for name, row in found.items())


def _fact(process: Process | None) -> dict[str, Any]:
    if process is None:
        return {"state": "stopped", "pid": None, "url": None, "log": None}
    row = {"pid": process.pid, "url": process.url, "log": str(process.log)}
    return {"state": "running" if alive(process) else "died", **row}


def _words(name: str, row: Mapping[str, Any]) -> str:
    if row["state"] == "died":
        return f"{name} died (see {row['log']})"
    return f"{name} {row['url'] or row['state']}"


# ------------------------------------------------------------------------------------------------ starting


def _plans(
    workspace: Workspace,
    settings: Servers,
    mlflow_uri: str,
    flows: Mapping[str, str],
    running: Mapping[str, Process],
) -> list[_Plan]:
    python = sys.executable
    prefect = (
        python,
        "-m",
        "uvicorn",
        "--factory",
        "prefect.server.api.server:create_app",
        "--log-level",
        "warning",
    )
    mlflow = (
        python, "-m", "mlflow", "server", "--workers", "1", "--backend-store-uri", mlflow_uri,
        "--serve-artifacts", "--artifacts-destination", str(workspace.artifacts),
    )  # fmt: skip
    runner = (
        python,
        "-m",
        "flows.runner",
        str(workspace.root),
        *(f"{name}={target}" for name, target in flows.items()),
    )
    plans = [
        _Plan(
            "prefect",
            _listening(prefect, settings.prefect_port),
            settings.prefect_port,
            "servers.prefect_port",
        ),
        _Plan(
            "mlflow", _listening(mlflow, settings.mlflow_port), settings.mlflow_port, "servers.mlflow_port"
        ),
        _Plan("runner", runner, None, None),
    ]
    remote = {"mlflow"} if mlflow_uri.startswith(("http://", "https://")) else set()
    return [plan for plan in plans if plan.name not in running and plan.name not in remote]


def _listening(command: Sequence[str], port: int) -> tuple[str, ...]:
    return (*command, "--host", LOOPBACK, "--port", str(port))


def _require_free(plan: _Plan) -> None:
    if plan.port is None:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just closed is free
        try:
            probe.bind((LOOPBACK, plan.port))
        except OSError:
            raise Unavailable(
                f"Port {plan.port} on {LOOPBACK} is taken by another program, so the {_TITLES[plan.name]} "
                f"cannot start; set {plan.setting} in params.yaml to a free port, or stop that program."
            ) from None


def _start(workspace: Workspace, plan: _Plan, running: Mapping[str, Process]) -> Process:
    url = None if plan.port is None else f"http://{LOOPBACK}:{plan.port}"
    prefect = url if plan.name == "prefect" else running["prefect"].url
    env = environment(workspace, f"{prefect}/api") | {"PREFECT__SERVER_FINAL": "1"}
    ready_mark(workspace).unlink(missing_ok=True) if plan.name == "runner" else None
    return spawn(plan.name, plan.command, env=env, log=workspace.servers / f"{plan.name}.log", url=url)


def _wait_until_healthy(workspace: Workspace, started: Sequence[Process], say: Say) -> None:
    deadline = time.monotonic() + _STARTUP_SECONDS
    waiting = list(started)
    if waiting:
        say(f"Starting {', '.join(_TITLES[p.name] for p in waiting)} (10 to 30 s) …")
    while waiting:
        for process in waiting:
            if not alive(process):
                raise Unavailable(f"The {_TITLES[process.name]} ended while starting; {_end(process)}")
        waiting = [p for p in waiting if not _healthy(workspace, p)]
        if waiting and time.monotonic() > deadline:
            late = waiting[0]
            raise Unavailable(
                f"The {_TITLES[late.name]} was not ready after {_STARTUP_SECONDS:.0f} s; {_end(late)}"
            )
        time.sleep(_POLL_SECONDS)


def _healthy(workspace: Workspace, process: Process) -> bool:
    if process.url is None:
        mark = ready_mark(workspace)
        return mark.exists() and mark.read_text() == str(process.pid)
    with suppress(OSError):
        get(process.url + _HEALTH[process.name], timeout=2)
        return True
    return False


# ------------------------------------------------------------------------------------------------ stopping


def _stop(workspace: Workspace, processes: Sequence[Process], say: Say = lambda text: None) -> None:
    for process in sorted(processes, key=lambda p: NAMES.index(p.name), reverse=True):
        ran = alive(process)
        stop(process, _STOP_SECONDS[process.name])
        record(workspace, [p for p in recorded(workspace) if p.name != process.name])
        say(f"{_TITLES[process.name]} {'stopped' if ran else 'had died'}.")


def _at(process: Process) -> str:
    return f" at {process.url}" if process.url else ""


def _end(process: Process) -> str:
    return f"the end of {process.log}:\n{tail(process.log)}"
