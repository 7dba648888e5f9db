from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tasks.core.digest import sha256_file
from tasks.core.errors import Corrupt
from tasks.core.ledger import Ledger
from tasks.core.workspace import Workspace
from tasks.replay import seal
from tasks.replay.schema import arrow_schema
from tasks.replay.validation import Expected, validate_dataset, validate_rows
from tests.replay.support import SETTINGS, TEMPLATE, TOKENIZER, append, group, groups

EXPECTED = Expected(
    tokenizer_digest=TOKENIZER,
    template_digest=TEMPLATE,
    policy_version=2,
    max_policy_lag=1,
    min_groups=2,
    vocabulary=100,
    evaluation_prompts=frozenset({"e" * 64}),
    group_size=4,
)
NAN, INF = float("nan"), float("inf")


def rows() -> list[dict[str, Any]]:
    return [asdict(one) for members in groups("g", 3) for one in members]


def table(values: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(values, schema=arrow_schema())


def failing(values: list[dict[str, Any]], expected: Expected = EXPECTED) -> dict[str, int]:
    return {check.name: check.failed for check in validate_rows(table(values), expected) if not check.ok}


def test_good_rows_pass_every_check() -> None:
    checks = validate_rows(table(rows()), EXPECTED)
    assert all(check.ok for check in checks)
    assert {(check.failed, check.of) for check in checks} == {(0, 12)}
    assert len({check.name for check in checks}) == len(checks) == 19


def put(name: str, at: int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(row: dict[str, Any]) -> None:
        row[name] = [*row[name]]
        row[name][at] = value

    return change


def cut(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda row: row.update({name: row[name][:-1]})


def let(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda row: row.update(values)


# Token 3 of every episode is an observation; turns are 0 0 0 0 1 1 …
FAULTS: list[tuple[str, Callable[[dict[str, Any]], None], int]] = [
    ("lengths_aligned", cut("loss_mask"), 1),
    ("lengths_aligned", cut("turn_ids"), 1),
    ("lengths_aligned", cut("behaviour_logprobs"), 1),
    ("lengths_aligned", let(prompt_ids=[]), 1),
    ("lengths_aligned", let(response_ids=[], loss_mask=[], turn_ids=[], behaviour_logprobs=[]), 1),
    ("logprobs_finite", put("behaviour_logprobs", 0, NAN), 1),
    ("logprobs_finite", put("behaviour_logprobs", -1, -INF), 1),
    ("logprobs_not_positive", put("behaviour_logprobs", 1, 0.01), 1),
    ("logprobs_masked", put("behaviour_logprobs", 3, -0.5), 1),
    ("logprob_source_known", let(logprob_source="guess"), 1),
    ("turns_ordered", put("turn_ids", 0, 1), 1),
    ("turns_ordered", put("turn_ids", -1, 0), 1),
    ("turns_ordered", put("turn_ids", -1, 3), 1),
    ("tokens_known", put("response_ids", -1, 100), 1),
    ("tokens_known", put("prompt_ids", 0, -1), 1),
    ("tokenizer_matches", let(tokenizer_digest="0" * 64), 1),
    ("template_matches", let(template_digest="0" * 64), 1),
    ("sampling_known", let(temperature=0.0), 1),
    ("sampling_known", let(temperature=NAN), 1),
    ("sampling_known", let(top_p=1.5), 1),
    ("no_evaluation_prompt", let(split="heldout"), 1),
    ("rewards_finite", let(reward=INF), 1),
    ("provenance_present", let(licence=" "), 1),
    ("provenance_present", let(source=""), 1),
    ("provenance_present", let(behaviour_version=""), 1),
    ("groups_complete", let(sample_index=3), 4),
    ("groups_complete", let(sample_index=4), 4),
    ("groups_share_prompt", let(prompt_sha256="0" * 64), 4),
]


@pytest.mark.parametrize(("name", "fault", "failed"), FAULTS)
@pytest.mark.parametrize("at", [0, 5, 10])
def test_one_fault_fails_its_check_and_no_other(
    name: str, fault: Callable[[dict[str, Any]], None], failed: int, at: int
) -> None:
    values = rows()
    fault(values[at])
    assert failing(values) == {name: failed}


def test_details_name_the_first_row() -> None:
    values = rows()
    for at in (7, 5):
        values[at]["reward"] = NAN
    (check,) = (check for check in validate_rows(table(values), EXPECTED) if not check.ok)
    assert check.detail == "2 of 12 rows have a reward that is not a finite number, the first is g1-1"


def test_a_row_in_which_the_policy_said_nothing() -> None:
    values = rows()
    values[6]["loss_mask"] = [False] * len(values[6]["loss_mask"])
    values[6]["behaviour_logprobs"] = [0.0] * len(values[6]["loss_mask"])
    assert failing(values) == {"policy_spoke": 1}


@pytest.mark.parametrize("turns", ["0", "true", '"2"', "1.5", "40000", "[" * 100_000])
def test_a_memory_of_no_number_of_turns(turns: str) -> None:
    values = rows()
    values[3]["reward_components"] = '{"memory_turns": 2}'
    assert failing(values) == {}
    values[6]["reward_components"] = f'{{"memory_turns": {turns}}}'
    assert failing(values) == {"memory_told": 1}


def test_duplicates_and_lost_members() -> None:
    values = rows()
    values[1] = dict(values[0])
    assert failing(values) == {"episodes_unique": 2, "groups_complete": 4}
    assert failing(rows()[:-1]) == {"groups_complete": 3}
    uneven = [asdict(one) for name, size in (("a", 4), ("b", 3)) for one in group(name, size)]
    assert failing(uneven) == {"groups_complete": 3}
    assert failing(uneven, Expected(TOKENIZER, TEMPLATE, 1, 0, 2)) == {}


def test_evaluation_prompts_are_kept_out() -> None:
    values = rows()
    for row in values[4:8]:
        row["prompt_sha256"] = "e" * 64
    assert failing(values) == {"no_evaluation_prompt": 4}


def test_older_rows_are_passed_over_and_only_too_few_fresh_groups_fail() -> None:
    values = rows()
    versions = ["agent/1", "agent/2", "agent/0"]
    for at, row in enumerate(values):
        row["behaviour_version"] = versions[at // 4]
    assert failing(values) == {}
    assert failing(values, Expected(TOKENIZER, TEMPLATE, 3, 1, 2)) == {"policy_lag": 8}
    for row in values:
        row["behaviour_version"] = "import/other"  # outside the registry: no lag
    assert failing(values, Expected(TOKENIZER, TEMPLATE, 30, 0, 3)) == {}


def test_rows_without_logprobs_are_told_and_not_failed() -> None:
    values = rows()
    values[0]["logprob_source"] = "missing"
    checks = {check.name: check for check in validate_rows(table(values), EXPECTED)}
    assert checks["logprob_source_known"].ok
    assert "1 rows have none" in checks["logprob_source_known"].detail


def test_an_empty_table_has_too_few_groups_and_no_other_fault() -> None:
    assert failing([]) == {"policy_lag": 0}


def test_several_chunks_are_one_table() -> None:
    values = rows()
    values[9]["reward"] = NAN
    parts = pa.concat_tables([table(values[:5]), table(values[5:7]), table(values[7:])]).slice(4)
    (bad,) = (c for c in validate_rows(parts, Expected(TOKENIZER, TEMPLATE, 1, 0, 2)) if not c.ok)
    assert (bad.name, bad.failed, bad.of) == ("rewards_finite", 1, 8)


def test_a_hundred_thousand_rows_take_under_two_seconds() -> None:
    one = table([asdict(episode) for members in groups("g", 250) for episode in members])
    big = pa.concat_tables([one] * 100)
    n = big.num_rows
    assert n == 100_000
    names = big.schema.names
    big = big.set_column(
        names.index("episode_id"), big.schema.field("episode_id"), pa.array(np.arange(n).astype(str))
    )
    big = big.set_column(
        names.index("group_id"), big.schema.field("group_id"), pa.array((np.arange(n) // 4).astype(str))
    )
    start = time.process_time()
    checks = validate_rows(big, EXPECTED)
    assert time.process_time() - start < 6  # row by row this takes a minute
    assert [check.name for check in checks if not check.ok] == ["groups_share_prompt"] or all(
        c.ok for c in checks
    )


def test_verdicts_evidence_and_quarantine(workspace: Workspace, ledger: Ledger) -> None:
    append(workspace, groups("g", 4))
    good = seal.seal(workspace, ledger, SETTINGS)
    report = validate_dataset(workspace, ledger, good, EXPECTED)
    assert (report.verdict, report.reasons) == ("PASS", ())

    append(workspace, [group("bad", reward=NAN), group("held", split="heldout")])
    bad = seal.seal(workspace, ledger, SETTINGS)
    refused = validate_dataset(workspace, ledger, bad, EXPECTED)
    assert refused.verdict == "FAIL"
    failed = {check.name for check in refused.checks if not check.ok}
    assert {"rewards_finite", "no_evaluation_prompt", "gx:column_values_to_be_in_set:split"} <= failed
    assert len(refused.reasons) == len(failed)
    assert any("rewards_finite: 4 of 24 rows" in reason for reason in refused.reasons)

    for entry, made in zip(ledger.entries("dataset.validated"), (report, refused), strict=True):
        assert entry.payload == made.to_payload()
        evidence = entry.payload["evidence"]
        path = workspace.root / evidence["path"]
        assert sha256_file(path) == evidence["sha256"]
        record = json.loads(path.read_bytes())
        assert record["verdict"] == made.verdict
        assert record["great_expectations"]["success"] == (made.verdict == "PASS")
        assert "Great Expectations" in (workspace.root / evidence["html"]).read_text()

    data = bytearray((workspace.root / bad.manifest.shards[-1].path).read_bytes())
    data[len(data) // 2] ^= 1
    (workspace.root / bad.manifest.shards[-1].path).unlink()
    (workspace.root / bad.manifest.shards[-1].path).write_bytes(data)
    with pytest.raises(Corrupt):
        validate_dataset(workspace, ledger, bad, EXPECTED)
