"""What an environment's tasks give without any skill, which every score of an agent has to be held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.arena.environment import Environment, Task
from tasks.arena.guarded import StepFault
from tasks.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Floor:
    """The mean rewards of the best constant action and of a blind choice.

    None where the environment did not live through it; then `error` says why.
    """

    tasks: int
    constant: float | None
    constant_action: str | None
    random: float | None
    error: str = ""


def floor_of(env: Environment, tasks: Sequence[Task], seed: int) -> Floor:
    """Measure both baselines on `tasks`; a guarded `env` that fails, or has none to give, costs its floor and no more.

    Args:
        seed: of the blind choices.
    """
    if not tasks:
        return Floor(0, None, None, None, "there are no tasks to measure them on.")
    try:
        action, constant = env.constant_baseline(tasks)
        return Floor(len(tasks), constant, action, env.random_baseline(tasks, seed))
    except (StepFault, UsageError) as fault:
        return Floor(len(tasks), None, None, None, str(fault))


def beside(constant: float | None, random: float | None, error: str) -> str:
    """Write the baselines as they stand beside a score; records of earlier releases have no `random`."""
    if constant is None:
        return f"no baselines: {error}" if error else "no baselines"
    return f"constant {constant:.3f}" + ("" if random is None else f", random {random:.3f}")
