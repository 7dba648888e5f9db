"""The gate: what passes, what fails, what stays open, and that a decision follows from its evidence."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest

from tasks.core.atomic import write_atomic
from tasks.core.digest import canonical_json, sha256_bytes, sha256_file
from tasks.core.errors import Corrupt, NotFound
from tasks.evaluation.paired import Agent, Baseline, pair_outcomes, write_outcomes
from tasks.promotion.gate import (
    Evidence,
    FileRef,
    Finding,
    Inputs,
    conclude,
    decide,
    read_decision,
    recompute_decision,
    write_decision,
)
from tasks.promotion.policy import Policy
from tests.promotion.support import serving_file
from tests.reward.report import make_report, sure_margins

SOUND = Finding("PASS", "d" * 64, "e" * 64)

BASELINE = Baseline("0", 0.1, 0.2)


@dataclass(frozen=True)
class Answer:
    task_id: str
    env: str
    reward: float
    response_text: str = "calc(1 + 1)"


def answers(env, right, n):
    return [Answer(f"{i:03d}", env, float(i < right)) for i in range(n)]


def outcomes_file(folder, candidate, champion, baseline=BASELINE):
    """Sides are {env: (right, of)}; the right ones are nested, so differences have one sign."""
    sides = [
        [a for env, (k, n) in side.items() for a in answers(env, k, n)] for side in (candidate, champion)
    ]
    baselines = dict.fromkeys(candidate, baseline)
    path, digest = write_outcomes(
        folder, pair_outcomes(*sides, (Agent(2, "b" * 64), Agent(1, "a" * 64)), baselines)
    )
    return FileRef(path.relative_to(folder).as_posix(), digest)


def reward_file(folder, accuracy=0.9, n=300, scale=None):
    """A report on pairs with margins right with probability `accuracy`; see `sure_margins`."""
    data = canonical_json(make_report(sure_margins(accuracy, n, scale)))
    write_atomic(folder / "reward" / f"{sha256_bytes(data)}.json", data)
    return FileRef(f"reward/{sha256_bytes(data)}.json", sha256_bytes(data))


def inputs_of(folder, candidate=None, champion=None, **changes):
    outcomes = outcomes_file(
        folder,
        candidate or {"calculator": (110, 120), "sums": (20, 40)},
        champion or {"calculator": (80, 120), "sums": (18, 40)},
    )
    return Inputs(
        **{
            "outcomes": outcomes,
            "reward": reward_file(folder),
            "data": SOUND,
            "integrity": SOUND,
            "serving": serving_file(folder),
            **changes,
        }
    )


def said(decision, name):
    (item,) = [e for e in decision.evidence if e.name == name]
    return item


def test_a_better_agent_passes(tmp_path):
    decision = decide(tmp_path, inputs_of(tmp_path), Policy())
    assert decision.verdict == "PASS"
    quality = said(decision, "quality")
    assert quality.estimate == pytest.approx(0.2)
    assert quality.low > 0
    assert quality.n == 160
    assert [e.name for e in decision.evidence] == [
        "integrity", "data", "reward model", "errors", "evaluation set", "quality", "guard/calculator", "guard/sums",
        "safety/empty", "hacking/proxy", "hacking/length", "hacking/format", "serving", "replay value", "divergence",
        "resources",
    ]  # fmt: skip


def test_no_baseline_is_weighed_so_one_that_is_missing_changes_no_verdict(tmp_path):
    sides = {"calculator": (110, 120)}, {"calculator": (80, 120)}

    def found(baseline):
        file = outcomes_file(tmp_path, *sides, baseline)
        decision = decide(tmp_path, inputs_of(tmp_path, outcomes=file), Policy())
        return decision.verdict, [(e.name, e.verdict, e.estimate, e.low, e.says) for e in decision.evidence]

    measured = found(BASELINE)
    assert measured[0] == "PASS"
    assert found(Baseline("0", 0.1)) == measured
    assert found(Baseline(None, None, None, "it hung.")) == measured


def test_an_equal_agent_stays_inconclusive_and_hears_what_would_have_been_found(tmp_path):
    same = {"calculator": (80, 120), "sums": (18, 40)}
    decision = decide(tmp_path, inputs_of(tmp_path, same, same), Policy())
    assert decision.verdict == "INCONCLUSIVE"
    assert "a true gain of" in " ".join(decision.reasons)


def test_a_worse_agent_fails(tmp_path):
    decision = decide(
        tmp_path, inputs_of(tmp_path, {"calculator": (40, 120)}, {"calculator": (80, 120)}), Policy()
    )
    assert decision.verdict == "FAIL"
    assert decision.reasons[0].startswith("Quality: -0.333")


def test_a_gain_paid_for_by_one_environment_fails(tmp_path):
    inputs = inputs_of(
        tmp_path, {"calculator": (118, 120), "sums": (4, 30)}, {"calculator": (60, 120), "sums": (20, 30)}
    )
    decision = decide(tmp_path, inputs, Policy())
    assert said(decision, "quality").verdict == "PASS"
    assert said(decision, "guard/sums").verdict == "FAIL"
    assert decision.verdict == "FAIL"


def test_a_guard_that_cannot_be_shown_leaves_it_open(tmp_path):
    inputs = inputs_of(
        tmp_path, {"calculator": (118, 120), "sums": (4, 8)}, {"calculator": (60, 120), "sums": (5, 8)}
    )
    decision = decide(tmp_path, inputs, Policy())
    assert decision.verdict == "INCONCLUSIVE"
    assert decision.reasons[0].startswith("Guard sums: the candidate may be worse")


def test_too_few_tasks_are_too_few_however_good(tmp_path):
    decision = decide(tmp_path, inputs_of(tmp_path, {"sums": (20, 20)}, {"sums": (0, 20)}), Policy())
    assert said(decision, "quality").verdict == "INCONCLUSIVE"
    assert "20 tasks are too few" in said(decision, "quality").says


def test_the_t_interval_alone_does_not_promote_on_a_handful_of_differences(tmp_path):
    """8 wins and no loss of 160: the t bound is above zero at 0.25 %, the exact p-value is 1/256."""
    decision = decide(tmp_path, inputs_of(tmp_path, {"sums": (88, 160)}, {"sums": (80, 160)}), Policy())
    quality = said(decision, "quality")
    assert quality.low > 0
    assert quality.verdict == "INCONCLUSIVE"
    assert "exact p = 0.0039" in quality.says


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"data": replace(SOUND, verdict="FAIL", reasons=("3 rows are not finite",))}, "FAIL"),
        ({"integrity": replace(SOUND, verdict="FAIL")}, "FAIL"),
        ({"data": None}, "INCONCLUSIVE"),
        ({"integrity": None}, "INCONCLUSIVE"),
        ({"reward": None}, "INCONCLUSIVE"),
        ({"serving": None}, "INCONCLUSIVE"),
    ],
)
def test_what_the_policy_requires_must_be_there_and_sound(tmp_path, changes, verdict):
    assert decide(tmp_path, inputs_of(tmp_path, **changes), Policy()).verdict == verdict


@pytest.mark.parametrize(
    ("report", "verdict"),
    [
        ({"accuracy": 0.9}, "PASS"),
        ({"accuracy": 0.52}, "FAIL"),
        ({"accuracy": 0.62, "n": 100}, "INCONCLUSIVE"),
        ({"accuracy": 0.7, "scale": 6.0}, "FAIL"),  # sure of itself and often wrong
    ],
)
def test_the_reward_model_has_a_veto(tmp_path, report, verdict):
    decision = decide(tmp_path, inputs_of(tmp_path, reward=reward_file(tmp_path, **report)), Policy())
    assert said(decision, "reward model").verdict == decision.verdict == verdict
    relaxed = Policy.model_validate({"reward_model": {"required": False}})
    assert decide(tmp_path, decision.inputs, relaxed).verdict == "PASS"


def test_no_evidence_is_no_pass():
    assert conclude([])[0] == "INCONCLUSIVE"
    assert conclude([Evidence("data", "FAIL", "no", None, counts=False)])[0] == "INCONCLUSIVE"


def test_a_decision_is_recomputed_from_its_evidence_to_the_same_bytes(tmp_path):
    inputs = inputs_of(tmp_path)
    decision = decide(tmp_path, inputs, Policy())
    path = write_decision(tmp_path, decision)
    assert path.stem == decision.digest == sha256_file(path)
    assert read_decision(path) == decision
    assert recompute_decision(path) == decision
    assert decide(tmp_path, inputs, Policy()).record == decision.record
    payload = decision.payload("evidence/decisions/x.json")
    assert payload["decision"] == decision.digest
    assert json.loads(canonical_json(payload)) == payload


def test_evidence_moved_to_another_folder_still_recomputes(tmp_path):
    path = write_decision(tmp_path / "a", decide(tmp_path / "a", inputs_of(tmp_path / "a"), Policy()))
    (tmp_path / "a").rename(tmp_path / "b")
    assert recompute_decision(tmp_path / "b" / "decisions" / path.name).verdict == "PASS"


def test_tampering_is_found_wherever_it_is(tmp_path):
    inputs = inputs_of(tmp_path, {"calculator": (81, 120)}, {"calculator": (80, 120)})
    honest = decide(tmp_path, inputs, Policy())
    assert honest.verdict == "INCONCLUSIVE"
    forged = write_decision(tmp_path, replace(honest, verdict="PASS", reasons=("All good.",)))
    with pytest.raises(Corrupt, match="recorded PASS, recomputed INCONCLUSIVE"):
        recompute_decision(forged)
    path = write_decision(tmp_path, honest)
    path.write_bytes(path.read_bytes().replace(b"INCONCLUSIVE", b"PASS"))
    with pytest.raises(Corrupt, match="was changed"):
        recompute_decision(path)
    path = write_decision(tmp_path, honest)
    outcomes = tmp_path / inputs.outcomes.path
    outcomes.write_bytes(outcomes.read_bytes().replace(b'"candidate_reward":0.0', b'"candidate_reward":1.0'))
    with pytest.raises(Corrupt, match="outcomes"):
        recompute_decision(path)
    outcomes.unlink()
    with pytest.raises(NotFound):
        recompute_decision(path)


def test_another_policy_is_another_decision(tmp_path):
    inputs = inputs_of(tmp_path)
    strict = Policy.model_validate({"superiority": {"margin": 0.19}})
    assert decide(tmp_path, inputs, strict).digest != decide(tmp_path, inputs, Policy()).digest
    assert decide(tmp_path, inputs, strict).verdict == "INCONCLUSIVE"
