"""The processes behind `tasks.arena.guarded`: a server that has loaded an environment, and the workers it forks.

The server is a fresh interpreter that does nothing but fork, so a worker is a copy of a process without threads, with the
environment loaded, and costs a millisecond or two. It ends its workers when they are to end and reaps them, and when its
own parent is gone it ends them all.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from tasks.arena.environment import Environment, checked, cut
from tasks.core.errors import UsageError

LARGEST_REPLY = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step may use, and what it may give.

    The memory is one of address space, which the kernel enforces in the moment of the request: a step that asks for too
    much gets a MemoryError before the machine is short of memory, where watching the resident size would come late.

    Attributes:
        seconds: by the clock.
        memory: bytes of address space above what the worker has mapped before its first step.
        observation: characters; of a longer one the two ends are kept, with a note between them.
        rewards: least and greatest reward.
    """

    seconds: float = 10.0
    memory: int = 1 << 30
    observation: int = 4096
    rewards: tuple[float, float] = (0.0, 1.0)


def main(control_fd: int) -> None:
    """Load the environment that comes on standard input, then start and end workers as the parent asks.

    A message with a descriptor asks for a worker that serves it, and is answered by its process id; a process id asks for
    that worker's end, and is answered by its exit status (below 0: the signal).
    """
    control = socket.socket(fileno=control_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    try:
        env, limits = pickle.load(sys.stdin.buffer)
    except BaseException as error:  # whatever its module does when it is imported
        control.send(f"{type(error).__name__}: {error}"[:500].encode())
        return
    with suppress(Exception):  # a fault of drawing shows where tasks are drawn
        env.tasks(
            "train", 1, 0
        )  # what the environment imports late is imported once, and not on a step's time
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    control.send(b"ready")
    workers: set[int] = set()
    while True:
        with suppress(ConnectionError):
            message, fds, _, _ = socket.recv_fds(control, 64, 1)
            if fds:
                if (pid := os.fork()) == 0:
                    control.close()
                    _work(Connection(fds[0]), env, limits)
                os.close(fds[0])
                os.setpgid(pid, pid)
                workers.add(pid)
                control.send(str(pid).encode())
                continue
            if message and (pid := int(message)) in workers:
                workers.remove(pid)
                control.send(str(_end(pid)).encode())
                continue
            if message:
                control.send(b"another server's")
                continue
        for pid in workers:
            _end(pid)
        return


def _end(pid: int) -> int:
    """Kill the worker with whatever it started in its process group; its exit status."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _work(orders: Connection, env: Environment, limits: Limits) -> NoReturn:
    try:
        with suppress(PermissionError):  # the server was faster
            os.setpgid(0, 0)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
        most = mapped + limits.memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        while True:
            call, *words = pickle.loads(orders.recv_bytes())
            orders.send_bytes(_reply(env, limits, call, words))
    except (EOFError, ConnectionError):
        os._exit(0)
    finally:
        os._exit(1)


def _reply(env: Environment, limits: Limits, call: str, words: Sequence[Any]) -> bytes:
    """What a method of the environment answers, as JSON: ["step", fields of the `Step`], ["value", what another method gave],
    ["refused", sentence of the `UsageError` of another method], or ["raised", what, whether the worker should be replaced]."""
    try:
        answer = getattr(env, call)(*words)
        told = _step(answer, limits) if call == "step" else ["value", answer]
        reply = json.dumps(told, default=float).encode()
        if len(reply) > LARGEST_REPLY:
            raise ValueError(f"the answer has {len(reply)} bytes")
    except BaseException as error:  # whatever an environment raises
        if call != "step" and isinstance(error, UsageError):
            return json.dumps(["refused", str(error)[:500]]).encode()
        what = f"{type(error).__name__}: {error}"[:500]
        return json.dumps(["raised", what, isinstance(error, MemoryError)]).encode()
    return reply


def _step(answer: object, limits: Limits) -> list[Any]:
    step = checked(answer)
    least, greatest = limits.rewards
    if not least <= step.reward <= greatest:
        raise ValueError(f"the reward {step.reward} is not in [{least}, {greatest}]")
    observation = cut(step.observation, limits.observation)
    return ["step", observation, step.done, step.reward, dict(step.components), step.valid]
