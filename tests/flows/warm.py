"""Command lines in processes of their own that need not import PyTorch, MLflow and Prefect first.

A warm process has imported them and forks for every command: a child has its own working directory, environment, arguments
and streams, runs `python -m flows.cli` and ends, as a fresh one would. What a fresh process imports, and that it can, is
for the tests that start one.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

_PROJECT = Path(__file__).resolve().parents[2]
_IMPORTED = (
    "flows.cycle",
    "flows.experience",
    "flows.offline",
    "flows.training",
    "great_expectations",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.transformers",
    "prefect",
    "rich.live",
    "tasks.leaderboard.cell",
    "tasks.promotion.registry",
    "tasks.rollout.rollout",
    "tasks.training.trainer",
    "transformers.models.llama.modeling_llama",
    "typer",
)


class Command:
    """A command that runs: a process that leads a session of its own, with its streams in files.

    Args:
        out: file for its standard output; `err`: for its standard error.
    """

    def __init__(
        self,
        words: Sequence[str],
        cwd: Path,
        env: Mapping[str, str],
        out: BinaryIO,
        err: BinaryIO,
        address: str,
    ) -> None:
        self._line = socket.socket(socket.AF_UNIX)
        self._line.connect(address)
        wanted = json.dumps({"words": list(words), "cwd": str(cwd), "env": dict(env)}).encode()
        socket.send_fds(self._line, [len(wanted).to_bytes(4)], [out.fileno(), err.fileno()])
        self._line.sendall(wanted)
        self.pid = int.from_bytes(_read(self._line, 4))
        self.returncode: int | None = None

    def wait(self, timeout: float) -> int:
        """Return the exit code, below 0 for a signal.

        Raises:
            TimeoutError: it still runs.
        """
        if self.returncode is None:
            self._line.settimeout(timeout)
            self.returncode = int.from_bytes(_read(self._line, 4), signed=True)
            self._line.close()
        return self.returncode

    def kill(self) -> int:
        """Kill it and what it started within its session; return the exit code."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        return self.wait(30)


def run(
    words: Sequence[str], cwd: Path, env: Mapping[str, str], timeout: float, address: str | None = None
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([python, "-m", "flows.cli", *words], capture_output=True, text=True, …)`.

    Raises:
        subprocess.TimeoutExpired: it took longer; it has been killed.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        command = Command(words, cwd, env, out, err, address or warm_address())
        try:
            code = command.wait(timeout)
        except TimeoutError:
            command.kill()
            raise subprocess.TimeoutExpired(list(words), timeout) from None
        told = []
        for stream in (out, err):
            stream.seek(0)
            told.append(stream.read().decode())
    return subprocess.CompletedProcess(list(words), code, *told)


@cache
def warm_address() -> str:
    """Start the warm process of this process, which ends with it; return where it listens."""
    folder = tempfile.TemporaryDirectory(prefix="warm-")
    address = f"{folder.name}/line"
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.flows.warm", "serve", address],
        cwd=_PROJECT,
        env={**plain, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(_PROJECT)},
        stdin=subprocess.PIPE,  # its end of file says that we are gone
        stdout=subprocess.PIPE,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"

    def end() -> None:
        server.stdin.close()
        server.wait()
        folder.cleanup()

    atexit.register(end)
    return address


def _read(line: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = line.recv(size - len(data))
        if not more:
            raise ConnectionError("the warm process has gone")
        data += more
    return data


def _serve(address: str) -> None:
    """Import, then fork a child for each caller until our own starter is gone."""
    import selectors

    from flows.environment import QUIET

    os.environ.update(QUIET)
    for name in _IMPORTED:
        import_module(name)
    with socket.socket(socket.AF_UNIX) as door, selectors.DefaultSelector() as ready:
        door.bind(address)
        door.listen()
        ready.register(door, selectors.EVENT_READ)
        ready.register(0, selectors.EVENT_READ)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while all(key.fileobj != 0 for key, _ in ready.select()):
            line, _ = door.accept()
            if os.fork() == 0:
                door.close()
                ready.close()
                _answer(line)
            line.close()
            _reap()


def _reap() -> None:
    """Let no child that has ended stay a zombie."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _answer(line: socket.socket) -> None:
    """Run one command in a child of this process and tell how it ended."""
    try:
        size, fds, _, _ = socket.recv_fds(line, 4, 2)
        wanted = json.loads(_read(line, int.from_bytes(size)))
        pid = os.fork()
        if pid == 0:
            line.close()
            _command(wanted, fds)
        for fd in fds:
            os.close(fd)
        line.sendall(pid.to_bytes(4))
        _, status = os.waitpid(pid, 0)
        line.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, signed=True))
    finally:
        os._exit(0)


def _command(wanted: Mapping[str, Any], fds: Sequence[int]) -> None:
    """Become `python -m flows.cli WORDS`; does not return."""
    code = 1
    try:
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, fd in enumerate((nothing, *fds)):
            os.dup2(fd, number)
            os.close(fd)
        os.setsid()
        os.chdir(wanted["cwd"])
        os.environ.clear()
        os.environ.update(wanted["env"])
        sys.argv = ["forebay", *wanted["words"]]
        runpy.run_module("flows.cli", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            sys.stderr.write(f"{ended.code}\n")
    except BaseException:
        traceback.print_exc()
    finally:
        _leave(code)


def _leave(code: int) -> None:
    """End as an interpreter does: threads, exit handlers, streams."""
    import threading

    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    task, place, *rest = sys.argv[1:]
    if task == "serve":
        _serve(place)
    else:  # "ask": what a script named `forebay` does
        done = run(rest, Path.cwd(), os.environ, 240, place)
        sys.stdout.write(done.stdout)
        sys.stderr.write(done.stderr)
        sys.exit(done.returncode)
