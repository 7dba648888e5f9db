"""How far can a batch of episodes go stale before an objective fails?

    python -m benchmarks.staleness [--seeds 0 1 2] [--methods vespo grpo] [--workers 2]

VESPO's protocol (arXiv 2602.10693v3, section 4): one batch of N mini-batches is sampled and learnt from once, in
N updates, so that its last mini-batch is N - 1 updates old. The mini-batch (64 answers) and the number of updates
are the same for all N; nothing else changes. The task is `sorting` of the laboratory. On policy all methods have the
same gradient, so N = 1 is one run. Decoupled PPO takes as its proximal policy the weights at the start of each
quarter of the batch. The learning rate is common to all: 3e-4, a third of what the on-policy run no longer stands
(1e-3 takes it to 0 in 16 updates); the stress setting doubles it.

What makes a method fall is asked twice: by what its updates report before it falls, and, for the three whose every
token keeps a push, by a run at the greatest N without the part that is suspected, the push on bad answers which the
policy has nearly given up already (`correction.sequence_mask` of the product).
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import lab
from models.machine import describe

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
MASK = 0.15  # nats a token; of an answer to `sorting` W is then e^-2, which is lab.FAR
MASKED = {f"{name}, masked": replace(METHODS[name], mask=MASK) for name in ("sapo", "cispo", "tis")}
ON_POLICY = "reinforce"  # the objective of the run that is every method's N = 1
STALENESS = (1, 4, 8, 16, 32, 64)
STRESSED = (1, 64)
EARLY = 1  # updates between this evaluation and the next, soon after the start
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
    task, method, n = lab.task("sorting"), (METHODS | MASKED)[settings["method"]], settings["n"]
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
                    "early": {
                        name: float(np.mean([one["trace"][EARLY][name] for one in runs])) for name in TRACED
                    },
                    "last": {
                        name: float(np.mean([one["trace"][-1][name] for one in runs])) for name in TRACED
                    },
                }
            )
    return rows


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to each row the differences of its final reward, paired by seed: from the on-policy run, and VESPO's from it
    at the same N."""
    finals = {(row["rate"], row["method"], row["n"]): row["finals"] for row in rows}
    for row in rows:
        rate, method, n = row["rate"], row["method"], row["n"]
        base, vespo = finals.get((rate, method, 1)), finals.get((rate, "vespo", n))
        if n > 1 and base is not None:
            row["from_on_policy"] = lab.difference(row["finals"], base)
        if n > 1 and vespo is not None and method != "vespo":
            row["vespo_from_it"] = lab.difference(vespo, row["finals"])


def show(rows: list[dict[str, Any]], console: Console) -> None:
    for rate in dict.fromkeys(row["rate"] for row in rows):
        chosen = [row for row in rows if row["rate"] == rate]
        depths = sorted({row["n"] for row in chosen})
        console.print(_ends(chosen, f"{rate}, learning rate {RATES[rate]:g}", depths))
        stars = "* the interval excludes 0; ** it does at a level of 5 % over all of this table"
        for name, title in (
            ("from_on_policy", "minus on-policy"),
            ("vespo_from_it", "VESPO at the same N minus the method"),
        ):
            compared = [row for row in chosen if name in row]
            table = Table(title=f"{rate}: {title}, paired by seed, ± 95 %", caption=stars)
            texts = [lab.mark(row[name], len(compared)) for row in compared]
            console.print(_fill(table, compared, texts, depths[1:]))
        for when, title in (
            ("early", f"updates {EARLY * EVERY + 1} to {(EARLY + 1) * EVERY}"),
            ("last", f"the last {EVERY} updates"),
        ):
            console.print(_reports(chosen, depths[-1], when, f"{rate}, N={depths[-1]}, mean of {title}"))


def _ends(rows: list[dict[str, Any]], title: str, depths: list[int]) -> Table:
    table = Table(
        title=f"{title}: held-out reward at the end ± 95 %",
        caption="(worst drop from the peak; first update at which a run had lost half of its peak × such runs) "
        "↓ runs that ended below their warm-up",
    )
    texts = []
    for row in rows:
        fell = f"; {min(row['collapses'])}×{len(row['collapses'])}" if row["collapses"] else ""
        harmed = f" ↓{row['harmed']}" if row["harmed"] else ""
        texts.append(f"{row['final']:.2f}±{row['final_half']:.2f} ({row['worst_drop']:.2f}{fell}){harmed}")
    return _fill(table, rows, texts, depths)


def _fill(table: Table, rows: list[dict[str, Any]], texts: list[str], depths: list[int]) -> Table:
    """A line for each method, a column for each N, the text of a row where they meet."""
    for name in ("method", *(f"N={n}" for n in depths)):
        table.add_column(name)
    entries = {(row["method"], row["n"]): text for row, text in zip(rows, texts, strict=True)}
    for method in dict.fromkeys(row["method"] for row in rows):
        table.add_row(method, *(entries.get((method, n), "") for n in depths))
    return table


def _reports(rows: list[dict[str, Any]], n: int, when: str, title: str) -> Table:
    columns = {
        "push on A<0, W<e^-2": "far_negative",
        "ESS": "ess",
        "phi": "phi",
        "phi<.01": "phi_dead",
        "KL k3/token": "kl_k3",
        "entropy": "entropy",
        "mean log W": "log_ratio_mean",
    }
    table = Table(title=title)
    for name in ("method", *columns):
        table.add_column(name)
    for row in rows:
        if row["n"] == n:
            table.add_row(row["method"], *(f"{row[when][name]:.3f}" for name in columns.values()))
    return table


def draw_curves(rows: list[dict[str, Any]], every: int) -> Any:
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "forebay"
    from matplotlib import pyplot

    rates = list(dict.fromkeys(row["rate"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] in METHODS))
    figure, axes = pyplot.subplots(
        len(rates), len(methods), figsize=(2.1 * len(methods), 2.1 * len(rates)), sharex=True, sharey=True
    )
    axes = np.reshape(axes, (len(rates), len(methods)))
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(STALENESS)))
    for row in rows:
        masked = row["method"] in MASKED
        if masked and row["n"] == 1:
            continue
        axis = axes[rates.index(row["rate"]), methods.index(row["method"].split(",")[0])]
        updates = np.arange(len(row["curve"])) * every
        style = {"color": "tab:red", "ls": ":"} if masked else {"color": colours[STALENESS.index(row["n"])]}
        axis.plot(updates, row["curve"], lw=1.2, label=f"N={row['n']}{', masked' * masked}", **style)
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
    masked = [name for name in MASKED if name.split(",")[0] in words.methods]
    runs = []
    for rate in words.rates:
        depths = (1, 4) if words.quick else STALENESS if rate == "main" else STRESSED
        runs += [(rate, 1, ON_POLICY), *((rate, n, name) for n in depths[1:] for name in words.methods)]
        runs += [(rate, depths[-1], name) for name in masked if rate == "main"]
    cells = {
        f"{method.replace(', ', '-')}-{n}-{RATES[rate]:g}-{updates}-{seed}": {
            "method": method,
            "n": n,
            "seed": seed,
            "rate": RATES[rate],
            "updates": updates,
            "every": every,
        }
        for seed in seeds
        for rate, n, method in runs
    }
    lab.warm_ups("sorting", seeds, words.workers)
    results = lab.run("staleness", cell, cells, workers=words.workers, fresh=words.fresh)
    rows = [row for rate in words.rates for row in summarise(results, rate, [*words.methods, *masked])]
    compare(rows)
    summary = {
        "machine": describe(),
        "code": lab.code(),
        "seeds": seeds,
        "updates": updates,
        "rates": RATES,
        "rows": rows,
    }
    lab.keep("staleness", summary, draw_curves(rows, every), save=words.save)
    if words.json:
        print(json.dumps(summary))
    else:
        show(rows, Console(width=160))


if __name__ == "__main__":
    main()
