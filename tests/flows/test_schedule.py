"""Schedules: what is refused, what is kept, and what the real servers make of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from flows.deployments import apply_if_up, emit_sealed, schedule, schedules, unschedule
from flows.servers import up
from tasks.core.errors import NotFound, UsageError
from tasks.core.workspace import Workspace
from tests.flows.live import ask, lay, ports, servers, until

ROOT = "ab" * 32


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


# ------------------------------------------------------------------------------------------- nothing started


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        ({"cron": "every day"}, r'"every day" is not a cron expression; write minute, hour'),
        ({"cron": "61 3 * * *"}, r'"61 3 \* \* \*" is not a cron expression'),
        (
            {"cron": "0 3 * * *", "timezone": "Europe/Viena"},
            r"no timezone `Europe/Viena`; did you mean `Europe/Vienna`\?",
        ),
        ({"cron": "0 3 * * *", "timezone": "!"}, r"no timezone `!`; write an IANA name"),
        ({"interval": "soon"}, r"interval: "),
        ({"on": "dataset.seald"}, r"no event `dataset.seald`; known: dataset.sealed"),
        ({}, r"exactly one of --cron, --interval and --on"),
        ({"cron": "0 3 * * *", "on": "dataset.sealed"}, r"exactly one of --cron, --interval and --on"),
        ({"on": "dataset.sealed", "parameters": {"datset": "x"}}, r"Flow `retrain`: .*datset"),
        ({"cron": "0 3 * * *", "parameters": {"collect": "sometimes"}}, r"Flow `retrain`: .*collect"),
    ],
)
def test_a_wish_that_cannot_be_is_one_sentence(
    workspace: Workspace, wish: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence) as raised:
        schedule(workspace, "retrain", **wish)
    assert "\n" not in str(raised.value)
    assert not (workspace.root / "schedules.yaml").exists()


def test_unknown_flow(workspace: Workspace) -> None:
    with pytest.raises(
        UsageError, match="no flow `retain`; known: collect, retrain, validate_reward, promote, audit"
    ):
        schedule(workspace, "retain", cron="0 3 * * *")


def test_a_flow_that_lacks_an_argument_is_refused_now_and_not_at_night(workspace: Workspace) -> None:
    with pytest.raises(UsageError, match=r"Flow `promote`: .*version"):
        schedule(workspace, "promote", cron="0 3 * * *")


def test_an_unknown_setting_is_refused_now_and_not_at_night(workspace: Workspace) -> None:
    workspace.params.write_text("seed: 0\n")
    with pytest.raises(UsageError, match="trainin"):
        schedule(workspace, "retrain", cron="0 3 * * *", overrides=["trainin.steps=3"])


def test_schedules_are_kept_in_a_file_and_the_same_name_replaces(workspace: Workspace) -> None:
    assert schedules(workspace) == []
    line = schedule(workspace, "retrain", cron="0 3 * * *")
    assert line.startswith('Schedule retrain-cron: retrain runs cron "0 3 * * *" (UTC), once `forebay up`')
    schedule(workspace, "retrain", on="dataset.sealed")
    schedule(workspace, "retrain", cron="0 4 * * *", timezone="Europe/Vienna")
    schedule(workspace, "audit", interval="1d", name="audit-daily", parameters={"ref": "agent/1"})
    found = {s.name: s for s in schedules(workspace)}
    assert list(found) == ["audit-daily", "retrain-cron", "retrain-dataset-sealed"]
    assert found["retrain-cron"].cron == "0 4 * * *"
    assert found["retrain-dataset-sealed"].flow_parameters() == {
        "dataset": "{{ event.payload.root }}",
        "collect": "never",
    }
    assert unschedule(workspace, "retrain-cron") == "Schedule retrain-cron is removed."
    with pytest.raises(
        NotFound, match="no schedule `retrain-cron`; known: audit-daily, retrain-dataset-sealed"
    ):
        unschedule(workspace, "retrain-cron")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x: {flow: retrain, crn: '0 3 * * *'}", r"schedules\.yaml: x: .*crn.*did you mean `cron`"),
        ("x: {flow: retrain}", r"schedules\.yaml: x: .*exactly one of cron, interval and on"),
        ("x: [", r"schedules\.yaml is not YAML"),
        ("- x", r"schedules\.yaml must give each schedule a name"),
        ("x: 0 3 * * *", r"schedules\.yaml must give each schedule a name"),
    ],
)
def test_a_file_edited_into_nonsense_is_one_sentence(workspace: Workspace, text: str, sentence: str) -> None:
    (workspace.root / "schedules.yaml").write_text(text)
    for read in (schedules, lambda w: up(w, ports())):
        with pytest.raises(UsageError, match=sentence) as raised:
            read(workspace)
        assert "\n" not in str(raised.value)


def test_a_seal_without_servers_says_so_and_stands(workspace: Workspace) -> None:
    assert "servers are down" in emit_sealed(workspace, ROOT, "main", 3)


# --------------------------------------------------------------------------------------------- real servers


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A workspace that wanted a cron schedule before its servers came up."""
    workspace = lay(tmp_path_factory.mktemp("schedule") / "ws")
    schedule(
        workspace, "retrain", cron="0 3 * * *", timezone="Europe/Vienna", parameters={"collect": "never"}
    )
    with servers(workspace, ports()):
        yield workspace


def runs(workspace: Workspace, flow: str, by: str) -> list[dict[str, Any]]:
    """Return the runs of a deployment that a schedule (SCHEDULE) or an event (AUTOMATION) made."""
    deployments = {d["id"]: d["entrypoint"] for d in ask(workspace, "/deployments/filter")}
    found = ask(workspace, "/flow_runs/filter")
    return [
        run
        for run in found
        if deployments.get(run["deployment_id"], "").endswith(flow)
        and (run["created_by"] or {}).get("type") == by
    ]


@pytest.mark.server
def test_cron_really_yields_scheduled_runs_with_the_pinned_versions(live: Workspace) -> None:
    """With SQLAlchemy 2.1 the scheduler makes none, and says nothing."""
    made = until(lambda: runs(live, "retrain", "SCHEDULE"), 90)
    assert {run["state_type"] for run in made} == {"SCHEDULED"}
    assert all(run["parameters"]["collect"] == "never" for run in made)
    assert all(run["parameters"]["workspace"] == str(live.root) for run in made)
    for run in made:
        due = datetime.fromisoformat(run["expected_start_time"]).astimezone(ZoneInfo("Europe/Vienna"))
        assert (due.hour, due.minute) == (3, 0)
        assert due > datetime.now(UTC)


@pytest.mark.server
def test_a_sealed_dataset_leads_to_a_finished_run_with_nobody_at_the_keyboard(live: Workspace) -> None:
    assert schedule(live, "retrain", on="dataset.sealed").endswith("retrain runs on dataset.sealed.")
    assert "knows that main/v3 is sealed" in emit_sealed(live, ROOT, "main", 3)
    until(lambda: [r["state_type"] for r in runs(live, "retrain", "AUTOMATION")] == ["COMPLETED"], 90)
    (run,) = runs(live, "retrain", "AUTOMATION")
    assert run["parameters"]["dataset"] == ROOT
    seen = json.loads((live.root / "retrain.json").read_text())
    assert seen == {"collect": "never", "dataset": ROOT, "overrides": None}


@pytest.mark.server
def test_applying_again_changes_nothing_and_removing_removes(live: Workspace) -> None:
    def identities() -> set[str]:
        deployments = ask(live, "/deployments/filter")
        clocks = {s["id"] for d in deployments for s in d["schedules"]}
        return clocks | {a["id"] for a in ask(live, "/automations/filter")}

    schedule(live, "collect", interval="6h")
    before = identities()
    assert len(before) == len(schedules(live))
    assert apply_if_up(live)
    assert identities() == before
    for wanted in schedules(live):
        unschedule(live, wanted.name)
    assert identities() == set()
    assert runs(live, "collect", "SCHEDULE") == []
