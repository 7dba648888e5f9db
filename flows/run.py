"""Run a whole cycle: look first whether there is anything to do, then hand it to the Prefect flow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flows import progress
from flows.context import Context
from flows.cycle import CollectMode, Cycle, Finished, finish, open_cycle, run_stage
from flows.keys import ready, sign_head
from flows.registry import reconcile_registry
from flows.service import rehearse
from tasks.core.errors import Conflict, Refused
from tasks.core.stages import STAGES


def plan(
    context: Context,
    collect: CollectMode,
    dataset: str | None,
    force: bool = False,
    start: str | None = None,
) -> Cycle | dict[str, Any]:
    """Return the cycle to run, or the result of the one that already answered the same question."""
    found = open_cycle(context, collect, dataset, force, start)
    if isinstance(found, Finished):
        return {**found.entry.payload, "found": True}
    return found


def run_retrain(
    context: Context,
    collect: CollectMode,
    dataset: str | None = None,
    force: bool = False,
    start: str | None = None,
) -> dict[str, Any]:
    """Run the cycle through Prefect, unless there is nothing to do (then Prefect is not even imported).

    Raises:
        Conflict: another process runs a cycle in this workspace.
    """
    from flows.registry import settle

    ready(context)
    with context.exclusive("a cycle"):
        settle(context)
        planned = plan(context, collect, dataset, force, start)
    if isinstance(planned, dict):
        return planned
    from flows.environment import prefect_api

    with prefect_api(context.workspace) as api:
        import tasks.rollout.rollout  # noqa: F401 - torch takes seconds to import; the server starts meanwhile
        from flows.retrain import retrain

        api.wait()
        root, overrides = str(context.workspace.root), list(context.overrides)
        result: dict[str, Any] = retrain(root, collect, dataset, overrides, start)
        return result


def run_stages(context: Context, cycle: Cycle, run: Any = run_stage) -> dict[str, Any]:
    """Run all stages of a cycle in order by `run(context, cycle, stage)` and record how it ended."""
    from flows.judging import check_evaluation, tell_memories
    from flows.training import check_settings

    check_settings(context)
    check_evaluation(context)
    tell_memories(context)
    reconcile_registry(context)  # what was changed in MLflow by hand is recorded before a cycle writes there
    ready(context)  # hours of training must not end before a key that is missing
    receipts: dict[str, dict[str, Any]] = {}
    say = progress.current().say
    try:
        for number, stage in enumerate(STAGES, start=1):
            say(f"[bold]{number}/{len(STAGES)} {stage}[/]")
            receipts[stage] = run(context, cycle, stage)
            line = summary(stage, receipts[stage])
            if line:
                say(f"    {line}")
    except (Refused, Conflict) as error:
        outcome = "refused" if isinstance(error, Refused) else "stale"
        finish(
            context,
            cycle.key,
            outcome,
            str(error),
            dataset=receipts.get("seal", {}).get("root", cycle.dataset),
        )
        raise
    return close_cycle(context, cycle, receipts)


def close_cycle(context: Context, cycle: Cycle, receipts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Record how a cycle ended whose stages have all run."""
    ended = receipts["promote"]
    details = {
        "dataset": receipts["seal"]["root"],
        "candidate": receipts["register"]["version"],
        "champion": cycle.champion,
        **({} if cycle.start == cycle.champion else {"start": cycle.start}),
        "evaluation": {"slices": receipts["evaluate"]["slices"]},
        "decision_record": receipts["decide"]["record"],
        "run": receipts["train"]["key"],
    }
    outcome = "promoted" if ended["promoted"] else "held"
    _rehearse(context, receipts["train"]["mlflow_run"])
    entry = finish(context, cycle.key, outcome, ended["reason"], **details)
    sign_head(context, entry)
    return {**entry.payload, "found": False}


def _rehearse(context: Context, run_id: str | None) -> None:
    """Try out the way back; what comes of it is shown, and is no reason to lose a cycle."""
    say = progress.current().say
    try:
        found = rehearse(context, always=False)
        if found["agent"] is None:
            return
        times = {name: found[name] for name in ("load_seconds", "answer_seconds", "total_seconds")}
        if run_id is not None:
            values = {"ok": float(found["ok"]), **times}
            context.registry.note(run_id, {f"rollback/{name}": value for name, value in values.items()})
    except Exception as error:  # MLflow's own among them; the promotion has happened and must be recorded
        say(f"    the way back was not rehearsed: {error}; try `forebay rehearse`")
        return
    ready_in = f"would serve after {found['total_seconds']:.1f} s" if found["ok"] else found["problem"]
    say(f"    a rollback to {found['agent']} {ready_in}")


def summary(stage: str, outputs: dict[str, Any]) -> str:
    """Return one line about what a stage gave."""
    from flows.show import baselines

    if stage == "collect" and "environments" in outputs:
        rows = (
            f"{name} {row['reward']:.3f} ({baselines(row)})" for name, row in outputs["environments"].items()
        )
        return f"{outputs['episodes']} episodes by agent/{outputs['version']}; mean reward {', '.join(rows)}"
    if stage == "seal":
        return f"{outputs['name']}/v{outputs['version']}, {outputs['rows']} episodes, root {outputs['root'][:12]}"
    if stage == "validate":
        return f"{outputs['verdict']}: {len(outputs['checks'])} checks"
    if stage == "reward":
        accuracy = outputs["accuracy"]
        return f"{outputs['verdict']}: right on {accuracy['estimate']:.3f} of {accuracy['n']} held-out pairs"
    if stage == "train":
        return f"{outputs['steps']} steps ({outputs['stop_reason']}), checkpoint {outputs['digest'][:12]}"
    if stage == "register":
        return f"agent/{outputs['version']}"
    if stage == "evaluate":
        rows = (
            f"{name} {row['champion']:.3f} → {row['candidate']:.3f} ({baselines(row)})"
            for name, row in outputs["slices"].items()
        )
        answered, planned = outputs["slices"]["all"]["n"], outputs.get("planned")
        early = f" (stopped after {answered} of {planned} tasks)" if planned not in (None, answered) else ""
        return ", ".join(rows) + early
    if stage == "decide":
        return str(outputs["verdict"])
    return str(outputs.get("reason") or outputs.get("skipped") or "")
