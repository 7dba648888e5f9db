"""The table and the order of a comparison, against hand-made results."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.leaderboard import load, markdown
from tasks.arena.floors import Floor
from tasks.leaderboard import causes
from tasks.leaderboard.causes import contrasts, troubles
from tasks.leaderboard.methods import METHODS
from tasks.leaderboard.page import Board, Failure, leaderboard_page, verdict
from tasks.leaderboard.ranking import lines, over_seeds, ranks

BASELINES = Path(__file__).parents[2] / "benchmarks" / "baselines"


def _slice(success: float) -> dict:
    names = ("success", "score", "pass@1", "pass@4", "turns", "tokens", "valid_format", "valid_action")
    return {
        "tasks": 10,
        "samples": 4,
        "figures": {name: {"estimate": success, "low": 0.0, "high": 1.0} for name in names},
    }


def result(env: str, method: str, seed: int, success: float, **more: object) -> dict:
    return {
        "env": env,
        "method": method,
        "seed": seed,
        "key": f"{env}{method}{seed}",
        "before": _slice(0.2),
        "after": _slice(success),
        "curve": [0.1, success],
        "steps": 2,
        "stop_reason": "finished",
        "findings": [],
        "episodes": 128,
        "cpu_seconds": 3.0,
        "seconds": 4.0,
    } | more


CLEAR = [
    result(env, method, seed, base + 0.01 * seed)
    for env in ("a", "b")
    for method, base in (("good", 0.8), ("fair", 0.5), ("poor", 0.3))
    for seed in range(3)
]


def test_an_interval_over_seeds_is_students():
    found = over_seeds([0.1, 0.2, 0.3])
    assert found.estimate == pytest.approx(0.2)
    assert found.half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    assert over_seeds([0.4]).half is None


def test_methods_that_always_win_are_firmly_first():
    good, fair, poor = ranks(CLEAR)
    assert [one.method for one in (good, fair, poor)] == ["good", "fair", "poor"]
    assert (good.rank, good.low, good.high, good.best) == (1.0, 1.0, 1.0, 1.0)
    assert (poor.rank, poor.best) == (3.0, 0.0)
    assert good.success == pytest.approx(0.81)


def test_equal_methods_share_their_places():
    same = [result("a", method, seed, 0.5) for method in ("x", "y") for seed in range(2)]
    assert {(one.rank, one.best) for one in ranks(same)} == {(1.5, 1.0)}


def test_the_order_is_as_firm_as_the_seeds_agree():
    """x wins with two seeds of three, by little; y wins the third by as much."""
    rewards = {"x": (0.6, 0.6, 0.4), "y": (0.5, 0.5, 0.5)}
    found = {
        one.method: one
        for one in ranks(
            [result("a", name, s, v) for name, values in rewards.items() for s, v in enumerate(values)]
        )
    }
    # Two of the three seeds are drawn: x is behind if both are the one that it lost (1/9), level if one is (4/9).
    assert found["x"].best == pytest.approx(8 / 9, abs=0.02)
    assert found["y"].best == pytest.approx(5 / 9, abs=0.02)
    assert found["x"].rank == pytest.approx(4 / 3)  # of 1, 1 and 2
    assert (found["x"].low, found["x"].high) == (1.0, 2.0)  # 4/3 ± 1.43, within what a rank can be


def test_one_seed_says_nothing_of_others():
    (first, second) = ranks([result("a", "x", 0, 0.6), result("a", "y", 0, 0.5)])
    assert (first.rank, second.rank) == (1.0, 2.0)
    assert (first.low, first.high, first.best) == (None, None, None)
    assert (
        verdict([first, second])
        == "x leads, with a mean rank of 1.0, by one seed, which says nothing of others."
    )


def test_the_verdict_says_ties_and_who_might_lead():
    same = ranks([result("a", method, seed, 0.5) for method in ("x", "y") for seed in range(2)])
    assert verdict(same) == "No order: x and y have the same mean rank."
    assert verdict(ranks(CLEAR)) == "good leads, with a mean rank of 1.0."
    close = [result("a", "x", s, v) for s, v in enumerate((0.6, 0.4, 0.6))]
    close += [result("a", "y", s, 0.5) for s in range(3)]
    assert verdict(ranks(close)) == "x leads, with a mean rank of 1.3; other seeds might as well put y first."


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_of_ranks_hold_among_equal_methods(seeds: int):
    """Six methods that differ by chance alone: the true mean rank of each is 3.5."""
    draw = np.random.default_rng(0)
    held = []
    for _ in range(60):
        success = draw.normal(0.5, 0.1, (3, 6, seeds))
        found = ranks(
            [
                result(f"e{e}", f"m{m}", s, float(success[e, m, s]))
                for e in range(3)
                for m in range(6)
                for s in range(seeds)
            ]
        )
        held += [one.low <= 3.5 <= one.high for one in found]
    assert np.mean(held) > 0.91


def without(*cells: tuple[str, str, int]) -> list[dict]:
    return [one for one in CLEAR if (one["method"], one["env"], one["seed"]) not in cells]


def test_a_method_without_a_cell_that_others_have_is_shown_and_not_ranked():
    short = without(("fair", "b", 2))
    # The two others are ranked over all that they have, as if there were no third.
    assert [(one.method, one.rank, one.success) for one in ranks(short)] == [
        ("good", 1.0, pytest.approx(0.81)),
        ("poor", 2.0, pytest.approx(0.31)),
    ]
    seeds = {(line.env, line.method): line.seeds for line in lines(short)}
    assert (seeds["a", "fair"], seeds["b", "fair"]) == (3, 2)
    board = Board(ranks(short), lines(short), {}, {}, short, 0.0, "", "")
    assert board.unranked() == ["fair"]


def test_a_seed_that_no_method_has_does_not_count():
    short = without(*((name, "b", 2) for name in ("good", "fair", "poor")))
    assert [(one.method, one.rank) for one in ranks(short)] == [("good", 1.0), ("fair", 2.0), ("poor", 3.0)]
    assert ranks(short)[0].success == pytest.approx(0.805)  # of seeds 0 and 1


def test_an_environment_that_no_method_finished_is_left_out():
    short = [one for one in CLEAR if one["env"] == "a"]
    assert [one.rank for one in ranks(short)] == [1.0, 2.0, 3.0]


def test_without_a_method_that_has_every_cell_there_is_no_order():
    short = without(("good", "a", 0), ("fair", "a", 1), ("poor", "a", 2))
    assert ranks(short) == ranks([]) == []
    assert verdict([]) == "No order: no method has every cell."
    assert verdict(ranks(CLEAR)[:1]) == "No order: good stands alone."


def test_gains_are_paired_with_the_start_and_collapses_counted():
    ill = [
        result("a", "m", 0, 0.5, findings=[{"driver": "policy drift", "onset": 3}], stop_reason="kl_blow_up"),
        result("a", "m", 1, 0.3),
    ]
    (line,) = lines(ill)
    assert line.gain.estimate == pytest.approx(0.2)
    assert (line.collapses, line.stopped, line.seeds) == ({"policy drift": 1}, {"kl_blow_up": 1}, 2)
    shared = {"success", "score", "pass@4", "turns", "tokens"}
    assert set(line.figures) == shared | {"valid_format", "valid_action"}
    assert (line.cpu_seconds, line.episodes) == (3.0, 128)


def test_results_from_before_valid_action_had_a_name_tell_it_and_no_valid_format():
    """Their `valid_format` was the share of `Step.valid`. Beside newer ones all lack the column that they lack."""
    old = result("a", "old", 0, 0.5)
    del old["after"]["figures"]["valid_action"]
    old["after"]["figures"]["valid_format"]["estimate"] = 0.9
    first, second = lines([old, result("a", "new", 0, 0.6)])
    assert first.figures["valid_action"].estimate == 0.9
    assert second.figures["valid_action"].estimate == 0.6
    assert first.figures.keys() == second.figures.keys()
    assert "valid_format" not in first.figures


@pytest.mark.parametrize("path", sorted(BASELINES.glob("leaderboard*.json")), ids=lambda path: path.stem)
def test_kept_results_still_make_their_tables_and_page(path):
    board = load(path)
    assert "| valid_action |" in markdown(board)
    assert "valid_action" in leaderboard_page(board)


def test_the_page_says_who_leads_and_against_what():
    floors = {env: Floor(10, 0.15, "<left>", 0.25) for env in ("a", "b")}
    starts = {env: over_seeds([0.2, 0.2, 0.2]) for env in ("a", "b")}
    ill = [{**CLEAR[0], "stop_reason": "kl_blow_up"}, *CLEAR[1:]]
    page = leaderboard_page(
        Board(ranks(ill), lines(ill), floors, starts, ill, 120.0, "2 cores", "From scratch.")
    )
    assert "good leads, with a mean rank of 1.0." in page
    assert "&lt;left&gt;" in page
    assert "<left>" not in page
    for text in (
        "0.150",
        "0.250",
        "Order of the methods",
        "fair",
        "2 CPU minutes on 2 cores",
        "kl_blow_up 1",
        "From scratch.",
    ):
        assert text in page
    assert "Cells without a result" not in page
    assert page.count("<svg") >= 3 + 6  # ranks, and a curve for each method on each environment
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_the_page_names_the_cells_that_failed_and_who_is_not_ranked():
    short = without(("fair", "b", 0), ("fair", "b", 1), ("fair", "b", 2))
    failures = [Failure("b", "fair", seed, "key", "All groups are <alike>.") for seed in range(3)]
    floors = {env: Floor(10, 0.15, "left", 0.25) for env in ("a", "b")}
    starts = {env: over_seeds([0.2, 0.2, 0.2]) for env in ("a", "b")}
    page = leaderboard_page(Board(ranks(short), lines(short), floors, starts, short, 1.0, "", "", failures))
    assert "good leads, with a mean rank of 1.0. Not ranked, for cells that failed: fair." in page
    assert page.count("All groups are &lt;alike&gt;.") == 3
    assert "3 methods" in page


COLLAPSED = {
    "findings": [{"driver": "stale negatives", "onset": 12}, {"driver": "policy drift", "onset": 14}],
    "key": "ab" * 32,
}


def test_the_page_says_what_the_methods_are_and_which_runs_collapsed():
    results = [
        result("a", "sapo", 0, 0.5, **COLLAPSED),
        result("a", "sapo", 1, 0.5, key="cd" * 32, stop_reason="kl_blow_up"),
        result("a", "sampo", 0, 0.6, tasks_digest="ef" * 32),
        result("a", "sampo", 1, 0.6, tasks_digest="ef" * 32),
    ]
    methods = {name: METHODS[name] for name in ("sapo", "sampo")}
    floors, starts = {"a": Floor(10, 0.15, "left", 0.25)}, {"a": over_seeds([0.2, 0.2])}
    page = leaderboard_page(
        Board(ranks(results), lines(results), floors, starts, results, 1.0, "", "", methods=methods)
    )
    rows = [re.sub(r"<[^>]+>", "|", row) for row in re.findall("<tr>(.*?)</tr>", page)]
    (sapo,) = [row for row in rows if "tau_pos" in row]
    assert sapo == "|sapo||token-mean||sapo tau_pos=1, tau_neg=1.05, unit turn||no||group_norm_per_turn|"
    assert "|sampo eps_lo=0.003, eps_hi=0.004, unit turn||yes||gigpo|" in "".join(rows)
    (collapsed,) = [row for row in rows if "stale negatives" in row and "policy drift" in row]
    assert collapsed == (
        "|sapo||a||0||stale negatives||12||policy drift 14||clipping||finished||forebay stability cell:abababababab|"
    )
    (stopped,) = [row for row in rows if "cell:cdcdcdcdcdcd" in row]
    assert stopped.startswith("|sapo||a||1||||||||||kl_blow_up|")
    assert "1 run collapsed, 1 stopped by a guard." in page
    assert "stale negatives (clipping): bad answers that the policy has nearly given up" in page
    assert "(set <code>efefefefefef</code>)" in page


def test_results_that_tell_neither_methods_nor_tasks_have_a_page():
    floors = {env: Floor(10, 0.15, "left", 0.25) for env in ("a", "b")}
    starts = {env: over_seeds([0.2, 0.2, 0.2]) for env in ("a", "b")}
    page = leaderboard_page(Board(ranks(CLEAR), lines(CLEAR), floors, starts, CLEAR, 1.0, "", ""))
    assert "No run collapsed, and none was stopped." in page
    assert "in four dimensions" not in page
    assert "10 held-out tasks. Start" in page


def test_a_run_that_collapsed_is_told_with_what_followed():
    (one, other) = troubles(
        [
            result("a", "m", 0, 0.5, **COLLAPSED),
            result("a", "m", 1, 0.5),
            result("b", "m", 0, 0.5, findings=[{"driver": "unheard of", "onset": 3}], stop_reason="collapse"),
        ]
    )
    assert one.course() == "stale negatives from update 12 on, then policy drift from 14, finished"
    assert (one.driver, one.onset, one.dimensions) == ("stale negatives", 12, ("clipping",))
    assert other.course() == "unheard of from update 3 on, collapse"
    assert other.dimensions == ()  # of another version of the signals
    assert causes.verdict([one, other]) == "2 runs collapsed, 1 stopped by a guard."
    assert causes.verdict([]) == "No run collapsed, and none was stopped."
    (meaning,) = causes.meanings([one, one, other])
    assert meaning.startswith("stale negatives (clipping): ")


def test_pairs_that_differ_in_one_dimension_say_which_one_made_runs_fail():
    methods = {name: METHODS[name] for name in ("grpo", "grpo_st", "sapo", "sampo")}
    ill = {("sapo", 0), ("sapo", 1), ("sapo", 2), ("grpo", 0)}
    results = [
        result("a", name, seed, 0.5, **(COLLAPSED if (name, seed) in ill else {}))
        for name in methods
        for seed in range(3)
        if (name, seed) != ("grpo_st", 2)
    ]
    found = contrasts(methods, results)
    # SAMPO differs from each in more than one; GRPO and GRPO_ST are compared on the seeds that both have.
    assert [(one.dimension, one.worse, one.better, one.wrong, one.runs) for one in found] == [
        ("clipping", "sapo", "grpo", (3, 1), 3),
        ("aggregation", "grpo", "grpo_st", (1, 0), 2),
    ]
    assert found[1].settings == ("token-mean", "seq-mean-token-mean")
    floors, starts = {"a": Floor(10, 0.15, "left", 0.25)}, {"a": over_seeds([0.2, 0.2])}
    board = Board(ranks(results), lines(results), floors, starts, results, 1.0, "", "", methods=methods)
    page = leaderboard_page(board)
    assert "Which dimension made runs fail" in page
    assert re.search(r"clipping</td><td[^>]*>sapo</td><td[^>]*>3 of 3<", page)
    assert contrasts({}, results) == []
    assert "Which dimension" not in leaderboard_page(replace(board, methods={}))


def test_a_comparison_of_failures_alone_still_has_a_page():
    failures = [Failure("a", "m", 0, "key", "It hung.")]
    page = leaderboard_page(Board([], [], {}, {}, [], 0.0, "", "", failures))
    assert "No order: no method has every cell." in page
    assert "It hung." in page


def test_methods_that_differ_in_the_order_of_their_options_alone_are_no_contrast():
    one = METHODS["grpo"]
    options = dict(reversed(one.clipping.options.items()))
    same = one.model_copy(update={"clipping": one.clipping.model_copy(update={"options": options})})
    results = [result("a", "grpo", 0, 0.5, **COLLAPSED), result("a", "other", 0, 0.5)]
    assert contrasts({"grpo": one, "other": same}, results) == []
    assert [pair.dimension for pair in contrasts({"grpo": one, "other": METHODS["grpo_sm"]}, results)] == [
        "clipping"
    ]
