"""Replay made in the test: real rows of the schema, with the tiny model's own log-probabilities and a
learnable reward."""

from __future__ import annotations

import random
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel

from models.causal_lm import load_policy, load_tokenizer, template_digest, tokenizer_digest
from models.packing import Sample, pack, packed_logprobs
from tasks.core.digest import sha256_file
from tasks.replay.schema import Episode, arrow_schema
from tasks.training.shards import ShardRef


def make_episodes(
    model_dir: Path, *, groups: int = 6, size: int = 4, seed: int = 0, model: PreTrainedModel | None = None
) -> list[Episode]:
    """Answers of random digits to prompts that share a beginning; an even first digit is rewarded. The third
    token of every answer is an observation. Log-probabilities are those of `model`, by default the one
    in `model_dir`."""
    rng = random.Random(seed)
    model, tokenizer = model or load_policy(model_dir), load_tokenizer(model_dir)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    episodes = []
    for group in range(groups):
        prompt = f"1 + 2 = 3\n{rng.randrange(10)} + {rng.randrange(10)} ="
        firsts = [rng.randrange(10) for _ in range(size - 2)] + [4, 5]  # both rewards in every group
        for index, first in enumerate(firsts):
            text = f" {first}:{'7' * rng.randrange(1, 4)}\n"
            response = ids(text)
            mask = [i != 2 for i in range(len(response))]
            sample = Sample(ids(prompt), response, mask)
            with torch.no_grad():
                logprobs = iter(packed_logprobs(model, pack([sample], 10_000)[0])[0].tolist())
            episodes.append(
                Episode(
                    episode_id=f"g{group}-{index}",
                    group_id=f"g{group}",
                    sample_index=index,
                    task_id=f"t{group}",
                    env="even",
                    env_version="1",
                    split="train",
                    seed=seed,
                    prompt_ids=ids(prompt),
                    response_ids=response,
                    loss_mask=mask,
                    turn_ids=[0] * len(response),
                    behaviour_logprobs=[next(logprobs) if m else 0.0 for m in mask],
                    logprob_source="engine",
                    behaviour_version="agent/1",
                    behaviour_digest="0" * 64,
                    temperature=1.0,
                    top_p=1.0,
                    max_new_tokens=8,
                    tokenizer_digest=tokenizer_digest(model_dir),
                    template_digest=template_digest(model_dir),
                    reward=float(first % 2 == 0),
                    reward_components="{}",
                    reward_digest="0" * 64,
                    finish_reason="done",
                    prompt_sha256="0" * 64,
                    response_text=text,
                    source="test",
                    licence="CC0-1.0",
                    created_at="2026-01-01T00:00:00+00:00",
                )
            )
    return episodes


def write_shards(root: Path, episodes: list[Episode], *, shards: int = 2) -> list[ShardRef]:
    """Write the episodes round-robin to Parquet files under `root`, so that groups lie across files."""
    root.mkdir(parents=True, exist_ok=True)
    refs = []
    for number in range(shards):
        path = root / f"part-{number}.parquet"
        pq.write_table(
            pa.Table.from_pylist([asdict(e) for e in episodes[number::shards]], arrow_schema()), path
        )
        refs.append(ShardRef(path.name, sha256_file(path)))
    return refs


def changed(episodes: list[Episode], number: int, **values: object) -> list[Episode]:
    """The episodes with fields of one of them replaced."""
    return [replace(e, **values) if i == number else e for i, e in enumerate(episodes)]


class Source:
    """Fresh groups in `folder` of the shard root, with the log-probabilities of the model as it is; a shard that is
    there is not made again."""

    def __init__(self, tiny: Path, root: Path, folder: str = "fresh") -> None:
        self.tiny, self.root, self.folder = tiny, root, folder
        self.asked: list[tuple[int, int, int]] = []

    def __call__(self, model: PreTrainedModel, updates: int, before: int, count: int) -> ShardRef:
        path = self.root / self.folder / f"{before}.parquet"
        self.asked.append((updates, before, count))
        if not path.exists():
            found = make_episodes(self.tiny, groups=count, seed=100 + before, model=model)
            named = [
                replace(e, group_id=f"fresh-{before}-{e.group_id}", reward=self.reward(e)) for e in found
            ]
            (shard,) = write_shards(path.parent / f"{before}", named, shards=1)
            (path.parent / f"{before}" / shard.path).rename(path)
        return ShardRef(f"{self.folder}/{before}.parquet", sha256_file(path))

    def reward(self, episode: Episode) -> float:
        return episode.reward
