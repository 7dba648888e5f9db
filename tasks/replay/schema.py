"""The replay row: one episode of a group, as a dataclass and as an Arrow schema.

The fields of `Episode` and the columns of `arrow_schema()` are the same names in the same order. A change to
either is a change of the format and raises `SCHEMA_VERSION`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 1
INVALID_TURNS = "invalid_turns"  # of `reward_components`: numbers of the turns without `Step.valid`
MEMORY_TURNS = (
    "memory_turns"  # of `reward_components`: how many turns the policy read beside the prompt, if not all
)
DEEP_THINKING = "deep_thinking_ratio"  # of `reward_components`: that of the response, where it was measured
BROKEN = -1  # a memory of no number of turns
MOST_TURNS = (1 << 15) - 1  # that a row can have

LogprobSource = Literal["engine", "recomputed", "missing"]
FinishReason = Literal["done", "length", "turns", "error"]


@dataclass(frozen=True, slots=True)
class Episode:
    """One sampled episode: the prompt, what followed, how likely the policy found it, and its reward.

    `response_ids`, `loss_mask`, `turn_ids` and `behaviour_logprobs` have one entry per response token, over
    all turns with their observations.
    """

    episode_id: str
    group_id: str  # the episodes of a group answer the same prompt and are compared with one another
    sample_index: int
    task_id: str
    env: str
    env_version: str
    split: str
    seed: int

    prompt_ids: list[int]
    response_ids: list[int]
    loss_mask: list[bool]  # True: the token was sampled by the policy; False: it is an observation
    turn_ids: list[int]  # an observation carries the index of the turn it answers

    behaviour_logprobs: list[float]  # nats, under the distribution sampled from; 0.0 where loss_mask is False
    logprob_source: LogprobSource
    behaviour_version: str
    behaviour_digest: str
    temperature: float
    top_p: float
    max_new_tokens: int  # per turn
    tokenizer_digest: str
    template_digest: str

    reward: float
    reward_components: str  # canonical JSON object of numbers; and INVALID_TURNS, a list, if there were any
    reward_digest: str  # of the verifier that gave the reward
    finish_reason: FinishReason
    prompt_sha256: str  # of the prompt text, to find an overlap of training and evaluation
    response_text: str

    source: str
    licence: str
    created_at: str  # UTC, ISO-8601


def arrow_schema() -> pa.Schema:
    """The columns of a shard: the fields of `Episode`, none nullable; the metadata holds `SCHEMA_VERSION`."""
    import pyarrow as pa

    def column(name: str, kind: pa.DataType) -> pa.Field:
        return pa.field(name, kind, nullable=False)

    def sequence(name: str, kind: pa.DataType) -> pa.Field:
        return column(name, pa.list_(column("element", kind)))

    return pa.schema(
        [
            column("episode_id", pa.string()),
            column("group_id", pa.string()),
            column("sample_index", pa.int32()),
            column("task_id", pa.string()),
            column("env", pa.string()),
            column("env_version", pa.string()),
            column("split", pa.string()),
            column("seed", pa.int64()),
            sequence("prompt_ids", pa.int32()),
            sequence("response_ids", pa.int32()),
            sequence("loss_mask", pa.bool_()),
            sequence("turn_ids", pa.int16()),
            sequence("behaviour_logprobs", pa.float32()),
            column("logprob_source", pa.string()),
            column("behaviour_version", pa.string()),
            column("behaviour_digest", pa.string()),
            column("temperature", pa.float64()),
            column("top_p", pa.float64()),
            column("max_new_tokens", pa.int32()),
            column("tokenizer_digest", pa.string()),
            column("template_digest", pa.string()),
            column("reward", pa.float64()),
            column("reward_components", pa.string()),
            column("reward_digest", pa.string()),
            column("finish_reason", pa.string()),
            column("prompt_sha256", pa.string()),
            column("response_text", pa.string()),
            column("source", pa.string()),
            column("licence", pa.string()),
            column("created_at", pa.string()),
        ],
        metadata={"forebay.schema_version": str(SCHEMA_VERSION)},
    )


def memory_of(components: str) -> int:
    """The turns that the policy read beside the prompt, by an episode's `reward_components`: 0 for all, BROKEN for what is no
    number of turns. Experience that others recorded may hold anything."""
    if f'"{MEMORY_TURNS}"' not in components:
        return 0
    try:
        found = json.loads(components)
    except (ValueError, RecursionError):
        return BROKEN
    if not isinstance(found, dict) or MEMORY_TURNS not in found:
        return 0
    turns = found[MEMORY_TURNS]
    return turns if type(turns) is int and 0 < turns <= MOST_TURNS else BROKEN
