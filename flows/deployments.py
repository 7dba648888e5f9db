"""Schedules: what the workspace wants (`schedules.yaml`), made true on its Prefect server.

The file is the authority. `forebay schedule` changes it and, when the servers are up, the server with it; the
runner makes the server follow the file whenever it starts. Applying twice changes nothing.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import time
import urllib.request
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self
from zoneinfo import available_timezones

import yaml
from pydantic import Field, model_validator

from flows.environment import configure, request
from flows.processes import running_url
from tasks.core.atomic import write_atomic
from tasks.core.digest import digest_json, sha256_bytes
from tasks.core.errors import NotFound, Unavailable, UsageError
from tasks.core.locks import file_lock
from tasks.core.settings import Section, build_section
from tasks.core.workspace import Workspace

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.automations import AutomationCore
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.actions import DeploymentScheduleUpdate
    from prefect.client.schemas.objects import DeploymentSchedule
    from prefect.client.schemas.responses import DeploymentResponse
    from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule

FLOWS: Mapping[str, str] = {
    "collect": "flows.collect:collect",
    "retrain": "flows.retrain:retrain",
    "validate_reward": "flows.validate_reward:validate_reward",
    "promote": "flows.promote:promote",
    "audit": "flows.audit:audit",
    "reconcile": "flows.watch:reconcile",
    "canary": "flows.canary:canary",
    "rehearse": "flows.rehearse:rehearse",
    "answer": "flows.answer:answer",
}
"""What the runner serves: {flow: "module:function"}."""

DEPLOYMENT = "forebay"
"""Name of every deployment; `retrain/forebay` runs the flow `retrain`."""

SEALED = "forebay.dataset.sealed"
DRIFT = "forebay.registry.drift"
_EVENTS = {"dataset.sealed": SEALED}
# What an event tells the flow that it starts. New experience would be sealed, and start the flow again.
_FROM_EVENT = {"retrain": {"dataset": "{{ event.payload.root }}", "collect": "never"}}
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_EPOCH = datetime(2024, 1, 1, tzinfo=UTC)
_EVENT_SECONDS = 10
_LISTENING_SECONDS = 1.0
_TAG = "forebay"
_HEAD = "# Kept by `forebay schedule` and `forebay unschedule`; `forebay up` applies what is edited here.\n"


class Schedule(Section):
    """When a flow runs by itself: by the clock (cron or interval) or upon an event."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    flow: Literal[
        "collect",
        "retrain",
        "validate_reward",
        "promote",
        "audit",
        "reconcile",
        "canary",
        "rehearse",
        "answer",
    ]
    cron: str | None = None
    interval: str | None = Field(
        None, pattern=r"^[1-9][0-9]*[smhd]$", description="30m, 6h, 1d: counted from 2024-01-01 UTC"
    )
    on: Literal["dataset.sealed"] | None = None
    timezone: str = "UTC"
    parameters: dict[str, Any] = Field(default_factory=dict)
    overrides: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_trigger(self) -> Self:
        if sum(value is not None for value in (self.cron, self.interval, self.on)) != 1:
            raise ValueError("give exactly one of cron, interval and on")
        return self

    @property
    def when(self) -> str:
        """Say when, for a person."""
        if self.cron is not None:
            return f'cron "{self.cron}" ({self.timezone})'
        return f"every {self.interval}" if self.interval is not None else f"on {self.on}"

    def flow_parameters(self) -> dict[str, Any]:
        """Return what the flow is called with beside its workspace."""
        from_event = _FROM_EVENT.get(self.flow, {}) if self.on else {}
        overrides = {"overrides": list(self.overrides)} if self.overrides else {}
        return {**from_event, **self.parameters, **overrides}


def schedules(workspace: Workspace) -> list[Schedule]:
    """Return the schedules of the workspace, by name.

    Raises:
        UsageError: `schedules.yaml` was edited into something that is none.
    """
    path = _path(workspace)
    try:
        rows = yaml.safe_load(path.read_text()) if path.exists() else {}
    except yaml.YAMLError as error:
        raise UsageError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(rows or {}, dict) or not all(isinstance(row, dict) for row in (rows or {}).values()):
        raise UsageError(
            f"{path.name} must give each schedule a name and, below it, a flow and when it runs."
        )
    found = (
        build_section(Schedule, {"name": n, **row}, f"{path.name}: {n}") for n, row in (rows or {}).items()
    )
    return sorted(found, key=lambda s: s.name)


def schedule(
    workspace: Workspace,
    flow: str,
    *,
    cron: str | None = None,
    interval: str | None = None,
    on: str | None = None,
    timezone: str = "UTC",
    parameters: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    name: str | None = None,
) -> str:
    """Let a flow run by itself; the same name replaces what it meant before. Return a sentence for a person.

    Args:
        flow: key of `FLOWS`.
        interval: a number and s, m, h or d.
        on: "dataset.sealed".
        parameters: of the flow, beside its workspace.
        overrides: settings as section.key=value, for these runs only.
        name: by default the flow and the kind of trigger, as in `retrain-cron`.

    Raises:
        UsageError: a flow, event, timezone, cron expression, parameter or setting that is none.
        Unavailable: the servers are up and refuse it; the file keeps the wish.
    """
    if flow not in FLOWS:
        raise UsageError(f"There is no flow `{flow}`; known: {', '.join(FLOWS)}.")
    if on is not None and on not in _EVENTS:
        raise UsageError(f"There is no event `{on}`; known: {', '.join(_EVENTS)}.")
    if sum(value is not None for value in (cron, interval, on)) != 1:
        raise UsageError(f"Say when `{flow}` runs: give exactly one of --cron, --interval and --on.")
    kind = "cron" if cron is not None else "interval" if interval is not None else str(on).replace(".", "-")
    values = {
        "name": name or f"{flow}-{kind}",
        "flow": flow,
        "cron": cron,
        "interval": interval,
        "on": on,
        "timezone": timezone,
        "parameters": dict(parameters or {}),
        "overrides": tuple(overrides),
    }
    wanted = build_section(Schedule, values, "schedule")
    _clock(wanted)
    _require_callable(workspace, wanted)
    with _editing(workspace):
        kept = [s for s in schedules(workspace) if s.name != wanted.name]
        _write(workspace, [*kept, wanted])
        up = apply_if_up(workspace)
    waits = "" if up else ", once `forebay up` has started the servers"
    return f"Schedule {wanted.name}: {flow} runs {wanted.when}{waits}."


def unschedule(workspace: Workspace, name: str) -> str:
    """Remove a schedule. Return a sentence for a person.

    Raises:
        NotFound: there is none of that name; the known ones are listed.
    """
    with _editing(workspace):
        found = schedules(workspace)
        if name not in {s.name for s in found}:
            known = ", ".join(s.name for s in found) or "none"
            raise NotFound(f"There is no schedule `{name}`; known: {known}.")
        _write(workspace, [s for s in found if s.name != name])
        apply_if_up(workspace)
    return f"Schedule {name} is removed."


def emit_sealed(workspace: Workspace, root: str, name: str, version: int) -> str:
    """Tell the server that a dataset was sealed; return a sentence about it. Never fails: the seal stands."""
    resource = (_resource(workspace, name), f"{name}/v{version}")
    try:
        told = emit(workspace, SEALED, resource, {"root": root, "name": name, "version": version})
    except OSError as error:
        return (
            f"The Prefect server was not told of {name}/v{version} ({error}); `forebay retrain` trains on it."
        )
    if not told:
        return f"The servers are down: nothing was told of {name}/v{version}; `forebay retrain` trains on it."
    return f"The Prefect server knows that {name}/v{version} is sealed."


def emit(workspace: Workspace, event: str, resource: tuple[str, str], payload: Mapping[str, Any]) -> bool:
    """Send an event about `resource` (its id and name) to the server of the workspace; False where none runs.

    Raises:
        OSError: the server does not take it.
    """
    url = running_url(workspace, "prefect")
    if url is None:
        return False
    value = {
        "id": str(uuid.uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": event,
        "resource": {"prefect.resource.id": resource[0], "prefect.resource.name": resource[1]},
        "payload": dict(payload),
    }
    headers = {"Content-Type": "application/json"}
    request(
        urllib.request.Request(f"{url}/api/events", json.dumps([value]).encode(), headers), _EVENT_SECONDS
    )
    return True


def emit_drift(workspace: Workspace, office: str, says: Sequence[str]) -> None:
    """Tell the server, if there is one, that somebody changed the registry. Never fails: the ledger has it."""
    with suppress(OSError):
        emit(
            workspace,
            DRIFT,
            (_resource(workspace, office, "registry"), f"registry of {office}"),
            {"found": list(says)},
        )


def start_run(workspace: Workspace, flow: str, parameters: Mapping[str, Any]) -> str | None:
    """Let the runner run a flow now; return the name of the run, None where no server or runner serves it.

    Raises:
        Unavailable: the server runs and does not take it.
    """
    url = running_url(workspace, "prefect")
    if url is None:
        return None
    configure(workspace, f"{url}/api")
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    try:
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name(f"{flow}/{DEPLOYMENT}")
            values = {"workspace": str(workspace.root), **parameters}
            return str(client.create_flow_run_from_deployment(deployment.id, parameters=values).name)
    except ObjectNotFound:
        return None
    except httpx.HTTPError as error:
        reason = " ".join(str(error).split())
        raise Unavailable(f"The Prefect server did not take the run ({reason}).") from None


def load(target: str) -> Flow[..., Any]:
    """Return the flow that "module:function" names."""
    module, _, name = target.partition(":")
    found: Flow[..., Any] = getattr(importlib.import_module(module), name)
    return found


def apply(workspace: Workspace, client: SyncPrefectClient) -> None:
    """Make schedules and automations on the server those of `schedules.yaml`; other automations stay."""
    by_flow: dict[str, list[Schedule]] = {}
    for wanted in schedules(workspace):
        by_flow.setdefault(wanted.flow, []).append(wanted)
    deployments = {d.flow_id: d for d in client.read_deployments() if d.name == DEPLOYMENT}
    automations: dict[str, AutomationCore] = {}
    for flow_id, deployment in deployments.items():
        flow = client.read_flow(flow_id).name
        _apply_clocks(client, deployment, [s for s in by_flow.get(flow, []) if not s.on])
        automations |= {s.name: _automation(workspace, s, deployment) for s in by_flow.get(flow, []) if s.on}
    _apply_automations(client, automations.values())


def _require_callable(workspace: Workspace, wanted: Schedule) -> None:
    """Refuse parameters and overrides that would only fail when the flow runs, at night."""
    from prefect.exceptions import ParameterTypeError

    from flows.settings import Settings

    if wanted.overrides:
        Settings.load(workspace.params, wanted.overrides)
    flow = load(FLOWS[wanted.flow])
    values = {"workspace": str(workspace.root), **wanted.flow_parameters()}
    try:
        inspect.signature(flow.fn).bind(**values)
        flow.validate_parameters(values)
    except TypeError as error:
        raise UsageError(f"Flow `{wanted.flow}`: {error}.") from None
    except ParameterTypeError as error:
        raise UsageError(f"Flow `{wanted.flow}`: {' '.join(str(error).split())}.") from None


def _apply_clocks(
    client: SyncPrefectClient, deployment: DeploymentResponse, wanted: Sequence[Schedule]
) -> None:
    from prefect.client.schemas.actions import DeploymentScheduleUpdate, DeploymentUpdate

    desired = {
        s.name: DeploymentScheduleUpdate(
            schedule=_clock(s), active=True, parameters=s.flow_parameters(), slug=s.name
        )
        for s in wanted
    }
    kept = set()
    for there in client.read_deployment_schedules(deployment.id):
        if there.slug in desired and _facts(there) == _facts(desired[there.slug]):
            kept.add(there.slug)
        else:
            client.delete_deployment_schedule(deployment.id, there.id)
    if kept != set(desired):
        client.update_deployment(deployment.id, DeploymentUpdate(schedules=list(desired.values())))


def _facts(there: DeploymentSchedule | DeploymentScheduleUpdate) -> dict[str, Any]:
    return there.model_dump(mode="json", include={"schedule", "active", "parameters"})


def _clock(wanted: Schedule) -> CronSchedule | IntervalSchedule | None:
    """Return the schedule in Prefect's terms, None for an event.

    Raises:
        UsageError: the cron expression or the timezone is none.
    """
    from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
    from pydantic import ValidationError

    if wanted.timezone not in available_timezones():
        near = difflib.get_close_matches(wanted.timezone, available_timezones(), n=1)
        hint = f"did you mean `{near[0]}`?" if near else "write an IANA name such as Europe/Vienna."
        raise UsageError(f"There is no timezone `{wanted.timezone}`; {hint}")
    if wanted.interval is not None:
        step = timedelta(**{_UNITS[wanted.interval[-1]]: int(wanted.interval[:-1])})
        return IntervalSchedule(interval=step, anchor_date=_EPOCH, timezone=wanted.timezone)
    if wanted.cron is None:
        return None
    try:
        return CronSchedule(cron=wanted.cron, timezone=wanted.timezone)
    except ValidationError:
        raise UsageError(
            f'"{wanted.cron}" is not a cron expression; write minute, hour, day, month and day of week, '
            'as in "0 3 * * *" for three in the morning.'
        ) from None


def _automation(workspace: Workspace, wanted: Schedule, deployment: DeploymentResponse) -> AutomationCore:
    from prefect.automations import AutomationCore, EventTrigger, Posture, RunDeployment

    assert wanted.on is not None
    trigger = EventTrigger(
        expect={_EVENTS[wanted.on]},
        match={"prefect.resource.id": _resource(workspace, "*")},
        posture=Posture.Reactive,
        threshold=1,
    )
    action = RunDeployment(
        source="selected",
        deployment_id=deployment.id,
        parameters=wanted.flow_parameters(),
        job_variables=None,
    )
    definition = digest_json([wanted.model_dump(mode="json"), _resource(workspace, "*"), str(deployment.id)])
    return AutomationCore(
        name=wanted.name,
        description=f"Kept by Forebay from schedules.yaml; definition {definition}",
        tags=[_TAG],
        trigger=trigger,
        actions=[action],
    )


def _apply_automations(client: SyncPrefectClient, wanted: Iterable[AutomationCore]) -> None:
    missing = {a.description: a for a in wanted}
    for there in client.read_automations():
        if _TAG not in there.tags:
            continue
        if there.enabled and there.description in missing:
            del missing[there.description]
        else:
            client.delete_automation(there.id)
    for automation in missing.values():
        client.create_automation(automation)
    if missing:  # the server answers before it listens, and an event in between would be lost
        time.sleep(_LISTENING_SECONDS)


def apply_if_up(workspace: Workspace) -> bool:
    """Apply `schedules.yaml` if the server runs; tell whether it does.

    Raises:
        Unavailable: the server runs and does not take it.
    """
    url = running_url(workspace, "prefect")
    if url is None:
        return False
    configure(workspace, f"{url}/api")
    import httpx
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            apply(workspace, client)
    except httpx.HTTPError as error:
        reason = " ".join(str(error).split())
        raise Unavailable(
            f"schedules.yaml is written, but the Prefect server did not take it ({reason}); "
            "`forebay down` and `forebay up` apply it again."
        ) from None
    return True


def _resource(workspace: Workspace, name: str, kind: str = "dataset") -> str:
    """Return the event resource of a dataset or another thing; `*` stands for any of the workspace."""
    return f"forebay.{kind}.{sha256_bytes(str(workspace.root).encode())[:12]}.{name}"


def _path(workspace: Workspace) -> Path:
    return workspace.root / "schedules.yaml"


def _write(workspace: Workspace, wanted: Sequence[Schedule]) -> None:
    ordered = sorted(wanted, key=lambda s: s.name)
    rows = {s.name: s.model_dump(mode="json", exclude={"name"}, exclude_defaults=True) for s in ordered}
    write_atomic(_path(workspace), (_HEAD + yaml.safe_dump(rows, sort_keys=False)).encode())


def _editing(workspace: Workspace) -> AbstractContextManager[None]:
    what = f"the schedules of {workspace.root}"
    return file_lock(workspace.locks / "schedules.lock", timeout=60, what=what)
