"""A laboratory for objectives: a Llama of 0.1 M parameters, two verifiable tasks, and runs of ten seconds.

`sorting`: `305927144860:` asks for the digits in order, 13 tokens. `countdown`: `357=15:` asks for a way to get from
three numbers to a target by + and - with the steps written out, `3+5=8;8+7=15`; a problem has six right answers in
the mean. Rewards are 1 or 0. A policy starts from a supervised warm-up that leaves it right sometimes: for sorting
the demonstrations have mistakes, for countdown the warm-up is short.

Losses, advantages and their counts are the product's (`models.objectives`, `models.advantages`). Log-probabilities
come from a plain padded forward pass and not from packed rows, whose bookkeeping would cost more than this model's
arithmetic; `tests/benchmarks/test_lab.py` holds the two to the same numbers.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import combinations_with_replacement, permutations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scipy import stats
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from models import objectives
from models.advantages import ADVANTAGES

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("benchmarks", "models", "tasks")
OUT = Path("benchmarks/out")
BASELINES = Path("benchmarks/baselines")
IMAGES = Path("docs/images")

END = "\n"
CHARACTERS = END + "0123456789+-=;:"
IDS = {character: number for number, character in enumerate(CHARACTERS)}
GROUP = 8  # answers to one problem
GROUPS = 8  # problems an update learns from
MINIBATCH = GROUP * GROUPS  # episodes an update learns from
HELD_OUT = 256
FAR = -2.0  # log W of an answer that the policy has nearly given up
CHUNK = 2048  # episodes sampled at one time


@dataclass(frozen=True, slots=True)
class Problem:
    prompt: str
    solutions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """Problems, and how a policy is warmed up on them.

    train: draws training problems. mistakes: share of the demonstrated characters that are replaced by a random digit.
    """

    name: str
    prompt: int  # characters of every prompt
    answer: int  # characters of the longest right answer, and the end
    train: Callable[[np.random.Generator, int], list[Problem]]
    held_out: tuple[Problem, ...]
    mistakes: float
    warm_up_steps: int


@cache
def task(name: str) -> Task:
    """The task called `sorting` or `countdown`; held-out problems are the same for every seed and never drawn."""
    return {"sorting": _sorting, "countdown": _countdown}[name]()


def _sorting(digits: int = 12) -> Task:
    def problem(row: np.ndarray) -> Problem:
        return Problem("".join(map(str, row)) + ":", ("".join(map(str, np.sort(row))),))

    def train(draw: np.random.Generator, count: int) -> list[Problem]:
        found: list[Problem] = []
        while len(found) < count:
            rows = draw.integers(10, size=(count - len(found), digits))
            found += [one for one in map(problem, rows) if one.prompt not in known]
        return found

    held_out = tuple(map(problem, np.random.default_rng(0).integers(10, size=(HELD_OUT, digits))))
    known = {one.prompt for one in held_out}
    return Task("sorting", digits + 1, digits + 1, train, held_out, mistakes=0.08, warm_up_steps=500)


def _countdown() -> Task:
    found: list[Problem] = []
    for numbers in combinations_with_replacement(range(1, 10), 3):
        reached: dict[int, set[str]] = {}
        for a, b, c in set(permutations(numbers)):
            for first, r in _steps(a, b):
                for second, target in {*_steps(r, c), *_steps(c, r)}:
                    reached.setdefault(target, set()).add(f"{first};{second}")
        name = "".join(map(str, numbers))
        found += [
            Problem(f"{name}={target:02}:", tuple(sorted(texts))) for target, texts in sorted(reached.items())
        ]
    order = np.random.default_rng(0).permutation(len(found))
    held_out = tuple(found[i] for i in order[:HELD_OUT])
    rest = [found[i] for i in order[HELD_OUT:]]

    def train(draw: np.random.Generator, count: int) -> list[Problem]:
        return [rest[i] for i in draw.integers(len(rest), size=count)]

    longest = max(len(text) for one in found for text in one.solutions)
    return Task("countdown", 7, longest + 1, train, held_out, mistakes=0.0, warm_up_steps=300)


def _steps(a: int, b: int) -> Iterator[tuple[str, int]]:
    yield f"{a}+{b}={a + b}", a + b
    if a >= b:
        yield f"{a}-{b}={a - b}", a - b


@dataclass(frozen=True, slots=True)
class Episodes:
    """B answers of at most R tokens to prompts of P tokens; answers are padded with the end."""

    prompts: Tensor  # [B, P] int64
    answers: Tensor  # [B, R] int64
    mask: Tensor  # [B, R] bool: up to the end, which was written too
    behaviour: Tensor  # [B, R] log-probability of each token when it was sampled
    rewards: Tensor  # [B]
    groups: Tensor  # [B] int64, which problem

    def __len__(self) -> int:
        return len(self.rewards)

    def __getitem__(self, rows: slice | Tensor) -> Episodes:
        return Episodes(*(getattr(self, one.name)[rows] for one in fields(self)))

    def texts(self) -> list[str]:
        """What was written, without the end."""
        return ["".join(CHARACTERS[i] for i in row).split(END)[0] for row in self.answers.tolist()]


def join(parts: Sequence[Episodes]) -> Episodes:
    """All episodes of `parts` in order; each part is one group."""
    columns = {one.name: [getattr(part, one.name) for part in parts] for one in fields(Episodes)}
    columns["groups"] = [torch.full_like(part.groups, place) for place, part in enumerate(parts)]
    return Episodes(**{name: torch.cat(column) for name, column in columns.items()})


def encode(texts: Sequence[str], width: int) -> Tensor:
    """[len(texts), width] token ids, one a character, padded with the end."""
    return torch.tensor([[IDS[character] for character in text.ljust(width, END)] for text in texts])


def make_policy(seed: int) -> LlamaForCausalLM:
    """Random weights: two layers of 64."""
    config = LlamaConfig(
        vocab_size=len(CHARACTERS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def warm_up(task: Task, seed: int) -> LlamaForCausalLM:
    """A new policy taught by demonstrations, 128 a step."""
    policy, draw = make_policy(seed), np.random.default_rng([seed, 0])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, task.warm_up_steps, pct_start=0.1)
    for _ in range(task.warm_up_steps):
        chosen = task.train(draw, 128)
        answers = encode([one.solutions[draw.integers(len(one.solutions))] for one in chosen], task.answer)
        mask = _written(answers)
        wrong = torch.from_numpy(draw.random(answers.shape) < task.mistakes) & (answers != 0)
        answers = torch.where(wrong, torch.from_numpy(draw.integers(1, 11, size=answers.shape)), answers)
        logprobs, _ = answer_logprobs(policy, encode([one.prompt for one in chosen], task.prompt), answers)
        optimizer.zero_grad()
        (-logprobs[mask].mean()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return policy


def warm_policy(name: str, seed: int) -> LlamaForCausalLM:
    """The warm-up of a seed, from `benchmarks/out/lab` if this code made it before."""
    made = task(name)
    path = OUT / "lab" / f"{name}-{made.warm_up_steps}-{made.mistakes}-{seed}-{_digest(Path(__file__))}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        torch.save(warm_up(made, seed).state_dict(), part)
        part.replace(path)
    policy = make_policy(seed)
    policy.load_state_dict(torch.load(path))
    return policy


def answer_logprobs(policy: LlamaForCausalLM, prompts: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """([B, R] log-probabilities of the answers' tokens, [B, R] entropies), nats, what follows the end included."""
    ids = torch.cat([prompts, answers[:, :-1]], 1)
    logs = policy(input_ids=ids, use_cache=False).logits[:, prompts.shape[1] - 1 :].log_softmax(-1)
    return logs.gather(2, answers[..., None]).squeeze(2), -(logs.exp() * logs).sum(-1)


@torch.no_grad()
def sample(
    policy: LlamaForCausalLM, task: Task, chosen: Sequence[Problem], each: int, generator: torch.Generator
) -> Episodes:
    """`each` answers at temperature 1 to every one of the chosen problems; a problem's answers stand together."""
    prompts = encode([one.prompt for one in chosen], task.prompt).repeat_interleave(each, 0)
    parts = [_write(policy, part, task.answer, generator) for part in prompts.split(CHUNK)]
    answers, behaviour = (torch.cat(columns) for columns in zip(*parts, strict=True))
    groups = torch.arange(len(chosen)).repeat_interleave(each)
    rewards = torch.empty(len(answers))
    episodes = Episodes(prompts, answers, _written(answers), behaviour, rewards, groups)
    right = [frozenset(one.solutions) for one in chosen]
    texts = zip(groups.tolist(), episodes.texts(), strict=True)
    rewards.copy_(torch.tensor([text in right[group] for group, text in texts]))
    return episodes


def _write(
    policy: LlamaForCausalLM, prompts: Tensor, longest: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    past = DynamicCache(config=policy.config)
    ids, alive = prompts, torch.ones(len(prompts), 1, dtype=torch.bool)
    answers = torch.zeros(len(prompts), longest, dtype=torch.int64)
    logprobs = torch.zeros(len(prompts), longest)
    for place in range(longest):
        logs = policy(input_ids=ids, past_key_values=past, use_cache=True).logits[:, -1].log_softmax(-1)
        ids = torch.multinomial(logs.exp(), 1, generator=generator) * alive
        answers[:, place], logprobs[:, place] = ids[:, 0], (logs.gather(1, ids) * alive)[:, 0]
        alive = alive & (ids != 0)
        if not alive.any():
            break
    return answers, logprobs


def _written(answers: Tensor) -> Tensor:
    """Which tokens were written: those before the first end, and that end."""
    ended = (answers == 0).long()
    return ended.cumsum(1) - ended == 0


def accuracy(policy: LlamaForCausalLM, task: Task, each: int = 2) -> float:
    """Mean reward on the held-out problems; the same random numbers every time."""
    generator = torch.Generator().manual_seed(0)
    return float(sample(policy, task, task.held_out, each, generator).rewards.mean())


@dataclass(frozen=True, slots=True)
class Method:
    """An objective with its constants.

    proximal: it needs log-probabilities of a proximal policy. mask: the product's `correction.sequence_mask`, which
    drops answers with A < 0 whose mean log(behaviour / policy) is above this.
    """

    objective: str
    options: Mapping[str, float] = field(default_factory=dict)
    proximal: bool = False
    mask: float | None = None


def optimizer_of(policy: LlamaForCausalLM, learning_rate: float) -> torch.optim.Optimizer:
    """Adam as the papers have it, at a constant rate."""
    return torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.01)


def advantages(rewards: Tensor, groups: Tensor) -> Tensor:
    """[B], standardised within the answers to one problem."""
    return ADVANTAGES["group_norm"](rewards, groups)


def update(
    policy: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    episodes: Episodes,
    advantage: Tensor,
    method: Method,
    *,
    old: Tensor | None = None,
    diversity: Tensor | None = None,
    local: float = 0.0,
    replayed: int = 0,
) -> dict[str, float]:
    """One step of the optimizer on all `episodes`; returns numbers that tell how far off-policy it was.

    far_negative is the share of the push on log-probabilities that falls on answers with A < 0 and W < exp(-2);
    replay_ess the effective sample size of the first `replayed` episodes, 1 if there are none.

    Args:
        old: [B, R] log-probabilities under the proximal policy.
        diversity: [B], DSDR's w.
        local: lambda_l, coefficient of DSDR's local entropy term.
        replayed: how many episodes come from replay; they stand first.
    """
    logprobs, entropies = answer_logprobs(policy, episodes.prompts, episodes.answers)
    sequence, _ = torch.nonzero(episodes.mask, as_tuple=True)
    batch = objectives.Batch(
        logprobs=logprobs[episodes.mask],
        advantages=advantage[sequence].float(),
        sequence=sequence,
        sequences=len(episodes),
        behaviour_logprobs=episodes.behaviour[episodes.mask],
        old_logprobs=None if old is None else old[episodes.mask],
        diversity=diversity,
    )
    losses = objectives.get(method.objective).loss(batch, **method.options)
    if method.mask is not None:
        losses = objectives.scaled(losses, batch, objectives.sequence_mask(batch, method.mask))
    whole = objectives.Counts(tokens=len(sequence), sequences=len(episodes))
    loss = objectives.aggregate(losses, batch, "token-mean", whole)
    if local:
        loss = loss + local * objectives.local_entropy(batch, len(torch.unique(episodes.groups)))
    push = objectives.coefficients(losses, batch).abs()
    log_w = objectives.sequence_log_ratio(batch)
    far = (batch.advantages < 0) & (log_w < FAR)[sequence]
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    tokens = objectives.token_statistics(batch, entropies[episodes.mask])
    found = objectives.summarise(log_w, losses.phi, tokens)
    return found | {
        "gradient_norm": float(norm),
        "far_negative": float(push[far].sum() / push.sum().clamp(min=1e-12)),
        "replay_ess": objectives.effective_sample_size(log_w[:replayed]) if replayed else 1.0,
    }


def code() -> dict[str, str]:
    """A digest of every file of this repository that is loaded: what decides a cell, the script's constants included."""
    files = (getattr(module, "__file__", None) for module in [*sys.modules.values()])
    paths = {Path(file).resolve() for file in files if file}
    names = {path.relative_to(ROOT): path for path in paths if path.is_relative_to(ROOT)}
    return {str(name): _digest(path) for name, path in sorted(names.items()) if name.parts[0] in PACKAGES}


def _digest(path: Path) -> str:
    """SHA-256 of the statements of a Python file; layout, comments and docstrings do not count, nor, in a benchmark, the
    functions that say which cells to run and what to make of them: a cell's settings are in its key.
    """
    around = {
        "code",
        "_digest",
        "run",
        "warm_ups",
        "interval",
        "difference",
        "mark",
        "parser",
        "keep",
        "main",
    }
    around |= {"measures", "needed", "median", "summarise", "compare", "show", "_ends", "_fill", "_reports"}
    around |= {"draw_curves"}
    tree = ast.parse(path.read_text())
    if path.parent.name == "benchmarks":
        tree.body = [node for node in tree.body if getattr(node, "name", None) not in around]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            del node.body[0]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def run(
    name: str,
    work: Callable[[Any], dict[str, Any]],
    cells: Mapping[str, dict[str, Any]],
    *,
    workers: int,
    fresh: bool,
) -> dict[str, dict[str, Any]]:
    """`work` of every cell's settings, in processes of one thread. A result is a file of its own in
    `benchmarks/out/<name>`; a cell whose file is there, made by the same code with the same settings, is not run again.
    """
    folder, made_by = OUT / name, code()
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    for key, settings in cells.items():
        path = folder / f"{key}.json"
        if not fresh and path.exists():
            kept = json.loads(path.read_text())
            if (kept.get("code"), kept["settings"]) == (made_by, settings):
                results[key] = kept
    missing = [key for key in cells if key not in results]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    with Progress(*columns) as progress, pool:
        bar = progress.add_task(name, total=len(cells), completed=len(results))
        futures = {pool.submit(work, cells[key]): key for key in missing}
        for future in as_completed(futures):
            key = futures[future]
            results[key] = {"code": made_by, "settings": cells[key], **future.result()}
            part = folder / f"{key}.part"
            part.write_text(json.dumps(results[key]))
            part.replace(folder / f"{key}.json")
            progress.advance(bar)
    return {key: results[key] for key in cells}


def warm_ups(name: str, seeds: Sequence[int], workers: int) -> None:
    """Make the warm-ups of these seeds that are not there yet, before cells share them."""
    cells = {f"{name}-{seed}": {"task": name, "seed": seed} for seed in seeds}
    run("lab", _warm_up_cell, cells, workers=workers, fresh=False)


def _warm_up_cell(settings: dict[str, Any]) -> dict[str, Any]:
    return {"accuracy": accuracy(warm_policy(settings["task"], settings["seed"]), task(settings["task"]))}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t; nan from fewer than two values."""
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values)), float(half)


def difference(own: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Of two runs of every seed: mean difference, half its 95 % interval, and p of no difference (paired t)."""
    mean, half = interval(np.subtract(own, base).tolist())
    return {
        "mean": mean,
        "half": half,
        "p": float(stats.ttest_rel(own, base).pvalue) if len(own) > 1 else float("nan"),
    }


def mark(found: Mapping[str, float], comparisons: int) -> str:
    """`+0.01±0.02`, and a star if the interval excludes 0; two if it does so with a level shared by all comparisons."""
    stars = "*" * ((found["p"] < 0.05) + (found["p"] < 0.05 / comparisons))
    return f"{found['mean']:+.3f}±{found['half']:.3f}{stars}"


def parser(description: str | None, seeds: int) -> argparse.ArgumentParser:
    """The words that the three benchmarks share."""
    words = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("--seeds", type=int, nargs="+", default=list(range(seeds)))
    words.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    words.add_argument("--fresh", action="store_true", help="run finished cells again")
    words.add_argument("--json", action="store_true", help="print the summary as JSON")
    words.add_argument("--quick", action="store_true", help="a smoke test: one seed, a few updates")
    words.add_argument("--save", action="store_true", help=f"summary to {BASELINES}, picture to {IMAGES}")
    return words


def keep(name: str, summary: dict[str, Any], figure: Any, *, save: bool) -> None:
    """Write summary and picture to `benchmarks/out`, or to where the repository keeps them."""
    for folder, suffix in ((BASELINES, "json"), (IMAGES, "svg")) if save else ((OUT, "json"), (OUT, "svg")):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.{suffix}"
        if suffix == "json":
            path.write_text(json.dumps(summary, indent=1) + "\n")
        else:
            figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
