"""An agent's attempts at the held-out tasks of one environment, in this process."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from models.causal_lm import load_policy, load_tokenizer
from tasks.arena.environment import plain_name, tasks_digest
from tasks.arena.floors import floor_of
from tasks.arena.guarded import Environments, Limits
from tasks.core.stages import derive_seed
from tasks.evaluation.report import report
from tasks.rollout.rollout import attempts


@dataclass(frozen=True, slots=True)
class Exam:
    """What an agent is asked.

    Attributes:
        tasks, samples: held-out tasks of the environment, and attempts at each.
        seed: of the tasks and of the noise: the same for every agent that is to be compared.
        limits: of the environment's steps.
    """

    policy: str
    env: str
    tasks: int
    samples: int
    temperature: float
    seed: int
    batch_rows: int
    device: str = "cpu"
    dtype: str = "float32"
    limits: Limits = field(default_factory=Limits)


def run_job(exam: Mapping[str, Any]) -> dict[str, Any]:
    """Sit an exam, given as the plain values of an `Exam`, in this process, which is its own."""
    if exam["device"] == "cpu":
        torch.set_num_threads(1)  # as many exams side by side as there are processes
    return sit(Exam(**{**exam, "limits": Limits(**exam["limits"])}))


def sit(exam: Exam) -> dict[str, Any]:
    """Return the figures of `report` with what the attempts cost and what no skill at all would earn.

    Returns:
        {env, tasks, tasks_digest, samples, figures, cpu_seconds (of an episode, without its environment's process), constant,
        constant_action, random, baseline_error (why there are no baselines, "" where there are)}.

    Raises:
        UsageError: the environment has fewer held-out tasks. Unavailable: its package is missing.
    """
    folder = Path(exam.policy)
    model = load_policy(folder, exam.device, exam.dtype)
    tokenizer = load_tokenizer(folder)
    with Environments(exam.limits) as environments:
        env = environments(exam.env)
        tasks = env.tasks("heldout", exam.tasks, derive_seed(exam.seed, plain_name(exam.env), "exam"))
        floor = floor_of(env, tasks, exam.seed)
        began = time.process_time()
        with torch.inference_mode():
            found = attempts(
                model,
                tokenizer,
                env,
                tasks,
                samples=exam.samples,
                temperature=exam.temperature,
                seed=exam.seed,
                batch_rows=exam.batch_rows,
            )
        spent = time.process_time() - began
        figures = report(found, max_turns=env.max_turns, max_tokens=env.max_turns * env.max_new_tokens)
    return {
        "env": exam.env,
        "tasks_digest": tasks_digest(exam.env, tasks),
        **figures.to_json(),
        "cpu_seconds": spent / (len(tasks) * exam.samples),
        "constant": floor.constant,
        "constant_action": floor.constant_action,
        "random": floor.random,
        "baseline_error": floor.error,
    }
