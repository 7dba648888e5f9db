"""What a comparison says: a row for each method on each environment, and how firm the order of the methods is.

The seeds are the sample: methods of one seed share their start, their first tasks and the held-out tasks, so gains and ranks
are paired by seed. Intervals are Student's over seeds. How often a method would be the best is told by resampling one seed less than
there are, as the rescaled bootstrap does (Rao and Wu, JASA 83, 1988): as many as there are would look firmer than they are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
from scipy import special

CONFIDENCE = 0.95
_RESAMPLED = 10_000
_SHOWN = ("success", "score", "turns", "tokens", "valid_format", "valid_action")


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over seeds with its half width at 95 %; None with one seed, which says nothing of others."""

    estimate: float
    half: float | None


@dataclass(frozen=True, slots=True)
class Line:
    """A method on one environment.

    Attributes:
        figures: of the trained policies on held-out tasks, by the names of `tasks.evaluation.report.Slice`, the widest
            pass@k among them. Results from before `valid_action` had a name of its own lack `valid_format`.
        gain: in success, over the start of the same seed.
        seeds: how many.
        collapses: {driver: runs} of those with a finding; stopped: {reason: runs} of those that a guard ended, whose last good
            checkpoint was judged.
        cpu_seconds: of a run, without the shared start, mean. episodes: sampled by a run, mean.
    """

    env: str
    method: str
    figures: Mapping[str, Mean]
    gain: Mean
    seeds: int
    collapses: Mapping[str, int]
    stopped: Mapping[str, int]
    cpu_seconds: float
    episodes: float


@dataclass(frozen=True, slots=True)
class Rank:
    """Where a method stands over all environments.

    Attributes:
        success: mean over environments of the mean over seeds.
        rank: mean over environments and seeds of its rank among the methods (1 is best; equal ones share); low and high its
            95 % interval, Student's over seeds.
        best: share of the resamples in which no method had a better mean rank.
        low, high and best are None with one seed, which says nothing of others.
    """

    method: str
    success: float
    rank: float
    low: float | None
    high: float | None
    best: float | None


def lines(results: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Return the rows of a comparison, environments and methods in the order in which they come."""
    found = []
    # What older results call valid_format is the share of Step.valid, so that they do not tell it.
    older = any("valid_action" not in one["after"]["figures"] for one in results)
    shown = [name for name in _SHOWN if not (older and name == "valid_format")]
    for env, method in dict.fromkeys((one["env"], one["method"]) for one in results):
        runs = [one for one in results if (one["env"], one["method"]) == (env, method)]
        named = runs[0]["after"]["figures"]
        widest = max((name for name in named if name.startswith("pass@")), key=lambda name: int(name[5:]))
        drivers = [one["findings"][0]["driver"] for one in runs if one["findings"]]
        reasons = [one["stop_reason"] for one in runs if one["stop_reason"] != "finished"]
        found.append(
            Line(
                env=env,
                method=method,
                figures={
                    name: over_seeds([_figure(one["after"], name) for one in runs])
                    for name in (*shown, widest)
                },
                gain=over_seeds(
                    [_figure(one["after"], "success") - _figure(one["before"], "success") for one in runs]
                ),
                seeds=len(runs),
                collapses=dict(Counter(drivers)),
                stopped=dict(Counter(reasons)),
                cpu_seconds=mean(one["cpu_seconds"] for one in runs),
                episodes=mean(one["episodes"] for one in runs),
            )
        )
    return found


def starts(results: Sequence[Mapping[str, Any]]) -> dict[str, Mean]:
    """Success of the starts on each environment, which the methods of a seed share."""
    found: dict[str, dict[int, float]] = {}
    for one in results:
        found.setdefault(one["env"], {})[one["seed"]] = _figure(one["before"], "success")
    return {env: over_seeds(list(seeds.values())) for env, seeds in found.items()}


def over_seeds(values: Sequence[float]) -> Mean:
    """Mean and half width of Student's interval; the values of one seed each."""
    if len(values) < 2:
        return Mean(values[0], None)
    n = len(values)
    quantile = float(special.stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    return Mean(mean(values), quantile * float(np.std(values, ddof=1)) / math.sqrt(n))


def ranks(results: Sequence[Mapping[str, Any]]) -> list[Rank]:
    """Return the order of the methods, best first, with its stability under other seeds.

    A method that lacks a cell (environment and seed) which another one has is not ranked: which of its runs fail may depend on
    how it does. A seed that is lacking on an environment altogether says nothing of the methods and does not count.
    """
    table = {(one["env"], one["method"], one["seed"]): _figure(one["after"], "success") for one in results}
    cells = {(env, seed) for env, _, seed in table}
    methods = [
        method
        for method in dict.fromkeys(one["method"] for one in results)
        if all((env, method, seed) in table for env, seed in cells)
    ]
    envs = list(dict.fromkeys(one["env"] for one in results))
    seeds = [
        seed
        for seed in dict.fromkeys(one["seed"] for one in results)
        if all((env, seed) in cells for env in envs)
    ]
    if not (methods and seeds):
        return []
    success = np.array([[[table[e, m, s] for s in seeds] for m in methods] for e in envs])  # [E, M, S]
    each = _ranked(success).mean(0)  # [M, S]
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(seeds), size=(_RESAMPLED, max(1, len(seeds) - 1)))
    resampled = each[:, drawn].mean(-1)  # [M, R]
    best = (resampled <= resampled.min(0) + 1e-12).mean(1)
    found = []
    for place, method in enumerate(methods):
        rank = over_seeds(each[place].tolist())
        low = high = first = None
        if rank.half is not None:
            low, high = (
                max(1.0, rank.estimate - rank.half),
                min(float(len(methods)), rank.estimate + rank.half),
            )
            first = float(best[place])
        found.append(Rank(method, float(success[:, place].mean()), rank.estimate, low, high, first))
    return sorted(found, key=lambda one: one.rank)


def _ranked(success: np.ndarray) -> np.ndarray:
    """Ranks among methods, [E, M, S]: 1 for the greatest, equal ones share the mean of their places."""
    above = (success[:, None] > success[:, :, None] + 1e-12).sum(2)
    equal = (np.abs(success[:, None] - success[:, :, None]) <= 1e-12).sum(2)
    ranked: np.ndarray = above + (equal + 1) / 2
    return ranked


def _figure(part: Mapping[str, Any], name: str) -> float:
    figures = part["figures"]
    if name == "valid_action" and name not in figures:
        name = "valid_format"
    return float(figures[name]["estimate"])
