"""Think@n on an agent's own answers: is finishing the answers with promising beginnings worth it? Nothing is decided by it."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from flows.context import Context
from flows.deep_thinking import answered
from tasks.core.errors import UsageError
from tasks.core.settings import DeepThinking

if TYPE_CHECKING:
    from tasks.arena.best_of import Sample
    from tasks.replay.schema import Episode

_ALPHA = 0.025  # of each bound: 95 % intervals


def evaluate_think(
    context: Context, ref: str, on: str, *, tasks: int, samples: int, prefix: int, eta: float
) -> dict[str, Any]:
    """Let an agent answer held-out tasks and compare what gives one answer from its samples, and for how many tokens.

    All samples are finished, so that every method chooses among the same. An answer is the text of a sample; one that was
    cut off has no vote. Right is a reward of 1 or more.

    Args:
        ref: of the agent, see `Context.agent`.
        on: name of an environment of one turn.
        tasks, samples: how many, and answers to each.
        prefix: tokens that the scores may see.
        eta: fraction of the samples that Think@n finishes.

    Returns:
        {agent, on, tasks, samples, prefix, eta, shorter: share of samples that end within the prefix, methods:
        [`tasks.evaluation.selection.Row`]}.

    Raises:
        NotFound: no such agent. UsageError: no such environment or one of several turns, too few tasks in it, numbers below
            1, or `eta` outside (0, 1].
    """
    from models.causal_lm import ModelError
    from tasks.arena.environment import get
    from tasks.evaluation.selection import compare
    from tasks.rollout.deep_thinking import certainties, lens_of, ratios

    if prefix < 1:
        raise UsageError(f"Scores need a prefix of one token at least, not {prefix}.")
    if not 0 < eta <= 1:
        raise UsageError(f"The fraction of samples to finish is {eta:g}; give one above 0 and at most 1.")
    if (turns := get(on).max_turns) != 1:
        raise UsageError(
            f"{on} has up to {turns} turns; the votes of samples are compared in environments of one turn."
        )
    measure = context.settings.collect.deep_thinking or DeepThinking()
    lens = lens_of(measure)
    questions: dict[str, list[list[Sample]]] = {"Think@n": [], "Self-Certainty@n": []}
    lengths: list[int] = []
    agent = context.agent(ref)
    for model, group in answered(context, agent.payload, on, tasks, samples):
        begun = [_begun(one, prefix) for one in group]
        try:
            found = ratios(model, begun, lens), certainties(model, begun)
        except ModelError as error:
            raise UsageError(str(error)) from error
        lengths += [len(one.response_ids) for one in group]
        for asked, scores in zip(questions.values(), found, strict=True):
            asked.append([_sample(one, score) for one, score in zip(group, scores, strict=True)])
    rows = compare(questions, eta=eta, prefix=prefix, alpha=_ALPHA)
    return {
        "agent": agent.subject,
        "on": on,
        "tasks": len(questions["Think@n"]),
        "samples": samples,
        "prefix": prefix,
        "eta": eta,
        "shorter": sum(length <= prefix for length in lengths) / len(lengths),
        "methods": [asdict(row) for row in rows],
    }


def _begun(episode: Episode, prefix: int) -> Episode:
    """The episode as far as its first tokens."""
    told = ("response_ids", "loss_mask", "turn_ids", "behaviour_logprobs")
    return replace(episode, **{name: getattr(episode, name)[:prefix] for name in told})


def _sample(episode: Episode, score: float) -> Sample:
    from tasks.arena.best_of import Sample

    text = None if episode.finish_reason == "length" else episode.response_text.strip()
    return Sample(text or None, len(episode.response_ids), score, float(episode.reward >= 1))
