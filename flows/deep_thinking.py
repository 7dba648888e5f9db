"""The deep-thinking ratio of an agent's answers beside its baselines, as a number to look at: nothing is decided by it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from flows import progress
from flows.context import Context
from tasks.core.errors import UsageError
from tasks.core.settings import DeepThinking
from tasks.core.stages import derive_seed

_ALPHA = 0.025  # of each bound: 95 % intervals


def evaluate_dtr(context: Context, ref: str, on: str, tasks: int, samples: int) -> dict[str, Any]:
    """Let an agent answer held-out tasks, sampled as in a collection, and compare ratios of right and wrong answers, and what is cheaper to have:
    length and self-certainty.

    Right is an answer with a reward of 1 or more; an answer that met a fault of the environment is left out. Nothing is
    written. The tasks are not those of the gate.

    Args:
        ref: of the agent, see `Context.agent`.
        on: name of an environment.
        tasks: how many.
        samples: answers to each.

    Returns:
        {agent, on, tasks, samples, threshold, rho, unit, norm, temperature, and the fields of
        `tasks.evaluation.deep_thinking.Report`, each interval {estimate, low, high, n, alpha} or null}.

    Raises:
        NotFound: no such agent. UsageError: no such environment, too few tasks in it, or numbers below 1.
    """
    from flows.experience import identity
    from models.causal_lm import ModelError, load_policy, load_tokenizer
    from tasks.evaluation.deep_thinking import Rated, by_correctness
    from tasks.rollout.deep_thinking import certainties, lens_of, ratios
    from tasks.rollout.rollout import rollout

    if tasks < 1 or samples < 1:
        raise UsageError(f"Give at least one task and one sample, not {tasks} and {samples}.")
    agent, settings = context.agent(ref).payload, context.settings.collect
    seed = derive_seed(context.settings.seed, on, "deep thinking")
    measure = settings.deep_thinking or DeepThinking()
    lens = lens_of(measure)
    folder = context.weights(agent)
    model, tokenizer = load_policy(folder, context.device(), context.dtype()), load_tokenizer(folder)
    rated: list[list[Rated]] = []
    with progress.current().bar(f"answer {on}") as report, context.environments() as environments:
        env = environments(on)
        for group in rollout(
            model,
            tokenizer,
            env,
            env.tasks("heldout", tasks, seed),
            group_size=samples,
            temperature=settings.temperature,
            seed=seed,
            batch_rows=settings.batch_rows,
            identity=identity(agent),
        ):
            told = [one for one in group if one.finish_reason != "error"]
            if not told:
                continue
            try:
                found, certain = ratios(model, told, lens), certainties(model, told)
            except ModelError as error:
                raise UsageError(str(error)) from error
            rated.append(
                [
                    Rated(ratio, sum(one.loss_mask), certainty, one.reward >= 1)
                    for one, ratio, certainty in zip(told, found, certain, strict=True)
                ]
            )
            report(len(rated), tasks, "groups")
    return {
        "agent": f"agent/{agent['version']}",
        "on": on,
        "tasks": tasks,
        "samples": samples,
        **measure.model_dump(),
        "temperature": settings.temperature,
        **asdict(by_correctness(rated, alpha=_ALPHA)),
    }
