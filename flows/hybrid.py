"""Fresh groups for a training step: sampled from the policy being trained, kept with the run that used them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.context import Context
from tasks.core.digest import digest_json, sha256_bytes, sha256_file, write_atomic, write_file_atomic
from tasks.core.stages import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tasks.lineage.revocation import Revoked
    from tasks.replay.schema import Episode
    from tasks.training.rounds import FreshSource
    from tasks.training.shards import ShardRef


def fresh_source(
    context: Context,
    agent: Mapping[str, Any],
    key: str,
    created_at: str,
    without: Collection[str] = (),
    environments: Mapping[str, int] | None = None,
) -> FreshSource:
    """Return what collects groups with the model as it stands, as a shard of the run; see `rounds.FreshSource`.

    A shard that is there already with the digest beside it is taken as it is: a resumed run learns from the bytes
    that it learnt from before. Anything else is sampled again. The episodes are marked as `agent/<n>+<updates>`:
    written by that agent's successor in the making.

    Args:
        without: SHA-256 of prompts that are revoked; they are not asked.
        environments: their weights, where not all of `collect.environments` may be learnt from.
    """
    from models.causal_lm import load_tokenizer
    from tasks.arena.environment import get
    from tasks.rollout.deep_thinking import measured
    from tasks.rollout.rollout import BehaviourIdentity, rollout
    from tasks.training.shards import ShardRef

    tokenizer = load_tokenizer(context.weights(agent))
    settings, seed = context.settings.collect, context.settings.seed
    weights = settings.environments if environments is None else environments
    folder = context.workspace.runs / key[:16] / "fresh"

    def collect(model: PreTrainedModel, updates: int, before: int, count: int) -> ShardRef:
        path = folder / f"groups-{before:06d}-{before + count - 1:06d}.parquet"
        digest = path.with_suffix(".sha256")
        if not (path.exists() and digest.exists() and digest.read_text() == sha256_file(path)):
            identity = BehaviourIdentity(
                f"agent/{agent['version']}+{updates}",
                digest_json(["run", key, "updates", updates]),
                agent["tokenizer_digest"],
                agent["template_digest"],
            )
            episodes: list[Episode] = []
            for name, groups in shares(weights, before, before + count).items():
                env = get(name)
                noise = derive_seed(seed, name, f"fresh {before}")
                tasks = [
                    task
                    for task in env.tasks("train", groups, noise)
                    if sha256_bytes(task.prompt.encode()) not in without
                ]
                for group in rollout(
                    model,
                    tokenizer,
                    env,
                    tasks,
                    group_size=settings.group_size,
                    temperature=settings.temperature,
                    seed=noise,
                    batch_rows=settings.batch_rows,
                    identity=identity,
                    created_at=created_at,
                ):
                    episodes += measured(model, group, settings.deep_thinking)
            folder.mkdir(parents=True, exist_ok=True)
            write_file_atomic(path, partial(_write, episodes))
            write_atomic(digest, sha256_file(path).encode())
        return ShardRef(context.workspace.relative(path), digest.read_text())

    return collect


def allowed(weights: Mapping[str, int], now: Revoked) -> dict[str, int]:
    """Return the environments whose tasks may be learnt from: neither their licence nor rollouts as such are revoked."""
    from tasks.arena.environment import get
    from tasks.rollout.rollout import SOURCE

    return {name: weight for name, weight in weights.items() if not now.origin(SOURCE, get(name).licence)}


def shares(weights: Mapping[str, int], start: int, stop: int) -> dict[str, int]:
    """Deal the groups start..stop-1 of an endless row to environments in proportion to their weights.

    The row repeats every sum(weights) groups, in which each environment has its weight's number of places, spread evenly.
    """
    total = sum(weights.values())
    places = sorted(
        ((turn + 0.5) / weight, name) for name, weight in weights.items() for turn in range(weight)
    )
    dealt: dict[str, int] = {}
    for number in range(start, stop):
        name = places[number % total][1]
        dealt[name] = dealt.get(name, 0) + 1
    return dealt


def _write(episodes: list[Episode], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tasks.replay.schema import arrow_schema

    table = pa.Table.from_pylist([asdict(episode) for episode in episodes], schema=arrow_schema())
    pq.write_table(table, path, compression="zstd")
