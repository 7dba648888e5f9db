from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tasks.arena import sandbox
from tasks.arena.sandbox import Limits, Result, run_python
from tasks.core.errors import Unavailable
from tests.arena import sandboxed

SYSTEM_PYTHON = "/usr/bin/python3"
QUICK = Limits(seconds=10.0, cpu_seconds=1)


def readable_python() -> str | None:
    """An interpreter whose library the user nobody can read: ours, or the system's."""
    if os.geteuid() != 0:
        return sys.executable
    check = "import sys, os; assert sys.version_info >= (3, 11); print(os.__file__)"
    for python in (sys.executable, SYSTEM_PYTHON):
        found = subprocess.run([python, "-c", check], capture_output=True, text=True, check=False)
        parents = Path(found.stdout.strip()).parents if found.returncode == 0 else []
        if parents and all(parent.stat().st_mode & 0o005 == 0o005 for parent in parents):
            return python
    return None


@pytest.fixture(params=["namespaces", "audit hook"])
def isolation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "audit hook":
        python = readable_python()
        if python is None:
            pytest.skip("the user nobody cannot read any Python installation here")
        monkeypatch.setattr(sandbox, "_NAMESPACES", False)
        monkeypatch.setattr(sys, "executable", python)
    elif sandboxed.isolation() != "namespaces":
        pytest.skip("the kernel gives this user no namespaces")
    return str(request.param)


@pytest.fixture(autouse=True)
def nothing_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if os.geteuid() == 0:  # nobody has to reach the folder inside
        for parent in (tmp_path, *tmp_path.parents):
            if parent.owner() == "root" and parent != Path("/"):
                parent.chmod(parent.stat().st_mode | 0o001)
    children = set(psutil.Process().children())
    descriptors = len(os.listdir("/proc/self/fd"))
    yield
    assert set(psutil.Process().children()) <= children
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert not list(tmp_path.glob("forebay-sandbox-*"))


def error(result: Result) -> str:
    assert (result.exit, result.reason) == (1, "exit")
    return result.error


def test_what_is_printed_and_how_it_ended_comes_back(isolation: str) -> None:
    assert run_python("print(6 * 7)") == Result("42\n", 0, "exit", "", isolation)  # type: ignore[arg-type]
    assert run_python("import math, decimal, json; print(math.gcd(12, 18))").stdout == "6\n"
    assert run_python("print('half', end=''); 1 / 0") == Result(
        "half", 1, "exit", "ZeroDivisionError: division by zero", isolation  # type: ignore[arg-type]
    )  # fmt: skip
    assert "never closed" in error(run_python("print("))
    assert "null bytes" in error(run_python("print(\0)"))
    assert run_python("raise SystemExit(3)").exit == 3
    assert run_python("import os; os._exit(7)").exit == 7
    assert run_python("print('été \U0001f40d')").stdout == "été \U0001f40d\n"
    assert "EOF" in error(run_python("input()"))
    assert "surrogates" in error(run_python("print('\ud800')"))


def test_equal_code_prints_equal_text(isolation: str) -> None:
    code = "print(set('abcdefgh'), hash('x'), __name__)"
    assert run_python(code) == run_python(code)


def test_nothing_is_inherited(isolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOREBAY_SECRET", "hunter2")
    with open("/dev/null") as held:
        os.set_inheritable(held.fileno(), True)
        result = run_python("import os, sys; print(dict(os.environ), os.listdir('.'), sys.argv, sys.path)")
        assert "hunter2" not in result.stdout
        assert "site-packages" not in result.stdout
        open_fds = "import os\nfor fd in range(3, 64):\n  try: print(os.fstat(fd))\n  except OSError: pass"
        assert run_python(open_fds).stdout == ""


def test_a_busy_loop_ends_by_its_computation_and_a_sleep_by_the_clock(isolation: str) -> None:
    assert run_python("while True: pass", QUICK).reason == "cpu"
    started = time.monotonic()
    result = run_python("import time; print(1, flush=True); time.sleep(60)", Limits(seconds=0.3))
    assert (result.stdout, result.exit, result.reason) == ("1\n", -signal.SIGKILL, "time")
    closed = run_python("import os, time; os.close(1); os.close(2); time.sleep(60)", Limits(seconds=0.3))
    assert closed.reason == "time"
    deaf = "import os, signal, time\nfor s in range(1, 32):\n  try: signal.signal(s, signal.SIG_IGN)\n  except OSError: pass\n"
    leaver = deaf + "try: os.setsid()\nexcept OSError: pass\ntime.sleep(60)"
    assert run_python(leaver, Limits(seconds=0.3)).reason == "time"
    assert time.monotonic() - started < 10


def test_memory_is_limited(isolation: str) -> None:
    result = run_python("x = [0] * 10**9")
    assert (result.reason, result.error) == ("memory", "MemoryError")
    assert run_python("x = bytearray(100 << 20); print(len(x))").stdout == f"{100 << 20}\n"


def test_a_flood_of_output_is_cut_while_it_comes(isolation: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limits = Limits(output=1000)
    for code in ("while True: print('x' * 99)", "import sys\nwhile True: sys.stderr.write('x' * 99)"):
        assert run_python(code, limits) == run_python(code, limits)
        assert run_python(code, limits).reason == "output"
    assert run_python("print('x' * 99_999_999)", limits).stdout == "x" * 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000  # KiB
    exact = run_python("print('x' * 999)", limits)
    assert (len(exact.stdout), exact.reason) == (1000, "exit")


def test_no_process_and_no_thread_can_be_started(isolation: str) -> None:
    assert error(run_python("import os\nwhile True: os.fork()")).startswith(
        ("BlockingIOError", "PermissionError")
    )
    assert "thread" in error(run_python("import threading; threading.Thread(target=print).start()"))
    spawn = run_python("import subprocess, sys; subprocess.run([sys.executable, '-c', '1'])")
    assert error(spawn).startswith(("BlockingIOError", "PermissionError"))


def test_there_is_no_network(isolation: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        connect = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        assert error(run_python(connect)).startswith(("OSError: [Errno 101]", "PermissionError"))
        with pytest.raises(TimeoutError):
            server.accept()
    send = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))"
    assert error(run_python(send)).startswith(("OSError: [Errno 101]", "PermissionError"))


def test_files_are_written_in_the_working_folder_only_and_not_without_end(
    isolation: str, tmp_path: Path
) -> None:
    target = tmp_path / "open to all"
    target.mkdir()
    target.chmod(0o777)
    assert run_python("open('x', 'w').write('kept'); print(open('x').read())").stdout == "kept\n"
    for code in (f"open({str(target / 'x')!r}, 'w')", f"import os; os.mkdir({str(target / 'x')!r})"):
        assert error(run_python(code)).startswith(("FileNotFoundError", "PermissionError"))
    assert not list(target.iterdir())
    big = run_python("f = open('x', 'wb', 0)\nwhile True: f.write(bytes(1 << 20))", Limits(files=4 << 20))
    assert error(big).startswith(("OSError: [Errno 27]", "OSError: [Errno 28]"))


def test_in_namespaces_other_files_and_processes_cannot_be_seen() -> None:
    if sandboxed.isolation() != "namespaces":
        pytest.skip("the kernel gives this user no namespaces")
    assert error(run_python("open('/etc/passwd')")).startswith("FileNotFoundError")
    assert error(run_python("import os; os.listdir('/proc')")).startswith("FileNotFoundError")
    assert run_python("import os; print(os.getpid(), os.getppid())").stdout == "1 0\n"
    many = "i = 0\nwhile True:\n  open(str(i), 'wb').write(bytes(1 << 20)); i += 1"
    assert error(run_python(many, Limits(files=4 << 20))).startswith("OSError: [Errno 28]")
    library = "import os; open(os.path.dirname(os.__file__) + '/x.py', 'w')"
    assert error(run_python(library)).startswith(("OSError: [Errno 30]", "PermissionError"))
    # Signals reach only the process itself, which ignores or survives them, or dies alone.
    for victim in ("os.getppid()", "-1", "0"):
        run_python(f"import os; os.kill({victim}, 9)")
    assert run_python("import os; os.setuid(0)").exit == 1
    assert run_python("import ctypes; ctypes.string_at(0)").reason == "signal"


def test_a_killed_caller_takes_the_code_with_it(tmp_path: Path) -> None:
    processes = 2 if run_python("").isolation == "namespaces" else 1
    script = (
        "from tasks.arena.sandbox import *; run_python('import time; time.sleep(60)', Limits(seconds=60))"
    )
    caller = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "TMPDIR": str(tmp_path)})
    inner: list[psutil.Process] = []
    try:
        end = time.monotonic() + 20
        while len(inner) < processes and time.monotonic() < end:
            time.sleep(0.05)
            inner = psutil.Process(caller.pid).children(recursive=True)
    finally:
        caller.kill()
        caller.wait()
    assert len(inner) == processes
    _, alive = psutil.wait_procs(inner, timeout=5)
    assert not alive
    for left in tmp_path.glob("forebay-sandbox-*"):  # the one thing that stays, empty
        left.rmdir()


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv") or readable_python() is None,
    reason="needs root, setpriv and a Python that others can read",
)
def test_an_ordinary_user_is_protected_as_well() -> None:
    source = Path(sandbox.__file__).parents[2]
    if not all(parent.stat().st_mode & 0o005 == 0o005 for parent in (source, *source.parents)):
        pytest.skip("other users cannot read the source")
    script = (
        "from tasks.arena.sandbox import run_python\n"
        "print(run_python('import os; os.fork()').error)\n"
        "print(run_python('import os; print(os.getuid()); os.kill(-1, 9)').stdout)\n"
        "print(run_python('import socket; socket.create_connection((\"127.0.0.1\", 9))').error)\n"
    )
    python = readable_python()
    assert python is not None
    ids = ["--reuid", "12345", "--regid", "12345", "--clear-groups"]
    found = subprocess.run(
        ["setpriv", *ids, python, "-c", script],
        env={"PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": "/tmp"},
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    fork, user, network = (
        found.stdout.split("\n")[0],
        found.stdout.split("\n")[1],
        found.stdout.strip().split("\n")[-1],
    )
    assert fork.startswith(("BlockingIOError", "PermissionError"))
    assert user == "12345"
    assert network.startswith(("OSError: [Errno 101]", "PermissionError"))


def test_an_interpreter_that_does_not_start_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(Unavailable, match="did not start"):
        run_python("print(1)")


@pytest.mark.skipif(not sandboxed.isolation(), reason="no sandbox starts here")
def test_a_caller_with_tighter_limits_of_its_own_is_no_obstacle() -> None:
    script = (
        "import resource\n"
        "from tasks.arena.sandbox import run_python\n"
        "for what in (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):\n"
        "    resource.setrlimit(what, (50, 50))\n"
        "print(run_python('print(1)').stdout)\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "1\n\n"
