"""How often the gate promotes an agent that is no better, how often it finds one that is, and whether intervals hold.

    python -m benchmarks.gate_errors [--streams 20000] [--save]

A stream is 20 retrains against one champion. In the null streams every candidate is exactly as good as the champion,
on average over tasks; each promotion is false. Worlds:

- `clustered`: 300 tasks in 30 families. A family has a difficulty, Beta(2, 2), and suits each agent more or less,
  N(0, 0.08 sqrt 2); answers are right or wrong.
- `large`: the same with 240 families, 2,400 tasks.
- `default`: 270 separate tasks, as the settings have it; the candidate answers a fifth of them otherwise than the champion.
- `skewed`: 270 separate tasks with graded rewards; the candidate gains a little mostly and loses much one time in twenty.

The false promotions are counted once with new tasks every night and once with the same tasks and champion's answers all
20 nights. `known law` is no test that anybody could run: its threshold is the quantile of the world's own null
distribution, for 5 % of streams. It is the best that a valid test of the mean difference could do here.

The rules are written out for whole arrays; a test holds those of the gate against `quality_evidence` itself.

Guards are looked at apart: how often each of three tests passes a candidate that loses exactly the margin in an
environment, and one that does not.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import special, stats

from models.machine import describe
from tasks.evaluation.bounded import bounded_mean, bounded_p
from tasks.evaluation.sequential import (
    FRACTIONS,
    betting_sequence,
    cluster_stream,
    empirical_bernstein,
    final_p,
    wealth,
)
from tasks.evaluation.statistics import clopper_pearson, clustered_mean, wilson
from tasks.promotion.policy import Policy

BASELINE = Path(__file__).parent / "baselines" / "gate_errors.json"
CYCLES = 20
GAINS = (0.02, 0.05, 0.10)
ERRORS = Policy().errors
GATE = "gate: t and McNemar, 5 % / 20"
BETTING = "betting at the end, 5 % / 20"
KNOWN_LAW = 1 - 0.95 ** (1 / CYCLES)
_CHUNK = 3_000_000  # answers at a time


@dataclass(frozen=True)
class World:
    """Where candidate and champion meet: `families` of `size` tasks each."""

    name: str
    families: int
    size: int

    def differences(
        self, rng: np.random.Generator, streams: int, cycles: int, gain: float, same: bool
    ) -> np.ndarray:
        """Draw candidate less champion, [streams * cycles, families, size] of -1, 0 and 1.

        Args:
            same: the tasks and the champion's answers are the same in all cycles of a stream.
        """
        once = (streams, 1) if same else (streams, cycles)
        if self.size == 1:
            champion = _uniform(rng, (*once, self.families, 1)) < 0.5
            change = np.where(champion, 0.2 - gain, 0.2 + gain)
            changed = _uniform(rng, (streams, cycles, self.families, 1)) < change
            found = np.where(changed, np.where(champion, -1, 1), 0)
        else:
            shift = _shift(gain)
            difficulty, own, other = _family(rng, (*once, self.families), (streams, cycles, self.families))
            champion = _uniform(rng, (*once, self.families, self.size)) < _chance(difficulty, own - shift)
            shape = (streams, cycles, self.families, self.size)
            candidate = _uniform(rng, shape) < _chance(difficulty, other + shift)
            found = candidate.astype(np.int8) - champion.astype(np.int8)
        return found.reshape(streams * cycles, self.families, self.size).astype(np.int8)

    def chunks(
        self, seed: int, streams: int, cycles: int, gain: float, same: bool
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Yield differences and how many streams they are of, a piece at a time."""
        rng = np.random.default_rng(seed)
        step = max(1, _CHUNK // (cycles * self.families * self.size))
        for start in range(0, streams, step):
            count = min(step, streams - start)
            yield self.differences(rng, count, cycles, gain, same), count


WORLDS = (World("clustered", 30, 10), World("large", 240, 10), World("default", 270, 1))


@dataclass(frozen=True)
class Scores:
    """What the rules look at, one entry a decision."""

    mean: np.ndarray  # of candidate - champion
    naive: np.ndarray  # z, tasks taken as independent
    robust: np.ndarray  # z over families
    gate: np.ndarray  # p of the gate: the greater of Student's t over families and exact McNemar
    final: np.ndarray  # wealth after all families
    best: np.ndarray  # greatest wealth after any family
    stop: np.ndarray  # share of the families seen when the wealth first reached the gate's threshold, else 1

    @classmethod
    def of(cls, differences: np.ndarray) -> Scores:
        """Score differences of -1, 0 and 1, [n, families, size]."""
        n, families, _ = differences.shape
        flat = differences.reshape(n, -1)
        mean = flat.mean(axis=1)
        by_family = differences.mean(axis=2)
        naive_error = flat.std(axis=1, ddof=1) / np.sqrt(flat.shape[1])
        error = by_family.std(axis=1, ddof=1) / np.sqrt(families)
        with np.errstate(divide="ignore", invalid="ignore"):
            naive, robust = np.nan_to_num(mean / naive_error), np.nan_to_num(mean / error)
        wins, losses = (flat == 1).sum(axis=1), (flat == -1).sum(axis=1)
        p = np.maximum(special.stdtr(families - 1, -robust), _mcnemar(wins, losses))
        path = _capital(by_family)
        reached = path >= 1 / ERRORS.share
        stop = np.where(reached.any(axis=1), (reached.argmax(axis=1) + 1) / families, 1.0)
        return cls(mean, naive, robust, p, path[:, -1], path.max(axis=1), stop)


def _capital(by_family: np.ndarray) -> np.ndarray:
    """The wealth of `tasks.evaluation.sequential` against "no better" after each family, [n, families]."""
    kinds, which = np.unique(by_family, return_inverse=True)
    factors = 1 + np.outer(kinds, FRACTIONS)  # [kinds, nodes]
    which = which.reshape(by_family.shape)
    path = np.empty(by_family.shape)
    capital = np.ones((by_family.shape[0], FRACTIONS.size))
    for t in range(by_family.shape[1]):
        capital *= factors[which[:, t]]
        path[:, t] = capital.mean(axis=1)
    return path


def _mcnemar(wins: np.ndarray, losses: np.ndarray) -> np.ndarray:
    return np.where(wins > 0, special.betainc(np.maximum(wins, 1), losses + 1, 0.5), 1.0)


Rule = Callable[[Scores, np.ndarray], np.ndarray]


def rules(critical: float) -> dict[str, Rule]:
    """Return every rule: whether it promotes, from scores and the number k = 1, 2, … of the cycle."""
    z = float(stats.norm.isf(0.05))
    z_share = float(stats.norm.isf(0.05 / CYCLES))
    return {
        "new > old": lambda s, k: s.mean > 0,
        "new > old + 1 point": lambda s, k: s.mean > 0.01,
        "z 5 %, tasks independent": lambda s, k: s.naive > z,
        "z 5 %, by family": lambda s, k: s.robust > z,
        "e-value >= 20 at the end": lambda s, k: s.final >= 20,
        "z 5 % / 20, by family": lambda s, k: s.robust > z_share,
        GATE: lambda s, k: s.gate <= ERRORS.share,
        "the same, 5 % * 6 / (pi k)^2": lambda s, k: s.gate <= ERRORS.alpha * 6 / (np.pi * k) ** 2,
        "the same, a 20th of what is left": lambda s, k: s.gate <= ERRORS.share * 0.95 ** (k - 1),
        BETTING: lambda s, k: s.final >= 1 / ERRORS.share,
        "e-process, any time, 5 % / 20": lambda s, k: s.best >= 1 / ERRORS.share,
        "known law, 5 % of streams": lambda s, k: s.mean > critical,
    }


PROVEN = {  # valid whatever the law, or valid in this world by construction
    GATE, "the same, 5 % * 6 / (pi k)^2", "the same, a 20th of what is left",
    BETTING, "e-process, any time, 5 % / 20", "known law, 5 % of streams",
}  # fmt: skip


def study(world: World, streams: int, draws: int) -> dict[str, Any]:
    """Count false promotions and power of every rule in one world."""
    null = np.concatenate([d.mean(axis=(1, 2)) for d, _ in world.chunks(11, draws * 5, 1, 0.0, False)])
    critical = float(np.quantile(null, 1 - KNOWN_LAW))
    named = rules(critical)
    report: dict[str, Any] = {"tasks": world.families * world.size, "families": world.families, "rules": {}}
    counts = {name: {"cycle": 0, "fresh": 0, "same": 0} for name in named}
    for same in (False, True):
        for found, count in world.chunks(12 + same, streams, CYCLES, 0.0, same):
            scores, k = Scores.of(found), np.tile(np.arange(1, CYCLES + 1), count)
            for name, rule in named.items():
                promoted = rule(scores, k).reshape(count, CYCLES)
                counts[name]["same" if same else "fresh"] += int(promoted.any(axis=1).sum())
                counts[name]["cycle"] += 0 if same else int(promoted.sum())
    power: dict[str, dict[str, list[float]]] = {name: {} for name in named}
    stops = {}
    for gain in GAINS:
        found = [Scores.of(d) for d, _ in world.chunks(int(1000 * gain), draws, 1, gain, False)]
        stops[f"{gain:.2f}"] = float(np.mean(np.concatenate([s.stop for s in found])))
        for name, rule in named.items():
            every = [
                float(np.mean(np.concatenate([rule(s, np.full(s.mean.size, k)) for s in found])))
                for k in range(1, CYCLES + 1)
            ]
            power[name][f"{gain:.2f}"] = [float(np.mean(every)), every[0], every[9], every[19]]
    for name in named:
        c = counts[name]
        report["rules"][name] = {
            "per_cycle": _share(c["cycle"], streams * CYCLES),
            "per_stream": _share(c["fresh"], streams),
            "per_stream_same_tasks": _share(c["same"], streams),
            "power_mean_first_tenth_twentieth": power[name],
        }
    valid = [n for n in named if n in PROVEN]
    ours = GATE
    report["best_valid"] = {
        gain: max(valid, key=lambda n, gain=gain: power[n][gain][0]) for gain in power[ours]
    }
    report["gate_behind_best_valid_points"] = {
        gain: 100 * (power[best][gain][0] - power[ours][gain][0])
        for gain, best in report["best_valid"].items()
    }
    report["e_process_stops_after_share"] = stops
    report["detectable"] = _detectable(world, draws)
    return report


def _detectable(world: World, draws: int) -> float:
    """Power at the minimum detectable effect that the gate reports, which promises 80 %."""
    rng = np.random.default_rng(21)
    found = world.differences(rng, 200, 1, 0.0, False).reshape(200, -1).astype(float)
    names = [f"{i}" for i in np.repeat(np.arange(world.families), world.size)]
    mde = np.mean([clustered_mean(x, names, alpha=ERRORS.share, support=(-1, 1)).mde for x in found])
    hits = [Scores.of(d).gate <= ERRORS.share for d, _ in world.chunks(22, draws // 4, 1, float(mde), False)]
    return float(np.mean(np.concatenate(hits)))


def skewed(streams: int) -> dict[str, Any]:
    """False promotions where normal theory is most wrong: small gains mostly, one time in twenty a great loss.

    Graded rewards, so that McNemar's test rounds at random; 270 separate tasks, the mean difference is 0.
    """
    rng, hits = np.random.default_rng(41), {name: [0, 0] for name in ("t alone", GATE, BETTING)}
    for start in range(0, streams, 500):
        count = min(500, streams - start)
        found = np.where(_uniform(rng, (count * CYCLES, 270)) < 0.05, -0.95, 0.05)
        t = found.mean(axis=1) / np.maximum(found.std(axis=1, ddof=1) / np.sqrt(270), 1e-12)
        sure = special.stdtr(269, -t) <= ERRORS.share
        counted = np.abs(found) > _uniform(rng, found.shape)
        exact = _mcnemar((counted & (found > 0)).sum(axis=1), (counted & (found < 0)).sum(axis=1))
        final = _capital(found)[:, -1]
        for name, promoted in (
            ("t alone", sure),
            (GATE, sure & (exact <= ERRORS.share)),
            (BETTING, final >= 1 / ERRORS.share),
        ):
            by_stream = promoted.reshape(count, CYCLES)
            hits[name][0] += int(by_stream.sum())
            hits[name][1] += int(by_stream.any(axis=1).sum())
    return {
        name: {"per_cycle": _share(c, streams * CYCLES), "per_stream": _share(s, streams)}
        for name, (c, s) in hits.items()
    }


# ----------------------------------------------------------------------------------------------- coverage


def coverage(rounds: int) -> list[dict[str, Any]]:
    """Return how often each interval holds the truth, with its nominal confidence."""
    rows = []
    for world in WORLDS:
        for alpha in (0.05, ERRORS.share):
            held = [0, 0]
            for found, count in world.chunks(31, rounds * 10, 1, 0.05, False):
                means = found.mean(axis=2)
                error = means.std(axis=1, ddof=1) / np.sqrt(world.families)
                reach = special.stdtrit(world.families - 1, 1 - alpha) * error
                off = means.mean(axis=1) - 0.05
                held = [held[0] + int((np.abs(off) <= reach).sum()), held[1] + count]
            rows.append(_row(f"t interval, {world.name}", 1 - 2 * alpha, *held))
    rows.append(_unequal_t(rounds))
    rows += [_row_exact(*item) for item in _proportions()]
    rows += _sequences(rounds)
    return rows


def _unequal_t(rounds: int) -> dict[str, Any]:
    rng, hits = np.random.default_rng(32), 0
    for _ in range(rounds):
        values, names = _unequal(rng)
        found = clustered_mean(values, names, alpha=0.05, support=(-1, 1))
        hits += found.low <= 0 <= found.high
    return _row("t interval, sizes 1 and 8 tied to the mean", 0.90, hits, rounds)


def _proportions() -> list[tuple[str, float, float, float]]:
    """(name, nominal, least, mean) coverage over 1,000 true proportions, summed exactly over all outcomes."""
    truths = (np.arange(1000) + 0.5) / 1000
    out = []
    for name, make in (("Clopper-Pearson", clopper_pearson), ("Wilson", wilson)):
        for n in (30, 300):
            bounds = np.array([make(k, n, alpha=0.025) for k in range(n + 1)])
            out.append(_exact(f"{name}, n = {n}", 0.95, bounds, n, truths))
    for n in (30, 300):
        for name, estimate in (("t interval", clustered_mean), ("Gaffke", bounded_mean)):
            bounds = np.array([_mean_bounds(estimate, k, n) for k in range(n + 1)])
            out.append(_exact(f"{name} of right answers, n = {n}", 0.90, bounds, n, truths))
    return out


def _mean_bounds(estimate: Callable[..., Any], k: int, n: int) -> tuple[float, float]:
    found = estimate(np.repeat([1.0, 0.0], [k, n - k]), alpha=0.05, support=(0, 1))
    return found.low, found.high


def _exact(
    name: str, nominal: float, bounds: np.ndarray, n: int, truths: np.ndarray
) -> tuple[str, float, float, float]:
    chance = stats.binom.pmf(np.arange(n + 1)[None, :], n, truths[:, None])
    held = (bounds[:, 0][None, :] <= truths[:, None]) & (truths[:, None] <= bounds[:, 1][None, :])
    covered = (chance * held).sum(axis=1)
    return name, nominal, float(covered.min()), float(covered.mean())


def _sequences(rounds: int) -> list[dict[str, Any]]:
    """The confidence sequences, over all times: the truth has to be inside after every cluster."""

    def paired(rng: np.random.Generator) -> tuple[np.ndarray, list[str] | None, float]:
        return rng.choice([-1.0, 0.0, 1.0], 270, p=[0.075, 0.8, 0.125]), None, 0.05

    def skewed(rng: np.random.Generator) -> tuple[np.ndarray, list[str] | None, float]:
        return np.where(rng.uniform(size=300) < 0.05, 0.95, -0.05), None, 0.0

    def families(rng: np.random.Generator) -> tuple[np.ndarray, list[str] | None, float]:
        found = WORLDS[0].differences(rng, 1, 1, 0.05, False).ravel().astype(float)
        return found, [f"{i}" for i in np.repeat(np.arange(30), 10)], 0.05

    def unequal(rng: np.random.Generator) -> tuple[np.ndarray, list[str] | None, float]:
        return *_unequal(rng), 0.0

    rows = []
    for name, draw in (
        ("270 tasks", paired),
        ("skewed", skewed),
        ("30 families", families),
        ("sizes 1 and 8", unequal),
    ):
        rng = np.random.default_rng(33)
        hits, widths = {"betting": 0, "empirical Bernstein": 0}, {"betting": [], "empirical Bernstein": []}
        for i in range(rounds):
            values, names, truth = draw(rng)
            stream = cluster_stream(values, names, support=(-1.0, 1.0))
            up, down = wealth(stream, truth).max(), wealth(stream.mirrored(), -truth).max()
            hits["betting"] += up < 20 and down < 20
            bounds = empirical_bernstein(stream, alpha=0.05)
            hits["empirical Bernstein"] += bounds.low[-1] <= truth <= bounds.high[-1]
            if i < 40:
                exact = betting_sequence(stream, alpha=0.05)
                widths["betting"].append(exact.high[-1] - exact.low[-1])
                widths["empirical Bernstein"].append(bounds.high[-1] - bounds.low[-1])
        for method, held in hits.items():
            rows.append(
                {
                    **_row(f"{method} sequence, {name}", 0.90, held, rounds),
                    "width": float(np.mean(widths[method])),
                }
            )
    return rows


def _unequal(rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """60 families of 1 or 8 tasks; the mean over tasks is 0, the mean over families is not."""
    sizes = rng.choice([1, 8], 60)
    means = np.where(sizes == 8, 0.1, -0.8) * (rng.uniform(size=60) < 0.5)
    return np.repeat(means, sizes), [f"{i}" for i in np.repeat(np.arange(60), sizes)]


# ------------------------------------------------------------------------------------------------- guards

GUARD = Policy().guards
# (losses, wins) as shares of the tasks: the first ones lose exactly the margin, the others do not.
NULLS = ((0.10, 0.0), (0.12, 0.02), (0.15, 0.05), (0.20, 0.10), (0.30, 0.20), (0.50, 0.40))
ALTERNATIVES = (
    (0.0, 0.0),
    (0.05, 0.05),
    (0.10, 0.10),
    (0.20, 0.20),
    (0.05, 0.10),
    (0.10, 0.20),
    (0.10, 0.30),
)
TESTS = ("Student", "Gaffke", "betting")


def guards(rounds: int) -> dict[str, Any]:
    """How often a guard passes, in percent, by three tests, at its error and at a third of it (Holm, three environments).

    Tasks lost, tied and won: exactly, over all outcomes of the trinomial law. Graded rewards and families: simulated.
    """
    report: dict[str, Any] = {"exact": [], "simulated": []}
    for n in (50, 100, 120):
        counts, table = _guard_table(n)
        for kind, laws in (("lost", NULLS), ("kept", ALTERNATIVES)):
            for loss, win in laws:
                shares = np.array([loss, 1 - loss - win, win])
                chance = stats.multinomial.pmf(counts, n, shares)
                passed = {
                    test: [float(100 * chance[p <= alpha].sum()) for alpha in (GUARD.alpha, GUARD.alpha / 3)]
                    for test, p in table.items()
                }
                report["exact"].append({"n": n, "margin": kind, "loss": loss, "win": win, "passed": passed})
    for name, draw in _GUARD_WORLDS.items():
        rng, hits = np.random.default_rng(51), dict.fromkeys(TESTS, 0)
        for _ in range(rounds):
            values, names = draw(rng)
            for test, p in _guard_p(values, names).items():
                hits[test] += p <= GUARD.alpha
        report["simulated"].append({"world": name, "passed": {t: _share(h, rounds) for t, h in hits.items()}})
    return report


def _guard_table(n: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Every (losses, ties, wins) of n tasks, [m, 3], and each test's p-value against a loss of the margin, [m]."""
    counts = np.array([(i, n - i - j, j) for i in range(n + 1) for j in range(n + 1 - i)])
    found = [_guard_p(np.repeat([-1.0, 0.0, 1.0], row), None) for row in counts]
    return counts, {test: np.array([p[test] for p in found]) for test in TESTS}


def _guard_p(values: np.ndarray, names: list[str] | None) -> dict[str, float]:
    stream = cluster_stream(values, names, support=(-1.0, 1.0))
    t = clustered_mean(values, names, alpha=GUARD.alpha, support=(-1.0, 1.0))
    found = t.p_above(-GUARD.margin), bounded_p(stream, -GUARD.margin), final_p(stream, -GUARD.margin)
    return dict(zip(TESTS, found, strict=True))


def _rare_loss(rng: np.random.Generator) -> tuple[np.ndarray, list[str] | None]:
    return np.where(rng.uniform(size=50) < 0.15, -0.95, 0.05), None


def _uneven(rng: np.random.Generator) -> tuple[np.ndarray, list[str] | None]:
    return np.where(rng.uniform(size=100) < 0.4 / 1.3, -1.0, 0.3), None


def _lost_families(rng: np.random.Generator) -> tuple[np.ndarray, list[str] | None]:
    return np.repeat(-1.0 * (rng.uniform(size=30) < 0.1), 4), [f"{i}" for i in np.repeat(np.arange(30), 4)]


def _tied_sizes(rng: np.random.Generator) -> tuple[np.ndarray, list[str] | None]:
    values, names = _unequal(rng)
    return (values - 0.1).clip(-1, 1), names


_GUARD_WORLDS = {
    "50 tasks, .05 gained or .95 lost": _rare_loss,
    "100 tasks, .3 gained or 1 lost": _uneven,
    "30 families of 4, won or lost together": _lost_families,
    "60 families of 1 or 8, size tied to the mean": _tied_sizes,
}


# ------------------------------------------------------------------------------------------------- pieces


def _uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.random(shape, dtype=np.float32)


def _family(
    rng: np.random.Generator, champion: tuple[int, ...], candidate: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    spread = 0.08 * np.sqrt(2)
    return rng.beta(2, 2, champion), rng.normal(0, spread, champion), rng.normal(0, spread, candidate)


def _chance(difficulty: np.ndarray, lean: np.ndarray) -> np.ndarray:
    return (difficulty + lean).clip(0, 1)[..., None]


_SHIFTS: dict[float, float] = {0.0: 0.0}


def _shift(gain: float) -> float:
    """How much each side's chance has to move for the mean difference to be `gain`, chances ending at 0 and 1."""
    if gain not in _SHIFTS:
        difficulty, own, other = _family(np.random.default_rng(1), (2_000_000,), (2_000_000,))
        low, high = 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            moved = (difficulty + other + middle).clip(0, 1) - (difficulty + own - middle).clip(0, 1)
            idle = (difficulty + other).clip(0, 1) - (difficulty + own).clip(0, 1)
            low, high = (middle, high) if (moved - idle).mean() < gain else (low, middle)
        _SHIFTS[gain] = low
    return _SHIFTS[gain]


def _share(hits: int, n: int) -> list[float]:
    return [hits / n, *clopper_pearson(hits, n, alpha=0.025)]


def _row(name: str, nominal: float, hits: int, n: int) -> dict[str, Any]:
    return {"interval": name, "nominal": nominal, "coverage": _share(hits, n)}


def _row_exact(name: str, nominal: float, least: float, mean: float) -> dict[str, Any]:
    return {"interval": name, "nominal": nominal, "least": least, "mean": mean}


def show(report: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    for name, world in report["worlds"].items():
        table = Table(title=f"{name}: {world['tasks']} tasks, {world['families']} families", box=None)
        for column in (
            "rule",
            "false / cycle",
            "false / stream",
            "same tasks",
            *(f"power {g:.2f}" for g in GAINS),
        ):
            table.add_column(column, justify="left" if column == "rule" else "right")
        for rule, r in world["rules"].items():
            rates = [r["per_cycle"], r["per_stream"], r["per_stream_same_tasks"]]
            power = [r["power_mean_first_tenth_twentieth"][f"{g:.2f}"] for g in GAINS]
            table.add_row(
                rule,
                *(f"{100 * e:.2f} [{100 * lo:.2f}, {100 * hi:.2f}]" for e, lo, hi in rates),
                *(f"{100 * p[0]:.1f} ({100 * p[1]:.0f} {100 * p[2]:.0f} {100 * p[3]:.0f})" for p in power),
            )
        console.print(table)
        console.print({k: v for k, v in world.items() if k != "rules"})
    console.print(report["skewed"])
    for row in report["coverage"]:
        console.print(row)
    for row in report["guards"]["exact"]:
        passed = "   ".join(f"{t} {a:.1f} / {b:.1f}" for t, (a, b) in row["passed"].items())
        console.print(f"guard, {row['n']} tasks, {row['loss']:.2f} lost, {row['win']:.2f} won: {passed}")
    for row in report["guards"]["simulated"]:
        console.print(row)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=20_000)
    parser.add_argument("--draws", type=int, default=20_000, help="of one decision, for each gain")
    parser.add_argument("--rounds", type=int, default=3_000, help="of each interval")
    parser.add_argument("--save", action="store_true", help=f"write {BASELINE.name}")
    words = parser.parse_args()
    begun = perf_counter()
    report: dict[str, Any] = {
        "machine": describe(),
        "streams": words.streams,
        "draws": words.draws,
        "worlds": {},
    }
    for world in WORLDS:
        fewer = 2 if world.name == "large" else 1  # it has eight times the answers
        report["worlds"][world.name] = study(world, words.streams // fewer, words.draws)
    report["skewed"] = skewed(words.streams)
    report["coverage"] = coverage(words.rounds)
    report["guards"] = guards(words.rounds)
    report["seconds"], report["cpu_seconds"] = round(perf_counter() - begun, 1), round(process_time(), 1)
    show(report, Console(width=180))
    if words.save:
        BASELINE.parent.mkdir(parents=True, exist_ok=True)
        BASELINE.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
