"""A sample of the campaign of `benchmarks.tamper`, with another seed than its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.tamper import Campaign, run, wrong
from tasks.lineage.report import Problem


def test_whatever_is_tampered_with_is_found_and_nothing_else_is_blamed(tmp_path: Path):
    result = run(tmp_path / "workspace", tampers=60, clean=10, seed=1, say=lambda text: None)
    assert result["failures"] == []
    assert result["false_alarms"] == []
    assert len(result["kinds"]) > 20


def test_the_campaign_itself_tells_what_is_missed_and_what_is_wrongly_blamed(tmp_path: Path):
    campaign = Campaign(tmp_path / "workspace", seed=3)
    intact = campaign.verify(full=True)
    with campaign.tampered() as done:
        report = campaign.verify(full=True)
    assert wrong(done, report) is None
    assert wrong(done, intact) == "missed"
    other = Problem("changed", "params.yaml", "settings", "0" * 64, "1" * 64)
    assert str(wrong(done, replace(report, problems=(*report.problems, other)))).startswith("blamed")
