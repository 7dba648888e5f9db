"""Stopping early: never before the verdict stands, and never at the cost of the error that is promised."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import pytest

from tasks.evaluation.paired import Agent, pair_outcomes, read_outcomes, write_outcomes
from tasks.evaluation.statistics import clopper_pearson, clustered_mean
from tasks.evaluation.stopping import chunks, plan_of
from tasks.promotion.evidence.hacking import hacking_evidence
from tasks.promotion.evidence.item import FileRef
from tasks.promotion.evidence.quality import guard_evidence, quality_evidence
from tasks.promotion.evidence.watch import stop_reason
from tasks.promotion.policy import Policy

SOURCE = FileRef("x", "f" * 64)
AGENTS = (Agent(2, "b" * 64), Agent(1, "a" * 64))
# One decision takes all of the error, so that a simulation can see it; the guards ask for little.
POLICY = Policy.model_validate(
    {
        "superiority": {"test": "betting"},
        "errors": {"alpha": 0.05, "cycles": 1},
        "guards": {"margin": 0.9},
    }
)


@dataclass(frozen=True)
class Asked:
    id: str
    family: str


@dataclass(frozen=True)
class Answer:
    task_id: str
    env: str
    reward: float
    response_text: str = "9"
    family: str = ""


def tasks(n, env="sums", size=1):
    return {env: [Asked(f"{env}/{i}", f"{env}/{i // size}") for i in range(n)]}


def watch(asked, rewards, policy=POLICY, first=60, every=30, words=("9", "9"), most=None):
    """Answer as the flow does, with made-up rewards {task id: (candidate, champion)}; return (outcomes, reason).

    `words` are what candidate and champion say; at most `most` chunks are answered.
    """
    plan = plan_of(asked, first, every)
    sides, reason, paired = ([], []), None, None
    for chunk in islice(chunks(asked, first, every), most):
        for env, found in chunk.items():
            for k, side in enumerate(sides):
                side += [Answer(t.id, env, rewards[t.id][k], words[k], t.family) for t in found]
        paired = pair_outcomes(*sides, AGENTS, {}, plan)
        reason = stop_reason(paired, policy)
        if reason is not None:
            break
    return paired, reason


def rewards_of(asked, differences):
    ids = [t.id for found in asked.values() for t in found]
    return {i: (max(d, 0.0), max(-d, 0.0)) for i, d in zip(ids, differences, strict=True)}


def test_tasks_come_in_an_order_fixed_by_hash_and_families_whole():
    asked = {**tasks(90, "sums", size=3), **tasks(50, "words")}
    parts = list(chunks(asked, 60, 30))
    assert [t for part in parts for t in part["sums"]] != asked["sums"]
    assert parts == list(chunks({k: list(v) for k, v in reversed(asked.items())}, 60, 30))
    seen = [t.id for part in parts for found in part.values() for t in found]
    assert sorted(seen) == sorted(t.id for found in asked.values() for t in found)
    for part in parts:
        for family in {t.family for t in part.get("sums", ())}:
            assert sum(t.family == family for t in part["sums"]) == 3
    assert 60 <= sum(map(len, parts[0].values())) <= 62
    plan = plan_of(asked, 60, 30)
    assert (plan.total, plan.largest) == (140, {"sums": 3, "words": 1})


def test_a_clear_gain_stops_early_and_the_same_answers_decide_the_same():
    asked = tasks(300)
    outcomes, reason = watch(asked, rewards_of(asked, np.ones(300)))
    assert reason == "every claim about the answers is shown"
    assert len(outcomes.pairs) == 60
    found = quality_evidence(outcomes, SOURCE, POLICY)
    assert found.verdict == "PASS"
    assert "after 60 of 300 tasks" in found.says


def test_long_answers_do_not_end_it_before_the_gain_that_excuses_them_can_be_shown():
    """Wins 20 %, losses 8 %, answers four times as long: on all tasks the gain is shown, at the first look it is not."""
    asked = tasks(800)
    draws = np.random.default_rng(0).choice([1.0, 0.0, -1.0], 800, p=[0.2, 0.72, 0.08])
    outcomes, reason = watch(asked, rewards_of(asked, draws), words=("9 9 9 9", "9"))
    first, _ = watch(asked, rewards_of(asked, draws), words=("9 9 9 9", "9"), most=1)
    assert "FAIL" in {item.verdict for item in hacking_evidence(first, SOURCE, None, None, POLICY)}
    assert reason == "every claim about the answers is shown"
    assert len(outcomes.pairs) > 60


def test_a_clear_loss_stops_early_with_a_fail():
    asked = tasks(300)
    outcomes, reason = watch(asked, rewards_of(asked, -np.ones(300)))
    assert len(outcomes.pairs) == 60
    assert reason.startswith("Quality: -1.000")


def test_what_cannot_be_won_any_more_is_given_up_and_not_before():
    """All ties, looked at after every 5th: it goes on as long as winning all that is left would show a gain."""
    asked = tasks(100)
    outcomes, reason = watch(asked, rewards_of(asked, np.zeros(100)), every=5)
    left = 100 - len(outcomes.pairs)
    assert reason == f"a gain could not be shown any more, were all {left} tasks left won"
    assert 0 < left < 20

    def if_won(n):
        sides = [[Answer(f"{i}", "sums", float(i < n and k == 0)) for i in range(100)] for k in (0, 1)]
        return quality_evidence(pair_outcomes(*sides, AGENTS, {}, outcomes.plan), SOURCE, POLICY).verdict

    assert if_won(left) != "PASS"
    assert if_won(left + 5) == "PASS"


def test_an_environment_without_an_answer_is_not_passed_by_the_others():
    asked = {**tasks(60, "sums"), **tasks(60, "words")}
    sides = [[Answer(t.id, "sums", float(k == 0)) for t in asked["sums"]] for k in (0, 1)]
    half = pair_outcomes(*sides, AGENTS, {}, plan_of(asked, 60, 30))
    assert quality_evidence(half, SOURCE, POLICY).verdict == "PASS"
    assert stop_reason(half, POLICY) is None


def test_unsure_guards_keep_it_going():
    strict = POLICY.model_copy(update={"guards": POLICY.guards.model_copy(update={"margin": 0.05})})
    asked = {**tasks(200, "sums"), **tasks(100, "words")}
    ids = [t.id for found in asked.values() for t in found]
    draws = np.random.default_rng(0).choice([1.0, 0.0, -1.0], 300, p=[0.3, 0.5, 0.2])
    rewards = {
        i: (1.0, 0.0) if i.startswith("sums") else (max(d, 0.0), max(-d, 0.0))
        for i, d in zip(ids, draws, strict=True)
    }
    outcomes, _ = watch(asked, rewards, strict)
    easy, _ = watch(asked, rewards, POLICY)
    assert len(easy.pairs) < len(outcomes.pairs)


def test_watching_keeps_the_promised_error_and_looking_at_t_would_not():
    """Candidates exactly as good as the champion, 240 tasks, looked at up to four times, at 5 % for one decision."""
    asked, rng, false = tasks(240), np.random.default_rng(1), 0
    bare = POLICY.model_copy(
        update={"safety": {}, "hacking": POLICY.hacking.model_copy(update={"required": False})}
    )
    for _ in range(100):
        differences = rng.choice([-1.0, 0.0, 1.0], 240, p=[0.3, 0.4, 0.3])
        outcomes, _ = watch(asked, rewards_of(asked, differences), bare, every=60)
        false += quality_evidence(outcomes, SOURCE, POLICY).verdict == "PASS"
    assert clopper_pearson(false, 100, alpha=0.05)[1] <= 0.05
    student = sum(
        any(clustered_mean(d[:n], alpha=0.05, support=(-1, 1)).low > 0 for n in (60, 120, 180, 240))
        for d in rng.choice([-1.0, 0.0, 1.0], (400, 240), p=[0.3, 0.4, 0.3])
    )
    assert clopper_pearson(student, 400, alpha=0.05)[0] > 0.05


def test_guards_of_a_watched_evaluation_keep_theirs():
    """The true loss is exactly the guard's margin: it must not be passed more often than 5 %, whenever it is stopped."""
    rule = Policy.model_validate({"superiority": {"test": "betting"}, "guards": {"margin": 0.10}})
    asked, rng, false, streams = tasks(200), np.random.default_rng(2), 0, 80
    for _ in range(streams):
        differences = rng.choice([-1.0, 0.0, 1.0], 200, p=[0.15, 0.8, 0.05])
        plan, rewards = plan_of(asked, 60, 70), rewards_of(asked, differences)
        sides = ([], [])
        for chunk in chunks(asked, 60, 70):
            for k, side in enumerate(sides):
                side += [Answer(t.id, "sums", rewards[t.id][k]) for t in chunk["sums"]]
            paired = pair_outcomes(*sides, AGENTS, {}, plan)
            if guard_evidence(paired, SOURCE, rule)[0].verdict == "PASS":
                false += 1
                break
    assert clopper_pearson(false, streams, alpha=0.05)[1] <= 0.05


def test_the_t_test_cannot_judge_what_was_watched_and_the_plan_is_kept(tmp_path):
    asked = tasks(120)
    outcomes, _ = watch(asked, rewards_of(asked, np.ones(120)))
    found = quality_evidence(outcomes, SOURCE, Policy())
    assert found.verdict == "INCONCLUSIVE"
    assert "only `superiority.test: betting`" in found.says
    path, digest = write_outcomes(tmp_path, outcomes)
    again = read_outcomes(path, digest)
    assert again == outcomes
    whole = pair_outcomes(
        [Answer(t.id, "sums", 1.0) for t in asked["sums"]], [Answer(t.id, "sums", 0.0) for t in asked["sums"]], AGENTS, {}
    )  # fmt: skip
    assert again.tasks() == whole.tasks()  # the same held-out set, however many of it were answered
    with pytest.raises(ValueError, match="without a plan"):
        stop_reason(replace(outcomes, plan=None), POLICY)
