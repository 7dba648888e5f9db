"""The budgets of the gate: what decisions take, counted in a real ledger, and what happens when nothing is left."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tasks.core.errors import Refused
from tasks.evaluation.paired import Agent, pair_outcomes, write_outcomes
from tasks.promotion.budget import Spent, asked_before, spent
from tasks.promotion.gate import FileRef, decide, read_decision, recompute_decision, write_decision
from tasks.promotion.policy import Policy
from tests.promotion.support import open_ledger
from tests.promotion.test_gate import Answer, inputs_of, said

CHAMPION = "a" * 64  # of `inputs_of`


def record(ledger, folder, inputs, policy):
    """Decide and record as the flow does; return the decision."""
    entries = ledger.entries("decision.made")
    known = asked_before(entries, inputs.question(policy))
    first = decide(folder, inputs, policy)
    before = known or spent(entries, first.champion.digest, first.tasks)
    decision = decide(folder, replace(inputs, spent=before), policy)
    ledger.append("decision.made", f"agent/{decision.candidate.version}", decision.payload("x"))
    return decision


def candidates(folder, n):
    """Different evidence against one champion on the same tasks."""
    for i in range(n):
        yield inputs_of(folder, {"calculator": (119 - i, 120)}, {"calculator": (60, 120)})


def test_each_decision_takes_its_share_until_nothing_is_left(tmp_path):
    ledger, policy = open_ledger(tmp_path), Policy.model_validate({"errors": {"cycles": 3}})
    made = [record(ledger, tmp_path, inputs, policy) for inputs in candidates(tmp_path, 5)]
    assert [d.verdict for d in made] == ["PASS"] * 3 + ["INCONCLUSIVE"] * 2
    assert [d.inputs.spent.decisions for d in made] == [0, 1, 2, 3, 4]
    assert sum(d.error for d in made) == pytest.approx(0.05)
    assert made[3].error == 0.0
    assert "raise errors.alpha" in made[3].reasons[0]
    assert said(made[1], "errors").verdict == "PASS"


def test_a_share_is_really_what_the_interval_uses(tmp_path):
    inputs = inputs_of(tmp_path)
    wide = decide(tmp_path, inputs, Policy.model_validate({"errors": {"cycles": 1000}}))
    narrow = decide(tmp_path, inputs, Policy.model_validate({"errors": {"cycles": 1}}))
    assert said(wide, "quality").low < said(narrow, "quality").low


def test_the_same_question_takes_nothing_and_gets_the_same_bytes(tmp_path):
    ledger, policy = open_ledger(tmp_path), Policy()
    first, other = candidates(tmp_path, 2)
    once = record(ledger, tmp_path, first, policy)
    record(ledger, tmp_path, other, policy)
    again = record(ledger, tmp_path, first, policy)
    assert again.record == once.record
    taken = spent(ledger.entries("decision.made"), CHAMPION, once.tasks)
    assert (taken.decisions, taken.uses) == (2, 2)
    assert taken.error == pytest.approx(2 * policy.errors.share)


def test_loosening_the_policy_after_a_look_is_another_decision(tmp_path):
    ledger = open_ledger(tmp_path)
    inputs = inputs_of(tmp_path)
    record(ledger, tmp_path, inputs, Policy.model_validate({"superiority": {"margin": 0.19}}))
    after = record(ledger, tmp_path, inputs, Policy())
    assert after.inputs.spent.decisions == 1
    assert after.inputs.spent.error == pytest.approx(0.0025)


def test_another_champion_has_an_account_of_its_own_and_the_tasks_do_not(tmp_path):
    ledger = open_ledger(tmp_path)
    decision = record(ledger, tmp_path, inputs_of(tmp_path), Policy())
    entries = ledger.entries("decision.made")
    assert spent(entries, "c" * 64, decision.tasks) == Spent(0, 0.0, 1)
    assert spent(entries, CHAMPION, {"calculator": "other"}) == Spent(1, 0.0025, 0)


def test_one_environment_that_is_used_up_is_enough(tmp_path):
    """Adding an environment, or changing the number of tasks of one, does not make the others fresh."""
    ledger = open_ledger(tmp_path)
    decision = record(ledger, tmp_path, inputs_of(tmp_path), Policy())
    wider = {**decision.tasks, "calculator": "drawn anew"}
    assert spent(ledger.entries("decision.made"), CHAMPION, wider).uses == 1


def test_held_out_tasks_wear_out(tmp_path):
    ledger, policy = open_ledger(tmp_path), Policy.model_validate({"evaluation_set": {"uses": 2}})
    made = [record(ledger, tmp_path, inputs, policy) for inputs in candidates(tmp_path, 3)]
    assert [d.verdict for d in made] == ["PASS", "PASS", "INCONCLUSIVE"]
    assert "raise evaluation.rotation by 1" in made[2].reasons[0]
    assert made[2].error == 0.0  # nothing could have been promoted, so nothing was risked


def test_what_was_spent_is_part_of_the_record(tmp_path):
    inputs = replace(inputs_of(tmp_path), spent=Spent(20, 0.05, 3))
    decision = decide(tmp_path, inputs, Policy())
    assert decision.verdict == "INCONCLUSIVE"
    path = write_decision(tmp_path, decision)
    assert read_decision(path) == decision
    assert recompute_decision(path).record == path.read_bytes()
    assert decide(tmp_path, replace(inputs, spent=Spent()), Policy()).digest != decision.digest


def test_a_record_of_another_version_is_refused(tmp_path):
    decision = decide(tmp_path, inputs_of(tmp_path), Policy())
    old = decision.record.replace(b"forebay.decision/4", b"forebay.decision/3")
    from tasks.core.atomic import write_atomic
    from tasks.core.digest import sha256_bytes

    path = tmp_path / "decisions" / f"{sha256_bytes(old)}.json"
    write_atomic(path, old)
    with pytest.raises(Refused, match="decision/3"):
        read_decision(path)


def test_betting_is_a_stricter_rule_of_the_policy(tmp_path):
    inputs = inputs_of(tmp_path)
    plain = said(decide(tmp_path, inputs, Policy()), "quality")
    betting = said(
        decide(tmp_path, inputs, Policy.model_validate({"superiority": {"test": "betting"}})), "quality"
    )
    assert betting.estimate == plain.estimate
    assert 0 < betting.low < plain.low
    assert betting.mde > plain.mde


def test_graded_rewards_do_not_promote_by_t_alone(tmp_path):
    """Gains of 0.02 on every one of 100 tasks: t is certain, but the sample may lack a rare great loss."""
    sides = [
        [Answer(f"{i:03d}", "sums", 0.5 + gain * (0.02 + 0.001 * (i % 3))) for i in range(100)]
        for gain in (1, 0)
    ]
    path, digest = write_outcomes(
        tmp_path, pair_outcomes(*sides, (Agent(2, "b" * 64), Agent(1, "a" * 64)), {})
    )
    outcomes = FileRef(path.relative_to(tmp_path).as_posix(), digest)
    quality = said(decide(tmp_path, inputs_of(tmp_path, outcomes=outcomes), Policy()), "quality")
    assert quality.low > 0.019
    assert quality.verdict == "INCONCLUSIVE"
    assert "too few tasks differ" in quality.says


def test_rare_great_losses_that_the_sample_lacks_do_not_promote_by_betting():
    """50 gains of 0.02 and no loss: t is certain, betting knows that a loss of 1 may be around the corner."""
    from tasks.evaluation.sequential import betting_mean
    from tasks.evaluation.statistics import clustered_mean

    gains = 0.02 + 0.001 * np.sin(np.arange(50))
    assert clustered_mean(gains, alpha=0.0025, support=(-1, 1)).low > 0.019
    assert betting_mean(gains, alpha=0.0025, support=(-1, 1)).low < 0
