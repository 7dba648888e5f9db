"""What a comparison says: a row for each method on each environment, and how firm the order of the methods is.

The seeds are the sample: methods of one seed share their start, their first tasks and the held-out tasks, so gains and ranks
are paired by seed. Intervals of means are Student's over seeds; ranks are judged by resampling the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
from scipy import special

CONFIDENCE = 0.95
_RESAMPLED = 10_000
_SHOWN = ("success", "score", "turns", "tokens", "valid_format")


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over seeds with its half width at 95 %; infinite with one seed."""

    estimate: float
    half: float


@dataclass(frozen=True, slots=True)
class Line:
    """A method on one environment.

    Attributes:
        figures: of the trained policies on held-out tasks, by the names of `tasks.evaluation.report.Slice`, the widest
            pass@k among them.
        gain: in success, over the start of the same seed.
        seeds: how many.
        collapses: {driver: runs} of those with a finding; stopped: runs that a guard ended.
        cpu_seconds: of a run, without the shared start, mean. episodes: sampled by a run, mean.
    """

    env: str
    method: str
    figures: Mapping[str, Mean]
    gain: Mean
    seeds: int
    collapses: Mapping[str, int]
    stopped: int
    cpu_seconds: float
    episodes: float


@dataclass(frozen=True, slots=True)
class Rank:
    """Where a method stands over all environments.

    Attributes:
        success: mean over environments of the mean over seeds.
        rank: mean over environments of its rank there (1 is best; equal ones share), low and high its 95 % interval.
        best: share of the resamples in which no method had a better mean rank.
    """

    method: str
    success: float
    rank: float
    low: float
    high: float
    best: float


def lines(results: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Return the rows of a comparison, environments and methods in the order in which they come."""
    found = []
    for env, method in dict.fromkeys((one["env"], one["method"]) for one in results):
        runs = [one for one in results if (one["env"], one["method"]) == (env, method)]
        named = runs[0]["after"]["figures"]
        widest = max((name for name in named if name.startswith("pass@")), key=lambda name: int(name[5:]))
        drivers = [one["findings"][0]["driver"] for one in runs if one["findings"]]
        found.append(
            Line(
                env=env,
                method=method,
                figures={
                    name: over_seeds([_figure(one["after"], name) for one in runs])
                    for name in (*_SHOWN, widest)
                },
                gain=over_seeds(
                    [_figure(one["after"], "success") - _figure(one["before"], "success") for one in runs]
                ),
                seeds=len(runs),
                collapses={driver: drivers.count(driver) for driver in dict.fromkeys(drivers)},
                stopped=sum(one["stop_reason"] != "finished" for one in runs),
                cpu_seconds=mean(one["cpu_seconds"] for one in runs),
                episodes=mean(one["episodes"] for one in runs),
            )
        )
    return found


def over_seeds(values: Sequence[float]) -> Mean:
    """Mean and half width of Student's interval; the values of one seed each."""
    if len(values) < 2:
        return Mean(values[0], math.inf)
    n = len(values)
    quantile = float(special.stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    return Mean(mean(values), quantile * float(np.std(values, ddof=1)) / math.sqrt(n))


def ranks(results: Sequence[Mapping[str, Any]]) -> list[Rank]:
    """Return the order of the methods, best first, with its stability under other seeds.

    Only seeds that every method has on every environment count; a method that lacks one of the others' environments is
    refused.

    Raises:
        ValueError: there is no such seed.
    """
    methods = list(dict.fromkeys(one["method"] for one in results))
    envs = list(dict.fromkeys(one["env"] for one in results))
    table = {(one["env"], one["method"], one["seed"]): _figure(one["after"], "success") for one in results}
    seeds = [
        seed
        for seed in dict.fromkeys(one["seed"] for one in results)
        if all((env, method, seed) in table for env in envs for method in methods)
    ]
    if not seeds:
        raise ValueError("no seed was run with every method on every environment")
    success = np.array([[[table[e, m, s] for s in seeds] for m in methods] for e in envs])  # [E, M, S]
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(seeds), size=(_RESAMPLED, len(seeds)))
    means = success[:, :, drawn].mean(-1)  # [E, M, R]
    resampled = _ranked(means).mean(0)  # [M, R]
    observed = _ranked(success.mean(-1)[:, :, None]).mean(0)[:, 0]
    best = (resampled <= resampled.min(0) + 1e-12).mean(1)
    tail = (1 - CONFIDENCE) / 2
    found = []
    for place, method in enumerate(methods):
        low, high = (float(np.quantile(resampled[place], q)) for q in (tail, 1 - tail))
        success_of = float(success[:, place].mean())
        found.append(Rank(method, success_of, float(observed[place]), low, high, float(best[place])))
    return sorted(found, key=lambda one: one.rank)


def _ranked(means: np.ndarray) -> np.ndarray:
    """Ranks among methods, [E, M, R]: 1 for the greatest, equal ones share the mean of their places."""
    above = (means[:, None] > means[:, :, None] + 1e-12).sum(2)
    equal = (np.abs(means[:, None] - means[:, :, None]) <= 1e-12).sum(2)
    ranked: np.ndarray = above + (equal + 1) / 2
    return ranked


def _figure(part: Mapping[str, Any], name: str) -> float:
    return float(part["figures"][name]["estimate"])
