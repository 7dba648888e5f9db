"""Fresh groups for a training step of an agent of this workspace."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from flows.context import Context
from flows.experience import identity

if TYPE_CHECKING:
    from tasks.arena.environment import Environment
    from tasks.lineage.revocation import Revoked
    from tasks.training.rounds import FreshSource


def fresh_source(
    context: Context,
    agent: Mapping[str, Any],
    key: str,
    created_at: str,
    without: Collection[str] = (),
    environments: Mapping[str, int] | None = None,
    environment: Callable[[str], Environment] | None = None,
) -> FreshSource:
    """Return what collects groups with the model as it stands, as a shard of the run; see `tasks.rollout.fresh`.

    Args:
        without: SHA-256 of prompts that are revoked; they are not asked.
        environments: their weights, where not all of `collect.environments` may be learnt from.
        environment: finds an environment by name; by default one that runs in this process, without a guard.
    """
    from models.causal_lm import load_tokenizer
    from tasks.arena.environment import get
    from tasks.rollout import fresh

    settings = context.settings.collect
    if environments is not None:
        settings = settings.model_copy(update={"environments": dict(environments)})
    sampling = fresh.Sampling(
        key=key,
        start=identity(agent),
        settings=settings,
        seed=context.settings.seed,
        environment=environment or get,
        root=context.workspace.root,
        folder=context.workspace.runs / key[:16] / "fresh",
        created_at=created_at,
        without=without,
    )
    return fresh.fresh_source(sampling, load_tokenizer(context.weights(agent)))


def allowed(weights: Mapping[str, int], now: Revoked) -> dict[str, int]:
    """Return the environments whose tasks may be learnt from: neither their licence nor rollouts as such are revoked."""
    from tasks.arena.environment import get
    from tasks.rollout.rollout import SOURCE

    return {name: weight for name, weight in weights.items() if not now.origin(SOURCE, get(name).licence)}
