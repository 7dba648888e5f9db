"""How far can a batch of episodes go stale before an objective fails?

    python -m benchmarks.staleness [--seeds 0 1 2] [--methods vespo grpo] [--workers 2]

VESPO's protocol (arXiv 2602.10693v3, section 4): one batch of N mini-batches is sampled and learnt from once, in
N updates, so that its last mini-batch is N - 1 updates old. The mini-batch (64 answers) and the number of updates
are the same for all N; nothing else changes. The task is `sorting` of the laboratory. On policy all methods have the
same gradient, so N = 1 is one run. Decoupled PPO takes as its proximal policy the weights at the start of each
quarter of the batch. The learning rate is common to all: 3e-4, a third of what the on-policy run no longer stands
(1e-3 takes it to 0 in 16 updates); the stress setting doubles it.
"""

from __future__ import annotations

import json
from typing import Any

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import lab
from benchmarks.machine import describe

METHODS = {
    "vespo": lab.Method("vespo"),
    "grpo": lab.Method("dapo", {"eps_lo": 0.2, "eps_hi": 0.28}),
    "gspo": lab.Method("gspo", {"eps_lo": 3e-4, "eps_hi": 4e-4}),
    "sapo": lab.Method("sapo", {"tau_pos": 1.0, "tau_neg": 1.05}),
    "cispo": lab.Method("cispo", {"eps_lo": 1.0, "eps_hi": 0.28}),
    "decoupled_ppo": lab.Method("decoupled_ppo", {"eps": 0.2}, proximal=True),
    "tis": lab.Method("tis", {"high": 2.0}),
    "reinforce": lab.Method("reinforce"),
}
ON_POLICY = "reinforce"  # the objective of the run that is every method's N = 1
STALENESS = (1, 4, 8, 16, 32, 64)
STRESSED = (1, 64)
RATES = {"main": 3e-4, "stress": 6e-4}
UPDATES = 192
EVERY = 16  # updates between two evaluations
FINAL = 3  # evaluations that the final reward is the mean of
TRACED = (
    "far_negative",
    "ess",
    "phi",
    "phi_dead",
    "kl_k3",
    "entropy",
    "log_ratio_mean",
    "log_ratio_std",
    "gradient_norm",
)


def cell(settings: dict[str, Any]) -> dict[str, Any]:
    """Train one policy; its curve of held-out reward, and the mean of what the updates reported in between."""
    task, method, n = lab.task("sorting"), METHODS[settings["method"]], settings["n"]
    policy = lab.warm_policy("sorting", settings["seed"])
    optimizer = lab.optimizer_of(policy, settings["rate"])
    draw = np.random.default_rng([settings["seed"], 1])
    generator = torch.Generator().manual_seed(settings["seed"] + 1)
    curve, trace, reports = [lab.accuracy(policy, task)], [], []
    for done in range(settings["updates"]):
        place = done % n
        if not place:
            episodes = lab.sample(policy, task, task.train(draw, lab.GROUPS * n), lab.GROUP, generator)
            advantage = lab.advantages(episodes.rewards, episodes.groups)
        if method.proximal and place % max(n // 4, 1) == 0:
            with torch.no_grad():
                end = (place + max(n // 4, 1)) * lab.MINIBATCH
                quarter = episodes[place * lab.MINIBATCH : end]
                parts = zip(quarter.prompts.split(lab.CHUNK), quarter.answers.split(lab.CHUNK), strict=True)
                proximal = iter(
                    torch.cat([lab.answer_logprobs(policy, *part)[0] for part in parts]).split(lab.MINIBATCH)
                )
        rows = slice(place * lab.MINIBATCH, (place + 1) * lab.MINIBATCH)
        old = next(proximal) if method.proximal else None
        reports.append(lab.update(policy, optimizer, episodes[rows], advantage[rows], method, old=old))
        if (done + 1) % settings["every"] == 0:
            curve.append(lab.accuracy(policy, task))
            trace.append({name: float(np.mean([one[name] for one in reports])) for name in TRACED})
            reports = []
    return {"curve": curve, "trace": trace}


def measures(curve: list[float], every: int) -> dict[str, Any]:
    """Final reward; worst drop from a peak before it; the update by which less than half of that peak was left (None:
    never), these two from the running mean of three evaluations; and whether it ended below the warm-up."""
    smooth = np.convolve(curve, np.ones(3) / 3, "valid") if len(curve) >= 3 else np.asarray(curve)
    peak = np.maximum.accumulate(smooth)
    fallen = np.flatnonzero(smooth < peak / 2)
    return {
        "final": float(np.mean(curve[-FINAL:])),
        "drop": float((peak - smooth).max()),
        "collapse": int(fallen[0] + 1) * every if len(fallen) else None,
        "harmed": bool(np.mean(curve[-FINAL:]) < curve[0]),
    }


def summarise(results: dict[str, dict[str, Any]], rate: str, methods: list[str]) -> list[dict[str, Any]]:
    """A row for each method and N, with the on-policy run as every method's N = 1."""
    rows = []
    for method in methods:
        for n in STALENESS:
            runs = [
                one
                for one in results.values()
                if one["settings"]["rate"] == RATES[rate]
                and one["settings"]["n"] == n
                and one["settings"]["method"] in ((method,) if n > 1 else (ON_POLICY,))
            ]
            if not runs:
                continue
            found = [measures(one["curve"], one["settings"]["every"]) for one in runs]
            final, half = lab.interval([one["final"] for one in found])
            last = [one["trace"][-1] for one in runs]
            rows.append(
                {
                    "rate": rate,
                    "method": method,
                    "n": n,
                    "final": final,
                    "final_half": half,
                    "finals": [one["final"] for one in found],
                    "drop": float(np.mean([one["drop"] for one in found])),
                    "worst_drop": max(one["drop"] for one in found),
                    "collapses": [one["collapse"] for one in found if one["collapse"]],
                    "harmed": sum(one["harmed"] for one in found),
                    "curve": np.mean([one["curve"] for one in runs], 0).tolist(),
                    "last": {name: float(np.mean([one[name] for one in last])) for name in last[0]},
                }
            )
    return rows


def against_on_policy(rows: list[dict[str, Any]]) -> None:
    """Add to each row the paired difference of its final reward from the on-policy run of the same seed."""
    for row in rows:
        base = next(
            (
                one
                for one in rows
                if (one["rate"], one["method"], one["n"]) == (row["rate"], row["method"], 1)
            ),
            None,
        )
        if base is not None and row["n"] > 1 and len(base["finals"]) == len(row["finals"]):
            row["loss"], row["loss_half"] = lab.interval(
                [own - before for own, before in zip(row["finals"], base["finals"], strict=True)]
            )


def show(rows: list[dict[str, Any]], console: Console) -> None:
    for rate in dict.fromkeys(row["rate"] for row in rows):
        chosen = [row for row in rows if row["rate"] == rate]
        depths = sorted({row["n"] for row in chosen})
        table = Table(
            title=f"{rate}, learning rate {RATES[rate]:g}: held-out reward at the end ± 95 %",
            caption="(worst drop from the peak; first update at which a run had lost half of its peak × such runs) "
            "↓ runs that ended below their warm-up",
        )
        for name in ("method", *(f"N={n}" for n in depths)):
            table.add_column(name)
        for method in dict.fromkeys(row["method"] for row in chosen):
            line = []
            for n in depths:
                row = next((one for one in chosen if (one["method"], one["n"]) == (method, n)), None)
                if row is None:
                    line.append("")
                    continue
                fell = f"; {min(row['collapses'])}×{len(row['collapses'])}" if row["collapses"] else ""
                harmed = f" ↓{row['harmed']}" if row["harmed"] else ""
                line.append(
                    f"{row['final']:.2f}±{row['final_half']:.2f} ({row['worst_drop']:.2f}{fell}){harmed}"
                )
            table.add_row(method, *line)
        console.print(table)
        columns = {
            "push on A<0, W<e^-2": "far_negative",
            "ESS": "ess",
            "phi": "phi",
            "phi<.01": "phi_dead",
            "KL k3/token": "kl_k3",
            "entropy": "entropy",
            "mean log W": "log_ratio_mean",
        }
        table = Table(title=f"{rate}, N={depths[-1]}, mean of the last {EVERY} updates: why")
        for name in ("method", *columns):
            table.add_column(name)
        for row in chosen:
            if row["n"] == depths[-1]:
                table.add_row(row["method"], *(f"{row['last'][name]:.3f}" for name in columns.values()))
        console.print(table)


def draw_curves(rows: list[dict[str, Any]], every: int) -> Any:
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "forebay"
    from matplotlib import pyplot

    rates = list(dict.fromkeys(row["rate"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = pyplot.subplots(
        len(rates), len(methods), figsize=(2.1 * len(methods), 2.1 * len(rates)), sharex=True, sharey=True
    )
    axes = np.reshape(axes, (len(rates), len(methods)))
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(STALENESS)))
    for row in rows:
        axis = axes[rates.index(row["rate"]), methods.index(row["method"])]
        updates = np.arange(len(row["curve"])) * every
        axis.plot(
            updates, row["curve"], color=colours[STALENESS.index(row["n"])], lw=1.2, label=f"N={row['n']}"
        )
    for column, method in enumerate(methods):
        axes[0, column].set_title(method, fontsize=9)
        axes[-1, column].set_xlabel("updates", fontsize=8)
    for line, rate in enumerate(rates):
        axes[line, 0].set_ylabel(f"reward, {rate} {RATES[rate]:g}", fontsize=8)
    axes[0, -1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = lab.parser(__doc__, seeds=3)
    compared = [name for name in METHODS if name != ON_POLICY]
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=compared)
    parser.add_argument("--rates", nargs="+", choices=RATES, default=list(RATES))
    words = parser.parse_args(arguments)
    updates, every, seeds = (8, 4, words.seeds[:1]) if words.quick else (UPDATES, EVERY, words.seeds)
    cells = {}
    for rate in words.rates:
        depths = (1, 4) if words.quick else STALENESS if rate == "main" else STRESSED
        for n in depths:
            for method in words.methods if n > 1 else [ON_POLICY]:
                for seed in seeds:
                    cells[f"{method}-{n}-{RATES[rate]:g}-{updates}-{seed}"] = {
                        "method": method,
                        "n": n,
                        "seed": seed,
                        "rate": RATES[rate],
                        "updates": updates,
                        "every": every,
                    }
    lab.warm_ups("sorting", seeds, words.workers)
    results = lab.run("staleness", cell, cells, workers=words.workers, fresh=words.fresh)
    rows = [row for rate in words.rates for row in summarise(results, rate, words.methods)]
    against_on_policy(rows)
    summary = {"machine": describe(), "seeds": seeds, "updates": updates, "rates": RATES, "rows": rows}
    lab.keep("staleness", summary, draw_curves(rows, every), save=words.save)
    if words.json:
        print(json.dumps(summary))
    else:
        show(rows, Console(width=160))


if __name__ == "__main__":
    main()
