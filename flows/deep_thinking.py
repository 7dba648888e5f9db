"""The deep-thinking ratio of an agent's answers beside its baselines, as a number to look at: nothing is decided by it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from flows import progress
from flows.context import Context
from tasks.core.errors import UsageError
from tasks.core.settings import DeepThinking
from tasks.core.stages import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tasks.replay.schema import Episode

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
    from models.causal_lm import ModelError
    from tasks.evaluation.deep_thinking import Rated, by_correctness
    from tasks.rollout.deep_thinking import certainties, lens_of, ratios

    settings = context.settings.collect
    measure = settings.deep_thinking or DeepThinking()
    lens = lens_of(measure)
    rated: list[list[Rated]] = []
    agent = context.agent(ref)
    for model, group in answered(context, agent.payload, on, tasks, samples):
        try:
            found, certain = ratios(model, group, lens), certainties(model, group)
        except ModelError as error:
            raise UsageError(str(error)) from error
        rated.append(
            [
                Rated(ratio, sum(one.loss_mask), certainty, one.reward >= 1)
                for one, ratio, certainty in zip(group, found, certain, strict=True)
            ]
        )
    return {
        "agent": agent.subject,
        "on": on,
        "tasks": len(rated),
        "samples": samples,
        **measure.model_dump(),
        "temperature": settings.temperature,
        **asdict(by_correctness(rated, alpha=_ALPHA)),
    }


def answered(
    context: Context, agent: Mapping[str, Any], on: str, tasks: int, samples: int
) -> Iterator[tuple[PreTrainedModel, list[Episode]]]:
    """Yield the model and its answers to each of some held-out tasks, which are not those of the gate.

    Answers that met a fault of the environment are left out, and tasks where all did.

    Args:
        agent: payload of its registration.

    Raises:
        UsageError: no such environment, too few tasks in it, or numbers below 1.
    """
    from flows.experience import identity
    from models.causal_lm import load_policy, load_tokenizer
    from tasks.rollout.rollout import rollout

    if tasks < 1 or samples < 1:
        raise UsageError(f"Give at least one task and one sample, not {tasks} and {samples}.")
    settings = context.settings.collect
    seed = derive_seed(context.settings.seed, on, "deep thinking")
    folder = context.weights(agent)
    with progress.current().bar(f"answer {on}") as report, context.environments() as environments:
        env = environments(on)
        asked = env.tasks("heldout", tasks, seed)
        model, tokenizer = load_policy(folder, context.device(), context.dtype()), load_tokenizer(folder)
        groups = rollout(
            model,
            tokenizer,
            env,
            asked,
            group_size=samples,
            temperature=settings.temperature,
            seed=seed,
            batch_rows=settings.batch_rows,
            identity=identity(agent),
        )
        for number, group in enumerate(groups, start=1):
            told = [one for one in group if one.finish_reason != "error"]
            if told:
                yield model, told
            report(number, tasks, "tasks")
