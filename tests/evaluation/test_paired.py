"""Pairing, the evidence file and the table."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tasks.core.digest import sha256_file
from tasks.core.errors import Corrupt, NotFound, UsageError
from tasks.evaluation.paired import Agent, Baseline, pair_outcomes, read_outcomes, table, write_outcomes

AGENTS = Agent(2, "b" * 64), Agent(1, "a" * 64)
BASELINES = {"calculator": Baseline("calc(1 + 1)", 0.25, 0.4), "sums": Baseline("0", 0.1, 0.7)}


@dataclass(frozen=True)
class Answer:
    task_id: str
    env: str
    reward: float
    response_text: str = "text"


def answers(env, rewards):
    return [Answer(f"t{i}", env, reward) for i, reward in enumerate(rewards)]


def outcomes(baselines=BASELINES):
    candidate = answers("calculator", [1, 1, 1, 0]) + answers("sums", [0, 1])
    champion = answers("sums", [0, 1]) + answers("calculator", [0, 0, 1, 0])
    return pair_outcomes(candidate, champion, AGENTS, baselines)


def test_answers_are_matched_by_task_whatever_their_order():
    pairs = outcomes().pairs
    assert [(p.env, p.task_id) for p in pairs][:2] == [("calculator", "t0"), ("calculator", "t1")]
    assert [p.candidate_reward - p.champion_reward for p in pairs] == [1, 1, 0, 0, 0, 0]


def test_several_answers_to_a_task_are_one_cluster():
    twice = [Answer("t", "sums", r) for r in (0, 1)] + [Answer("u", "sums", 1)] * 2
    paired = pair_outcomes(twice, twice, AGENTS, {})
    assert [p.sample for p in paired.pairs] == [0, 1, 0, 1]
    assert paired.difference(alpha=0.05).clusters == 2


@pytest.mark.parametrize(
    ("candidate", "champion", "says"),
    [
        (answers("sums", [1, 0]), answers("sums", [1]), "task t1 of sums"),
        (answers("sums", [1]), answers("calculator", [1]), "2 answers have no counterpart"),
        ([Answer("t", "sums", 1)] * 2, [Answer("t", "sums", 1)], "answer 2"),
        ([], [], "no outcomes"),
    ],
)
def test_what_is_not_paired_is_refused(candidate, champion, says):
    with pytest.raises(UsageError, match=says):
        pair_outcomes(candidate, champion, AGENTS, {})


def test_evidence_round_trips_and_equal_outcomes_give_equal_bytes(tmp_path):
    path, digest = write_outcomes(tmp_path, outcomes())
    assert path.name == f"{digest}.jsonl"
    assert sha256_file(path) == digest
    assert read_outcomes(path, digest) == outcomes()
    assert write_outcomes(tmp_path, outcomes()) == (path, digest)


def test_a_changed_byte_is_found(tmp_path):
    path, digest = write_outcomes(tmp_path, outcomes())
    path.write_bytes(path.read_bytes().replace(b"1.0", b"0.0", 1))
    with pytest.raises(Corrupt, match="differ from their digest"):
        read_outcomes(path, digest)
    with pytest.raises(NotFound):
        read_outcomes(tmp_path / "none.jsonl", digest)


# As an earlier release wrote them, which knew no random baseline.
OLD = (
    b'{"baselines":{"sums":{"answer":"0","score":0.1}},"candidate":{"digest":"'
    + b"b" * 64
    + b'","version":2},'
    b'"champion":{"digest":"' + b"a" * 64 + b'","version":1},"plan":null,"schema":"forebay.outcomes/2"}\n'
    b'{"candidate_components":{},"candidate_finish":"","candidate_response":"text","candidate_reward":1.0,'
    b'"candidate_tokens":0,"champion_components":{},"champion_finish":"","champion_response":"text",'
    b'"champion_reward":0.0,"champion_tokens":0,"env":"sums","family":"t0","sample":0,"task_id":"t0"}\n'
)


def test_outcomes_of_an_earlier_release_are_read_and_give_the_same_bytes(tmp_path):
    path = tmp_path / "old.jsonl"
    path.write_bytes(OLD)
    old = read_outcomes(path, sha256_file(path))
    assert old.baselines == {"sums": Baseline("0", 0.1)}
    assert (old.constant(), old.random(), old.random("sums")) == (0.1, None, None)
    again, digest = write_outcomes(tmp_path, old)
    assert again.read_bytes() == OLD
    assert digest == sha256_file(path)


def test_baselines_that_are_missing_are_kept_with_the_reason(tmp_path):
    lacking = outcomes({**BASELINES, "sums": Baseline(None, None, None, "it hung.")})
    assert read_outcomes(*write_outcomes(tmp_path, lacking)) == lacking
    rows = {row.env: row for row in table(lacking, alpha=0.05)}
    assert (rows["sums"].constant, rows["sums"].random, rows["sums"].baseline_error) == (
        None,
        None,
        "it hung.",
    )
    assert (rows["calculator"].constant, rows["calculator"].random) == (0.25, 0.4)
    assert (rows["all"].constant, rows["all"].random) == (None, None)


def test_the_table_shows_both_agents_and_both_baselines():
    rows = {row.env: row for row in table(outcomes(), alpha=0.05)}
    assert list(rows) == ["calculator", "sums", "all"]
    one = rows["calculator"]
    assert (one.candidate, one.champion, one.constant, one.random) == (0.75, 0.25, 0.25, 0.4)
    assert one.low < one.difference == 0.5
    assert rows["all"].constant == pytest.approx((4 * 0.25 + 2 * 0.1) / 6)
    assert rows["all"].random == pytest.approx((4 * 0.4 + 2 * 0.7) / 6)
    assert table(outcomes({}), alpha=0.05)[0].constant is None
