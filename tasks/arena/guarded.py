"""An environment whose steps run in processes of their own, so that a fault costs one episode and never the run.

A step that takes too long, ends its process, uses too much memory, raises, or answers with something else than a proper
`Step` is a `StepFault`; `tasks.rollout` gives that episode reward 0 and the finish reason "error". A process that hung or
died is replaced; since `step` is a pure function of task and actions, nothing is lost with it. Healthy steps are the same
as without the guard, byte for byte, and the environment keeps its identity.

The environment's choices, its expert and its baselines run in those processes too. A guard is against accidents: code that
means harm belongs into `tasks.arena.sandbox`. Drawing tasks is not guarded, that runs here. Linux.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Self

from tasks.arena.environment import Environment, Expert, Listed, Step, Task, Wrapper, get
from tasks.arena.guard_server import LARGEST_REPLY, Limits
from tasks.core.errors import ForebayError, Unavailable, UsageError

__all__ = ["Environments", "Guarded", "Limits", "StepFault"]

_LIMITS = Limits()
_START_SECONDS = 60.0  # to import and load an environment, on a busy machine
_SERVER = "import sys; sys.path[:] = sys.argv[2:]; from tasks.arena.guard_server import main; main(int(sys.argv[1]))"


class StepFault(ForebayError):
    """A step, or another call, hung, died, raised or gave nonsense; the sentence says which, in which environment."""


@dataclass(frozen=True, slots=True, eq=False)
class _Worker:
    pid: int
    orders: Connection


class Guarded(Wrapper):
    """`env` behind `workers` processes; close it, or use it as a context manager. For one thread at a time.

    It is `Listed`, or has an `Expert`, if `env` is and has.

    Attributes:
        inside: the environment itself; it has to be picklable, and its module importable.
        restarts: workers that had to be replaced.

    Raises:
        UsageError: the environment cannot be loaded in another process, or `workers` is below 1.
        Unavailable: no process could be started.
    """

    def __init__(self, env: Environment, limits: Limits = _LIMITS, workers: int = 1) -> None:
        if workers < 1:
            raise UsageError(f"A guarded environment needs at least one worker, not {workers}.")
        self.inside = env
        self.limits = limits
        self.restarts = 0
        try:
            self._loaded = pickle.dumps((env, limits))
        except Exception as error:  # whatever the environment's pickling raises
            raise UsageError(
                f"The environment {env.name} cannot be sent to a process of its own: {error}."
            ) from None
        if isinstance(env, Listed):
            self.choices = partial(self._ask, limits.seconds, "choices")
        if isinstance(env, Expert):
            self.expert = partial(self._ask, limits.seconds, "expert")
        self._workers: list[_Worker] = []
        self._start_server()
        try:
            self._workers = [self._start_worker() for _ in range(workers)]
        except BaseException:
            self.close()
            raise

    def constant_baseline(self, tasks: Sequence[Task]) -> tuple[str, float]:
        """See `Environment.constant_baseline`; it may take as long as one step for each task.

        Raises:
            StepFault: it failed.
        """
        call = "constant_baseline"
        answer = self._ask(self.limits.seconds * max(1, len(tasks)), call, tasks)
        try:
            action, reward = answer
            str(action).encode()
        except (TypeError, ValueError):
            raise self._fault("gave no pair of an action and its mean reward", call) from None
        return str(action), self._mean_reward(reward, call)

    def random_baseline(self, tasks: Sequence[Task], seed: int) -> float:
        """See `Environment.random_baseline`; limits and failures as for `constant_baseline`."""
        call = "random_baseline"
        return self._mean_reward(self._ask(self.limits.seconds * max(1, len(tasks)), call, tasks, seed), call)

    def step(self, task: Task, actions: Sequence[str]) -> Step:
        """See `Environment.step`.

        Raises:
            StepFault: the step failed.
            Unavailable: no worker could be started.
        """
        (answer,) = self.steps([(task, actions)])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def steps(self, turns: Sequence[tuple[Task, Sequence[str]]]) -> list[Step | Exception]:
        """Step several episodes, as many at once as there are workers; a `StepFault` stands where a step failed.

        Any other exception, an interrupt for one, closes the guard.

        Raises:
            UsageError: the guard is closed.
            Unavailable: no worker could be started.
        """
        self._require_open()
        answers: dict[int, Step | Exception] = {}
        waiting: deque[tuple[int, bytes]] = deque()
        for i, (task, actions) in enumerate(turns):
            try:
                waiting.append((i, pickle.dumps(("step", task, list(actions)))))
            except Exception as error:  # whatever the task's pickling raises
                answers[i] = self._fault(f"could not be sent to its process: {error}")
        busy: dict[Connection, tuple[int, int, float]] = {}  # to which worker and turn, and until when
        idle = list(range(len(self._workers)))
        try:
            while waiting or busy:
                while waiting and idle:
                    place, (i, order) = idle.pop(), waiting.popleft()
                    busy[self._send(place, order)] = place, i, time.monotonic() + self.limits.seconds
                first = min(end for _, _, end in busy.values())
                ready = set(wait(busy, max(0.0, first - time.monotonic())))
                now = time.monotonic()
                for orders, (place, i, end) in list(busy.items()):
                    if orders in ready or end <= now:
                        del busy[orders]
                        hung = orders not in ready
                        answers[i] = self._hung(place, self.limits.seconds) if hung else self._received(place)
                        idle.append(place)
        except BaseException:  # an interrupt, or no worker to be had
            self.close()  # answers may be under way that nobody waits for any more
            raise
        return [answers[i] for i in range(len(turns))]

    def close(self) -> None:
        """End all processes; a second call does nothing."""
        for worker in self._workers:
            worker.orders.close()
        self._workers = []
        self._control.close()  # the server ends its workers, then itself
        try:
            self._server.wait(_START_SECONDS)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, seconds: float, call: str, *words: Any) -> Any:
        """Call a method of the environment in a worker; what it gives has to be made of JSON's types, a tuple comes as a list.

        Raises:
            StepFault: the call failed, or took longer than `seconds`. UsageError: the method's own, or the guard is closed.
            Unavailable: no worker could be started.
        """
        self._require_open()
        try:
            order = pickle.dumps((call, *words))
        except Exception as error:  # as in `steps`
            raise self._fault(f"could not be sent to its process: {error}", call) from None
        try:
            ready = wait([self._send(0, order)], seconds)
            answer = self._received(0, call) if ready else self._hung(0, seconds, call)
        except BaseException:  # as in `steps`
            self.close()
            raise
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _mean_reward(self, value: Any, call: str) -> float:
        """The mean reward that a method gave.

        Raises:
            StepFault: it is none.
        """
        least, greatest = self.limits.rewards
        if not isinstance(value, int | float) or not least <= value <= greatest:
            raise self._fault(
                f"gave the mean reward {value!r:.100}, which is not in [{least}, {greatest}]", call
            )
        return float(value)

    def _require_open(self) -> None:
        if not self._workers:
            raise UsageError(f"The guarded environment {self.name} is closed.")

    def _send(self, place: int, order: bytes) -> Connection:
        """Give the order to the worker at `place`; one that died while it was idle is replaced and costs nothing."""
        try:
            self._workers[place].orders.send_bytes(order)
        except ConnectionError:
            self._replace(place)
            self._workers[place].orders.send_bytes(order)
        return self._workers[place].orders

    def _received(self, place: int, call: str = "step") -> Any:
        """The answer of the worker at `place`, an exception where there is none."""
        try:
            kind, *rest = json.loads(self._workers[place].orders.recv_bytes(LARGEST_REPLY))
        except (EOFError, OSError, ValueError):  # it died, perhaps while it was writing
            status = self._replace(place)
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            return self._fault(f"ended its process ({how})", call)
        if kind == "step":
            return Step(*rest)
        if kind == "value":
            return rest[0]
        if kind == "refused":
            return UsageError(rest[0])
        what, spent = rest
        if spent:
            self._replace(place)
        return self._fault(f"failed: {what}", call)

    def _hung(self, place: int, seconds: float, call: str = "step") -> StepFault:
        self._replace(place)
        return self._fault(f"took more than {seconds:g} s and was ended", call)

    def _fault(self, what: str, call: str = "step") -> StepFault:
        says = f"{'A step' if call == 'step' else f'{call}()'} of {self.name} {what}."
        return StepFault(
            says.encode(errors="replace").decode()
        )  # a sentence that can be kept, whatever was raised

    def _replace(self, place: int) -> int:
        """End the worker at `place`, start another; the exit status of the old one."""
        worker = self._workers[place]
        worker.orders.close()
        status = -signal.SIGKILL
        try:
            status = int(self._order(str(worker.pid).encode()))
        except (OSError, ValueError):  # the server is gone
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
        self._workers[place] = self._start_worker()
        self.restarts += 1
        return status

    def _start_worker(self) -> _Worker:
        for _ in range(2):
            ours, theirs = socket.socketpair()
            with ours, theirs:
                try:
                    pid = int(self._order(b"start", theirs.fileno()))
                except (OSError, ValueError):  # somebody killed the server
                    self._control.close()
                    self._server.kill()
                    self._server.wait()
                    self._start_server()
                    continue
                return _Worker(pid, Connection(ours.detach()))
        raise Unavailable(
            f"No process could be started for the environment {self.name}; see to memory and process limits."
        )

    def _order(self, message: bytes, *fds: int) -> bytes:
        socket.send_fds(self._control, [message], fds)
        return self._control.recv(64)

    def _start_server(self) -> None:
        self._control, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        self._control.settimeout(_START_SECONDS)
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-c", _SERVER, str(theirs.fileno()), *sys.path],
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        try:
            assert self._server.stdin is not None
            with suppress(BrokenPipeError), self._server.stdin as stdin:
                stdin.write(self._loaded)
            problem = self._control.recv(1000).decode()
        except OSError as error:
            problem = str(error)
        if problem != "ready":
            self._server.kill()
            self.close()
            raise UsageError(
                f"The environment {self.name} cannot be loaded in a process of its own ({problem or 'it ended at once'}); "
                "its class must be importable from a module."
            )


class Environments:
    """Environments by name, each behind a guard that begins when it is first asked for; close it, or use it as a context
    manager."""

    def __init__(self, limits: Limits = _LIMITS, workers: int = 1) -> None:
        self._limits, self._workers = limits, workers
        self._open: dict[str, Guarded] = {}

    def __call__(self, name: str) -> Guarded:
        """Return the environment called `name`.

        Raises:
            UsageError: there is none, or it cannot be loaded in another process. Unavailable: its package is not
                installed, or no process could be started.
        """
        if name not in self._open:
            self._open[name] = Guarded(get(name), self._limits, self._workers)
        return self._open[name]

    def close(self) -> None:
        """End the processes of all of them."""
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
