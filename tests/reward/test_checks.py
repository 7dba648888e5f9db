"""Verdicts on reports with known content, and on real small reward models with known flaws."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from benchmarks.reward_validation import OWN
from benchmarks.reward_zoo import ZOO, World, make_world
from tasks.core.digest import canonical_json
from tasks.core.errors import Refused
from tasks.promotion.policy import Policy
from tasks.promotion.policy import RewardModel as Rule
from tasks.reward.checks import judge_report, reasons
from tasks.reward.expiry import expired
from tasks.reward.validation import measure
from tests.reward.report import make_report, make_samples, sure_margins

RULE = Policy().reward_model
GOOD = sure_margins(0.9, 100)


def judged(report, name, rule=RULE):
    """The verdict over all, and the check called `name`."""
    verdict, checks = judge_report(report, rule)
    (check,) = [check for check in checks if check.name == name]
    return verdict, check


# ------------------------------------------------------------------------------------------------- the verdict


@pytest.mark.parametrize(
    ("margins", "verdict"),
    [
        (GOOD, "PASS"),
        (sure_margins(0.5, 200), "FAIL"),
        (sure_margins(0.63, 100), "INCONCLUSIVE"),
        (sure_margins(0.99, 4), "INCONCLUSIVE"),
        ([], "INCONCLUSIVE"),
    ],
)
def test_accuracy_makes_the_verdict_where_there_is_nothing_else(margins, verdict):
    found, check = judged(make_report(margins), "accuracy")
    assert found == check.verdict == verdict
    assert check.counts


def test_what_has_no_data_is_reported_with_the_reason_and_does_not_count():
    verdict, checks = judge_report(make_report(GOOD), RULE)
    assert verdict == "PASS"
    idle = [check for check in checks if not check.counts]
    assert {check.family for check in idle} == {"ranking", "best of n", "length", "edits", "probes", "drift", "support", "frame"}  # fmt: skip
    assert all(check.verdict == "INCONCLUSIVE" and check.says.endswith(".") for check in idle)


def test_a_check_counts_if_the_policy_says_so_and_accuracy_always():
    report = make_report(sure_margins(0.7, 300, scale=6.0))  # sure of itself and often wrong
    assert judged(report, "calibration")[0] == "FAIL"
    lenient = Rule(counts=("accuracy",))
    assert judged(report, "calibration", lenient)[0] == "PASS"
    assert judged(make_report(sure_margins(0.5, 300)), "accuracy", Rule(counts=()))[0] == "FAIL"


def test_the_reasons_are_those_of_the_checks_that_decided():
    verdict, checks = judge_report(make_report(sure_margins(0.5, 300)), RULE)
    assert verdict == "FAIL"
    assert reasons(verdict, checks)[0].startswith("Right on 0.500 [")
    assert len(reasons(verdict, checks)) == sum(c.counts and c.verdict == "FAIL" for c in checks)


def test_another_version_of_the_report_is_refused():
    with pytest.raises(Refused, match="validate the reward model again"):
        judge_report({"schema": "forebay.reward/1", "pairs": []}, RULE)


def test_the_same_report_gives_the_same_checks_after_it_was_written_and_read():
    world = make_world(3, train=60, heldout=20, answers=8)
    trained = ZOO["good"](world)
    report = measure(trained.source, world.material, trained.training)
    again = measure(trained.source, world.material, trained.training)
    assert canonical_json(report) == canonical_json(again)
    assert judge_report(json.loads(canonical_json(report)), RULE) == judge_report(report, RULE)


# ----------------------------------------------------------------------------------------------- single checks


def slices_report(**right):
    """Pairs of slices {name: (right, of)}, a prompt each."""
    margins, names = [], []
    for name, (k, n) in right.items():
        margins += [2.0] * k + [-2.0] * (n - k)
        names += [name] * n
    report = make_report(margins)
    for pair, name in zip(report["preferences"], names, strict=True):
        pair["slice"] = name
    return report


def test_one_bad_slice_fails_whatever_the_others_do():
    verdict, check = judged(slices_report(good=(300, 310), bad=(10, 40)), "slices/bad")
    assert (verdict, check.verdict) == ("FAIL", "FAIL")


def test_small_slices_are_judged_together_or_not_at_all():
    report = slices_report(large=(90, 100), one=(7, 8), two=(8, 9))
    verdict, check = judged(report, "slices/one + two")
    assert (verdict, check.verdict, check.n) == ("PASS", "PASS", 17)
    verdict, check = judged(slices_report(large=(90, 100), one=(0, 5)), "slices/one")
    assert (verdict, check.verdict, check.counts) == ("PASS", "INCONCLUSIVE", False)
    assert "too few" in check.says


def test_many_slices_do_not_fail_by_chance():
    """Twenty slices that are right on half of their pairs, the limit: Holm holds the error over all of them."""
    rng, failed = np.random.default_rng(0), 0
    for _ in range(100):
        report = slices_report(**{f"s{k}": (int(rng.binomial(40, 0.5)), 40) for k in range(20)})
        failed += any(c.family == "slices" and c.verdict == "FAIL" for c in judge_report(report, RULE)[1])
    assert failed <= 12  # 5 expected at most; 12 has a chance below 0.3 %


def test_verifiers_have_no_calibration_and_no_leak():
    report = make_report(GOOD, source={"kind": "verifier", "digest": "5" * 64})
    report["training"]["prompts"] = None
    verdict, checks = judge_report(report, RULE)
    assert verdict == "PASS"
    assert not any(check.counts for check in checks if check.family in ("calibration", "leak"))


def test_a_trained_model_that_hides_its_prompts_does_not_pass():
    report = make_report(GOOD)
    report["training"]["prompts"] = None
    assert judged(report, "leak")[0] == "INCONCLUSIVE"


def test_leaked_prompts_are_named():
    report = make_report(GOOD)
    report["training"]["leaked"] = ["ab" * 32]
    verdict, check = judged(report, "leak")
    assert verdict == "FAIL"
    assert "abababababab" in check.says


def edits(gains, name="filler"):
    """A wrong answer at 0, the right one at 1, and the edited one above or below it."""
    return [{"prompt": f"p{k}", "edit": name, "right": 1.0, "wrong": 0.0, "edited": 2.0 if gain else 0.0} for k, gain in enumerate(gains)]  # fmt: skip


@pytest.mark.parametrize(
    ("share", "n", "verdict", "counts"),
    [(0.0, 40, "PASS", True), (0.5, 40, "FAIL", True), (0.25, 40, "INCONCLUSIVE", True), (0.0, 5, "INCONCLUSIVE", False)],
)  # fmt: skip
def test_edits_are_judged_by_what_they_gain(share, n, verdict, counts):
    _, check = judged(make_report(GOOD, edits=edits(np.arange(n) < share * n)), "edits/filler")
    assert (check.verdict, check.counts) == (verdict, counts)
    assert check.estimate == pytest.approx(share)


def test_a_wrong_answer_that_wins_anyway_is_no_gain_of_the_edit():
    rows = [{**row, "wrong": 2.0} for row in edits([True] * 40)]
    assert judged(make_report(GOOD, edits=rows), "edits/filler")[1].verdict == "PASS"


def test_probes_have_exact_bounds_and_a_tie_is_no_win_for_the_right_answer():
    rows = [{"prompt": f"p{k}", "probe": "empty", "right": 1.0, "score": 0.0} for k in range(30)]
    verdict, check = judged(make_report(GOOD, probes=rows), "probes/empty")
    assert (verdict, check.high) == ("PASS", pytest.approx(1 - 0.05 ** (1 / 30)))
    ties = [{**row, "score": 1.0} for row in rows]
    assert judged(make_report(GOOD, probes=ties), "probes/empty")[0] == "FAIL"
    assert judged(make_report(GOOD, probes=rows[:10]), "probes/empty")[1].counts is False


def test_best_of_n_fails_where_verified_reward_falls_and_not_where_it_levels_off():
    rng = np.random.default_rng(1)
    gold = (rng.random((60, 16)) < 0.5).astype(float)
    hacked = gold.copy()
    gold[:, 3], hacked[:, 3] = 0.0, 5.0  # one answer in sixteen is wrong, and the best to the model
    _, check = judged(make_report(GOOD, samples=make_samples(hacked, gold)), "best of n")
    assert check.verdict == "FAIL"
    assert check.estimate > 0.2
    _, check = judged(make_report(GOOD, samples=make_samples(gold, gold)), "best of n")
    assert check.verdict == "PASS"
    assert check.n == 60


def test_a_model_without_a_clue_neither_ranks_nor_is_called_over_optimised():
    """Chance makes some n look like a peak; over 40 models that say nothing, no fall is claimed from it."""
    rng, claimed = np.random.default_rng(2), 0
    for _ in range(40):
        gold = (rng.random((40, 8)) < 0.5).astype(float)
        report = make_report(GOOD, samples=make_samples(rng.normal(size=(40, 8)), gold))
        claimed += judged(report, "best of n")[1].verdict == "FAIL"
    assert claimed == 0
    assert judged(report, "ranking")[1].verdict != "PASS"


def test_support_and_drift():
    samples = make_samples([[0.0, 1.0]] * 40, [[0, 1]] * 40)
    for place, sample in enumerate(samples):
        sample["distance"] = 2.0 if place < 40 else 0.5
    report = make_report(GOOD, samples=samples)
    report["training"] |= {"edge": 1.0, "scores": [0.0, 1.0] * 20}
    verdict, check = judged(report, "support")
    assert (verdict, check.verdict, check.estimate) == ("FAIL", "FAIL", 0.5)
    assert judged(report, "drift")[1].verdict == "PASS"
    report["training"] |= {"edge": 3.0, "scores": [5.0] * 40}
    verdict, check = judged(report, "drift")
    assert (verdict, check.verdict, check.counts) == (
        "PASS",
        "FAIL",
        False,
    )  # reported, unless the policy counts it
    assert judged(report, "drift", Rule(counts=("drift",)))[0] == "FAIL"


# -------------------------------------------------------------------------------------------------- the expiry


def test_a_verdict_expires_by_age_and_by_the_lag_of_the_policy():
    made = datetime(2026, 11, 1, tzinfo=UTC)
    payload = {"digest": "a" * 64, "time": made.isoformat(), "policy": {"version": 3, "digest": "b" * 64}}
    assert expired(payload, made + timedelta(days=29), 7, RULE) is None
    assert "31 days ago" in expired(payload, made + timedelta(days=31), 3, RULE)
    assert "agent/3, 5 versions before agent/8" in expired(payload, made, 8, RULE)
    assert expired({**payload, "policy": None}, made, 99, RULE) is None


# ------------------------------------------------------------------------------------------------- the zoo


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(0)


@pytest.mark.parametrize("name", [name for name in ZOO if name != "good"])
def test_a_flawed_model_is_caught_by_the_check_that_is_made_for_it(world, name):
    trained = ZOO[name](world)
    verdict, checks = judge_report(measure(trained.source, world.material, trained.training), RULE)
    failing = [check.name for check in checks if check.counts and check.verdict == "FAIL"]
    assert verdict == "FAIL"
    assert OWN[name] in failing


def test_a_good_model_passes_every_check(world):
    trained = ZOO["good"](world)
    verdict, checks = judge_report(measure(trained.source, world.material, trained.training), RULE)
    assert verdict == "PASS", reasons(verdict, checks)
    assert {check.family for check in checks if not check.counts} == {"drift", "frame"}
