"""Baselines by playing, and games that are kept between steps, on a small game of our own."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from tasks.arena.environment import Step, Task, get
from tasks.arena.playing import Games, best_of, best_repeated, expert_baseline, mean_reward, play, random_play
from tasks.core.errors import UsageError


class Track:
    """Walk to the right end of a track whose length is the payload's: two steps right, more than that too far."""

    name, version, licence = "track", "1", "Apache-2.0"
    max_turns, max_new_tokens = 4, 4

    def tasks(self, split: str, n: int, seed: int) -> list[Task]:
        return [
            Task(f"track/{length}", "track", "1", "train", seed, f"{length}:", {"length": length})
            for length in (2, 2, 4, 9)[:n]
        ]

    def step(self, task: Task, actions: Sequence[str]) -> Step:
        place = actions.count("r")
        done = place == task.payload["length"] or len(actions) == self.max_turns
        return Step("", done, float(place == task.payload["length"]))

    def choices(self, task: Task) -> list[str]:
        return ["l", "r"]

    def constant_baseline(self, tasks: Sequence[Task]) -> tuple[str, float]:
        return best_repeated(self, tasks)

    def random_baseline(self, tasks: Sequence[Task], seed: int) -> float:
        return random_play(self, tasks, seed)

    def expert(self, task: Task, actions: Sequence[str]) -> str:
        return "r"


TRACK = Track()
TASKS = TRACK.tasks("train", 4, seed=0)


def test_the_constant_baseline_plays_every_action() -> None:
    assert TRACK.constant_baseline(TASKS) == ("r", 0.75)
    assert TRACK.constant_baseline(TASKS[3:]) == ("l", 0.0)


def test_the_random_baseline_is_near_the_exact_probability_and_repeats() -> None:
    # Two heads before the end of four tosses: 11 / 16.
    many = TASKS[:1] * 4000
    assert TRACK.random_baseline(many, seed=0) == pytest.approx(11 / 16, abs=0.03)
    assert TRACK.random_baseline(many, seed=0) == TRACK.random_baseline(many, seed=0)
    assert len({TRACK.random_baseline(TASKS[:1] * 50, seed=seed) for seed in range(5)}) > 1


def test_an_expert_is_measured_where_there_is_one() -> None:
    assert expert_baseline(TRACK, TASKS) == 0.75
    assert expert_baseline(get("largest"), TASKS) is None


def test_no_tasks_are_refused() -> None:
    for measure in (
        lambda: TRACK.constant_baseline([]),
        lambda: TRACK.random_baseline([], 0),
        lambda: mean_reward(TRACK, [], lambda task, actions: "r"),
        *(
            lambda name=name: get(name).random_baseline([], 0)
            for name in ("calculator", "largest", "reasoning_gym/gcd")
        ),
    ):
        with pytest.raises(UsageError, match="at least one task"):
            measure()


def test_no_actions_are_refused() -> None:
    with pytest.raises(UsageError, match="track names no actions"):
        best_of(TRACK, TASKS, [])


def test_an_environment_that_does_not_end_is_named() -> None:
    class Endless(Track):
        def step(self, task: Task, actions: Sequence[str]) -> Step:
            return Step("", done=False)

    with pytest.raises(UsageError, match="track did not end the task track/2 after 4 actions"):
        play(Endless(), TASKS[0], lambda actions: "r")


def test_what_is_kept_never_changes_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A game whose state depends on every action and their order, asked in a random order, with hardly any room."""
    monkeypatch.setattr("tasks.arena.playing._KEPT", 3)
    begun: list[int] = []

    def begin(seed: int) -> list[str]:
        begun.append(seed)
        return [str(seed)]

    games: Games[list[str]] = Games(begin, lambda game, action: game.append(action))
    rng = random.Random(0)
    for _ in range(500):
        seed, actions = rng.randrange(3), [rng.choice("ab") for _ in range(rng.randrange(5))]
        with games.after(seed, actions) as game:
            assert game == [str(seed), *actions]
    assert 0 < len(begun) < 500  # some were found again


def test_an_episode_is_played_once_from_its_beginning() -> None:
    begun: list[int] = []
    played: list[str] = []
    games: Games[list[str]] = Games(
        lambda seed: begun.append(seed) or [], lambda game, action: played.append(action)
    )
    for turn in range(10):
        with games.after(1, ["a"] * turn):
            pass
    assert (len(begun), len(played)) == (1, 9)


def test_a_game_that_fails_is_not_kept() -> None:
    def advance(game: list[str], action: str) -> None:
        game.append(action)
        if action == "bad":
            raise ValueError

    games: Games[list[str]] = Games(lambda seed: [], advance)
    with games.after(0, ["a"]):
        pass
    with pytest.raises(ValueError), games.after(0, ["a", "bad"]):  # noqa: PT011
        pass
    with games.after(0, ["a"]) as game:
        assert game == ["a"]
