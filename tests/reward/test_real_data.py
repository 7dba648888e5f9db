"""Reward models on a few hundred real records, through the same validation as a registered one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks.reward_validation import FILES, validate_real
from tasks.core.digest import sha256_file
from tasks.promotion.policy import Policy
from tasks.reward.checks import judge_report

DATA = os.environ.get("FOREBAY_REAL_DATA")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(DATA is None, reason="set FOREBAY_REAL_DATA to the folder with the real data")
@pytest.mark.parametrize("name", FILES)
def test_a_head_on_minilm_gets_the_verdict_that_its_report_gives_again(name, tmp_path):
    told = validate_real(name, Path(str(DATA)), "head", tmp_path, groups=60)
    path = tmp_path / told["evidence"]["path"]
    assert sha256_file(path) == told["evidence"]["sha256"]
    report = json.loads(path.read_text())
    verdict, checks = judge_report(report, Policy().reward_model)
    found = {check.name: check for check in checks}
    assert verdict == told["verdict"]
    assert found["leak"].verdict == found["frame"].verdict == "PASS"
    assert found["accuracy"].n == len({pair["group"] for pair in report["preferences"]}) >= 10
    assert 0.2 < told["accuracy"]["estimate"] < 0.9  # frozen states know a little, and never all
    assert {pair["licence"] for pair in report["preferences"]} == {"MIT"}
    assert bool(report["samples"]) == (name == "gsm8k")
    if name == "gsm8k":
        assert [point["n"] for point in told["best_of_n"]] == [1, 2, 4]
