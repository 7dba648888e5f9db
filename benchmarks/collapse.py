"""Is the beginning of a collapse named, and its driver, with no alarm on healthy runs; and what prevents it?

    python -m benchmarks.collapse [--seeds 0 1 2] [--workers 2]

A collapse is constructed: a policy of the laboratory learns `sorting` on policy, and from an update that the seed draws on
it learns from batches of 64 mini-batches that are each sampled once, so that they grow stale. CISPO goes on pushing down bad
answers that the policy has nearly given up (`benchmarks.staleness`), and falls. The same history is learnt from by CISPO with
the product's sequence mask and by VESPO. Healthy runs stay on policy to the end. `tasks.training.stability` reads
the numbers that every update reports, and nothing else; held-out rewards only tell afterwards what happened.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import lab
from models.machine import describe
from tasks.training.stability import find_collapse

CISPO = {"eps_lo": 1.0, "eps_hi": 0.28}
KINDS = {
    "collapse": lab.Method("cispo", CISPO),
    "masked": lab.Method("cispo", CISPO, mask=0.15),
    "vespo": lab.Method("vespo"),
    "healthy": lab.Method("cispo", CISPO),
}
UPDATES, EVERY, RATE = 192, 8, 3e-4
STALE = 64  # mini-batches that are sampled at once, from the onset on
FIRST, LAST = 50, 120  # the onset lies between


def onset_of(seed: int) -> int:
    """The update with which the data of a seed begin to grow stale."""
    return int(np.random.default_rng(seed).integers(FIRST, LAST)) + 1


def cell(settings: dict[str, Any]) -> dict[str, Any]:
    """Train one policy; what its updates reported, and its held-out reward every few of them."""
    task, method, seed = lab.task("sorting"), KINDS[settings["kind"]], settings["seed"]
    policy = lab.warm_policy("sorting", seed)
    optimizer = lab.optimizer_of(policy, RATE)
    draw = np.random.default_rng([seed, 1])
    generator = torch.Generator().manual_seed(seed + 1)
    curve, rewards, place, size = [], [lab.accuracy(policy, task)], 0, 0
    for step in range(1, settings["updates"] + 1):
        if place == size:
            stale = settings["kind"] != "healthy" and step >= settings["onset"]
            place, size = 0, STALE if stale else 1
            episodes = lab.sample(policy, task, task.train(draw, lab.GROUPS * size), lab.GROUP, generator)
            advantage = lab.advantages(episodes.rewards, episodes.groups)
        rows = slice(place * lab.MINIBATCH, (place + 1) * lab.MINIBATCH)
        place += 1
        report = lab.update(policy, optimizer, episodes[rows], advantage[rows], method)
        names = ("far_negative", "kl_k3", "entropy", "ess")
        kept = {name: report[name] for name in names} | {"grad_norm": report["gradient_norm"]}
        curve.append({"step": step, **kept})
        if step % EVERY == 0:
            rewards.append(lab.accuracy(policy, task))
    return {"curve": curve, "rewards": rewards}


def judge(run: dict[str, Any]) -> dict[str, Any]:
    """What the detector says of a run, beside what happened in it."""
    settings, rewards = run["settings"], run["rewards"]
    found = find_collapse(run["curve"])
    at = settings["onset"] // EVERY if settings["kind"] != "healthy" else 0
    told: dict[str, Any] = {
        "seed": settings["seed"],
        "before": rewards[at],
        "lowest_after": min(rewards[at:]),
        "final": float(np.mean(rewards[-3:])),
        "driver": found[0].driver if found else None,
    }
    if found and settings["kind"] != "healthy":
        told["off"] = (found[0].onset - settings["onset"]) / settings["updates"]
        told["late"] = found[0].noticed - settings["onset"]
    return told


def summarise(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each kind of run what the detector said, and how the runs ended."""
    kinds: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        runs = [judge(run) for run in results.values() if run["settings"]["kind"] == kind]
        if not runs:
            continue
        final, half = lab.interval([run["final"] for run in runs])
        offs = [abs(run["off"]) for run in runs if "off" in run]
        kinds[kind] = {
            "runs": runs,
            "final": final,
            "final_half": half,
            "lowest_after": float(np.mean([run["lowest_after"] for run in runs])),
            "alarms": sum(run["driver"] is not None for run in runs),
            "drivers": Counter(run["driver"] for run in runs if run["driver"]),
            "off_median": float(np.median(offs)) if offs else None,
            "off_most": max(offs, default=None),
            "late_median": float(np.median([run["late"] for run in runs if "late" in run])) if offs else None,
        }
    return kinds


def show(kinds: dict[str, dict[str, Any]], console: Console) -> None:
    table = Table(title=f"{UPDATES} updates; data grow stale from update {FIRST + 1}-{LAST} on")
    for name in (
        "runs",
        "held-out at the end ± 95 %",
        "lowest after",
        "alarms",
        "driver",
        "onset off by",
        "noticed after",
    ):
        table.add_column(name)
    for kind, row in kinds.items():
        off = row["off_most"]
        table.add_row(
            f"{len(row['runs'])} {kind}",
            f"{row['final']:.2f}±{row['final_half']:.2f}",
            f"{row['lowest_after']:.2f}",
            str(row["alarms"]),
            ", ".join(f"{name} {count}" for name, count in row["drivers"].items()),
            "" if off is None else f"{row['off_median']:.1%}, at most {off:.1%}",
            "" if off is None else f"{row['late_median']:.0f} updates",
        )
    console.print(table)


def draw_curves(results: dict[str, dict[str, Any]]) -> Any:
    """Held-out reward and the push on answers that are nearly given up, all runs, counted from the onset."""
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "forebay"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(KINDS), figsize=(2.6 * len(KINDS), 4), sharex=True, sharey="row")
    for run in results.values():
        settings = run["settings"]
        column = list(KINDS).index(settings["kind"])
        updates = np.arange(len(run["rewards"])) * EVERY - settings["onset"]
        axes[0, column].plot(updates, run["rewards"], lw=0.8, color="tab:blue")
        steps = [row["step"] - settings["onset"] for row in run["curve"]]
        axes[1, column].plot(steps, [row["far_negative"] for row in run["curve"]], lw=0.8, color="tab:red")
    for column, kind in enumerate(KINDS):
        axes[0, column].set_title(kind, fontsize=9)
        axes[1, column].set_xlabel("updates since the onset", fontsize=8)
    axes[0, 0].set_ylabel("held-out reward", fontsize=8)
    axes[1, 0].set_ylabel("push on A<0, W<e^-2", fontsize=8)
    return figure


def main(arguments: list[str] | None = None) -> None:
    words = lab.parser(__doc__, seeds=10).parse_args(arguments)
    seeds, updates = (words.seeds[:1], 16) if words.quick else (words.seeds, UPDATES)
    cells = {
        f"{kind}-{updates}-{seed}": {
            "kind": kind,
            "seed": seed,
            "updates": updates,
            "onset": 8 if words.quick else onset_of(seed),
        }
        for seed in seeds
        for kind in KINDS
    }
    lab.warm_ups("sorting", seeds, words.workers)
    results = lab.run("collapse", cell, cells, workers=words.workers, fresh=words.fresh)
    kinds = summarise(results)
    summary = {"machine": describe(), "code": lab.code(), "seeds": seeds, "updates": updates, "kinds": kinds}
    lab.keep("collapse", summary, draw_curves(results), save=words.save)
    if words.json:
        print(json.dumps(summary))
    else:
        show(kinds, Console(width=140))


if __name__ == "__main__":
    main()
