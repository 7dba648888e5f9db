"""The process environment of Prefect and its peers, and a Prefect API for flows that run in this process.

Prefect reads its settings when it is imported, so `prefect_api` sets the environment first; import Prefect
(and the flows) inside its block.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from flows.processes import running_url, tail
from tasks.core.atomic import write_file_atomic
from tasks.core.errors import Unavailable
from tasks.core.locks import file_lock
from tasks.core.workspace import Workspace

LOOPBACK = "127.0.0.1"
_PROJECT = Path(__file__).resolve().parents[1]
_STARTUP_SECONDS = 120  # Prefect's own 20 s are fewer than a first start with migrations takes
_STOP_SECONDS = 10

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "1",
    "ITERATIVE_DO_NOT_TRACK": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # job endpoints answer without authentication (CVE-2026-0545), and nothing here needs them
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}
"""No telemetry, no job execution: safe to set in any process."""

# A person's own Prefect profile and cloud key have no meaning on a workspace's private server.
_FOREIGN = ("PREFECT_PROFILE", "PREFECT_API_KEY")


def environment(workspace: Workspace, api_url: str) -> dict[str, str]:
    """Return the environment of a process that talks to the Prefect API at `api_url` (or serves it)."""
    inherited = {key: value for key, value in os.environ.items() if key not in _FOREIGN}
    return {
        **inherited,
        **QUIET,
        "PREFECT_API_URL": api_url,
        "PREFECT_HOME": str(workspace.servers / "prefect"),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{_database(workspace)}",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(_STARTUP_SECONDS),
        # The run's page keeps the whole log; the terminal shows what needs a person.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        # How soon a run that waits for another of its flow looks again; 30 s is for servers far away.
        "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "5",
        # Without it, any web page that a person visits may read and drive the server on loopback.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": api_url.removesuffix("/api"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(_PROJECT), os.environ.get("PYTHONPATH")))),
        **{key: ",".join(filter(None, (os.environ.get(key), LOOPBACK))) for key in ("NO_PROXY", "no_proxy")},
    }


def configure(workspace: Workspace, api_url: str) -> None:
    """Make this process use the Prefect API at `api_url`; best called before Prefect is imported."""
    for key in _FOREIGN:
        os.environ.pop(key, None)
    os.environ.update(environment(workspace, api_url))
    # Whoever runs a flow in this process gets its exception; Prefect would print the traceback as well.
    os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"
    if "prefect.context" in sys.modules:
        sys.modules["prefect.context"].refresh_global_settings_context()


def prepare_prefect(workspace: Workspace) -> None:
    """Lay the migrated database of Prefect, so that no server has to migrate when it starts. Safe to repeat.

    Migrating takes 10 to 20 s, and the result depends on Prefect's version alone: it is kept in the user's
    cache and copied from there the next time.

    Raises:
        Unavailable: Prefect could not migrate, or the disk is full.
    """
    target = _database(workspace)
    with file_lock(workspace.locks / "prefect.lock", what=f"the Prefect database of {workspace.root}"):
        if target.exists():
            return
        template = _cache() / f"prefect-{version('prefect')}.db"
        if not template.exists():
            write_file_atomic(template, lambda aside: _migrate(workspace, aside))
        write_file_atomic(target, lambda aside: _copy_database(template, aside))


@dataclass(frozen=True)
class PrefectApi:
    """A Prefect API that flows of this process report to."""

    url: str
    log: Path | None
    """Log of the server if it lives only as long as this block, None if `forebay up` started it."""

    def wait(self) -> None:
        """Block until the API answers.

        Raises:
            Unavailable: it does not come up; the last lines of its log are in the error.
        """
        try:
            get(f"{self.url}/health", _STARTUP_SECONDS)
        except OSError as error:
            hint = "; run `forebay down`, then `forebay up`."
            detail = f"; the end of {self.log}:\n{tail(self.log)}" if self.log else hint
            raise Unavailable(f"Prefect does not answer at {self.url} ({error}){detail}") from None


@contextmanager
def prefect_api(workspace: Workspace) -> Iterator[PrefectApi]:
    """Give flows of this process a Prefect API: that of `forebay up`, else a private server for this block.

    The private server starts in the background: its port accepts connections at once and the first request is
    answered when it is ready (about 6 s), so import Prefect, the flows and PyTorch meanwhile. It shares the
    workspace's database, runs no schedules, and dies with this process however that ends.
    """
    url = running_url(workspace, "prefect")
    if url is not None:
        configure(workspace, f"{url}/api")
        yield PrefectApi(f"{url}/api", None)
        return
    log = workspace.servers / "prefect-private.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket() as listener, log.open("wb") as stream:
        listener.bind((LOOPBACK, 0))
        listener.listen(128)
        api = PrefectApi(f"http://{LOOPBACK}:{listener.getsockname()[1]}/api", log)
        server = subprocess.Popen(
            [sys.executable, "-m", "flows.private_server", str(listener.fileno())],
            env={**environment(workspace, api.url), "PREFECT_UI_ENABLED": "false"},
            pass_fds=(listener.fileno(),),
            stdin=subprocess.PIPE,  # its end of file tells the server that we are gone
            stdout=stream,
            stderr=stream,
            start_new_session=True,  # Ctrl-C must not take the API from a flow that is winding up
        )
    configure(workspace, api.url)
    try:
        try:
            yield api
        finally:
            _drain()
    finally:
        assert server.stdin is not None
        server.stdin.close()
        try:
            server.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def get(url: str, timeout: float) -> bytes:
    """Return the body at a loopback `url`; raises OSError (also for an HTTP error)."""
    return request(urllib.request.Request(url), timeout)


def request(what: urllib.request.Request, timeout: float) -> bytes:
    """Send a request to a server on loopback, past any proxy; raises OSError (also for an HTTP error)."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(what, timeout=timeout) as answer:
        return bytes(answer.read())


def _drain() -> None:
    """Send what Prefect still holds back: task states and logs travel in the background."""
    if "prefect" not in sys.modules:
        return
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    with suppress(RuntimeError):  # no flow ran, so nothing was ever queued
        APILogWorker.instance().drain()
    EventsWorker.drain_all()


def _database(workspace: Workspace) -> Path:
    return workspace.servers / "prefect.db"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "forebay"


def _migrate(workspace: Workspace, target: Path) -> None:
    """Make an empty, migrated Prefect database at `target`."""
    work = target.with_name(f"{target.name}.work")
    env = environment(workspace, f"http://{LOOPBACK}/api") | {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{work}"
    }
    command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise Unavailable(f"Prefect could not lay its database: {' '.join(last)}")
        _copy_database(work, target)
    finally:
        for path in target.parent.glob(f"{work.name}*"):
            path.unlink()


def _copy_database(source: Path, target: Path) -> None:
    """Copy a SQLite database as one file, what lies in its write-ahead log included."""
    with sqlite3.connect(source) as old, sqlite3.connect(target) as new:
        old.backup(new)
    old.close()
    new.close()
