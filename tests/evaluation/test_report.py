"""The figures of an evaluation with several attempts at each task."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tasks.evaluation.report import report, valid_action, valid_format
from tasks.evaluation.statistics import clustered_mean
from tasks.rollout.rollout import Outcome


def outcome(task: int, reward: float, turns: int = 2, invalid: int = 0, family: str = "") -> Outcome:
    return Outcome(
        task_id=f"t{task}",
        env="e",
        reward=reward,
        components={},
        response_text="",
        turns=turns,
        tokens=3 * turns,
        family=family or f"t{task}",
        finish_reason="done",
        invalid_turns=invalid,
    )


ATTEMPTS = [
    [outcome(0, 1.0), outcome(0, 1.0), outcome(0, 0.0), outcome(0, 0.5)],
    [outcome(1, 0.0, turns=4, invalid=1), outcome(1, 0.0), outcome(1, 0.0), outcome(1, 0.0)],
    [outcome(2, 1.0), outcome(2, 0.0), outcome(2, 0.0), outcome(2, 0.0)],
]


def test_the_figures_by_hand():
    found = report(ATTEMPTS, max_turns=5, max_tokens=50)
    estimates = {name: figure.estimate for name, figure in found.figures.items()}
    assert (found.tasks, found.samples) == (3, 4)
    assert estimates == pytest.approx(
        {
            "success": 3 / 12,
            "score": 3.5 / 12,
            "pass@1": (2 / 4 + 0 + 1 / 4) / 3,
            "pass@2": ((1 - 1 / 6) + 0 + (1 - 3 / 6)) / 3,  # C(2, 2) / C(4, 2), C(3, 2) / C(4, 2)
            "pass@4": 2 / 3,
            "turns": (2 + 2.5 + 2) / 3,
            "tokens": 3 * (2 + 2.5 + 2) / 3,
            "valid_format": (1 + (0.75 + 3) / 4 + 1) / 3,
            "valid_action": (1 + (0.75 + 3) / 4 + 1) / 3,
        }
    )


def test_form_is_the_environments_to_tell_and_possible_is_more():
    """Of four actions one was no word of the game and one was impossible: 3/4 in form, 2/4 possible."""
    spoken = replace(outcome(0, 0.0, turns=4, invalid=2), components={"valid_format": 0.75, "success": 0.0})
    assert (valid_format(spoken), valid_action(spoken)) == (0.75, 0.5)
    silent = replace(spoken, components={"success": 0.0, "valid_action": 0.5})
    assert (valid_format(silent), valid_action(silent)) == (0.5, 0.5)
    counted = replace(spoken, components={"valid_format": 3.0})  # not a share: some environment's own number
    assert valid_format(counted) == 0.5
    figures = report([[spoken], [outcome(1, 1.0)]], max_turns=5, max_tokens=50).figures
    assert (figures["valid_format"].estimate, figures["valid_action"].estimate) == (0.875, 0.75)


def test_intervals_count_families_and_not_attempts():
    together = [[outcome(n, float(n % 2), family="one" if n < 4 else f"f{n}")] for n in range(8)]
    found = report(together, max_turns=5, max_tokens=50).figures["success"]
    want = clustered_mean(
        [float(n % 2) for n in range(8)],
        ["one"] * 4 + [f"f{n}" for n in range(4, 8)],
        alpha=0.025,
        support=(0.0, 1.0),
    )
    assert (found.estimate, found.low, found.high) == (want.estimate, want.low, want.high)
    apart = report([[outcome(n, float(n % 2))] for n in range(8)], max_turns=5, max_tokens=50)
    assert apart.figures["success"].high - apart.figures["success"].low < found.high - found.low


def test_tasks_with_other_numbers_of_attempts_are_refused():
    for wrong in ([], [[]], [ATTEMPTS[0], ATTEMPTS[1][:2]]):
        with pytest.raises(ValueError, match="same number of attempts"):
            report(wrong, max_turns=5, max_tokens=50)
    single = report([[outcome(0, 1.0)]], max_turns=5, max_tokens=50)
    assert set(single.figures) >= {"pass@1"}
    assert math.isclose(single.figures["pass@1"].estimate, 1.0)
