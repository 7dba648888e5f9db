"""What the page shows of the two agents' answers: by environment, by difference, and a few in full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.core.digest import sha256_bytes
from tasks.evaluation.paired import Pair, PairedOutcomes
from tasks.evaluation.statistics import clustered_mean
from tasks.pages import figures
from tasks.pages.figures import Axis, Interval
from tasks.pages.parts import Chart, Group, Row, Strips, bounded, interval, number, plain

_SHOWN = 3  # tasks that the candidate won, and as many that it lost
_CUT = 700  # characters of an answer
_BINS = 20


@dataclass(frozen=True)
class Shown:
    """One task and what champion and candidate answered: (reward, text, characters left out)."""

    env: str
    task: str
    sides: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True)
class Examples:
    """A few of the `count` tasks that one side won."""

    title: str
    count: int
    shown: tuple[Shown, ...]


def score(outcomes: PairedOutcomes) -> str:
    """Say in a sentence what both agents, the best constant answers and blind choices earn."""
    candidate, champion, _ = outcomes.rewards()
    constant, random = outcomes.constant(), outcomes.random()
    beside = "" if constant is None else f", the best constant answers {constant:.3f}"
    beside += "" if random is None else f", blind choices {random:.3f}"
    return (
        f"On {len(candidate):,} held-out answers the candidate earns {candidate.mean():.3f} of 1, "
        f"the champion {champion.mean():.3f}{beside}."
    )


def environments(outcomes: PairedOutcomes, evidence: Sequence[Mapping[str, Any]], alpha: float) -> Strips:
    """Draw the means of both agents in each environment and over all; the differences are those that the gate weighed.

    Args:
        evidence: items of the decision's record.
        alpha: one-sided error of each bound of a mean, by Student's t over clusters: these describe, they decide nothing.
    """
    weighed = {item["name"]: item for item in evidence}
    axis = Axis(-0.02, 1.02)
    rows = []
    for env in [*outcomes.slices(), None]:
        candidate, champion, clusters = outcomes.rewards(env)
        sides = [clustered_mean(x, clusters, alpha=alpha, support=(0.0, 1.0)) for x in (candidate, champion)]
        gain = weighed.get(f"guard/{env}" if env else "quality", {})
        value = Interval(float((candidate - champion).mean()), gain.get("low"), gain.get("high"))
        constant, random, name = outcomes.constant(env), outcomes.random(env), plain(env or "all")
        told = f"{name}: candidate {sides[0].estimate:.3f}, champion {sides[1].estimate:.3f}"
        told += "" if constant is None else f", constant answer {constant:.3f}"
        told += "" if random is None else f", blind choice {random:.3f}"
        cells = (
            *(number(side.estimate) for side in sides),
            number(constant),
            number(random),
            bounded(value, signed=True),
            f"{int((candidate > champion).sum())}",
            f"{int((candidate < champion).sum())}",
            f"{len(candidate):,}",
        )
        drawn = figures.means(axis, interval(sides[0]), interval(sides[1]), (constant, random), told)
        rows.append(Row(name, drawn, cells))
    heads = ("mean reward", "candidate", "champion", "constant", "random", "difference", "won", "lost", "n")
    return Strips(heads, (Group(tuple(rows), figures.ruler(axis)),))


def without_baselines(outcomes: PairedOutcomes) -> list[str]:
    """Say of each environment whose baselines could not be measured why they are missing."""
    errors = {env: outcomes.baselines[env].error for env in outcomes.slices() if env in outcomes.baselines}
    return [plain(f"{env}: no baselines: {error}") for env, error in errors.items() if error]


def differences(outcomes: PairedOutcomes) -> tuple[str, Chart | None]:
    """Say how many answers were won and lost, and draw by how much unless every reward is 0 or 1."""
    candidate, champion, _ = outcomes.rewards()
    found = np.round(candidate - champion, 9)
    won, lost, alike = (int(x.sum()) for x in (found > 0, found < 0, found == 0))
    says = f"{len(found):,} paired answers: {won} won by the candidate, {lost} lost, {alike} with the same reward."
    if np.isin(found, (-1.0, 0.0, 1.0)).all():
        return says, None
    edges = np.linspace(-1, 1, _BINS + 1)
    counts = np.histogram(found[found != 0], bins=edges)[0]
    without = f", without the {alike} that are alike" if alike else ""
    return says, Chart(
        figures.histogram(edges.tolist(), counts.tolist(), says),
        f"Differences in reward, candidate less champion{without}.",
    )


def examples(outcomes: PairedOutcomes) -> list[Examples]:
    """Choose a few tasks that the candidate won and a few that it lost: the greatest differences, spread over environments."""
    sides = []
    for title, sign in (("Won by the candidate", 1), ("Lost by the candidate", -1)):
        rank: dict[str, int] = {}
        ranked = []
        for pair in sorted((p for p in outcomes.pairs if sign * _gain(p) > 0), key=_telling):
            rank[pair.env] = rank.get(pair.env, 0) + 1
            ranked.append((rank[pair.env], pair.env, pair))
        ranked.sort(key=lambda found: found[:2])
        shown = tuple(_shown(pair) for _, _, pair in ranked[:_SHOWN])
        sides.append(Examples(title, len(ranked), shown))
    return [side for side in sides if side.count]


def _shown(pair: Pair) -> Shown:
    sides = ((pair.champion_reward, pair.champion_response), (pair.candidate_reward, pair.candidate_response))
    return Shown(
        plain(pair.env),
        plain(pair.task_id.removeprefix(f"{pair.env}/")),
        tuple((f"{reward:.3g}", plain(text[:_CUT]), max(0, len(text) - _CUT)) for reward, text in sides),
    )


def _gain(pair: Pair) -> float:
    return pair.candidate_reward - pair.champion_reward


def _telling(pair: Pair) -> tuple[float, str]:
    """Order by how much the agents differ; among equals by a digest, which no one has chosen."""
    return -abs(_gain(pair)), sha256_bytes(f"{pair.env}/{pair.task_id}/{pair.sample}".encode())
