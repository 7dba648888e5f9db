"""The runner: registers the deployments, makes the server follow `schedules.yaml`, and runs what is due.

Started by `forebay up` as `python -m flows.runner WORKSPACE NAME=MODULE:FUNCTION …`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import (
    ConcurrencyLimitConfig,
    ConcurrencyLimitStrategy,
    FlowRun,
    State,
    StateType,
)
from prefect.runner import Runner
from prefect.settings import PREFECT_API_URL
from prefect.states import Crashed
from prefect.types.entrypoint import EntrypointType

from flows.deployments import DEPLOYMENT, apply, load
from flows.environment import get
from flows.processes import ready_mark
from tasks.core.atomic import write_atomic
from tasks.core.errors import ForebayError
from tasks.core.workspace import Workspace

# Polling is one request on loopback: often enough that an event does not seem to be lost.
_POLL_SECONDS = 3
_SERVER_SECONDS = 180
# One run of each flow at a time; the workspace's own lock stays the authority, this keeps the queue in order.
_ONE_AT_A_TIME = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE)
_PAGE = 200
_CUT_OFF = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


def settle(client: SyncPrefectClient) -> None:
    """Bring the books in order that the last runner left, before anything runs.

    A run that was cut off is Crashed, which frees its place; of the runs of a deployment that came due while
    nothing ran, only the newest is made up for.
    """
    cut_off: State[None] = Crashed(message="The runner was stopped while this run was active.")
    for run in _runs(client, _CUT_OFF):
        client.set_flow_run_state(run.id, cut_off)
    now = datetime.now(UTC)
    due = [r for r in _runs(client, [StateType.SCHEDULED]) if r.auto_scheduled and _due(r) < now]
    due.sort(key=lambda r: (str(r.deployment_id), _due(r)))
    for _, missed in groupby(due, key=lambda r: r.deployment_id):
        for run in list(missed)[:-1]:
            client.delete_flow_run(run.id)


def _due(run: FlowRun) -> datetime:
    return run.expected_start_time or datetime.max.replace(tzinfo=UTC)


def _runs(client: SyncPrefectClient, states: Sequence[StateType]) -> list[FlowRun]:
    """Return the runs of deployments in those states; what a person started by hand is not the runner's."""
    values = {"state": {"type": {"any_": list(states)}}, "deployment_id": {"is_null_": False}}
    wanted = FlowRunFilter.model_validate(values)
    found: list[FlowRun] = []
    while page := client.read_flow_runs(flow_run_filter=wanted, limit=_PAGE, offset=len(found)):
        found += page
    return found


async def serve(workspace: Workspace, flows: Mapping[str, str]) -> None:
    """Serve the flows until SIGTERM."""
    runner = Runner(name="forebay", query_seconds=_POLL_SECONDS, pause_on_shutdown=False)
    for target in flows.values():
        deployment = await load(target).ato_deployment(
            name=DEPLOYMENT,
            parameters={"workspace": str(workspace.root)},
            concurrency_limit=_ONE_AT_A_TIME,
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        await runner.aadd_deployment(deployment)
    with get_client(sync_client=True) as client:
        settle(client)
        apply(workspace, client)
    write_atomic(ready_mark(workspace), str(os.getpid()).encode())
    await runner.start()


def _await_server(url: str) -> None:
    deadline = time.monotonic() + _SERVER_SECONDS
    while True:
        try:
            get(f"{url}/health", timeout=2)
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def main(root: str, *flows: str) -> None:
    """Run the runner for the workspace at `root`."""
    url = PREFECT_API_URL.value()
    assert url is not None
    _await_server(url)
    asyncio.run(serve(Workspace(Path(root)), dict(flow.split("=", 1) for flow in flows)))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ForebayError as error:
        sys.exit(str(error))
