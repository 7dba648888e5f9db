"""The benchmark's arithmetic on made-up results, and one arm of it end to end."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import language_feedback
from benchmarks.language_feedback import SETTINGS, demonstrated, environment, main, sampled_by, summarise
from tasks.arena.topics import is_question
from tasks.replay.schema import arrow_schema
from tests.tiny import make_tiny_model
from tests.training.replay import make_episodes


def judged(by_turn: list[float]) -> dict:
    kinds = {"valid_format": 1.0, "repeated": 0.0, "questions": 0.0, "premature": 1.0}
    return {kind: {"by_turn": by_turn, "turns": 3.0, **kinds} for kind in ("true", "shuffled")}


def arm(success: float, shuffled: float) -> dict:
    found = judged([0.1, 0.2, success, 0.9, 0.9, 0.9])
    found["shuffled"]["by_turn"] = [0.1, 0.2, shuffled, 0.9, 0.9, 0.9]
    return {"judged": found, "tokens": 10, "cloned": None, "punished": 0.25}


def test_differences_are_paired_by_seed():
    results = {
        f"letter-{seed}": {
            "settings": {"topic": "letter", "seed": seed},
            "arms": {
                "start": arm(0.4 + level, 0.4 + level),
                "true": arm(0.7 + level, 0.3 + level),
                "shuffled": arm(0.5 + level + (0.1 if seed else -0.1), 0.5),
            },
        }
        for seed, level in enumerate((0.0, 0.2))
    }
    rows = {row["arm"]: row for row in summarise(results)}
    assert rows["true"]["success"][0] == pytest.approx(0.8)
    assert rows["true"]["from_start"]["mean"] == pytest.approx(0.3)
    assert rows["true"]["from_start"]["half"] == pytest.approx(0.0, abs=1e-9)  # the level of a seed cancels
    assert rows["true"]["heeded"]["mean"] == pytest.approx(0.4)
    assert rows["true"]["heeded_from_start"]["mean"] == pytest.approx(0.4)
    assert rows["true"]["from_shuffled"]["mean"] == pytest.approx(0.2)
    assert rows["true"]["from_shuffled"]["half"] > 1.0  # two seeds that disagree by 0.2
    assert "from_shuffled" not in rows["shuffled"]
    assert rows["true"]["punished"] == 0.25


def test_late_successes_with_an_advantage_below_zero_are_counted(tmp_path: Path):
    solved = [1, 2, None, 4, 3, None, None, 2]
    given = make_episodes(make_tiny_model(tmp_path / "m"), groups=1, size=8)
    episodes = [
        replace(
            one,
            response_ids=[5] * 8, loss_mask=[True, False] * 4, behaviour_logprobs=[0.0] * 8,
            turn_ids=sorted([*range(turn or 4), *[(turn or 4) - 1] * (8 - (turn or 4))]),
            reward=float(turn is not None),
        )
        for one, turn in zip(given, solved, strict=True)
    ]  # fmt: skip
    path = tmp_path / "shard.parquet"
    pq.write_table(pa.Table.from_pylist([asdict(one) for one in episodes], arrow_schema()), path)
    assert sampled_by(path) == {"tokens": 32, "successes": 5, "punished": 1}


def test_the_demonstrator_of_things_asks_nothing_and_that_of_letters_heeds_half():
    thing = demonstrated(environment(SETTINGS["thing"], "true", 4), 0.0, 100, 0)
    assert not any(is_question(action) for _, turns in thing for action, _ in turns)
    assert sum(turns[-1][1].reward for _, turns in thing) / 100 == pytest.approx(1 - (7 / 8) ** 4, abs=0.12)
    letter = demonstrated(environment(SETTINGS["letter"], "true", 3), 1.0, 100, 0)
    assert sum(turns[-1][1].reward for _, turns in letter) / 100 > 0.6


@pytest.mark.slow
def test_all_arms_of_a_topic_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(language_feedback, "HELD_OUT", 10)
    main(["--quick", "--topics", "letter", "--workers", "1", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["arm"] for row in found["rows"]] == ["start", "true", "shuffled", "single turn", "SFT"]
    assert all(row["by_turn"] == sorted(row["by_turn"]) for row in found["rows"])
    assert all(len(row["by_turn"]) == 6 for row in found["rows"])
    assert (tmp_path / "benchmarks/out/language_feedback.svg").exists()
