"""An environment whose baselines end their process costs its floor: what was collected, attempted and judged stays."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from flows.context import Context
from flows.judging import evaluate_pair
from flows.run import summary
from flows.show import scores_table
from tasks.evaluation.paired import read_outcomes
from tasks.promotion.page.answers import environments, score, without_baselines
from tests.flows.conftest import forebay, lay_workspace, loads, register_rival

PLAIN, TRAP = (f"tests.leaderboard.doors:{name}" for name in ("plain", "trap"))
WHY = f"constant_baseline() of {TRAP} ended its process (exit status 3)."


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Context:
    return lay_workspace(
        tmp_path_factory.mktemp("floors") / "ws",
        tiny_base,
        collect={"environments": {PLAIN: 2, TRAP: 2}, "group_size": 2},
        evaluation={"tasks": {PLAIN: 6, TRAP: 6}},
        guard={"seconds": 5},
    )


def lacks(row: dict) -> bool:
    return (row["constant"], row["random"], row["baseline_error"]) == (None, None, WHY)


def has(row: dict) -> bool:
    return 0 < row["constant"] <= 1 and 0 <= row["random"] <= 1 and row["baseline_error"] == ""


def test_what_was_collected_stays(context: Context) -> None:
    told = loads(forebay(context.workspace.root, "collect", "--json"))
    assert told["episodes"] == 8
    rows = told["environments"]
    assert has(rows[PLAIN])
    assert lacks(rows[TRAP])
    shown = forebay(context.workspace.root, "collect").stdout
    line = summary("collect", told)
    for text in (shown, line):
        text = " ".join(text.split())
        assert f"no baselines: {WHY}" in text
        assert f"constant {rows[PLAIN]['constant']:.3f}, random " in text
    del rows[PLAIN]["random"], rows[PLAIN]["baseline_error"]  # a record of an earlier release
    assert f"(constant {rows[PLAIN]['constant']:.3f})" in summary("collect", told)


@pytest.mark.slow
def test_what_was_attempted_stays(context: Context) -> None:
    asked = ("evaluate", "attempts", "--tasks", "4", "--samples", "2")
    told = loads(forebay(context.workspace.root, *asked, "--json"))
    plain, trap = sorted(told["slices"], key=lambda one: one["env"])
    assert has(plain)
    assert lacks(trap)
    assert trap["figures"]["success"]["estimate"] >= 0
    shown = " ".join(forebay(context.workspace.root, *asked).stdout.split())
    assert f"no baselines: {WHY}" in shown
    assert f"constant {plain['constant']:.3f}, random {plain['random']:.3f}" in shown


def test_what_was_judged_stays_and_the_page_says_why_there_is_no_floor(context: Context) -> None:
    rival = register_rival(context)
    told = evaluate_pair(context, rival["version"], 1)
    slices = json.loads(json.dumps(told["slices"]))
    assert has(slices[PLAIN])
    assert lacks(slices[TRAP])
    assert (slices["all"]["n"], slices["all"]["constant"], slices["all"]["random"]) == (12, None, None)
    assert f"no baselines: {WHY}" in summary("evaluate", told)

    shown = StringIO()
    Console(width=200, file=shown).print(scores_table(told))
    table = shown.getvalue()
    assert f"{TRAP}: no baselines: {WHY}" in table
    assert f"{slices[PLAIN]['constant']:.3f}" in table
    assert f"{slices[PLAIN]['random']:.3f}" in table

    file = told["outcomes"]
    outcomes = read_outcomes(context.workspace.root / file["path"], file["sha256"])
    assert len(outcomes.pairs) == 12
    assert without_baselines(outcomes) == [f"{TRAP}: no baselines: {WHY}"]
    assert "constant" not in score(outcomes)
    strips = environments(outcomes, [], 0.05)
    place = strips.heads.index("random") - 1
    figures = {row.name: row.cells[place - 1 : place + 1] for row in strips.groups[0].rows}
    assert figures[TRAP] == ("", "")
    assert figures[PLAIN] == tuple(f"{slices[PLAIN][name]:.3f}" for name in ("constant", "random"))
