"""The table and the order of a comparison, against hand-made results."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tasks.arena.floors import Floor
from tasks.leaderboard.page import Board, Failure, leaderboard_page, verdict
from tasks.leaderboard.ranking import lines, over_seeds, ranks


def _slice(success: float) -> dict:
    names = ("success", "score", "pass@1", "pass@4", "turns", "tokens", "valid_format")
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
    assert set(line.figures) == {"success", "score", "pass@4", "turns", "tokens", "valid_format"}
    assert (line.cpu_seconds, line.episodes) == (3.0, 128)


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


def test_a_comparison_of_failures_alone_still_has_a_page():
    failures = [Failure("a", "m", 0, "key", "It hung.")]
    page = leaderboard_page(Board([], [], {}, {}, [], 0.0, "", "", failures))
    assert "No order: no method has every cell." in page
    assert "It hung." in page
