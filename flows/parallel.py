"""Where the tasks of a flow run side by side: processes of this machine, or a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any, Literal

from flows.progress import Report
from tasks.core.errors import ForebayError, Refused, Unavailable, UsageError

_WATCHED = threading.Event()
_INTERRUPTED = threading.Event()
_REAPING = threading.Lock()  # starting a process looks after all of them, and how one ended is told once
_END_SECONDS = 10.0  # for a process that has done its work
Runner = Literal["processes", "ray"]


def task_runner(runner: Runner, workers: int, address: str | None = None) -> Any:
    """Return Prefect's runner for `workers` tasks at once.

    Args:
        address: of a Ray cluster, as ray://host:10001; None starts one here.

    Raises:
        Unavailable: Ray is not installed. UsageError: an address without Ray.
    """
    if runner == "processes":
        if address is not None:
            raise UsageError("--ray-address goes with --runner ray.")
        from prefect.task_runners import ThreadPoolTaskRunner

        return ThreadPoolTaskRunner(max_workers=workers)  # each thread waits for an `isolated` process
    try:
        from prefect_ray import RayTaskRunner
    except ImportError:
        raise Unavailable("Ray is not installed; install forebay[ray], or leave --runner out.") from None
    if address is not None:
        return RayTaskRunner(address=address)
    return RayTaskRunner(init_kwargs={"num_cpus": workers, "include_dashboard": False})


def isolated(work: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """What `work(*args)` returns, in a process of its own that ends with this one; a failure comes back as {error: sentence}.

    One that is killed, for want of memory say, takes nothing else with it.

    Args:
        work: a function of a module; it and `args` are pickled.
    """
    if _INTERRUPTED.is_set():
        return {"error": "It was not begun: the flow was interrupted."}
    ours, theirs = multiprocessing.Pipe(duplex=False)
    with _REAPING:
        context = _server(work.__module__)
        process = context.Process(target=_work, args=(theirs, work, args, dict(os.environ)))
    try:
        with _REAPING:
            process.start()
        theirs.close()
        if _INTERRUPTED.is_set():
            process.kill()
        result: dict[str, Any] = ours.recv()
        wait([process.sentinel], _END_SECONDS)  # a thread of the work may go on
    except (EOFError, OSError):
        wait([process.sentinel], _END_SECONDS)
        with _REAPING:
            result = {"error": f"Its process ended with {_ending(process.exitcode)}."}
    finally:
        ours.close()
        theirs.close()
        with _REAPING:
            if process.pid is not None:
                process.kill()
                process.join()
    return result


def _server(module: str) -> ForkServerContext:
    """Start what forks the processes, unless it runs: it has imported the first `module`, from where this process imports."""
    context = multiprocessing.get_context("forkserver")
    # Python 3.11 does not tell it the path, and it would import what lies in the working directory.
    path = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    before = {name: os.environ.get(name) for name in path}
    os.environ |= path
    try:
        context.set_forkserver_preload([__name__, module])
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def _work(
    pipe: Connection,
    work: Callable[..., dict[str, Any]],
    args: tuple[Any, ...],
    environment: Mapping[str, str],
) -> None:
    # Whoever waits for the work is interrupted too, and ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(environment)
    end_with_parent()
    try:
        pipe.send(work(*args))
    except Exception as error:  # an environment of one's own may raise anything, and its rewards be anything
        told = str(error) if isinstance(error, ForebayError) else f"{type(error).__name__}: {error}"
        pipe.send({"error": told})


def _ending(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def gathered(
    jobs: Mapping[str, Callable[[], Any]],
    report: Report,
    unit: str,
    says: Callable[[Mapping[str, Any]], str],
) -> dict[str, dict[str, Any]]:
    """Submit `jobs` and wait for what `isolated` returned in each; the results by the same names in the same order.

    Args:
        jobs: each submits one of Prefect's tasks and returns its future.
        unit: what is counted, for the progress bar; `says` tells of a result.
    """
    from prefect.futures import as_completed

    done: dict[str, dict[str, Any]] = {}
    with _ended_if_interrupted():
        report(0, len(jobs), unit)
        names = {submit(): name for name, submit in jobs.items()}
        for future in as_completed(list(names)):
            name = names[future]
            try:
                one = done[name] = future.result()
            except Exception as error:  # a machine of a cluster that went away
                one = done[name] = {"error": f"Its process ended: {type(error).__name__}: {error}"}
            report(len(done), len(jobs), f"{name}: {one['error']}" if "error" in one else says(one))
    return {name: done[name] for name in jobs}


@contextmanager
def _ended_if_interrupted() -> Iterator[None]:
    """After Ctrl-C or SIGTERM nobody waits for the work, as Prefect would: what was done is taken up again where it was."""
    _INTERRUPTED.clear()
    try:
        yield
    except BaseException:
        _INTERRUPTED.set()
        for process in multiprocessing.active_children():
            process.kill()
        raise


def require_all(results: Mapping[str, Mapping[str, Any]], unit: str) -> None:
    """Refuse what `gathered` returned unless nothing failed.

    Raises:
        Refused: the sentence is that of the first, and says how many more there are.
    """
    errors = [f"{name}: {one['error']}" for name, one in results.items() if "error" in one]
    if errors:
        more = f" ({len(errors) - 1} more {unit} failed)" if len(errors) > 1 else ""
        raise Refused(f"{errors[0]}{more}")


def end_with_parent() -> None:
    """Let this process end as soon as the one that started it does: a killed flow must not leave workers that hold locks."""
    parent = multiprocessing.parent_process()
    if parent is None or _WATCHED.is_set():
        return
    _WATCHED.set()
    threading.Thread(target=_watch, args=(parent.sentinel,), daemon=True).start()


def _watch(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
