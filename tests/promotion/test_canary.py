"""The canary's statistics: worked numbers, error under continuous looking, power, and evidence that can be recomputed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from tasks.core.digest import canonical_json, sha256_bytes
from tasks.core.errors import Corrupt
from tasks.evaluation.sequential import cluster_stream, wealth
from tasks.promotion import canary
from tasks.promotion.canary import (
    Group,
    Recomputer,
    Rule,
    Traffic,
    judge,
    log_wealth,
    make_record,
    recompute,
    upper_bound,
    write_record,
)

ONE = np.array([1.0])


def traffic(new, old) -> Traffic:
    return Traffic(*(tuple(Group(f"{i:04d}", float(x), 8) for i, x in enumerate(xs)) for xs in (new, old)))


def rule(**changes) -> Rule:
    values = {"alpha": 0.05, "margin": 0.0, "min_groups": 10, "weights": {"a": 1.0}}
    return Rule(**{**values, **changes})


def test_the_wealth_is_that_of_the_evaluation_whatever_the_order():
    values = np.random.default_rng(0).integers(0, 9, 40) / 8
    found = log_wealth(values)
    for cell in (50, 512, 1000):
        expected = wealth(cluster_stream(values, support=(0.0, 1.0)), cell / 1024)[-1]
        assert found[cell] == pytest.approx(np.log(expected), abs=1e-9)
    assert np.array_equal(log_wealth(values[::-1]), found)
    assert np.isinf(found[0])
    assert log_wealth(np.zeros(5))[0] == 0


def test_one_stream_against_a_known_constant_gives_the_bound_of_that_stream():
    """With no old traffic the old mean is 0 at best, so the bound is the upper bound of the new mean alone."""
    values = np.array([0.0, 0.25, 0.5, 0.25, 0.0, 0.25] * 20)
    bound = upper_bound([values], [np.array([])], ONE, 0.05)
    grid = np.linspace(0, 1, 100001)
    stream = cluster_stream(1 - values, support=(0.0, 1.0))
    inside = [m for m in grid[::10] if wealth(stream, 1 - m)[-1] < 20]
    assert bound == pytest.approx(max(inside), abs=5e-4)


def test_more_traffic_tightens_and_environments_add_up_as_squares():
    chance = np.random.default_rng(1)

    def width(n, parts):
        draw = [chance.binomial(8, 0.5, n // parts) / 8 for _ in range(2 * parts)]
        return upper_bound(draw[::2], draw[1::2], np.full(parts, 1 / parts), 0.05)

    assert width(3200, 1) < width(400, 1) < width(50, 1)
    assert width(1200, 4) < 2 * width(1200, 1)  # by bounds of their own they would add up to more than twice


def test_verdicts_and_what_they_say():
    good, bad = np.tile([1.0, 0.75], 60), np.tile([0.25, 0.0], 60)
    assert judge({"a": traffic(bad, good)}, rule()).verdict == "HARM"
    proven = judge({"a": traffic(good, bad)}, rule())
    assert (proven.verdict, proven.estimate, proven.new, proven.old) == ("PROVEN", 0.75, 120, 120)
    assert 0 < proven.low < 0.75 < proven.high <= 1
    assert judge({"a": traffic(good, good)}, rule()).verdict == "WATCHING"
    assert judge({"a": traffic(good, good)}, rule(margin=0.2)).verdict == "PROVEN"  # not worse by the margin
    few = judge({"a": traffic(bad[:9], good)}, rule())
    assert (few.verdict, few.says) == ("INCONCLUSIVE", "9 and 120 groups; 10 of each are needed")
    none = judge({"a": traffic(bad, [])}, rule())
    assert none.verdict == "INCONCLUSIVE"
    assert "forebay collect --version previous" in none.says
    with pytest.raises(ValueError, match="within"):
        judge({"a": traffic([1.5] * 20, good)}, rule())


def test_an_environment_without_traffic_leaves_room_and_one_without_weight_does_not_count():
    good, bad = np.tile([1.0, 0.75], 60), np.tile([0.25, 0.0], 60)
    half = judge({"a": traffic(bad, good)}, rule(weights={"a": 0.5, "b": 0.5}))
    assert half.verdict == "WATCHING"  # in b the new one may be better by 1
    assert half.high > 0
    assert half.estimate == -0.75
    assert judge({"a": traffic(bad, good), "c": traffic(good, bad)}, rule()).verdict == "HARM"


LOOKS = range(10, 201, 10)


def first_harm(new, old, alpha) -> int | None:
    for n in LOOKS:
        if upper_bound([new[:n]], [old[:n]], ONE, alpha) < 0:
            return n
    return None


def test_equal_agents_are_rarely_rolled_back_however_often_one_looks():
    """The same looks with Student's interval roll back far more often than alpha: the simulation has teeth."""
    chance, alpha, runs = np.random.default_rng(7), 0.10, 150
    false = naive = 0
    for _ in range(runs):
        new, old = (chance.choice([0.0, 0.5, 1.0], 200, p=[0.3, 0.2, 0.5]) for _ in range(2))
        false += first_harm(new, old, alpha) is not None
        naive += any(stats.ttest_ind(new[:n], old[:n], alternative="less").pvalue < alpha for n in LOOKS)
    assert stats.binomtest(false, runs, alpha, alternative="greater").pvalue > 0.05, false
    assert stats.binomtest(naive, runs, alpha, alternative="greater").pvalue < 1e-6, naive


def test_a_drop_by_ten_points_is_found():
    """Groups of 8 answers, 60 % right against 50 %: found within 200 groups of each nearly always."""
    chance = np.random.default_rng(3)
    found = [
        first_harm(chance.binomial(8, 0.5, 200) / 8, chance.binomial(8, 0.6, 200) / 8, 0.05)
        for _ in range(40)
    ]
    assert sum(n is not None for n in found) >= 36, found
    assert np.median([n for n in found if n is not None]) < 130


def test_evidence_is_recomputed_to_the_same_bytes_and_a_changed_one_is_named(tmp_path):
    data = {"a": traffic(np.tile([0.5, 0.125], 20), np.tile([0.75, 0.5], 20))}
    record, judged = make_record(data, rule(), {"new": {"version": 2}, "old": {"version": 1}})
    path, sha256 = write_record(tmp_path, record)
    assert recompute(path, sha256) == judged
    record["result"]["verdict"] = "PROVEN"
    forged = canonical_json(record)
    path.write_bytes(forged)
    with pytest.raises(Corrupt, match="was changed"):
        recompute(path, sha256)
    with pytest.raises(Corrupt, match="another result"):
        recompute(path, sha256_bytes(forged))
    assert json.loads(forged)["schema"] == "forebay.canary/1"


def looks(tmp_path, n: int = 60, every: int = 6) -> list:
    """Records of a growing canary in two environments, of rewards that are all different; groups get more answers."""
    chance, made = np.random.default_rng(5), []
    sides = {env: [chance.uniform(0, 1, n).tolist() for _ in range(2)] for env in ("a", "b")}
    fixed = rule(weights={"a": 0.7, "b": 0.3}, min_groups=5)
    for k in range(0, n + 1, every):
        seen = {env: traffic(*(rewards[:k] for rewards in both)) for env, both in sides.items()}
        record, _ = make_record(seen, fixed, {"promotion": 7, "left_out": {}})
        made.append(write_record(tmp_path, record))
        for both in sides.values():  # the newest group is still being answered
            both[0][max(k - 1, 0)] = float(chance.uniform())
    return made


@pytest.mark.parametrize("order", [1, -1])
def test_looks_judged_in_one_pass_say_what_each_says_by_itself(tmp_path, monkeypatch, order):
    made = looks(tmp_path)
    alone = []
    monkeypatch.setattr(
        canary, "recompute", lambda path, sha256: alone.append(sha256) or recompute(path, sha256)
    )
    recomputer = Recomputer()
    for path, sha256 in made[::order]:
        recomputer.check(path, sha256)
    assert len(alone) <= 2  # the last bits of a sum may make one disagree, which is then judged by itself
    assert len({sha256 for _, sha256 in made}) == 11


@pytest.mark.parametrize("field", ["high", "estimate", "verdict", "new"])
def test_a_look_that_was_rewritten_among_others_is_named(tmp_path, field):
    made = looks(tmp_path)
    record = json.loads(made[5][0].read_bytes())
    told = record["result"][field]
    record["result"][field] = "PROVEN" if field == "verdict" else told + (1 if field == "new" else 1e-9)
    made[5] = write_record(tmp_path, record)
    recomputer = Recomputer()
    for i, (path, sha256) in enumerate(made):
        if i == 5:
            with pytest.raises(Corrupt, match="another result"):
                recomputer.check(path, sha256)
        else:
            recomputer.check(path, sha256)
    record["groups"]["a"]["new"][0][1] = 1.5
    path, sha256 = write_record(tmp_path, record)
    with pytest.raises(ValueError, match="within"):
        recomputer.check(path, sha256)
    path.write_bytes(b"{}")
    with pytest.raises(Corrupt, match="was changed"):
        recomputer.check(path, sha256)
