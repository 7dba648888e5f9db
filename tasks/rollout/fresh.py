"""Fresh groups for a training step: sampled from the policy being trained, kept with the run that used them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from models.causal_lm import weights_digest
from tasks.arena.environment import Environment, Task, plain_name
from tasks.core.atomic import write_atomic, write_file_atomic
from tasks.core.digest import digest_json, sha256_bytes, sha256_file
from tasks.core.settings import Collect
from tasks.core.stages import derive_seed
from tasks.replay.schema import Episode, arrow_schema
from tasks.rollout.deep_thinking import measured
from tasks.rollout.rollout import BehaviourIdentity, rollout
from tasks.training.shards import ShardRef

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tasks.training.rounds import FreshSource


@dataclass(frozen=True)
class Sampling:
    """Where the groups of one run come from, and where they are kept.

    Attributes:
        key: the run's, part of the identity of the policies that it makes.
        settings: how groups are sampled; `environments` are weights, of which not all need be learnt from.
        environment: finds an environment by name.
        root, folder: paths of shards are relative to `root`; they are written into `folder`, below it.
        created_at: of every episode, so that a resumed run writes the same bytes.
        without: SHA-256 of prompts that are revoked; they are not asked.
    """

    key: str
    start: BehaviourIdentity
    settings: Collect
    seed: int
    environment: Callable[[str], Environment]
    root: Path
    folder: Path
    created_at: str
    without: Collection[str] = ()


def fresh_source(sampling: Sampling, tokenizer: PreTrainedTokenizerBase) -> FreshSource:
    """Return what collects groups with the model as it stands, as a shard of the run; see `rounds.FreshSource`.

    A shard that is there already with the digest beside it is taken as it is: a resumed run learns from the bytes
    that it learnt from before. Anything else is sampled again. The episodes are marked as `agent/<n>+<updates>`:
    written by that agent's successor in the making, whose weights the digest beside it stands for.
    """
    return partial(_collect, sampling, tokenizer)


def _collect(
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    updates: int,
    before: int,
    count: int,
) -> ShardRef:
    path = sampling.folder / f"groups-{before:06d}-{before + count - 1:06d}.parquet"
    digest = path.with_suffix(".sha256")
    if not (path.exists() and digest.exists() and digest.read_text() == sha256_file(path)):
        start, settings = sampling.start, sampling.settings
        identity = BehaviourIdentity(
            f"{start.version}+{updates}",
            # Not the number of updates: a run that goes back and on another way comes by the same number again.
            digest_json(["run", sampling.key, "weights", weights_digest(model)]),
            start.tokenizer_digest,
            start.template_digest,
        )
        episodes: list[Episode] = []
        for name, groups in shares(settings.environments, before, before + count).items():
            env = sampling.environment(name)
            noise = derive_seed(sampling.seed, plain_name(name), f"fresh {before}")
            tasks = may_be_asked(env.tasks("train", groups, noise), sampling.without)
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
                created_at=sampling.created_at,
            ):
                episodes += measured(model, group, settings.deep_thinking)
        write_episodes(path, episodes)
        write_atomic(digest, sha256_file(path).encode())
    return ShardRef(str(path.relative_to(sampling.root)), digest.read_text())


def may_be_asked(tasks: Iterable[Task], without: Collection[str]) -> list[Task]:
    """The tasks but those whose prompts' SHA-256 is among `without`, for they are revoked."""
    return [task for task in tasks if sha256_bytes(task.prompt.encode()) not in without]


def write_episodes(path: Path, episodes: list[Episode]) -> None:
    """Write a shard, or nothing."""

    def write(aside: Path) -> None:
        schema = arrow_schema()
        columns = {name: [getattr(one, name) for one in episodes] for name in schema.names}
        table = pa.Table.from_pydict(columns, schema=schema)
        pq.write_table(table, aside, compression="zstd")

    path.parent.mkdir(parents=True, exist_ok=True)
    write_file_atomic(path, write)


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
