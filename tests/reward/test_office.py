"""The office of reward models: what passes, what fails, what nobody can tell, and the same bytes again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from tasks.core.atomic import write_atomic
from tasks.core.digest import canonical_json, sha256_bytes
from tasks.core.errors import Corrupt
from tasks.evaluation.paired import Agent
from tasks.promotion.evidence.item import FileRef
from tasks.promotion.gate import write_decision
from tasks.promotion.policy import Policy
from tasks.reward.office import (
    NOBODY,
    RewardInputs,
    compare,
    decide_office,
    keep_comparison,
    recompute_office,
)
from tasks.reward.source import Answer, Preference
from tests.reward.report import make_report, sure_margins

OURS, THEIRS = Agent(2, "5" * 64), Agent(1, "6" * 64)
POLICY = Policy()


@dataclass(frozen=True)
class Table:
    """A source that knows the score of every answer."""

    digest: str
    scores: dict[str, float]
    kind: str = "head"

    def score(self, answers: Sequence[Answer]) -> list[float]:
        return [self.scores[answer.response] for answer in answers]


def sources(right: float, other: float, groups: int = 300, seed: int = 0):
    """Two tables, right with these probabilities, and the comparisons."""
    draw = random.Random(seed)
    pairs = [Preference(f"p{i}", f"{i}+", f"{i}-", f"g{i}", "s", "test", "MIT") for i in range(groups)]
    tables = []
    for agent, share in ((OURS, right), (THEIRS, other)):
        scores = {}
        for i in range(groups):
            up = draw.random() < share
            scores |= {f"{i}+": float(up), f"{i}-": float(not up)}
        tables.append(Table(agent.digest, scores))
    return *tables, pairs


def validation(folder, verdict):
    """A report that is judged PASS or FAIL by its margins."""
    margins = sure_margins(0.9 if verdict == "PASS" else 0.5, 400, 2.2 if verdict == "PASS" else 3.0)
    data = canonical_json(make_report(margins))
    ref = FileRef("reward/report.json", sha256_bytes(data))
    write_atomic(folder / ref.path, data)
    return ref


def decided(folder, right=0.8, other=0.8, verdict="PASS", champion=THEIRS, policy=POLICY, **changes):
    ours, theirs, pairs = sources(right, other)
    comparison = keep_comparison(folder, compare(ours, theirs, pairs)) if champion != NOBODY else None
    inputs = RewardInputs(OURS, champion, validation(folder, verdict), "", comparison)
    return decide_office(folder, replace(inputs, **changes), policy)


def verdict_of(decision, name):
    return next(item.verdict for item in decision.evidence if item.name == name)


@pytest.mark.parametrize(
    ("right", "other", "verdict"),
    [(0.8, 0.8, "PASS"), (0.9, 0.7, "PASS"), (0.6, 0.85, "FAIL"), (0.78, 0.8, "PASS")],
)
def test_only_a_sure_loss_of_accuracy_fails(tmp_path, right, other, verdict):
    decision = decided(tmp_path, right, other)
    assert verdict_of(decision, "accuracy") == verdict
    item = next(item for item in decision.evidence if item.name == "accuracy")
    assert item.n == 300
    assert item.low < item.estimate < item.high


def test_the_estimate_is_the_plain_difference_of_accuracies(tmp_path):
    ours, theirs, pairs = sources(0.9, 0.6)
    share = [
        sum(t.scores[p.chosen] > t.scores[p.rejected] for p in pairs) / len(pairs) for t in (ours, theirs)
    ]
    item = next(item for item in decided(tmp_path, 0.9, 0.6).evidence if item.name == "accuracy")
    assert item.estimate == pytest.approx(share[0] - share[1], abs=1e-9)


def test_a_failed_or_missing_or_expired_validation_and_changed_files_do_not_pass(tmp_path):
    assert verdict_of(decided(tmp_path, verdict="FAIL"), "reward model") == "FAIL"
    assert decided(tmp_path, verdict="FAIL").verdict == "FAIL"
    assert decided(tmp_path, validation=None).verdict == "INCONCLUSIVE"
    assert decided(tmp_path, expired="it is old").verdict == "FAIL"
    assert decided(tmp_path, integrity="head.safetensors is not what was registered").verdict == "FAIL"


def test_the_first_has_nobody_to_be_compared_with_and_without_comparisons_nobody_can_tell(tmp_path):
    assert [item.name for item in decided(tmp_path, champion=NOBODY).evidence] == [
        "integrity",
        "reward model",
    ]
    alone = decided(tmp_path, comparison=None, alone="reward/1 cannot be opened")
    assert verdict_of(alone, "accuracy") == "INCONCLUSIVE"
    assert alone.verdict == "PASS"  # by its validation alone, and it says so
    assert "reward/1 cannot be opened; the validation alone decides" in alone.record.decode()
    assert recompute_office(write_decision(tmp_path, alone)).record == alone.record
    assert decided(tmp_path, comparison=None, verdict="FAIL").verdict == "FAIL"


def test_evidence_about_others_is_refused(tmp_path):
    with pytest.raises(Corrupt, match="other reward models"):
        decided(tmp_path, champion=Agent(1, "7" * 64))
    with pytest.raises(Corrupt, match="another reward model"):
        decided(tmp_path, candidate=Agent(2, "8" * 64))


def test_the_record_follows_from_its_evidence_byte_for_byte(tmp_path):
    decision = decided(tmp_path)
    path = write_decision(tmp_path, decision)
    assert recompute_office(path).record == decision.record
    comparison = tmp_path / decision.inputs.comparison.path
    data = comparison.read_bytes()
    comparison.write_bytes(data.replace(b'"candidate":1.0', b'"candidate":-1.0', 1))
    with pytest.raises(Corrupt, match="was changed"):
        recompute_office(path)
    comparison.write_bytes(data)
    forged = decision.record.replace(b'"verdict":"FAIL"', b'"verdict":"PASS"').replace(b"0.8", b"0.9", 1)
    other = tmp_path / "decisions" / f"{sha256_bytes(forged)}.json"
    write_atomic(other, forged)
    with pytest.raises(Corrupt):
        recompute_office(other)
