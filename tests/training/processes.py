"""A small run over the processes of torchrun, or in this process: `python -m tests.training.processes FOLDER`."""

from __future__ import annotations

import random
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from models import adapters
from models.causal_lm import load_policy
from models.packing import Sample
from tasks.training import parallel
from tasks.training.parallel import World
from tasks.training.settings import TrainingSettings
from tasks.training.shards import Episodes
from tasks.training.update import accumulate_gradients

STEPS, SAVED_AT = 4, 2
# EMPG needs entropies, so that every update scores the samples before it learns from them.
SETTINGS = TrainingSettings(
    objective="grpo", advantage="empg", token_budget=30, grad_clip=0.5, aggregation="seq-mean-token-mean"
)
# A coupled objective: what a token loses depends on all tokens of the update, whichever process has them.
COUPLED = SETTINGS.model_copy(
    update={"objective": "m2po", "advantage": "group_norm", "options": {"threshold": 0.01}}
)
State = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


def episodes(seed: int = 0, groups: int = 3, size: int = 4) -> Episodes:
    """Random answers with an observation in some; the last answers of a group are longer."""
    rng = random.Random(seed)
    samples = []
    for group in range(groups):
        prompt = [5, 6, 7, *(rng.randrange(9, 90) for _ in range(group))]
        for place in range(size):
            answer = [rng.randrange(9, 90) for _ in range(rng.randrange(2, 5) + 3 * place)]
            samples.append(Sample(prompt, answer, [offset != 2 for offset in range(len(answer))]))
    trained = sum(sum(s.trained) for s in samples)
    turns = [int(offset > 2) for s in samples for offset, t in enumerate(s.trained) if t]
    behaviour = torch.tensor([-4.6 + rng.uniform(-0.3, 0.3) for _ in range(trained)])
    index = [group for group in range(groups) for _ in range(size)]
    rewards = tuple(float(rng.random() < 0.5) if n % size else 1.0 for n in range(len(samples)))
    rewards = tuple(0.0 if n % size == 1 else r for n, r in enumerate(rewards))
    return Episodes(
        samples=tuple(samples),
        rewards=rewards,
        groups=tuple(index),
        lags=(0,) * len(samples),
        turns=torch.tensor(turns),
        behaviour_logprobs=behaviour,
        group_ids=tuple(f"g{group}" for group in range(groups)),
        texts=("",) * len(samples),
    )


def start(model_dir: Path, world: World, *, lora: bool) -> tuple[parallel.Scorer, torch.optim.AdamW]:
    model: PreTrainedModel = load_policy(model_dir, dtype="float64")
    if lora:
        adapters.attach(model, 4, 8.0, ["q_proj", "up_proj"], seed=0)
    scorer = parallel.split(model, world)
    parallel.prepare(model, activation_checkpointing=lora, compile=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    return scorer, torch.optim.AdamW(trained, lr=1e-3, fused=True)


def updates(
    scorer: parallel.Scorer, optimizer: torch.optim.Optimizer, world: World, first: int, last: int
) -> list[dict[str, float]]:
    seen = []
    settings = COUPLED if _has_adapter(scorer) else SETTINGS
    for step in range(first, last):
        update = accumulate_gradients(scorer, episodes(step), settings, None, world)
        optimizer.step()
        seen.append(update.metrics)
    return seen


def state(scorer: parallel.Scorer, optimizer: torch.optim.Optimizer, world: World) -> State:
    model = scorer.model
    weights = parallel.gather_weights(model, world)
    moments = parallel.gather_moments(model, optimizer, world)
    return deepcopy(weights), deepcopy(moments)


def resumed(model_dir: Path, world: World, saved: State, *, lora: bool) -> dict[str, Any]:
    """The updates after `saved`, from a fresh start."""
    scorer, optimizer = start(model_dir, world, lora=lora)
    parallel.load_state(scorer.model, optimizer, *saved, SAVED_AT)
    metrics = updates(scorer, optimizer, world, SAVED_AT, STEPS)
    return {"metrics": metrics, "export": parallel.gather_export(scorer.model, world)}


def reference(model_dir: Path, scorer: parallel.Scorer, world: World) -> torch.Tensor:
    """What the policy before training says: that without the adapter, or a frozen copy."""
    samples = episodes().samples
    if _has_adapter(scorer):
        with adapters.without(scorer.model):
            return parallel.score(scorer, samples, SETTINGS.token_budget, None, world)[0]
    frozen = load_policy(model_dir, dtype="float64").requires_grad_(False)
    return parallel.score(parallel.split(frozen, world), samples, SETTINGS.token_budget, None, world)[0]


def _has_adapter(scorer: parallel.Scorer) -> bool:
    return any(".lora_" in name for name, _ in scorer.named_parameters())


def whole_run(model_dir: Path, world: World, *, lora: bool) -> dict[str, Any]:
    scorer, optimizer = start(model_dir, world, lora=lora)
    first = reference(model_dir, scorer, world)
    metrics = updates(scorer, optimizer, world, 0, SAVED_AT)
    saved = state(scorer, optimizer, world)
    metrics += updates(scorer, optimizer, world, SAVED_AT, STEPS)
    export = parallel.gather_export(scorer.model, world)
    last = reference(model_dir, scorer, world)
    return {"metrics": metrics, "saved": saved, "export": export, "references": (first, last)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    here = parallel.join("cpu")
    for lora in (False, True):
        run = whole_run(folder / "model", here, lora=lora)
        kept = folder / f"lora-{lora}.pt"
        if here.main:
            torch.save(run, kept)
        here.wait()
        again = resumed(folder / "model", here, torch.load(kept)["saved"], lora=lora)
        if here.main:
            torch.save(run | {"again": again, "size": here.size}, kept)
