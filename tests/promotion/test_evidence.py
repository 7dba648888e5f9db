"""Each kind of evidence by itself: what passes, what fails, what stays open, on worked numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from tasks.core.errors import UsageError
from tasks.evaluation.paired import Agent, pair_outcomes, read_outcomes, write_outcomes
from tasks.evaluation.serving import Serving, serving_evidence
from tasks.evaluation.statistics import clopper_pearson
from tasks.promotion.evidence import hacking, replay_value, training
from tasks.promotion.evidence.item import FileRef
from tasks.promotion.evidence.quality import guard_evidence, quality_evidence
from tasks.promotion.evidence.safety import safety_evidence
from tasks.promotion.evidence.serving import serving_evidence as judge_serving
from tasks.promotion.policy import Policy, load_policy

SOURCE = FileRef("x", "f" * 64)
AGENTS = (Agent(2, "b" * 64), Agent(1, "a" * 64))


@dataclass(frozen=True)
class Answer:
    task_id: str
    env: str
    reward: float
    response_text: str = " 42"
    family: str = ""
    components: dict = field(default_factory=dict)
    finish_reason: str = "done"
    tokens: int = 4


def side(rewards, env="sums", **same):
    return [Answer(f"{i:03d}", env, float(r), **same) for i, r in enumerate(rewards)]


def paired(candidate, champion):
    return pair_outcomes(candidate, champion, AGENTS, {})


def graded(wins, ties, losses, **same):
    """Outcomes with so many tasks won, tied and lost by the candidate."""
    up, down = [1] * wins + [1] * ties + [0] * losses, [0] * wins + [1] * ties + [1] * losses
    return paired(side(up, **same), side(down))


def policy(**sections) -> Policy:
    return Policy.model_validate(sections)


# ------------------------------------------------------------------------------------------------ quality


def test_no_worse_by_a_declared_margin_is_another_claim_than_better():
    """10 tasks of 300 lost and 10 won: no gain to see, and surely no loss of 0.10; a loss of 0.01 may well be."""
    outcomes = graded(10, 280, 10)

    def claim(name, margin):
        found = quality_evidence(outcomes, SOURCE, policy(superiority={"claim": name, "margin": margin}))
        return found.verdict, found.margin

    assert claim("superiority", 0.0) == ("INCONCLUSIVE", 0.0)
    assert claim("non_inferiority", 0.10) == ("PASS", -0.10)
    assert claim("non_inferiority", 0.01) == ("INCONCLUSIVE", -0.01)
    worse = quality_evidence(
        graded(0, 200, 100), SOURCE, policy(superiority={"claim": "non_inferiority", "margin": 0.1})
    )
    assert worse.verdict == "FAIL"
    assert "no worse" in worse.says


def test_the_verdict_and_the_interval_of_a_margin_agree():
    rule = policy(superiority={"claim": "non_inferiority", "margin": 0.05})
    for losses in range(0, 20, 3):
        found = quality_evidence(graded(5, 200, losses), SOURCE, rule)
        assert (found.verdict == "PASS") == (found.low > -0.05)


def test_no_worse_without_a_margin_is_refused(tmp_path):
    (tmp_path / "policy.yaml").write_text("superiority: {claim: non_inferiority}\n")
    with pytest.raises(UsageError, match="how much worse would still do"):
        load_policy(tmp_path / "policy.yaml")


def test_copies_of_one_task_count_as_one():
    """60 tasks, all won: separate ones prove it; six templates of ten copies each do not."""
    rewards = np.ones(60)
    separate = paired(side(rewards), side(rewards * 0))
    copies = [
        [Answer(f"{i:03d}", "sums", r, family=f"template {i % 6}") for i in range(60)] for r in (1.0, 0.0)
    ]
    alike = paired(copies[0], copies[1])
    rule = policy(superiority={"min_tasks": 5, "margin": 0.2})
    assert quality_evidence(separate, SOURCE, rule).verdict == "PASS"
    assert quality_evidence(alike, SOURCE, rule).verdict == "INCONCLUSIVE"
    assert quality_evidence(alike, SOURCE, policy()).says.startswith("Quality: 6 tasks are too few")


def test_families_survive_the_file_and_an_older_file_has_none(tmp_path):
    outcomes = paired(
        [Answer("1", "sums", 1.0, family="f", components={"ok": 1.0}, finish_reason="length", tokens=7)],
        [Answer("1", "sums", 0.0, family="f")],
    )
    path, digest = write_outcomes(tmp_path, outcomes)
    again = read_outcomes(path, digest)
    assert again == outcomes
    assert again.pairs[0].cluster == "sums/f"
    assert again.pairs[0].candidate_finish == "length"
    from tasks.core.digest import sha256_bytes

    old = path.read_bytes().replace(b'"family":"f",', b"")
    (tmp_path / "old.jsonl").write_bytes(old)
    assert read_outcomes(tmp_path / "old.jsonl", sha256_bytes(old)).pairs[0].family == "1"


def test_guards_hold_their_error_where_nearly_all_tasks_are_tied():
    """5 losses of 50 and no win: t would be sure that less than 0.19 is lost, and that is false too often; see bounded."""
    rule = policy(guards={"margin": 0.10})
    (tied,) = guard_evidence(graded(0, 50, 0), SOURCE, rule)
    assert tied.verdict == "PASS"
    (three,) = guard_evidence(graded(0, 48, 2), SOURCE, rule)
    assert three.verdict == "INCONCLUSIVE"  # the t interval, [-0.087, 0.007], would have passed it
    assert three.low == pytest.approx(-clopper_pearson(2, 50, alpha=0.05)[1], abs=1e-9)
    (lost,) = guard_evidence(graded(0, 35, 15), SOURCE, rule)
    assert lost.verdict == "FAIL"


# ------------------------------------------------------------------------------------------------- safety


def test_a_share_has_clopper_and_pearsons_bounds_and_the_rule_of_three_shows():
    rule = policy(safety={"empty": {"pattern": r"^\s*$", "max_rate": 0.02}})
    clean = paired(side(np.ones(100)), side(np.ones(100)))
    (found,) = safety_evidence(clean, SOURCE, rule)
    assert (found.name, found.verdict, found.unit) == ("safety/empty", "INCONCLUSIVE", "share")
    assert found.high == pytest.approx(1 - 0.05 ** (1 / 100), abs=1e-9)  # 3 / n, nearly
    assert "about 150 answers" in found.says
    longer = paired(side(np.ones(160)), side(np.ones(160)))
    assert safety_evidence(longer, SOURCE, rule)[0].verdict == "PASS"
    some = paired(side(np.ones(90)) + side(np.ones(10), env="other", response_text=" \n"), [
        *side(np.ones(90)), *side(np.ones(10), env="other")
    ])  # fmt: skip
    (bad,) = safety_evidence(some, SOURCE, rule)
    low, high = clopper_pearson(10, 100, alpha=0.05)
    assert (bad.low, bad.high) == pytest.approx((low, high), abs=1e-9)
    assert bad.verdict == "FAIL"


@pytest.mark.parametrize(
    ("event", "bad"),
    [
        ({"pattern": "(?i)password"}, {"response_text": "the PassWord is"}),
        ({"finish": "length"}, {"finish_reason": "length"}),
        ({"component": "leaked"}, {"components": {"leaked": 1.0}}),
        ({"lacks": "valid_call"}, {"components": {"valid_call": 0.0}}),
    ],
)
def test_every_kind_of_event_is_counted_in_the_candidate_alone(event, bad):
    rule = policy(safety={"event": {**event, "max_rate": 0.3}})
    good = {"components": {"leaked": 0.0, "valid_call": 1.0}}
    champion = side(np.ones(60), **bad)
    fine = safety_evidence(paired(side(np.ones(60), **good), champion), SOURCE, rule)
    caught = safety_evidence(
        paired(side(np.ones(60), **{**good, **bad}), side(np.ones(60), **good)), SOURCE, rule
    )
    assert (fine[0].verdict, fine[0].estimate) == ("PASS", 0.0)
    assert (caught[0].verdict, caught[0].estimate) == ("FAIL", 1.0)


def test_answers_of_one_family_are_not_independent_and_an_absent_component_shows_nothing():
    family = [Answer(f"{i}", "sums", 1.0, family=f"{i // 10}") for i in range(60)]
    rule = policy(safety={"empty": {"pattern": r"^$", "max_rate": 0.1}})
    (found,) = safety_evidence(paired(family, family), SOURCE, rule)
    assert found.verdict == "INCONCLUSIVE"
    assert found.high == pytest.approx(1 - 0.05 ** (1 / 6), abs=1e-9)
    assert "by 6 families" in found.says
    nothing = policy(safety={"x": {"component": "toxicity", "max_rate": 0.1}})
    (item,) = safety_evidence(paired(family, family), SOURCE, nothing)
    assert (item.verdict, item.counts) == ("INCONCLUSIVE", True)
    assert safety_evidence(paired(family, family), SOURCE, policy(safety={})) == []


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"max_rate": 0.1}, "exactly one event"),
        ({"pattern": "a", "finish": "error", "max_rate": 0.1}, "exactly one event"),
        ({"pattern": "(", "max_rate": 0.1}, "no regular expression"),
        ({"pattern": "a"}, "max_rate"),
    ],
)
def test_a_safety_rule_that_says_nothing_is_refused(tmp_path, rule, says):
    import yaml

    (tmp_path / "policy.yaml").write_text(yaml.safe_dump({"safety": {"x": rule}}))
    with pytest.raises(UsageError, match=says):
        load_policy(tmp_path / "policy.yaml")


# ------------------------------------------------------------------------------------------------ hacking


def hacks(outcomes, proxy=None):
    found = hacking.hacking_evidence(outcomes, SOURCE, proxy, proxy and SOURCE, policy())
    return {item.name.removeprefix("hacking/"): item for item in found}


def proxy_scores(outcomes, gain):
    rows = [
        {
            "env": p.env, "task_id": p.task_id, "sample": p.sample,
            "candidate": gain * (p.candidate_reward if gain < 0 else 1.0), "champion": 0.0,
        }
        for p in outcomes.pairs
    ]  # fmt: skip
    return {"schema": "forebay.proxy/1", "reward": "r", "answers": rows}


def test_a_proxy_that_rises_alone_is_being_exploited():
    flat = graded(10, 180, 10)
    assert hacks(flat)["proxy"].counts is False
    assert hacks(flat, proxy_scores(flat, 2.0))["proxy"].verdict == "FAIL"
    assert "being exploited" in hacks(flat, proxy_scores(flat, 2.0))["proxy"].says
    assert hacks(flat, proxy_scores(flat, 0.0))["proxy"].verdict == "PASS"
    better = graded(80, 120, 0)
    assert hacks(better, proxy_scores(better, 2.0))["proxy"].verdict == "PASS"
    unsure = graded(10, 20, 5)  # the verifiers may see as much, they have not shown it
    assert hacks(unsure, proxy_scores(unsure, 0.3))["proxy"].verdict == "INCONCLUSIVE"


def test_longer_answers_need_a_gain_to_excuse_them():
    long = paired(side(np.ones(100), tokens=8), side(np.ones(100)))
    assert hacks(long)["length"].verdict == "FAIL"
    assert hacks(long)["length"].estimate == pytest.approx(2.0)
    short = paired(side(np.ones(100), tokens=1), side(np.ones(100)))
    assert hacks(short)["length"].verdict == "FAIL"
    same = graded(5, 90, 5)
    assert hacks(same)["length"].verdict == "PASS"
    earned = graded(60, 40, 0, tokens=8)
    assert hacks(earned)["length"].verdict == "PASS"
    assert "they are better" in hacks(earned)["length"].says


def test_answers_of_another_shape_are_told_from_other_answers_of_the_same():
    assert hacking.shape("calc(12 + 7)\nresult: 19") == hacking.shape("calc(3 + 401)\nresult: 5")
    assert hacking.shape("12") != hacking.shape("twelve")
    assert hacking.shape("Ünlü 9") == "a 9"
    reshaped = paired(side(np.ones(80), response_text="the answer is 42!"), side(np.ones(80)))
    assert hacks(reshaped)["format"].verdict == "FAIL"
    assert hacks(graded(5, 90, 5))["format"].verdict == "PASS"


# ------------------------------------------------------------------------------------------------ serving


def served(**changes) -> Serving:
    rows = ((0.1, 0.3), (0.2, 0.1))
    return Serving(**{
        "load_seconds": 2.0, "seconds": rows, "cpu_seconds": rows, "tokens": (4, 4), "memory_mib": 700.0,
        "answers": "a", "repeated": True, **changes,
    })  # fmt: skip


def judged(candidate, champion=None, **rule):
    report = serving_evidence(candidate, champion or served(), ["p"], device="cpu")
    return judge_serving(report, SOURCE, policy(serving=rule))


def test_serving_is_held_against_budgets_and_against_the_champion():
    assert judged(served()).verdict == "PASS"
    assert judged(served()).estimate == pytest.approx(0.285)  # the 95th percentile of .1 .3 .2 .1
    assert judged(served(), max_p95_seconds=0.2).verdict == "FAIL"
    assert judged(served(), max_load_seconds=1.0).verdict == "FAIL"
    assert judged(served(), max_memory_mib=500).verdict == "FAIL"
    slow = served(cpu_seconds=((0.4, 0.9), (0.8, 0.4)))
    assert judged(slow).verdict == "FAIL"
    assert "4.00 times the champion's" in judged(slow).says
    assert judged(slow, vs_champion=None).verdict == "PASS"


def test_an_agent_that_does_not_serve_fails_and_a_busy_machine_leaves_it_open():
    assert judged(Serving("Model x cannot be read", "agent")).verdict == "FAIL"
    assert judged(Serving("it had not answered after 300 s", "machine")).verdict == "INCONCLUSIVE"
    assert judged(served(), Serving("gone", "machine")).verdict == "INCONCLUSIVE"
    assert judged(served(), Serving("gone", "agent"), vs_champion=None).verdict == "PASS"
    assert judge_serving(None, None, policy()).verdict == "INCONCLUSIVE"


# -------------------------------------------------------------------------------------- replay and training


def log_report(rewards, candidate, champion):
    n = len(rewards)
    return {
        "schema": "forebay.replay_value/1",
        "log": {
            "rewards": [[float(r)] for r in rewards],
            "turns": [1] * n,
            "prompts": [f"p{i}" for i in range(n)],
            "environments": ["sums"] * n,
        },
        "candidate_ratios": [[float(x)] for x in candidate],
        "champion_ratios": [[float(x)] for x in champion],
        "problem": "",
    }


def test_a_candidate_that_favours_what_was_rewarded_earns_more_on_the_log():
    """Two answers of equal chance under the champion, which wrote the log; the candidate gives the right one 0.8."""
    right = np.arange(400) % 2
    report = log_report(right, np.where(right, np.log(0.8 / 0.5), np.log(0.2 / 0.5)), np.zeros(400))
    found = replay_value.replay_value_evidence(report, SOURCE, policy())
    assert (found.verdict, found.counts) == ("PASS", False)
    assert found.estimate == pytest.approx(0.3, abs=0.02)
    assert found.low < 0.3 < found.high
    worse = log_report(right, np.where(right, np.log(0.2 / 0.5), np.log(0.8 / 0.5)), np.zeros(400))
    assert (
        replay_value.replay_value_evidence(worse, SOURCE, policy(replay_value={"required": True})).verdict
        == "FAIL"
    )


def test_a_log_that_says_little_about_the_candidate_is_inconclusive_with_the_reason():
    right = np.arange(200) % 2
    ratios = np.full(200, -8.0)
    ratios[0] = 4.0
    found = replay_value.replay_value_evidence(log_report(right, ratios, np.zeros(200)), SOURCE, policy())
    assert found.verdict == "INCONCLUSIVE"
    assert "below the floor" in found.says
    none = {
        **log_report(right, ratios, ratios),
        "log": None,
        "problem": "the agents were trained on every prompt",
    }
    assert "every prompt" in replay_value.replay_value_evidence(none, SOURCE, policy()).says


RUN = {"kl_k3": 0.02, "seconds": 90.0, "tokens": 50_000, "cpu_seconds": 170.0, "memory_mib": 1500.0}


@pytest.mark.parametrize(
    ("limits", "verdict", "counts"),
    [
        ({}, "PASS", False),
        ({"max_seconds": 100, "max_tokens": 60_000}, "PASS", True),
        ({"max_cpu_seconds": 100}, "FAIL", True),
        ({"max_memory_mib": 1000}, "FAIL", True),
        ({"max_seconds": 100, "max_tokens": 10}, "FAIL", True),
    ],
)
def test_resources_are_reported_and_held_against_limits(limits, verdict, counts):
    found = training.resources_evidence(RUN, SOURCE, policy(resources=limits))
    assert (found.verdict, found.counts) == (verdict, counts)


def test_what_a_run_did_not_record_is_not_within_a_limit():
    unknown = {**RUN, "memory_mib": None}
    found = training.resources_evidence(unknown, SOURCE, policy(resources={"max_memory_mib": 9000}))
    assert found.verdict == "INCONCLUSIVE"
    assert training.resources_evidence(None, None, policy()).counts is False


def test_the_divergence_has_a_budget():
    def judge(limit):
        found = training.divergence_evidence(RUN, SOURCE, policy(divergence={"max_nats_per_token": limit}))
        return found.verdict, found.counts, found.unit

    assert judge(None) == ("PASS", False, "nats")
    assert judge(0.05) == ("PASS", True, "nats")
    assert judge(0.01) == ("FAIL", True, "nats")
    strict = policy(divergence={"max_nats_per_token": 1})
    assert training.divergence_evidence({**RUN, "kl_k3": None}, SOURCE, strict).verdict == "INCONCLUSIVE"
