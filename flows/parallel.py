"""Where the tasks of a flow run side by side: processes of this machine, or a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from flows.progress import Report
from tasks.core.errors import ForebayError, Refused, Unavailable, UsageError

_WATCHED = threading.Event()
_INTERRUPTED = threading.Event()  # this process is about to end
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

    One that is killed, for want of memory say, takes nothing else with it. The processes are forked from a server that
    has imported `work` already.

    Args:
        work: a function of a module; it and `args` are pickled.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, work.__module__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, work, args))
    process.start()
    theirs.close()
    if _INTERRUPTED.is_set():
        process.kill()
    with ours:
        try:
            result: dict[str, Any] = ours.recv()
        except EOFError:
            process.join()
            result = {"error": f"Its process ended with {_ending(process.exitcode)}."}
    process.join()
    return result


def _work(pipe: Connection, work: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # whoever waits for the work is interrupted too, and ends this process
    end_with_parent()
    try:
        result = work(*args)
    except Exception as error:  # an environment of one's own may raise anything, and its rewards be anything
        told = str(error) if isinstance(error, ForebayError) else f"{type(error).__name__}: {error}"
        result = {"error": told}
    pipe.send(result)


def _ending(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def gathered(
    futures: Mapping[str, Any], report: Report, unit: str, says: Callable[[Mapping[str, Any]], str]
) -> dict[str, dict[str, Any]]:
    """Wait for what `isolated` returned in each of Prefect's `futures`; the results by the same names in the same order.

    Args:
        unit: what is counted, for the progress bar; `says` tells of a result.
    """
    from prefect.futures import as_completed

    names = {future: name for name, future in futures.items()}
    done: dict[str, dict[str, Any]] = {}
    report(0, len(futures), unit)
    with _ended_if_interrupted():
        for future in as_completed(list(names)):
            name = names[future]
            try:
                one = done[name] = future.result()
            except Exception as error:  # a machine of a cluster that went away
                one = done[name] = {"error": f"Its process ended: {type(error).__name__}: {error}"}
            report(len(done), len(futures), f"{name}: {one['error']}" if "error" in one else says(one))
    return {name: done[name] for name in futures}


@contextmanager
def _ended_if_interrupted() -> Iterator[None]:
    """After Ctrl-C or SIGTERM nobody waits for the work, as Prefect would: what was done is taken up again where it was."""
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
