"""One cell of a comparison: a method on an environment with a seed, from its start to its figures on held-out tasks.

A cell is a function of its `Plan`: killed and run again it goes on from what its folder holds, and a finished one is found.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from models.causal_lm import load_policy, load_tokenizer
from tasks.arena.environment import Environment, Task, draw_up_to, plain_name, tasks_digest
from tasks.arena.guarded import Environments, Limits
from tasks.core.atomic import write_atomic
from tasks.core.digest import canonical_json, digest_json, sha256_file
from tasks.core.locks import file_lock
from tasks.core.settings import Collect
from tasks.core.stages import derive_seed
from tasks.evaluation.report import Slice, report
from tasks.leaderboard.methods import training_settings
from tasks.leaderboard.settings import Arena, Method
from tasks.leaderboard.starter import EPOCH, identity_of, start_from_own, start_from_scratch
from tasks.rollout.fresh import Sampling, fresh_source, may_be_asked, write_episodes
from tasks.rollout.rollout import attempts, rollout
from tasks.training.curve import FILE, read_curve
from tasks.training.shards import ShardRef
from tasks.training.stability import find_collapse
from tasks.training.trainer import train

_BATCH_ROWS = 128


@dataclass(frozen=True, slots=True)
class Plan:
    """What decides a cell.

    Attributes:
        name: of the method; what it does is `method`.
        policy: directory of the language model to start from, and `policy_digest` of its files; None: from scratch.
        code: digest of everything else that decides: the code, the environment's verifier, the installed packages.
        limits: of the environment's steps.
        without: SHA-256 of prompts that are revoked; nothing is learnt from them.
        device, dtype: as in `trainer.train`; what is computed where differs in the last bits.
    """

    env: str
    name: str
    method: Method
    seed: int
    arena: Arena
    policy: str | None
    policy_digest: str | None
    code: str
    limits: Limits = field(default_factory=Limits)
    device: str = "cpu"
    dtype: str = "float32"
    without: tuple[str, ...] = ()

    def start_key(self) -> str:
        """Digest of what decides the start: all methods of an environment and a seed share it."""
        temperature = self.arena.recipe.temperature if self.policy else None
        return digest_json(
            {
                "env": self.env,
                "seed": self.seed,
                "start": self.arena.start.model_dump(mode="json"),
                "policy": self.policy_digest,
                "temperature": temperature,
                "judging": self.arena.judging.model_dump(mode="json"),
                "code": self.code,
                "limits": asdict(self.limits),
                "device": [self.device, self.dtype],
                "without": self.without,
            }
        )

    def key(self) -> str:
        """Digest of everything that decides the result."""
        outside = training_settings(self.method, self.arena.recipe, self.name).outside_code()
        parts = [part.model_dump(mode="json") for part in (self.arena.recipe, self.method)]
        return digest_json([self.start_key(), *parts, outside])


def run_cell(plan: Plan, root: Path) -> dict[str, Any]:
    """Return the result of a cell, computed now or found in `root`.

    Returns:
        {env, method, seed, key, tasks_digest (of the held-out ones), before, after: `Slice.to_json`, curve: [mean training reward of each update], stop_reason,
        steps, findings: [driver, onset], episodes (sampled in training), cpu_seconds, seconds}; `before` is the start's. The
        times are without the start, and of all parts of a cell that was cut short, each up to its last update.

    Raises:
        UsageError: settings that cannot work, or an environment that is not there. Refused: no start could be made.
    """
    folder = root / "cells" / plan.key()[:16]
    done = folder / "result.json"
    with file_lock(root / "locks" / f"{plan.key()[:16]}.lock", timeout=float("inf")):
        if not done.exists():
            write_atomic(done, canonical_json(_run(plan, root, folder)))
    found: dict[str, Any] = json.loads(done.read_text())
    return found


def _run(plan: Plan, root: Path, folder: Path) -> dict[str, Any]:
    recipe = plan.arena.recipe
    settings = training_settings(plan.method, recipe, plan.name)
    folder.mkdir(parents=True, exist_ok=True)
    start, before = _start(plan, root)
    meter = Meter(folder / "spent.json")
    with Environments(plan.limits) as environments:
        env = environments(plan.env)
        sampling = Sampling(
            key=plan.key(),
            start=identity_of("agent/0", start),
            settings=Collect(
                environments={plan.env: 1},
                group_size=recipe.group_size,
                temperature=recipe.temperature,
                batch_rows=_BATCH_ROWS,
            ),
            seed=derive_seed(plan.seed, plain_name(plan.env), "arena"),
            environment=environments,
            root=folder,
            folder=folder / "fresh",
            created_at=EPOCH,
            without=plan.without,
        )
        metrics: dict[int, Mapping[str, float]] = {int(row["step"]): row for row in read_curve(folder)}

        def on_metrics(step: int, values: Mapping[str, float]) -> None:
            metrics[step] = values
            _keep_curve(folder / FILE, metrics)
            meter.keep()

        made = train(
            run_dir=folder / "run",
            init_dir=start,
            shards=[_first_groups(plan, start, env, folder)],
            shard_root=folder,
            settings=settings,
            seed=plan.seed,
            device=plan.device,
            dtype=plan.dtype,
            fresh=fresh_source(sampling, load_tokenizer(start)),
            on_metrics=on_metrics,
        )
        heldout = heldout_of(env, plan.arena.judging.tasks)
        after = _judged(plan, made.export_dir, env, heldout)
    curve = [{**values, "step": step} for step, values in sorted(metrics.items())]
    return {
        "env": plan.env,
        "method": plan.name,
        "seed": plan.seed,
        "key": plan.key(),
        "tasks_digest": tasks_digest(plan.env, heldout),
        "before": before,
        "after": after.to_json(),
        "curve": [row["reward"] for row in curve],
        "steps": made.steps,
        "stop_reason": made.stop_reason,
        "findings": [{"driver": one.driver, "onset": one.onset} for one in find_collapse(curve)],
        "episodes": sum(map(_episodes, (folder / "fresh").glob("*.parquet"))),
        **meter.keep(),
    }


def _start(plan: Plan, root: Path) -> tuple[Path, dict[str, Any]]:
    """The start of all methods with its figures, made by the first that comes."""
    folder = root / "starts" / plan.start_key()[:16]
    done = folder / "start.json"
    with file_lock(root / "locks" / f"start-{plan.start_key()[:16]}.lock", timeout=float("inf")):
        if not done.exists():
            # With processes of its own: what they took is known when they have ended, and belongs to no cell.
            with Environments(plan.limits) as environments:
                start, figures = _made_start(plan, environments(plan.env), folder)
            write_atomic(done, canonical_json({"path": str(start.relative_to(root)), "figures": figures}))
    found = json.loads(done.read_text())
    return root / found["path"], found["figures"]


def _made_start(plan: Plan, env: Environment, folder: Path) -> tuple[Path, dict[str, Any]]:
    settings = plan.arena.start
    if plan.policy is None:
        start = start_from_scratch(env, settings, plan.seed, folder, plan.without)
    else:
        start = start_from_own(
            env, Path(plan.policy), settings, plan.seed, folder,
            temperature=plan.arena.recipe.temperature, batch_rows=_BATCH_ROWS,
            device=plan.device, dtype=plan.dtype, without=plan.without,
        )  # fmt: skip
    return start, _judged(plan, start, env, heldout_of(env, plan.arena.judging.tasks)).to_json()


def _first_groups(plan: Plan, start: Path, env: Environment, folder: Path) -> ShardRef:
    """What the start says to the first tasks: a filter that leaves too few fresh groups is filled up from it."""
    path = folder / "first.parquet"
    recipe = plan.arena.recipe
    if not path.exists():
        seed = derive_seed(plan.seed, plain_name(plan.env), "first")
        tasks = may_be_asked(draw_up_to(env, "train", recipe.first_groups, seed), plan.without)
        groups = rollout(
            load_policy(start, plan.device, plan.dtype), load_tokenizer(start), env, tasks, group_size=recipe.group_size,
            temperature=recipe.temperature, seed=seed, batch_rows=_BATCH_ROWS, identity=identity_of("agent/0", start),
            created_at=EPOCH,
        )  # fmt: skip
        write_episodes(path, [episode for group in groups for episode in group])
    return ShardRef(path.name, sha256_file(path))


def _judged(plan: Plan, policy: Path, env: Environment, tasks: Sequence[Task]) -> Slice:
    judging = plan.arena.judging
    with torch.inference_mode():
        found = attempts(
            load_policy(policy, plan.device, plan.dtype), load_tokenizer(policy), env, tasks, samples=judging.samples,
            temperature=judging.temperature, seed=plan.seed, batch_rows=_BATCH_ROWS,
        )  # fmt: skip
    return report(found, max_turns=env.max_turns, max_tokens=env.max_turns * env.max_new_tokens)


def heldout_of(env: Environment, wanted: int) -> list[Task]:
    """The held-out tasks of every comparison on `env`; a small environment may have fewer than wanted."""
    return draw_up_to(env, "heldout", wanted, derive_seed(0, plain_name(env.name), "arena heldout"))


class Meter:
    """Processor and clock time from now on, added to that of earlier parts of the same work, which the file `path` keeps.

    A part that was killed counts as far as it was kept, and what an environment's processes took in it is not known.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        before = json.loads(path.read_text()) if path.exists() else {"cpu_seconds": 0.0, "seconds": 0.0}
        self._since = _processor_seconds() - before["cpu_seconds"], time.perf_counter() - before["seconds"]

    def keep(self) -> dict[str, float]:
        """Write {cpu_seconds, seconds} and return them."""
        now = _processor_seconds(), time.perf_counter()
        spent = [round(one - since, 2) for one, since in zip(now, self._since, strict=True)]
        found = {"cpu_seconds": spent[0], "seconds": spent[1]}
        write_atomic(self._path, canonical_json(found))
        return found


def _processor_seconds() -> float:
    """Processor time of this process and of those it has waited for, an environment's guard among them."""
    return sum(os.times()[:4])


def _episodes(path: Path) -> int:
    return int(pq.ParquetFile(path).metadata.num_rows)


def _keep_curve(path: Path, metrics: Mapping[int, Mapping[str, float]]) -> None:
    lines = (json.dumps({**values, "step": step}) for step, values in sorted(metrics.items()))
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode())


def as_job(plan: Plan) -> dict[str, Any]:
    """Plain values of a plan, for another process."""
    return {
        **asdict(plan),
        "method": plan.method.model_dump(mode="json"),
        "arena": plan.arena.model_dump(mode="json"),
    }


def run_job(job: Mapping[str, Any], root: str) -> dict[str, Any]:
    """Run the cell of a job in this process, which is its own, by `run_cell`."""
    # As many cells side by side as there are processes, and the same bits however many.
    torch.set_num_threads(1)
    return run_cell(from_job(job), Path(root))


def from_job(job: Mapping[str, Any]) -> Plan:
    """The plan of which `job` are the `as_job`."""
    limits = Limits(**{**job["limits"], "rewards": tuple(job["limits"]["rewards"])})
    parts = {
        "method": Method(**job["method"]),
        "arena": Arena(**job["arena"]),
        "limits": limits,
        "without": tuple(job["without"]),
    }
    return Plan(**{**job, **parts})
