"""Is off-policy evidence right, and does it know when it is worthless?

    python -m benchmarks.off_policy [--quick] [--save]

Policies at a growing distance from the one that wrote the log, in two worlds:

`two turns`: three kinds of prompts, four actions a turn, a reward of 1 or 0 at the end; the value of every policy is
summed up exactly. Candidates are tilted from the behaviour, which has one good and one bad action it rarely takes:
towards what is better, what is worse, or what is merely different and exactly as good.

`language model`: the laboratory's Llama on `sorting`. A candidate is the warm-up after some updates of VESPO on 64
groups of its own; its value is the mean reward of a fresh sample on the prompts of the pool that logs are drawn from,
8 answers each. The same candidate is also judged on the 64 groups that it was trained on, which is the mistake to avoid;
there its value is that of 64 fresh answers to each of these prompts.

A log has 128 prompts of 8 episodes. Coverage is nominally 95 %. A conclusion is wrong if it is PASS where the true
difference from the behaviour is at most 0, or FAIL where it is at least 0.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import lab
from models.machine import describe
from tasks.evaluation.off_policy import (
    ESTIMATORS,
    Evidence,
    Log,
    Rule,
    baseline,
    compare,
    estimate_value,
    evaluate,
    overlap,
    sequence_of_difference,
    single_turn,
)

PROMPTS = 128
EACH = 8
RULE = Rule()
DISTANCES = (0.0, 1.0, 2.0, 4.0, 8.0)
UPDATES = (0, 2, 4, 8, 16, 64)
POOL = 2048

# Two turns: the chance of a reward for each kind of prompt, first and second action.
FIRST = np.array([0.55, 0.05, 0.35, 0.05])
SECOND = np.array([[0.45, 0.05, 0.40, 0.10], [0.30, 0.10, 0.55, 0.05]])  # after a bad and a good first action
GOOD = np.array([0.0, 0.0, 1.0, 1.0])
PAYS = (
    np.array([0.05, 0.2, 0.4])[:, None, None]
    + 0.15 * GOOD[:, None]
    + 0.15 * GOOD
    + 0.2 * GOOD[:, None] * GOOD
)
TILTS = {
    "better": np.array([-0.5, -0.5, 0.0, 0.5]),
    "worse": np.array([0.0, 0.5, -0.5, -0.5]),
    "as good": np.array([-0.5, 0.5, -0.5, 0.5]),
}


def tilted(chances: np.ndarray, tilt: np.ndarray, distance: float) -> np.ndarray:
    """Chances tilted, over the last axis. Where the tilt is only different, pairs of equal worth keep their mass."""
    found = chances * np.exp(distance * tilt)
    if tilt is TILTS["as good"]:
        pairs = found.reshape(*found.shape[:-1], 2, 2)
        mass = chances.reshape(pairs.shape).sum(-1, keepdims=True)
        return (pairs / pairs.sum(-1, keepdims=True) * mass).reshape(found.shape)
    return found / found.sum(-1, keepdims=True)


def exact_value(first: np.ndarray, second: np.ndarray) -> float:
    return float(
        sum(first[a] * second[int(GOOD[a]), b] * PAYS[:, a, b].mean() for a, b in product(range(4), repeat=2))
    )


def two_turn_log(draw: np.random.Generator) -> tuple[Log, np.ndarray, np.ndarray]:
    """A log of the behaviour, and its first and second actions [B]."""
    kind = np.repeat(draw.integers(3, size=PROMPTS), EACH)
    first = draw.choice(4, size=len(kind), p=FIRST)
    state = GOOD[first].astype(int)
    second = (SECOND.cumsum(1)[state] < draw.random(len(kind))[:, None]).sum(1)
    rewards = np.zeros((len(kind), 2))
    rewards[:, 1] = draw.random(len(kind)) < PAYS[kind, first, second]
    prompts = tuple(np.repeat(np.arange(PROMPTS), EACH).astype(str))
    return Log(rewards, np.full(len(kind), 2), prompts, ("two turns",) * len(kind)), first, second


def two_turns(logs: int) -> list[dict[str, Any]]:
    rows = []
    base = exact_value(FIRST, SECOND)
    for name, distance in [("better", 0.0), *product(TILTS, DISTANCES[1:])]:
        chances = [tilted(chance, TILTS[name], distance) for chance in (FIRST, SECOND)]
        value, draw = exact_value(chances[0], chances[1]), np.random.default_rng([len(rows), 0])
        found = []
        for _ in range(logs):
            log, first, second = two_turn_log(draw)
            state = GOOD[first].astype(int)
            ratios = np.log(np.c_[(chances[0] / FIRST)[first], (chances[1] / SECOND)[state, second]])
            found.append(judged(log, ratios, value, value - base))
        rows.append(
            {"tilt": name, "distance": distance, "value": value, "gain": value - base} | summarised(found)
        )
    return rows


def judged(log: Log, ratios: np.ndarray, value: float, gain: float) -> dict[str, float]:
    """What one log says of a policy whose value, and gain over the behaviour, are known."""
    none, model = np.zeros_like(ratios), baseline(log)
    found: dict[str, float] = {}
    for name in ESTIMATORS:
        one = evaluate(log, ratios, replace(RULE, estimator=name), model)
        found[f"error {name}"] = one.estimate - value
        found[f"cover {name}"] = one.low <= value <= one.high
        found[f"width {name}"] = one.high - one.low
    found["error is, whole weights"] = estimate_value(log, ratios, "is") - value
    difference = compare(log, ratios, none, RULE, model)
    low, high = sequence_of_difference(log, ratios, none, RULE)
    found |= {
        "cover difference": difference.low <= gain <= difference.high,
        "width difference": difference.high - difference.low,
        "cover sequence": bool((low <= gain).all() and (gain <= high).all()),
        "width sequence": difference.anytime_high - difference.anytime_low,
        "mde any time": difference.mde,
        "ess": difference.overlap[0].ess_share,
        "missing": difference.overlap[0].missing,
        "mean weight": difference.overlap[0].mean_weight,
    }
    for looks, floor in product(("any time", "once"), (True, False)):
        rule = replace(RULE, looks=looks, min_ess=RULE.min_ess if floor else 0.0)
        one = compare(log, ratios, none, rule, model)
        key = looks if floor else f"{looks}, no floor"
        found |= conclusion(one, gain, key)
        if looks == "once" and floor:
            found["refused"] = "worth" in one.reasons[0] or "fewer than" in one.reasons[0]
            found["mde once"] = one.mde
    return found


def conclusion(one: Evidence, gain: float, key: str) -> dict[str, float]:
    wrong = (one.verdict == "PASS" and gain <= 1e-9) or (one.verdict == "FAIL" and gain >= -1e-9)
    return {f"wrong {key}": wrong, f"right {key}": one.verdict != "INCONCLUSIVE" and not wrong}


def summarised(found: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Means over the logs; of errors the bias with its standard error, and the root mean square."""
    result: dict[str, Any] = {"logs": len(found)}
    for key in found[0]:
        values = np.array([float(one[key]) for one in found])
        if key.startswith("error"):
            result[key.replace("error", "bias")] = float(values.mean())
            result[key.replace("error", "bias se")] = float(values.std(ddof=1) / len(values) ** 0.5)
            result[key.replace("error", "rmse")] = float((values**2).mean() ** 0.5)
        else:
            result[key] = float(values.mean())
    return result


@torch.no_grad()
def log_ratios(policy: Any, episodes: lab.Episodes) -> np.ndarray:
    """[B, 1]."""
    parts = zip(episodes.prompts.split(lab.CHUNK), episodes.answers.split(lab.CHUNK), strict=True)
    logprobs = torch.cat([lab.answer_logprobs(policy, *part)[0] for part in parts])
    return ((logprobs - episodes.behaviour).double() * episodes.mask).sum(1, keepdim=True).numpy()


def language_model(logs: int, pool: int) -> list[dict[str, Any]]:
    task, draw = lab.task("sorting"), np.random.default_rng(0)
    behaviour, policy = lab.warm_policy("sorting", 0), lab.warm_policy("sorting", 0)
    generator = torch.Generator().manual_seed(0)
    taught, problems = task.train(draw, 64), task.train(draw, pool)
    own = lab.sample(behaviour, task, taught, EACH, generator)
    written = lab.sample(behaviour, task, problems, EACH, generator)
    advantage = lab.advantages(own.rewards.double(), own.groups)
    optimizer = lab.optimizer_of(policy, 3e-4)
    rows, base = [], 0.0
    for step in range(UPDATES[-1] + 1):
        if step in UPDATES:
            value = float(lab.sample(policy, task, problems, EACH, generator).rewards.mean())
            base = base if step else value
            ratios = log_ratios(policy, written)
            pooled = single_turn(written.rewards.numpy(), written.groups.numpy().astype(str).tolist())
            found = []
            for number in range(logs):
                chosen = np.random.default_rng([step, number]).permutation(pool)[:PROMPTS]
                places = (chosen[:, None] * EACH + np.arange(EACH)).ravel()
                names = np.repeat(chosen, EACH).astype(str)
                log = single_turn(written.rewards.numpy()[places], names.tolist())
                found.append(judged(log, ratios[places], value, value - base))
            same = single_turn(own.rewards.numpy(), own.groups.numpy().astype(str).tolist())
            again = lab.sample(policy, task, taught, 8 * EACH, torch.Generator().manual_seed(1))
            trained_on = evaluate(same, log_ratios(policy, own), replace(RULE, looks="once"))
            rows.append(
                {
                    "updates": step,
                    "value": value,
                    "gain": value - base,
                    "ess of the whole pool": overlap(pooled, ratios).ess_share,
                    "on its own training log": {
                        "value": float(again.rewards.mean()),
                        "estimate": trained_on.estimate,
                        "low": trained_on.low,
                        "high": trained_on.high,
                        "ess": trained_on.overlap[0].ess_share,
                    },
                }
                | summarised(found)
            )
        rows_of = slice(step % 8 * lab.MINIBATCH, (step % 8 + 1) * lab.MINIBATCH)
        lab.update(policy, optimizer, own[rows_of], advantage[rows_of], lab.Method("vespo"))
    return rows


def show(summary: dict[str, Any], console: Console) -> None:
    for world in ("two turns", "language model"):
        labels = ("tilt", "distance") if world == "two turns" else ("updates",)
        table = Table(title=f"{world}: one row a candidate; shares in %")
        names = ("true gain", "ESS", "missing", "bias wdr", "rmse is / pdis / wis / dr / wdr")
        for name in (
            *labels,
            *names,
            "covers is / wis / dr / wdr / difference / sequence",
            "refused",
            "right, wrong: any time",
            "once",
            "once, no floor",
        ):
            table.add_column(name)
        for row in summary[world]:
            table.add_row(
                *(f"{row[label]:g}" if label != "tilt" else row[label] for label in labels),
                f"{row['gain']:+.3f}",
                f"{100 * row['ess']:.0f}",
                f"{100 * row['missing']:.1f}",
                f"{row['bias wdr']:+.4f}",
                " ".join(f"{row[f'rmse {name}']:.3f}" for name in ("is", "pdis", "wis", "dr", "wdr")),
                " ".join(
                    f"{100 * row[f'cover {name}']:.1f}"
                    for name in ("is", "wis", "dr", "wdr", "difference", "sequence")
                ),
                f"{100 * row['refused']:.0f}",
                *(
                    f"{100 * row[f'right {key}']:.1f}, {100 * row[f'wrong {key}']:.1f}"
                    for key in ("any time", "once", "once, no floor")
                ),
            )
        console.print(table)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--quick", action="store_true", help="a smoke test: a few logs")
    words.add_argument("--save", action="store_true", help=f"summary to {lab.BASELINES}")
    words = words.parse_args()
    torch.set_num_threads(1)
    started, worked = time.perf_counter(), time.process_time()
    summary = {
        "machine": describe(),
        "log": f"{PROMPTS} prompts of {EACH} episodes",
        "two turns": two_turns(10 if words.quick else 300),
        "language model": language_model(5 if words.quick else 200, 256 if words.quick else POOL),
    }
    summary["seconds"] = round(time.perf_counter() - started)
    summary["cpu_seconds"] = round(time.process_time() - worked)
    show(summary, Console(width=230))
    folder = lab.BASELINES if words.save else lab.OUT
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "off_policy.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(
        f"{summary['seconds']} s ({summary['cpu_seconds']} s of one core) on {summary['machine']}; {folder / 'off_policy.json'}"
    )


if __name__ == "__main__":
    main()
