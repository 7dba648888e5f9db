"""Where the tasks of a flow run side by side: processes of this machine, or a Ray cluster."""

from __future__ import annotations

from typing import Any, Literal

from tasks.core.errors import Unavailable

Runner = Literal["processes", "ray"]


def task_runner(runner: Runner, workers: int, address: str | None = None) -> Any:
    """Return Prefect's runner for `workers` tasks at once.

    Args:
        address: of a Ray cluster, as ray://host:10001; None starts one here.

    Raises:
        Unavailable: Ray is not installed.
    """
    if runner == "processes":
        from prefect.task_runners import ProcessPoolTaskRunner

        return ProcessPoolTaskRunner(max_workers=workers)
    try:
        from prefect_ray import RayTaskRunner
    except ImportError:
        raise Unavailable("Ray is not installed; install forebay[ray], or leave --runner out.") from None
    if address is not None:
        return RayTaskRunner(address=address)
    return RayTaskRunner(init_kwargs={"num_cpus": workers, "include_dashboard": False})
