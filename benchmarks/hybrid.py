"""How many fresh samples does a policy need to become so good: on-policy, hybrid, or replay alone?

    python -m benchmarks.hybrid [--seeds 0 1 2] [--workers 2]

On-policy: all 8 groups of an update are sampled from the policy in training. Hybrid: a share of them is
(`tasks.training.mixture`, schedule constant), the others are drawn from the fresh groups of the last 16 updates,
those used before included. Pure replay: the warm-up policy answers once, and all updates draw from that. The task
is `sorting` of the laboratory, the objective VESPO at one learning rate, the update 64 answers; what differs is
where they come from. A hybrid of GRPO stands beside, to tell the mixture from the objective.

Counted are the episodes sampled for training until two evaluations in a row have reached the accuracy on held-out
problems in their mean. A run that does not get there counts as "more than all its samples".
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import lab
from benchmarks.machine import describe
from tasks.training import mixture
from tasks.training.settings import Mixture

METHODS = {"vespo": lab.Method("vespo"), "grpo": lab.Method("dapo", {"eps_lo": 0.2, "eps_hi": 0.28})}
# name: (objective, share of fresh groups, groups sampled before the first update, updates)
ARMS = {
    "on-policy": ("vespo", 1.0, 0, 256),
    "hybrid 1/2": ("vespo", 0.5, 0, 320),
    "hybrid 1/4": ("vespo", 0.25, 0, 384),
    "hybrid 1/4 grpo": ("grpo", 0.25, 0, 384),
    "replay of 256": ("vespo", 0.0, 32, 256),
    "replay of 1024": ("vespo", 0.0, 128, 256),
    "replay of 4096": ("vespo", 0.0, 512, 256),
    "replay of 16384": ("vespo", 0.0, 2048, 256),
    "replay of 1024 grpo": ("grpo", 0.0, 128, 256),
}
RATE = 3e-4
WINDOW = 16  # updates whose fresh groups can be replayed
EVERY = 8
LEVELS = (0.5, 0.6, 0.7, 0.8)


def cell(settings: dict[str, Any]) -> dict[str, Any]:
    """Train one policy; the held-out accuracy and the episodes sampled by then, at every evaluation."""
    objective, share, collected, _ = ARMS[settings["arm"]]
    task, method = lab.task("sorting"), METHODS[objective]
    policy = lab.warm_policy("sorting", settings["seed"])
    optimizer = lab.optimizer_of(policy, RATE)
    draw = np.random.default_rng([settings["seed"], 2])
    generator = torch.Generator().manual_seed(settings["seed"] + 2)

    def sampled(groups: int) -> list[lab.Episodes]:
        episodes = lab.sample(policy, task, task.train(draw, groups), lab.GROUP, generator)
        return [episodes[start : start + lab.GROUP] for start in range(0, len(episodes), lab.GROUP)]

    constant = Mixture(schedule="constant", fresh=share)
    mix = mixture.start(constant, lab.GROUPS)
    past = [sampled(collected)] if collected else []  # the fresh groups of each update
    samples = [collected * lab.GROUP]
    curve = [lab.accuracy(policy, task)]
    total, trace, esses = samples[0], [], []
    for done in range(settings["updates"]):
        wanted, mix = mixture.fresh_groups(constant, mix, done, settings["updates"], lab.GROUPS)
        stock = [group for groups in past for group in groups]
        wanted = max(wanted, lab.GROUPS - len(stock))  # at the start there is nothing to replay
        fresh = sampled(wanted) if wanted else []
        chosen = draw.permutation(len(stock))[: lab.GROUPS - wanted]
        groups = [*fresh, *(stock[i] for i in chosen)]
        if not collected:
            past = [*past, fresh][-WINDOW:]
        total += wanted * lab.GROUP
        batch = lab.join(groups)
        advantage = lab.advantages(batch.rewards, batch.groups)
        esses.append(lab.update(policy, optimizer, batch, advantage, method)["ess"])
        if (done + 1) % settings["every"] == 0:
            curve.append(lab.accuracy(policy, task))
            samples.append(total)
            trace.append(float(np.mean(esses)))
            esses = []
    return {"curve": curve, "samples": samples, "ess": trace}


def needed(run: dict[str, Any], level: float) -> int | None:
    """Samples by which the mean of an evaluation and the next was at the level; None if it never was."""
    pairs = zip(pairwise(run["curve"]), run["samples"][1:], strict=True)
    return next((count for pair, count in pairs if sum(pair) / 2 >= level), None)


def summarise(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each arm: samples to each level (one count a seed), and best accuracy."""
    rows = []
    for arm in dict.fromkeys(one["settings"]["arm"] for one in results.values()):
        runs = [one for one in results.values() if one["settings"]["arm"] == arm]
        best, best_half = lab.interval([max(np.convolve(one["curve"], [0.5, 0.5], "valid")) for one in runs])
        final, final_half = lab.interval([float(np.mean(one["curve"][-3:])) for one in runs])
        rows.append(
            {
                "arm": arm,
                "samples": runs[0]["samples"],
                "curve": np.mean([one["curve"] for one in runs], 0).tolist(),
                "needed": {str(level): [needed(one, level) for one in runs] for level in LEVELS},
                "best": best,
                "best_half": best_half,
                "final": final,
                "final_half": final_half,
                "ess": float(np.mean([one["ess"] for one in runs])),
            }
        )
    return rows


def median(counts: list[int | None], budget: int) -> str:
    """Median, least and greatest of the counts; a missing one is more than the budget."""
    known = sorted(count if count is not None else budget + 1 for count in counts)
    words = [f">{budget}" if count > budget else str(count) for count in known]
    return f"{words[(len(words) - 1) // 2]} [{words[0]}, {words[-1]}]"


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="Episodes sampled until held-out accuracy is reached: median over seeds, and range")
    for name in ("arm", *(f"{level:g}" for level in LEVELS), "best ± 95 %", "final ± 95 %", "mean ESS"):
        table.add_column(name)
    for row in rows:
        counts = (median(row["needed"][str(level)], row["samples"][-1]) for level in LEVELS)
        ends = (f"{row[name]:.2f}±{row[f'{name}_half']:.2f}" for name in ("best", "final"))
        table.add_row(row["arm"], *counts, *ends, f"{row['ess']:.2f}")
    console.print(table)


def draw_curves(rows: list[dict[str, Any]]) -> Any:
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "forebay"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    for row in rows:
        if row["arm"].startswith("replay"):
            axes.plot(row["samples"][0], row["best"], "o", label=f"{row['arm']}, best")
        else:
            axes.plot(row["samples"], row["curve"], lw=1.3, label=row["arm"])
    axes.set(xscale="log", xlabel="episodes sampled", ylabel="held-out accuracy")
    axes.legend(fontsize=7)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = lab.parser(__doc__, seeds=3)
    parser.add_argument("--methods", nargs="+", choices=ARMS, default=list(ARMS))
    words = parser.parse_args(arguments)
    seeds = words.seeds[:1] if words.quick else words.seeds
    cells = {
        f"{arm.replace(' ', '-').replace('/', 'in')}-{seed}{'-quick' if words.quick else ''}": {
            "arm": arm,
            "seed": seed,
            "updates": 4 if words.quick else ARMS[arm][3],
            "every": 2 if words.quick else EVERY,
        }
        for seed in seeds
        for arm in words.methods
    }
    lab.warm_ups("sorting", seeds, words.workers)
    rows = summarise(lab.run("hybrid", cell, cells, workers=words.workers, fresh=words.fresh))
    summary = {"machine": describe(), "seeds": seeds, "rate": RATE, "window": WINDOW, "rows": rows}
    lab.keep("hybrid", summary, draw_curves(rows), save=words.save)
    if words.json:
        print(json.dumps(summary))
    else:
        show(rows, Console(width=170))


if __name__ == "__main__":
    main()
