"""`forebay up` and `forebay down` on the real servers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flows.environment import get
from flows.processes import alive, recorded
from flows.servers import describe, down, state, up
from tasks.core.errors import Unavailable
from tasks.core.settings import Servers
from tasks.core.workspace import Workspace
from tests.flows.live import FLOWS, ask, lay, ports, processes_of, servers, until

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def settings() -> Servers:
    return ports()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, settings: Servers) -> Iterator[Workspace]:
    workspace = lay(tmp_path_factory.mktemp("servers") / "ws")
    with servers(workspace, settings):
        yield workspace


def pid(workspace: Workspace, name: str) -> int:
    return next(p.pid for p in recorded(workspace) if p.name == name)


# ------------------------------------------------------------------------------------------- nothing started


@pytest.mark.parametrize("name", ["prefect", "mlflow"])
def test_busy_port_is_named_with_its_setting_and_nothing_starts(tmp_path: Path, name: str) -> None:
    workspace = Workspace(tmp_path)
    settings = ports()
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", getattr(settings, f"{name}_port")))
        holder.listen()
        with pytest.raises(Unavailable, match=rf"Port \d+ .* is taken .* set servers\.{name}_port") as raised:
            up(workspace, settings)
    assert "\n" not in str(raised.value)
    assert recorded(workspace) == []
    assert processes_of(workspace) == []


def test_down_and_state_when_nothing_ever_ran(tmp_path: Path) -> None:
    said: list[str] = []
    down(Workspace(tmp_path), said.append)
    assert said == ["Nothing is running."]
    assert {row["state"] for row in state(Workspace(tmp_path)).values()} == {"stopped"}
    assert describe(state(Workspace(tmp_path))) == "down; `forebay up` starts them"


# --------------------------------------------------------------------------------------------- real servers


@pytest.mark.server
def test_up_is_healthy_and_up_again_says_so(running: Workspace, settings: Servers) -> None:
    before = recorded(running)
    assert get(f"http://127.0.0.1:{settings.prefect_port}/api/health", 5) == b"true"
    assert get(f"http://127.0.0.1:{settings.mlflow_port}/health", 5) == b"OK"
    assert {row["state"] for row in state(running).values()} == {"running"}
    said: list[str] = []
    started = time.monotonic()
    up(running, settings, said.append, flows=FLOWS)
    assert time.monotonic() - started < 8  # starting them takes ten seconds and more
    assert len(said) == 3
    assert all("already up" in line for line in said)
    assert recorded(running) == before


@pytest.mark.server
def test_servers_listen_on_loopback_only(running: Workspace) -> None:
    listening = [
        connection.laddr.ip
        for process in recorded(running)
        for member in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True))
        for connection in member.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 2
    assert set(listening) <= {"127.0.0.1", "::1"}


@pytest.mark.server
def test_a_killed_server_is_reported_and_up_heals(running: Workspace, settings: Servers) -> None:
    os.kill(pid(running, "mlflow"), signal.SIGKILL)
    until(lambda: state(running)["mlflow"]["state"] == "died", 5)
    assert "mlflow died (see " in describe(state(running))
    assert state(running)["prefect"]["state"] == "running"
    runner = pid(running, "runner")
    up(running, settings, flows=FLOWS)
    assert {row["state"] for row in state(running).values()} == {"running"}
    assert pid(running, "runner") == runner


@pytest.mark.server
def test_a_run_that_is_cut_off_is_crashed_and_the_next_one_gets_its_place(
    running: Workspace, settings: Servers
) -> None:
    deployments = ask(running, "/deployments/filter")
    collect = next(d["id"] for d in deployments if d["entrypoint"].endswith("collect"))
    runs = [ask(running, f"/deployments/{collect}/create_flow_run")["id"] for _ in range(2)]

    def names() -> list[str]:
        found = {run["id"]: run["state_name"] for run in ask(running, "/flow_runs/filter")}
        return sorted(found[run] for run in runs)

    until(lambda: names() == ["AwaitingConcurrencySlot", "Running"])  # one at a time
    os.kill(pid(running, "runner"), signal.SIGKILL)
    until(lambda: state(running)["runner"]["state"] == "died", 5)
    up(running, settings, flows=FLOWS)
    assert "Crashed" in names()
    until(lambda: names() == ["Crashed", "Running"])


@pytest.mark.server
def test_ctrl_c_in_the_foreground_stops_everything(running: Workspace, settings: Servers) -> None:
    before = recorded(running)
    assert len(processes_of(running)) >= 4  # a run is active, see above
    code = f"""if True:
        from pathlib import Path
        from flows.servers import up
        from tasks.core.settings import Servers
        from tasks.core.workspace import Workspace
        settings = Servers.model_validate({settings.model_dump()})
        up(Workspace(Path({str(running.root)!r})), settings, lambda t: print(t, flush=True), foreground=True)
    """
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "Ctrl-C stops everything.\n":
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said = process.stdout.read().splitlines()
    assert process.returncode == 0
    assert said == ["runner stopped.", "MLflow server stopped.", "Prefect server stopped."]
    assert processes_of(running) == []
    assert not any(alive(p) for p in before)
    assert {row["state"] for row in state(running).values()} == {"stopped"}


@pytest.mark.server
def test_a_server_that_ends_at_start_shows_its_log_and_takes_the_others_with_it(tmp_path: Path) -> None:
    workspace = lay(tmp_path / "ws")
    with pytest.raises(
        Unavailable, match=r"MLflow server ended while starting; the end of .*mlflow\.log:\n.*"
    ) as raised:
        up(workspace, ports(), mlflow_uri="nonsense://store", flows=FLOWS)
    assert "nonsense" in str(raised.value)
    assert processes_of(workspace) == []
    assert recorded(workspace) == []


# ------------------------------------------------------------------------------- Prefect without `forebay up`

RUN = """
import sys
from pathlib import Path
from flows.environment import prefect_api
from tasks.core.workspace import Workspace

workspace = Workspace(Path(sys.argv[1]))
with prefect_api(workspace) as api:
    print("spawned", flush=True)
    if "hang" in sys.argv:
        import time
        time.sleep(600)
    from tests.flows.sample import retrain
    api.wait()
    retrain(str(workspace.root), collect="never")
"""


def start(workspace: Workspace, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(workspace.root), *words]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)


@pytest.mark.server
def test_a_flow_runs_without_up_and_its_states_are_kept(tmp_path: Path) -> None:
    import sqlite3

    workspace = lay(tmp_path / "ws")
    with start(workspace) as process:
        assert process.wait(120) == 0
    assert (workspace.root / "retrain.json").exists()
    assert processes_of(workspace) == []
    with sqlite3.connect(workspace.servers / "prefect.db") as database:
        for table in ("flow_run", "task_run"):
            assert database.execute(f"select state_name from {table}").fetchall() == [("Completed",)]


@pytest.mark.server
def test_the_private_server_dies_with_a_killed_process(tmp_path: Path) -> None:
    workspace = lay(tmp_path / "ws")
    with start(workspace, "hang") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "spawned\n"
        until(lambda: processes_of(workspace), 10)
        process.kill()
    until(lambda: processes_of(workspace) == [], 20)
