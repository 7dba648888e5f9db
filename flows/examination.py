"""An agent's figures on held-out tasks that it attempts several times: pass@k, avg@k, turns, tokens, cost, format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flows.context import Context
from flows.parallel import Runner, task_runner
from tasks.core.atomic import write_atomic
from tasks.core.digest import canonical_json, sha256_bytes
from tasks.core.errors import UsageError
from tasks.core.stages import once

_FIGURES = 2  # what they mean; in 1 valid_format was what valid_action is


@dataclass(frozen=True, slots=True)
class Terms:
    """On which environments, how many held-out tasks of each, how many attempts, and how they are sampled."""

    envs: tuple[str, ...]
    tasks: int
    samples: int
    temperature: float
    seed: int


def exams(context: Context, ref: str, terms: Terms) -> list[dict[str, Any]]:
    """Return the arguments of `tasks.evaluation.attempted.Exam` for each environment, as plain values."""
    guard = context.settings.guard
    agent = context.agent(ref).payload
    shared = {
        **asdict(terms),
        "policy": str(context.weights(agent)),
        "batch_rows": context.settings.evaluation.batch_rows,
        "device": context.device(),
        "dtype": context.dtype(),
        "limits": {"seconds": guard.seconds, "memory": guard.memory_mib << 20},
    }
    del shared["envs"]
    return [{**shared, "env": env} for env in terms.envs]


def examine(
    context: Context, ref: str, terms: Terms, workers: int, runner: Runner, address: str | None
) -> dict[str, Any]:
    """Return an agent's figures, measured now or found in the ledger.

    Returns:
        {agent, terms, slices: [as `tasks.evaluation.attempted.sit`], evidence: {path, sha256}, found}.

    Raises:
        UsageError: an environment does not exist, or is named twice. Refused: one could not be attempted.
    """
    from flows.experience import intact
    from tasks.arena.environment import get, verifier_digest

    if not terms.envs or len(set(terms.envs)) < len(terms.envs):
        raise UsageError("Name at least one environment, and each once.")
    if not 0 < terms.temperature < math.inf:
        raise UsageError(f"Attempts need a temperature above 0, not {terms.temperature:g}.")
    agent = context.agent(ref).payload
    inputs = {
        "agent": agent["digest"],
        "figures": _FIGURES,
        "terms": {**asdict(terms), "envs": list(terms.envs)},
        "verifiers": {name: verifier_digest(get(name)) for name in terms.envs},
        "device": [context.device(), context.dtype(), context.settings.evaluation.batch_rows],
        "guard": context.settings.guard.model_dump(mode="json", exclude={"workers"}),
    }

    def work(key: str) -> dict[str, Any]:
        slices = _attempted(context, f"agent/{agent['version']}", terms, workers, runner, address)
        data = canonical_json({"agent": agent["digest"], "slices": slices})
        file = context.workspace.evidence / "exam" / f"{sha256_bytes(data)}.json"
        write_atomic(file, data)
        return {
            "agent": f"agent/{agent['version']}",
            "terms": inputs["terms"],
            "slices": slices,
            "evidence": {"path": context.workspace.relative(file), "sha256": sha256_bytes(data)},
        }

    def stands(outputs: Mapping[str, Any]) -> bool:
        return intact(context, outputs["evidence"])

    outputs, found = once(context.ledger, "exam", inputs, work, stands)
    return {**outputs, "found": found}


def _attempted(
    context: Context, ref: str, terms: Terms, workers: int, runner: Runner, address: str | None
) -> list[dict[str, Any]]:
    from flows.environment import prefect_api

    with prefect_api(context.workspace) as api:
        import tasks.evaluation.attempted  # noqa: F401 - torch takes seconds to import; the server starts meanwhile
        from flows.exam import exam

        api.wait()
        flow = exam.with_options(task_runner=task_runner(runner, workers, address))
        asked = {**asdict(terms), "envs": list(terms.envs)}
        slices: list[dict[str, Any]] = flow(str(context.workspace.root), ref, asked, list(context.overrides))
        return slices
