"""How many samples does a policy need to become so good: on-policy, hybrid, or replay alone?

    python -m benchmarks.hybrid [--seeds 0 1 2] [--workers 2]

What the product does (`tasks.training.rounds`, with its own mixture, sampler and admission): before training the
initial policy answers once, and this sealed dataset is the replay; every update learns from 8 groups, of which the
schedule wants a share fresh from the policy in training (constant, linear, or steered by the effective sample size of
the replayed answers). A fresh group is learnt from once and never replayed; one whose answers are all right or all
wrong is refused, a replayed group takes its place, and later updates ask for more. Replay goes through the sealed
groups in random order, all of them once an epoch.

Beside it, on-policy: no sealed dataset, 8 fresh groups an update as they come. The product needs a sealed dataset;
`64 + all fresh` is the nearest that it has. The task is `sorting` of the laboratory, the objective VESPO, unless GRPO
is named, at one learning rate, the update 64 answers, and all arms make the same number of updates; what differs is
where the answers come from.

Counted are the episodes sampled, sealed and fresh, those refused included, until two evaluations in a row have
reached the accuracy on held-out problems in their mean. A run that does not get there counts as "more than all its
samples".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import lab
from models.machine import describe
from tasks.training import admission, mixture
from tasks.training.groups import GroupTable
from tasks.training.sampler import Sampler
from tasks.training.settings import Mixture, TrainingSettings

METHODS = {"vespo": lab.Method("vespo"), "grpo": lab.Method("dapo", {"eps_lo": 0.2, "eps_hi": 0.28})}


@dataclass(frozen=True, slots=True)
class Arm:
    """sealed: episodes that the initial policy writes before training; 0 is on-policy."""

    sealed: int
    mixture: Mixture
    objective: str = "vespo"


REPLAY = Mixture(schedule="replay")
QUARTER, HALF, ALL = (Mixture(schedule="constant", fresh=share) for share in (0.25, 0.5, 1.0))
LINEAR = Mixture(schedule="linear", fresh=1.0, fresh_end=0.0)
STEERED = Mixture(schedule="ess", fresh=0.5, target_ess=0.5)
ON_POLICY = "on-policy"
ARMS = {
    ON_POLICY: Arm(0, ALL),
    "64 + all fresh": Arm(64, ALL),
    "256": Arm(256, REPLAY),
    "256 + a quarter": Arm(256, QUARTER),
    "256 + half": Arm(256, HALF),
    "256 + linear 1 to 0": Arm(256, LINEAR),
    "256 + ess 0.5": Arm(256, STEERED),
    "1024": Arm(1024, REPLAY),
    "1024 + a quarter": Arm(1024, QUARTER),
    "1024 + half": Arm(1024, HALF),
    "1024 + ess 0.5": Arm(1024, STEERED),
    "1024, GRPO": Arm(1024, REPLAY, "grpo"),
}
RATE = 3e-4
UPDATES = 192
EVERY = 8
LEVELS = (0.5, 0.6, 0.7, 0.8)


class Curriculum:
    """What every update learns from, as `tasks.training.rounds.Curriculum` decides it.

    Args:
        sampled: samples so many groups from the policy as it is.
        steps: updates of the run.
        groups_per_step: groups of an update.
    """

    def __init__(
        self,
        arm: Arm,
        sampled: Callable[[int], list[lab.Episodes]],
        *,
        steps: int,
        seed: int,
        groups_per_step: int = lab.GROUPS,
    ) -> None:
        self.settings = TrainingSettings(mixture=arm.mixture, steps=steps, groups_per_step=groups_per_step)
        self._sampled = sampled
        self._sealed = _named(sampled(arm.sealed // lab.GROUP))
        admitted, _ = admission.admit(_table(self._sealed), self.settings.admission)
        self._sampler = Sampler(admitted, self.settings.sampling, seed)
        self._frontier = self._sampler.start()
        self._mix = mixture.start(arm.mixture, groups_per_step)

    def lesson(self, step: int) -> tuple[list[lab.Episodes], int]:
        """The groups of update `step`, from 0, and how many of them, the first, are replayed."""
        settings, size = self.settings, self.settings.groups_per_step
        wanted, mix = mixture.fresh_groups(settings.mixture, self._mix, step, settings.steps, size)
        fresh = _named(self._sampled(wanted)) if wanted else {}
        if fresh:
            table = _table(fresh)
            fresh = {name: fresh[name] for name in table.ids[admission.passes(table, settings.admission)]}
        self._mix = mixture.refused(mix, wanted - len(fresh), size)
        ids, self._frontier = self._sampler.draw(self._frontier, size - len(fresh))
        return [*(self._sealed[name] for name in ids), *fresh.values()], len(ids)

    def learnt(self, replay_ess: float) -> None:
        """Take note of the effective sample size of what was replayed in the update."""
        size = self.settings.groups_per_step
        self._mix = mixture.measured(self.settings.mixture, self._mix, replay_ess, size)


def _named(groups: list[lab.Episodes]) -> dict[str, lab.Episodes]:
    return {f"{place:06d}": group for place, group in enumerate(groups)}


def _table(groups: dict[str, lab.Episodes]) -> GroupTable:
    rewards = torch.stack([group.rewards for group in groups.values()]).double().numpy()
    trained = np.array([int(group.mask.sum()) for group in groups.values()])
    prompts = np.array([group.prompts.numel() for group in groups.values()])
    none = np.zeros(len(groups), np.int32)
    return GroupTable(
        ids=np.array(list(groups)),
        episodes=np.full(len(groups), rewards.shape[1], np.int32),
        tokens=prompts + trained,
        trained=trained,
        reward_mean=rewards.mean(1),
        reward_std=rewards.std(1),
        lag=none,
        age=none,
    )


def cell(settings: dict[str, Any]) -> dict[str, Any]:
    """Train one policy. At every evaluation: held-out accuracy and the episodes sampled by then; between two: the share
    of the groups learnt from that was fresh, and the effective sample size of the replayed answers, if there were any.
    """
    arm, task, updates = ARMS[settings["arm"]], lab.task("sorting"), settings["updates"]
    policy = lab.warm_policy("sorting", settings["seed"])
    optimizer = lab.optimizer_of(policy, RATE)
    draw = np.random.default_rng([settings["seed"], 2])
    generator = torch.Generator().manual_seed(settings["seed"] + 2)
    total = 0

    def sampled(groups: int) -> list[lab.Episodes]:
        nonlocal total
        total += groups * lab.GROUP
        episodes = lab.sample(policy, task, task.train(draw, groups), lab.GROUP, generator)
        return [episodes[start : start + lab.GROUP] for start in range(0, len(episodes), lab.GROUP)]

    curriculum = Curriculum(arm, sampled, steps=updates, seed=settings["seed"]) if arm.sealed else None
    curve, samples, trace, shares, esses = [lab.accuracy(policy, task)], [total], [], [], []
    for done in range(updates):
        groups, replayed = curriculum.lesson(done) if curriculum else (sampled(lab.GROUPS), 0)
        batch = lab.join(groups)
        advantage = lab.advantages(batch.rewards, batch.groups)
        method, count = METHODS[arm.objective], replayed * lab.GROUP
        ess = lab.update(policy, optimizer, batch, advantage, method, replayed=count)["replay_ess"]
        shares.append(1 - replayed / len(groups))
        if curriculum and replayed:
            curriculum.learnt(ess)
            esses.append(ess)
        if (done + 1) % settings["every"] == 0:
            curve.append(lab.accuracy(policy, task))
            samples.append(total)
            trace.append((float(np.mean(shares)), float(np.mean(esses)) if esses else None))
            shares, esses = [], []
    return {"curve": curve, "samples": samples, "trace": trace}


def needed(run: dict[str, Any], level: float) -> int | None:
    """Samples by which the mean of an evaluation and the next was at the level; None if it never was."""
    pairs = zip(pairwise(run["curve"]), run["samples"][1:], strict=True)
    return next((count for pair, count in pairs if sum(pair) / 2 >= level), None)


def summarise(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each arm: samples to each level (one count a seed), accuracy, fresh share and replay's ESS."""
    rows = []
    for arm in dict.fromkeys(one["settings"]["arm"] for one in results.values()):
        runs = [one for one in results.values() if one["settings"]["arm"] == arm]
        finals = [float(np.mean(one["curve"][-3:])) for one in runs]
        final, final_half = lab.interval(finals)
        best, best_half = lab.interval([max(np.convolve(one["curve"], [0.5, 0.5], "valid")) for one in runs])
        esses = [ess for one in runs for _, ess in one["trace"] if ess is not None]
        rows.append(
            {
                "arm": arm,
                "sealed": ARMS[arm].sealed,
                "schedule": ARMS[arm].mixture.schedule if ARMS[arm].sealed else None,
                "samples": np.mean([one["samples"] for one in runs], 0).tolist(),
                "totals": [one["samples"][-1] for one in runs],
                "curve": np.mean([one["curve"] for one in runs], 0).tolist(),
                "needed": {str(level): [needed(one, level) for one in runs] for level in LEVELS},
                "finals": finals,
                "final": final,
                "final_half": final_half,
                "best": best,
                "best_half": best_half,
                "fresh": np.mean([[share for share, _ in one["trace"]] for one in runs], 0).tolist(),
                "replay_ess": float(np.mean(esses)) if esses else None,
            }
        )
    finals = {row["arm"]: row["finals"] for row in rows}
    for row in rows:
        for name, base in (("from_on_policy", ON_POLICY), ("from_replay", str(row["sealed"]))):
            if base in finals and row["sealed"] and row["arm"] != base:
                row[name] = lab.difference(row["finals"], finals[base])
    return rows


def median(counts: Sequence[int | None], totals: Sequence[int]) -> str:
    """Median, and least and greatest, of the counts; a missing one is more than its run's total, and than all others."""
    pairs = sorted((count is None, count or total) for count, total in zip(counts, totals, strict=True))
    words = [f">{number}" if missing else str(number) for missing, number in pairs]
    middle = words[(len(words) - 1) // 2]
    return middle if len(set(words)) == 1 else f"{middle} [{words[0]}, {words[-1]}]"


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="Episodes sampled until held-out accuracy is reached: median over seeds, and range")
    for name in ("arm: sealed + fresh", *(f"{level:g}" for level in LEVELS), "in all"):
        table.add_column(name)
    for row in rows:
        counts = (median(row["needed"][str(level)], row["totals"]) for level in LEVELS)
        table.add_row(row["arm"], *counts, f"{row['samples'][-1]:.0f}")
    console.print(table)
    table = Table(
        title="Accuracy at the end ± 95 %, and its differences paired by seed",
        caption="* the interval excludes 0; ** it does at a level of 5 % over all of its column",
    )
    names = ("minus on-policy", "minus the same replay alone", "best", "share fresh: mean, first, last")
    for name in ("arm: sealed + fresh", "final", *names, "ESS of replay"):
        table.add_column(name)
    for row in rows:
        table.add_row(
            row["arm"],
            f"{row['final']:.3f}±{row['final_half']:.3f}",
            *(
                lab.mark(row[name], sum(name in one for one in rows)) if name in row else ""
                for name in ("from_on_policy", "from_replay")
            ),
            f"{row['best']:.2f}",
            f"{np.mean(row['fresh']):.2f}, {row['fresh'][0]:.2f}, {row['fresh'][-1]:.2f}",
            "" if row["replay_ess"] is None else f"{row['replay_ess']:.2f}",
        )
    console.print(table)


def draw_curves(rows: list[dict[str, Any]]) -> Any:
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "forebay"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    kinds = list(
        dict.fromkeys(row["arm"].partition(" ")[2] for row in rows)
    )  # what stands beside the sealed replay
    for axis, sealed in zip(axes, (256, 1024), strict=True):
        axis.set(
            xscale="log", xlabel="episodes sampled, sealed and fresh", title=f"sealed replay of {sealed}"
        )
        for row in rows:
            if row["sealed"] not in (0, sealed):
                continue
            kind = kinds.index(row["arm"].partition(" ")[2])
            colour = "black" if row["arm"] == ON_POLICY else matplotlib.colormaps["tab10"](kind)
            if row["schedule"] == "replay":  # all its samples are there before the first update
                axis.plot(row["samples"][0], row["best"], "o", color=colour, label=f"{row['arm']}, best")
            else:
                axis.plot(row["samples"], row["curve"], lw=1.2, color=colour, label=row["arm"])
        axis.legend(fontsize=7, loc="lower right")
    axes[0].set_ylabel("held-out accuracy")
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = lab.parser(__doc__, seeds=3)
    parser.add_argument("--methods", nargs="+", choices=ARMS, default=list(ARMS))
    words = parser.parse_args(arguments)
    seeds = words.seeds[:1] if words.quick else words.seeds
    updates, every = (4, 2) if words.quick else (UPDATES, EVERY)
    cells = {
        f"{arm.replace(', ', '-').replace(' + ', '+').replace(' ', '-')}-{updates}-{seed}": {
            "arm": arm,
            "seed": seed,
            "updates": updates,
            "every": every,
        }
        for seed in seeds
        for arm in words.methods
    }
    lab.warm_ups("sorting", seeds, words.workers)
    rows = summarise(lab.run("hybrid", cell, cells, workers=words.workers, fresh=words.fresh))
    summary = {
        "machine": describe(),
        "code": lab.code(),
        "seeds": seeds,
        "updates": updates,
        "rate": RATE,
        "rows": rows,
    }
    lab.keep("hybrid", summary, draw_curves(rows), save=words.save)
    if words.json:
        print(json.dumps(summary))
    else:
        show(rows, Console(width=130))


if __name__ == "__main__":
    main()
