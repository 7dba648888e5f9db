"""A comparison of methods: what is asked, the cells that answer it, and what is kept of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any

from flows import progress
from flows.context import Context
from flows.parallel import Runner, task_runner
from tasks.core.atomic import write_atomic
from tasks.core.digest import canonical_json, digest_json, sha256_bytes
from tasks.core.errors import Conflict, Corrupt, NotFound, Refused, UsageError
from tasks.core.stages import code_digest, lock_digest, once

if TYPE_CHECKING:
    from tasks.arena.floors import Floor
    from tasks.leaderboard.cell import Plan
    from tasks.leaderboard.page import Failure

STAGE = "arena"
_TAG = 5000  # characters that MLflow takes
_GUARDED = {
    "report": "",
    "stop": " A run that begins to collapse is ended.",
    "mask": " A run that begins to collapse goes on with a sequence mask.",
    "raise_kl": " A run that begins to collapse goes on with a larger KL.",
}


@dataclass(frozen=True, slots=True)
class Question:
    """Which methods are compared on which environments, over the seeds 0 .. seeds - 1."""

    envs: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: int


def plans(context: Context, question: Question) -> list[Plan]:
    """Return the cells, the seeds of a method and environment side by side.

    Raises:
        UsageError: a method or an environment does not exist, or one is named twice. Unavailable: a package is missing.
        Refused: the start learnt from revoked data, or nothing may be learnt from an environment.
    """
    from tasks.arena.environment import get, verifier_digest
    from tasks.arena.guarded import Limits
    from tasks.leaderboard.cell import Plan
    from tasks.leaderboard.methods import training_settings
    from tasks.leaderboard.starter import SOURCE as SHOWN
    from tasks.leaderboard.starter import require_demonstrator
    from tasks.lineage.revocation import revoked
    from tasks.rollout.rollout import SOURCE
    from tasks.training.trainer import check

    settings = context.settings.arena
    known = settings.known()
    for what, names in (("method", question.methods), ("environment", question.envs)):
        if not names:
            raise UsageError(f"Name at least one {what}.")
        if len(set(names)) < len(names):
            raise UsageError(f"The {what} {max(names, key=names.count)} is named twice.")
    for name in question.methods:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UsageError(
                f"There is no method {name}; did you mean {near}? `forebay arena methods` lists them."
            )
        check(training_settings(known[name], settings.recipe, name))
    start, code = settings.start.policy, {}
    now = revoked(context.ledger, context.workspace)
    for env in question.envs:
        found = get(env)
        if start == "scratch":
            require_demonstrator(found)
        if any(now.origin(source, found.licence) for source in (SOURCE, SHOWN)):
            raise Refused(
                f"Nothing may be learnt from {env}: its licence ({found.licence}), or all that is sampled here, is revoked; see "
                "`forebay revoke --list`."
            )
        code[env] = digest_json([code_digest(), lock_digest(), verifier_digest(found)])
    agent = None if start == "scratch" else _unflagged(context, start)
    guard = context.settings.guard
    make = partial(
        Plan,
        arena=settings,
        policy=None if agent is None else str(context.weights(agent)),
        policy_digest=None if agent is None else agent["digest"],
        limits=Limits(seconds=guard.seconds, memory=guard.memory_mib << 20),
        device=context.device(),
        dtype=context.dtype(),
        without=tuple(sorted(now.values.get("prompt_sha256", ()))),
    )
    return [
        make(env, name, known[name], seed, code=code[env])
        for env in question.envs
        for name in question.methods
        for seed in range(question.seeds)
    ]


def _unflagged(context: Context, name: str) -> dict[str, Any]:
    """The entry of the agent that all methods start from, unless it learnt from revoked data."""
    from flows.scoring import flag_of

    entry = context.agent(name)
    if why := flag_of(context, entry.subject):
        raise Refused(
            f"{entry.subject} {why}, and every policy of the arena would start from it; set arena.start.policy to another "
            "agent. `forebay revoke --list` says what is revoked and what to train anew."
        )
    return dict(entry.payload)


def require_same(context: Context, question: Question, began: Sequence[Plan]) -> None:
    """Refuse a comparison whose cells would be others now, for data was revoked or reinstated while they ran.

    Raises:
        Conflict: they would. Refused: they could not even begin.
    """
    if [plan.key() for plan in plans(context, question)] != [plan.key() for plan in began]:
        raise Conflict(
            "Prompts were revoked or reinstated while the arena ran; nothing is made of it, run the same command again."
        )


def floors_of(context: Context, envs: Sequence[str]) -> dict[str, Floor]:
    """Return what the held-out tasks of each environment give without any skill."""
    from tasks.arena.floors import floor_of
    from tasks.leaderboard.cell import heldout_of

    floors, wanted = {}, context.settings.arena.judging.tasks
    with context.environments() as environments:
        for name in envs:
            env = environments(name)
            floors[name] = floor_of(env, heldout_of(env, wanted), 0)
    return floors


def run_arena(
    context: Context,
    question: Question,
    workers: int,
    runner: Runner = "processes",
    address: str | None = None,
) -> dict[str, Any]:
    """Return the comparison, run now by Prefect or found in the ledger; see `keep_board` for what it holds.

    Cells that were finished before an interruption are found again; those that failed are tried again.

    Args:
        workers: cells at once.
        runner: processes of this machine, or a Ray cluster.
        address: of the cluster, as ray://host:10001; None starts one here.

    Raises:
        Unavailable: Ray is not installed.
    """
    wanted = plans(context, question)
    found = context.ledger.last("stage.done", _key(wanted, context))
    if found is not None and _stands(context, found.payload["outputs"]):
        return {**found.payload["outputs"], "found": True}
    from flows.environment import prefect_api

    with prefect_api(context.workspace) as api:
        import tasks.leaderboard.cell  # noqa: F401 - torch takes seconds to import; the server starts meanwhile
        from flows.arena import arena

        api.wait()
        flow = arena.with_options(task_runner=task_runner(runner, workers, address))
        root, overrides = str(context.workspace.root), list(context.overrides)
        board: dict[str, Any] = flow(
            root, list(question.methods), list(question.envs), question.seeds, overrides
        )
        return {**board, "found": False}


def keep_board(
    context: Context,
    question: Question,
    results: Sequence[Mapping[str, Any]],
    failures: Sequence[Failure],
    floors: Mapping[str, Floor],
) -> dict[str, Any]:
    """Record a comparison: results as evidence, a page, MLflow runs, an entry in the ledger.

    Args:
        results: of the cells that finished; failures: the others.
        floors: of the environments that have results.

    Returns:
        {question, methods: {name: `Method`}, ranks, unranked: methods, lines, troubles: [as `causes.Trouble`], contrasts:
        [as `causes.Contrast`], floors, starts, tasks_digest: {env: of the held-out tasks}, failures, recipe, results: {path, sha256}, page, cpu_seconds,
        machine}.
    """
    from models.machine import describe
    from tasks.leaderboard.causes import contrasts, troubles
    from tasks.leaderboard.page import Board, leaderboard_page, tasks_asked
    from tasks.leaderboard.ranking import lines, ranks, starts

    known = context.settings.arena.known()
    methods = {name: known[name] for name in question.methods}

    def work(key: str) -> dict[str, Any]:
        _track(context, results, failures)
        cpu_seconds = sum(one["cpu_seconds"] for one in results)
        board = Board(
            ranks(results),
            lines(results),
            floors,
            starts(results),
            results,
            cpu_seconds,
            describe(),
            _recipe(context),
            failures,
            methods,
        )
        data = canonical_json({"results": list(results)})
        file = context.workspace.evidence / "arena" / f"{sha256_bytes(data)}.json"
        write_atomic(file, data)
        page = context.workspace.state / "arena" / f"leaderboard-{key[:12]}.html"
        write_atomic(page, leaderboard_page(board).encode())
        return {
            "question": asdict(question),
            "methods": {name: method.model_dump(mode="json") for name, method in methods.items()},
            "ranks": [asdict(one) for one in board.ranks],
            "unranked": board.unranked(),
            "lines": [asdict(one) for one in board.lines],
            "troubles": [asdict(one) for one in troubles(results)],
            "contrasts": [asdict(one) for one in contrasts(methods, results)],
            "floors": {name: asdict(floor) for name, floor in floors.items()},
            "starts": {name: asdict(start) for name, start in board.starts.items()},
            "tasks_digest": tasks_asked(results),
            "failures": [asdict(one) for one in failures],
            "recipe": board.recipe,
            "results": {"path": context.workspace.relative(file), "sha256": sha256_bytes(data)},
            "page": context.workspace.relative(page),
            "cpu_seconds": round(cpu_seconds, 1),
            "machine": board.machine,
        }

    inputs = _inputs([str(one["key"]) for one in results])
    if failures:  # never what `run_arena` finds: asked again, these cells are tried again
        inputs["failures"] = digest_json([asdict(one) for one in failures])
    outputs, _ = once(context.ledger, STAGE, inputs, work, partial(_stands, context))
    return outputs


def last_board(context: Context) -> dict[str, Any]:
    """Return the newest comparison of this workspace, as `keep_board`; of one that is older than a part, that part is empty.

    Raises:
        NotFound: there is none. Corrupt: its results are not what was recorded.
    """
    from tasks.leaderboard.causes import troubles

    for entry in reversed(list(context.ledger.entries("stage.done"))):
        if entry.payload["stage"] == STAGE:
            board = {
                "failures": [],
                "unranked": [],
                "methods": {},
                "contrasts": [],
                "tasks_digest": {},
                **entry.payload["outputs"],
                "found": True,
            }
            if "troubles" not in board:
                board["troubles"] = [asdict(one) for one in troubles(results_of(context, board))]
            # What they called the form of an action was whether it was possible.
            board["lines"] = [
                {**line, "figures": {"valid_action": line["figures"].get("valid_format"), **line["figures"]}}
                for line in board["lines"]
            ]
            return board
    raise NotFound("Nothing was compared here yet; `forebay arena run` does it.")


def results_of(context: Context, board: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the results that a comparison was made of, from its evidence.

    Raises:
        Corrupt: the file is gone, or is not what was recorded.
    """
    from flows.experience import intact

    file = board["results"]
    if not intact(context, file):
        raise Corrupt(
            f"{file['path']} is not the results that the ledger recorded; `forebay arena run` makes them again."
        )
    found: list[dict[str, Any]] = json.loads((context.workspace.root / file["path"]).read_text())["results"]
    return found


def _key(wanted: Sequence[Plan], context: Context) -> str:
    from tasks.core.stages import stage_key

    return stage_key(STAGE, _inputs([plan.key() for plan in wanted]))


def _inputs(keys: Sequence[str]) -> dict[str, Any]:
    return {"cells": digest_json(list(keys))}


def _stands(context: Context, outputs: Mapping[str, Any]) -> bool:
    from flows.experience import intact

    return intact(context, outputs["results"]) and (context.workspace.root / outputs["page"]).exists()


def _track(context: Context, results: Sequence[Mapping[str, Any]], failures: Sequence[Failure]) -> None:
    """One MLflow run a cell, found again by the cell's key; of one that failed it says why."""
    with progress.current().bar("MLflow") as report:
        for number, one in enumerate(results, start=1):
            tracked = context.registry.run(
                "arena",
                one["key"],
                name=f"{one['method']} {one['env']} {one['seed']}",
                params={name: one[name] for name in ("env", "method", "seed", "stop_reason", "steps")},
            )
            with tracked as run:
                for step, reward in enumerate(one["curve"], start=1):
                    run.log({"reward": reward}, step)
                figures = {
                    f"{name.replace('@', '_at_')}/{when}": figure["estimate"]
                    for when in ("before", "after")
                    for name, figure in one[when]["figures"].items()
                }
                run.log({**figures, "cpu_seconds": one["cpu_seconds"]}, len(one["curve"]))
            report(number, len(results), "runs")
    for failure in failures:
        context.registry.run(
            "arena",
            failure.key,
            name=f"{failure.method} {failure.env} {failure.seed}",
            params={name: getattr(failure, name) for name in ("env", "method", "seed")},
            tags={"error": failure.error[:_TAG]},
        ).close("FAILED")


def _recipe(context: Context) -> str:
    """What all methods share, in a sentence."""
    settings = context.settings.arena
    start, recipe = settings.start, settings.recipe
    shape = f"a model from scratch ({start.layers} layers, {start.hidden} wide)"
    model, shown = (
        (shape, start.demonstrations) if start.policy == "scratch" else (start.policy, start.successes)
    )
    return (
        f"Start: {model}, cloned from {shown} episodes of full reward. {recipe.steps} updates of "
        f"{recipe.groups_per_step} groups of {recipe.group_size} answers, {recipe.updates_per_round} a round; learning rate "
        f"{recipe.learning_rate:g}, KL {recipe.kl:g}, format penalty {recipe.format_penalty:g}. "
        f"{settings.judging.samples} attempts at each held-out task.{_GUARDED[recipe.collapse]}"
    )
