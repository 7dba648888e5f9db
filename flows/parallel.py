"""Where the tasks of a flow run side by side: processes of this machine, or a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.connection import wait
from typing import Any, Literal

from tasks.core.errors import Unavailable, UsageError

_WATCHED = threading.Event()
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
        from prefect.task_runners import ProcessPoolTaskRunner

        return ProcessPoolTaskRunner(max_workers=workers)
    try:
        from prefect_ray import RayTaskRunner
    except ImportError:
        raise Unavailable("Ray is not installed; install forebay[ray], or leave --runner out.") from None
    if address is not None:
        return RayTaskRunner(address=address)
    return RayTaskRunner(init_kwargs={"num_cpus": workers, "include_dashboard": False})


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
