"""Run Python code that nobody has read, with limits of time, memory, files and output, and without a network.

The code runs in an interpreter of its own that sees the standard library only, inherits neither descriptors nor
environment variables, and may not start processes or threads (RLIMIT_NPROC 0; root becomes the user nobody first).

What else is guaranteed depends on the kernel, and `Result.isolation` says which of the two was in force:

"namespaces" (Linux, as root with CAP_SYS_ADMIN, or as a user who may make user namespaces): the kernel enforces all
of it. No network, not even loopback. Of the file system only the interpreter's library and the system's shared
libraries are there, read-only, and the working folder, which is memory of at most `files` bytes and vanishes with the
process. No other process can be seen or sent a signal. What remains open are faults of the kernel itself.

"audit hook" (all else): the limits hold as before, but sockets, signals and changes to files outside the working
folder are denied by a hook of Python. Code that means harm can get around such a hook, and files that the user may
read can be read. It stops accidents, not attacks; `files` then limits each file, not their sum.

In both, a caller that is killed takes the process with it (PR_SET_PDEATHSIG), unless the code undid that on purpose;
the empty temporary folder then stays behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from tasks.core.errors import Unavailable

Isolation = Literal["namespaces", "audit hook"]
Reason = Literal["exit", "time", "cpu", "memory", "output", "signal"]

_CHILD = Path(__file__).with_name("sandbox_child.py")
_NAMESPACES = True  # try them; the tests of the fallback do not
_START_SECONDS = 20.0  # for the interpreter to start, on a busy machine
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Limits:
    """What the code may use.

    Attributes:
        seconds: by the clock, from when the code starts.
        cpu_seconds: of computation.
        memory: bytes of address space, the interpreter's own 20 MiB or so included.
        files: bytes of all files together, or of each ("audit hook").
        output: bytes kept of stdout, and of stderr; more end the process.
    """

    seconds: float = 5.0
    cpu_seconds: int = 2
    memory: int = 256 << 20
    files: int = 8 << 20
    output: int = 1 << 16


@dataclass(frozen=True, slots=True)
class Result:
    """How the code ended.

    Attributes:
        stdout: the first `Limits.output` bytes, as text.
        exit: the exit status; below 0 the signal that ended it.
        reason: "exit" if it ended by itself, also by an exception; else the limit it met ("signal": another way to die).
        error: last line of stderr: of an uncaught exception its type and message.
        isolation: what kept the code in; see the module's docstring.
    """

    stdout: str
    exit: int
    reason: Reason
    error: str
    isolation: Isolation


def run_python(code: str, limits: Limits = Limits()) -> Result:
    """Run `code` as a program without input, in at most `limits.seconds` and the time an interpreter takes to start.

    Hashes of text are not random, so equal code prints equal text unless it asks for a time or for random numbers.

    Raises:
        Unavailable: the interpreter did not start, or root could not become nobody.
    """
    with tempfile.TemporaryDirectory(prefix="forebay-sandbox-") as folder:
        status, status_child = os.pipe()
        with os.fdopen(status, "rb", buffering=0) as said:
            try:
                child = _start(status_child)
            finally:
                os.close(status_child)
            isolation, texts, met = None, [b"", b""], None
            inner, over = 0, False
            try:
                _order(child, code, limits, os.path.realpath(folder), status_child)
                inner, isolation = _read_status(said)
                if isolation is not None:
                    texts, met = _collect(child, limits)
                    over = met is None
            finally:
                if not over:
                    _kill(child.pid, inner)
                if isolation is None and child.stderr is not None:
                    texts[1] = child.stderr.read(_CHUNK)
                _, wait_status, usage = os.wait4(child.pid, 0)
                child.returncode = os.waitstatus_to_exitcode(wait_status)
                for stream in (child.stdin, child.stdout, child.stderr):
                    assert stream
                    stream.close()
    stdout, stderr = (text.decode(errors="replace") for text in texts)
    error = stderr.strip().rpartition("\n")[2]
    if isolation is None:
        raise Unavailable(
            f"The sandbox for Python code did not start ({error or 'no answer'}); run as an ordinary user, "
            "or allow the user nobody to read the Python installation."
        )
    return Result(
        stdout, child.returncode, met or _reason(child.returncode, error, usage, limits), error, isolation
    )


def _start(status: int) -> subprocess.Popen[bytes]:
    # -I would include -E, which ignores the seed; with an environment of one variable the rest of it does the same.
    return subprocess.Popen(
        [sys.executable, "-P", "-s", "-S", "-X", "utf8", "-B", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONHASHSEED": "0"},
        cwd="/",
        pass_fds=[status],
        start_new_session=True,
    )


def _order(child: subprocess.Popen[bytes], code: str, limits: Limits, folder: str, status: int) -> None:
    order = {
        "code": code,
        "status": status,
        "parent": os.getpid(),
        "folder": folder,
        "namespaces": _NAMESPACES,
        "cpu_seconds": limits.cpu_seconds,
        "memory": limits.memory,
        "files": limits.files,
    }
    assert child.stdin
    with contextlib.suppress(BrokenPipeError):  # it says no status then
        child.stdin.write(json.dumps(order).encode())
        child.stdin.close()


def _read_status(said: IO[bytes]) -> tuple[int, Isolation | None]:
    """The inner process (0: there is none) and what keeps it in (None: it did not start)."""
    text, end = b"", time.monotonic() + _START_SECONDS
    while select.select([said], [], [], max(0.0, end - time.monotonic()))[0] and (chunk := said.read(_CHUNK)):
        text += chunk
    words = dict(line.split(" ", 1) for line in text.decode().splitlines())
    known: dict[str | None, Isolation] = {"namespaces": "namespaces", "audit hook": "audit hook"}
    return int(words.get("pid", 0)), known.get(words.get("isolation"))


def _collect(child: subprocess.Popen[bytes], limits: Limits) -> tuple[list[bytes], Reason | None]:
    """Read stdout and stderr until the process has ended or met a limit, which is returned."""
    assert child.stdout is not None
    assert child.stderr is not None
    end = time.monotonic() + limits.seconds
    texts = {child.stdout.fileno(): b"", child.stderr.fileno(): b""}
    ended = os.pidfd_open(child.pid)
    try:
        with selectors.DefaultSelector() as selector:
            for stream in (*texts, ended):
                selector.register(stream, selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(max(0.0, end - time.monotonic()))
                if not ready:
                    return list(texts.values()), "time"
                for key, _ in ready:
                    chunk = b"" if key.fd == ended else os.read(key.fd, _CHUNK)
                    if not chunk:
                        selector.unregister(key.fd)
                        continue
                    texts[key.fd] += chunk
                    if len(texts[key.fd]) > limits.output:
                        texts[key.fd] = texts[key.fd][: limits.output]
                        return list(texts.values()), "output"
    finally:
        os.close(ended)
    return list(texts.values()), None


def _kill(pid: int, inner: int) -> None:
    """Kill the child; before it the process inside (0: none), whose id is its own as long as the child has not ended."""
    if inner and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(inner, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)  # not reaped yet, so the id is its own


def _reason(code: int, error: str, usage: resource.struct_rusage, limits: Limits) -> Reason:
    if code < 0:
        used = usage.ru_utime + usage.ru_stime  # the kernel counts ticks for the limit, and this otherwise
        return "cpu" if code == -signal.SIGKILL and used >= 0.9 * limits.cpu_seconds else "signal"
    return "memory" if code and error.startswith("MemoryError") else "exit"
