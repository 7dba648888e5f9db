"""The benchmark of the gate's errors: its arrays say what the gate says, and its committed figures keep the promise."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest

from benchmarks.gate_errors import BASELINE, BETTING, ERRORS, GAINS, GATE, WORLDS, Scores, World, rules
from tasks.evaluation.paired import Agent, pair_outcomes
from tasks.evaluation.sequential import cluster_stream, wealth
from tasks.promotion.gate import FileRef, quality_evidence
from tasks.promotion.policy import Policy


@dataclass(frozen=True)
class Answer:
    task_id: str
    env: str
    reward: float
    response_text: str = ""


def asked(differences: np.ndarray, policy: Policy) -> str:
    """Let the gate itself judge differences of -1, 0 and 1, [families, size]; a family is a task with many answers."""
    sides: list[list[Answer]] = [[], []]
    for (family, _), d in np.ndenumerate(differences):
        for side, reward in zip(sides, (float(d == 1), float(d == -1)), strict=True):
            side.append(Answer(f"{family:03d}", "world", reward))
    outcomes = pair_outcomes(*sides, (Agent(2, "b"), Agent(1, "a")), {})
    return quality_evidence(outcomes, FileRef("x", "y"), policy).verdict


@pytest.mark.parametrize("world", [World("small", 30, 4), World("separate", 60, 1)])
def test_the_arrays_say_what_the_gate_says(world: World):
    rng = np.random.default_rng(0)
    found = np.concatenate([world.differences(rng, 30, 1, gain, False) for gain in (0.0, 0.1, 0.19)])
    scores, named = Scores.of(found), rules(0.0)
    verdicts = {}
    for rule, test in ((GATE, "t"), (BETTING, "betting")):
        policy = Policy.model_validate({"superiority": {"test": test, "min_tasks": 2}})
        ours = named[rule](scores, np.ones(len(found)))
        verdicts[rule] = [asked(one, policy) == "PASS" for one in found]
        assert ours.tolist() == verdicts[rule]
    assert 0 < sum(verdicts[GATE]) < len(found)


def test_the_wealth_is_that_of_the_module():
    found = WORLDS[0].differences(np.random.default_rng(1), 5, 1, 0.1, False)
    scores = Scores.of(found)
    for i, one in enumerate(found):
        names = [f"{k}" for k in np.repeat(np.arange(30), 10)]
        path = wealth(cluster_stream(one.ravel().astype(float), names, support=(-1, 1)), 0.0)
        assert (scores.final[i], scores.best[i]) == pytest.approx((path[-1], path.max()), rel=1e-9)


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
@pytest.mark.parametrize("gain", [0.0, *GAINS])
def test_a_world_has_the_gain_that_it_claims(world: World, gain: float):
    found = world.differences(np.random.default_rng(2), 200, 1, gain, False).mean(axis=(1, 2))
    assert abs(found.mean() - gain) < 4 * found.std() / np.sqrt(found.size)


def test_the_committed_figures_keep_the_promise():
    report = json.loads(BASELINE.read_text())
    assert ERRORS.cycles == 20
    assert report["skewed"][GATE]["per_stream"][0] <= 0.05 < report["skewed"]["t alone"]["per_stream"][0]
    for name, world in report["worlds"].items():
        ours = world["rules"][GATE]
        for kind in ("per_stream", "per_stream_same_tasks"):
            assert ours[kind][0] <= 0.05, (name, kind)
        assert world["rules"]["new > old"]["per_stream"][0] > 0.99
        assert all(points <= 10 for points in world["gate_behind_best_valid_points"].values()), name


def test_the_committed_guards_hold_their_error_and_students_would_not():
    report = json.loads(BASELINE.read_text())["guards"]
    lost = [row for row in report["exact"] if row["margin"] == "lost"]
    assert all(row["passed"]["Gaffke"][0] <= 5 and row["passed"]["Gaffke"][1] <= 5 / 3 for row in lost)
    assert max(row["passed"]["Student"][0] for row in lost) > 9
    assert all(row["passed"]["Gaffke"][1] <= 0.05 for row in report["simulated"])
    kept = [row for row in report["exact"] if row["margin"] == "kept"]
    assert all(row["passed"]["Gaffke"][0] >= row["passed"]["betting"][0] for row in kept)
