"""Off-policy evidence from sealed replay: its episodes scored under other policies than the one that wrote them.

The log must be new to the policies. Leave out the prompts they were trained on (`without`): training raises the odds
of logged answers that were rewarded, and on those the policy looks better than it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import pyarrow as pa
from transformers import PreTrainedModel

from tasks.core.errors import Refused
from tasks.evaluation.off_policy import Evidence, Floats, Log, Rule, compare, evaluate
from tasks.replay.passes import passes
from tasks.replay.schema import Episode
from tasks.training.parallel import World, score, split

TOKEN_BUDGET = 1024
"""Tokens of a packed row; a longer episode has a row of its own."""


def value_on_replay(
    episodes: Sequence[Episode], policy: PreTrainedModel, rule: Rule, token_budget: int = TOKEN_BUDGET
) -> Evidence:
    """Judge the mean reward that `policy` would have earned on the prompts of `episodes`.

    Args:
        episodes: from `usable`.
        policy: in evaluation mode, loaded with attn_implementation="sdpa".

    Raises:
        ValueError: there are no episodes, or a reward is outside [0, 1].
    """
    return evaluate(logged(episodes), log_ratios(policy, episodes, token_budget), rule)


def difference_on_replay(
    episodes: Sequence[Episode],
    candidate: PreTrainedModel,
    champion: PreTrainedModel,
    rule: Rule,
    token_budget: int = TOKEN_BUDGET,
) -> Evidence:
    """Judge the mean reward of `candidate` less that of `champion` on the prompts of `episodes`; see above."""
    sides = [log_ratios(policy, episodes, token_budget) for policy in (candidate, champion)]
    return compare(logged(episodes), sides[0], sides[1], rule)


def usable(rows: pa.Table, tokenizer_digest: str, without: Collection[str] = ()) -> list[Episode]:
    """The episodes of `rows` (`tasks.replay.shards.read_rows`) that can be scored, by the digest of their prompt.

    Passed over are episodes whose environment failed, and those whose prompt is among `without`. The order is as good
    as random, which a confidence sequence needs: sealed rows stand family by family. Where a log grows and is looked at
    again, add the new part to the old one, `usable(old) + usable(new)`.

    Args:
        tokenizer_digest: of the policies that will score them.
        without: SHA-256 of the prompts that these policies were trained on.

    Raises:
        Refused: an episode has no probability that could be compared; the sentence says how many and why.
    """
    episodes = [Episode(**row) for batch in rows.to_batches() for row in batch.to_pylist()]
    known = frozenset(without)
    kept = sorted(
        (one for one in episodes if one.finish_reason != "error" and one.prompt_sha256 not in known),
        key=lambda one: (one.prompt_sha256, one.episode_id),
    )
    for broken, why in (
        (
            [one for one in kept if one.tokenizer_digest != tokenizer_digest],
            "were made with another tokenizer",
        ),
        (
            [one for one in kept if one.logprob_source == "missing"],
            "lack the log-probabilities of their policy",
        ),
        ([one for one in kept if not one.temperature > 0], "were not sampled but are greedy"),
        ([one for one in kept if one.top_p != 1], "were sampled with top_p below 1"),
    ):
        if broken:
            raise Refused(
                f"{len(broken)} of {len(kept)} episodes {why}, so they are no evidence about another policy; "
                "leave them out of the dataset that is evaluated."
            )
    return kept


def logged(episodes: Sequence[Episode]) -> Log:
    """The log of `episodes`: the reward is earned in the last turn that the policy wrote in.

    Raises:
        ValueError: there are no episodes, or a reward is outside [0, 1].
    """
    turns = np.array([_turns(one) for one in episodes], dtype=np.int64)
    rewards = np.zeros((len(episodes), max(turns, default=0)))
    rewards[np.arange(len(episodes)), turns - 1] = [one.reward for one in episodes]
    return Log(
        rewards, turns, tuple(one.prompt_sha256 for one in episodes), tuple(one.env for one in episodes)
    )


def log_ratios(
    policy: PreTrainedModel, episodes: Sequence[Episode], token_budget: int = TOKEN_BUDGET
) -> Floats:
    """[B, T] log of the policy's probability of each turn over that of the policy that wrote it, at the temperature
    it was written at."""
    samples = [sample for e in episodes for sample in passes(e)]
    written = [np.array(e.loss_mask, dtype=bool) for e in episodes]
    behaviour = _trained((e.behaviour_logprobs for e in episodes), written)
    turn = _trained((e.turn_ids for e in episodes), written).astype(np.int64)
    episode = np.repeat(np.arange(len(episodes)), [mask.sum() for mask in written])
    found = np.zeros((len(episodes), max(map(_turns, episodes), default=0)))
    alone = World(policy.device)
    scored, _ = score(split(policy, alone), samples, token_budget, None, alone)
    np.add.at(found, (episode, turn), scored.double().cpu().numpy() - behaviour)
    return found


def _trained(columns: Iterable[Sequence[float]], written: Sequence[np.ndarray]) -> np.ndarray:
    parts = [np.asarray(column)[mask] for column, mask in zip(columns, written, strict=True)]
    return np.concatenate([*parts, np.zeros(0)])


def _turns(episode: Episode) -> int:
    """Turns up to the last one that the policy wrote in, at least 1."""
    return 1 + max(
        (t for t, mine in zip(episode.turn_ids, episode.loss_mask, strict=True) if mine), default=0
    )
