"""Gymnasium's environments as text, the ready ones and a user's own, played for real."""

from __future__ import annotations

import pickle
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from tasks.arena import environment
from tasks.arena.environment import Environment, Listed, Step, Task, get, split_of, verifier_digest
from tasks.arena.guarded import Guarded
from tasks.arena.playing import mean_reward, play
from tasks.arena.solvers import shortest
from tasks.core.errors import Unavailable, UsageError

pytest.importorskip("gymnasium")

OWN = "tests.arena.own_worlds"
NAMES = ["gymnasium/CartPole-v1", "gymnasium/FrozenLake-v1", "gymnasium/Taxi-v4", f"{OWN}:counter"]


@pytest.fixture(params=NAMES)
def env(request: pytest.FixtureRequest) -> Environment:
    return get(request.param)


def at_random(env: Environment, task: Task, seed: int) -> tuple[list[str], list[Step]]:
    rng = random.Random(seed)
    assert isinstance(env, Listed)
    words = [*env.choices(task), "jump"]
    actions: list[str] = []

    def policy(before: Sequence[str]) -> str:
        actions.append(" " + rng.choice(words))
        return actions[-1]

    return actions, play(env, task, policy)


def test_tasks_are_distinct_repeat_and_keep_to_their_split(env: Environment) -> None:
    n = 2 if env.name.endswith("counter") else 6  # nine starts in all
    tasks = env.tasks("train", n, seed=3)
    assert tasks == get(env.name).tasks("train", n, seed=3)
    assert len({task.prompt for task in tasks}) == n
    assert {split_of(task.prompt) for task in tasks} == {"train"}
    assert {(task.env, task.env_version) for task in tasks} == {(env.name, env.version)}


def test_an_episode_is_a_function_of_its_seed_and_actions(env: Environment) -> None:
    for task in env.tasks("train", 2, seed=5):
        episodes = [at_random(env, task, seed) for seed in range(3)]
        other = pickle.loads(pickle.dumps(env))
        for actions, steps in reversed(episodes):
            assert other.step(task, actions) == steps[-1]
            assert [env.step(task, actions[: i + 1]) for i in range(len(actions))] == steps


def test_rewards_are_shares_and_only_words_of_the_world_are_valid(env: Environment) -> None:
    for seed, task in enumerate(env.tasks("train", 2, seed=7)):
        actions, steps = at_random(env, task, seed)
        end = steps[-1]
        assert 0 <= end.reward <= 1
        assert set(end.components) == {"valid_format", "success", "score"}
        assert end.components["success"] == float(end.reward == 1.0)
        assert [step.valid for step in steps] == [action.strip() != "jump" for action in actions]
        assert end.components["valid_format"] == pytest.approx(sum(step.valid for step in steps) / len(steps))
    nonsense = play(env, task, lambda actions: "jump")
    assert len(nonsense) == env.max_turns
    assert len({step.observation for step in nonsense[:-1]}) == 1
    assert nonsense[-1].reward == 0.0


def test_a_pole_is_kept_upright_by_a_rule_that_reads_the_text() -> None:
    env = get("gymnasium/CartPole-v1")
    tasks = env.tasks("heldout", 10, seed=0)

    def rule(task: Task, actions: Sequence[str]) -> str:
        seen = env.step(task, actions).observation if actions else task.prompt
        angle, turning = (float(seen.split(word)[-1].split()[0].rstrip(",")) for word in ("pole", "turning"))
        return "right" if angle + turning > 0 else "left"

    assert env.constant_baseline(tasks)[1] < 0.3
    assert mean_reward(env, tasks, rule) == 1.0


def test_a_taxi_gets_there_by_what_the_prompt_says() -> None:
    """Plan by the words alone: where the taxi is, where the walls stand."""
    env = get("gymnasium/Taxi-v4")
    corners = {"R": (0, 0), "G": (0, 4), "Y": (4, 0), "B": (4, 3)}
    walls = {(0, 1), (1, 1), (3, 0), (4, 0), (3, 2), (4, 2)}  # east of these cells
    moves = {"south": (1, 0), "north": (-1, 0), "east": (0, 1), "west": (0, -1)}

    def around(cell: tuple[int, int]) -> list[tuple[str, tuple[int, int]]]:
        found = []
        for word, (down, right) in moves.items():
            there = (cell[0] + down, cell[1] + right)
            barred = (word == "east" and cell in walls) or (word == "west" and there in walls)
            if 0 <= there[0] < 5 and 0 <= there[1] < 5 and not barred:
                found.append((word, there))
        return found

    for task in env.tasks("heldout", 20, seed=0):
        words = task.prompt.split("\n")[-2].replace(",", "").split()
        start, passenger, goal = (int(words[1]), int(words[2])), corners[words[4]], corners[words[6]]
        there = shortest(start, around, lambda cell, at=passenger: cell == at)
        back = shortest(passenger, around, lambda cell, at=goal: cell == at)
        assert there is not None
        assert back is not None
        end = play(env, task, lambda actions, way=[*there, "pickup", *back, "dropoff"]: way[len(actions)])[-1]
        assert (end.reward, end.components["success"]) == (1.0, 1.0)


def test_a_factory_brings_a_world_of_ones_own() -> None:
    env = get(f"{OWN}:lake")
    task = env.tasks("train", 1, seed=0)[0]
    way = ["down", "down", "right", "right", "down", "right"]
    assert [env.step(task, way[: i + 1]).done for i in range(6)] == [False] * 5 + [True]
    assert env.step(task, way).reward == 1.0
    assert env.step(task, ["right"]).observation.startswith(".P..\n")
    counted = get(f"{OWN}:counter")
    task = counted.tasks("train", 1, seed=0)[0]
    start = task.prompt.count("#")
    assert counted.step(task, ["up"] * (12 - start)).reward == 1.0  # 2.0, cut
    assert counted.step(task, ["down"] * start).reward == 0.0


def test_how_a_world_is_told_and_judged_is_in_its_version() -> None:
    from tasks.arena.gymnasium_adapter import WORLDS, Gymnasium, ended

    world = WORLDS["CartPole-v1"]
    same, other, shorter = (
        Gymnasium("x", w).version for w in (world, replace(world, reward=ended), replace(world, max_turns=9))
    )
    assert same == Gymnasium("x", replace(world)).version
    assert len({same, other, shorter}) == 3
    assert verifier_digest(Gymnasium("x", world)) != verifier_digest(
        Gymnasium("x", replace(world, reward=ended))
    )


def test_any_registered_world_is_told_by_its_numbers() -> None:
    env = get("gymnasium/CartPole-v0")
    task = env.tasks("train", 1, seed=0)[0]
    assert env.max_turns == 200
    line = task.prompt.split("\n")[-2]
    assert len([float(x) for x in line.split()]) == 4
    assert env.step(task, ["1", "0"]).valid


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gymnasium/Nope-v1", "Gymnasium has no environment 'Nope-v1'.*ready for use are CartPole-v1"),
        ("gymnasium/Pendulum-v1", "only discrete ones can be written as words"),
        ("gymnasium/Acrobot-v1", "write a factory"),
        ("no.such.module:make", "ModuleNotFoundError.*with its folder on PYTHONPATH"),
        (f"{OWN}:nobody", "AttributeError"),
        (f"{OWN}:broken", "RuntimeError: no licence key"),
        (f"{OWN}:number", "type int, which is no Environment: it lacks constant_baseline, licence"),
        (f"{OWN}:nameless", f"calls itself 'largest'; its name must be '{OWN}:nameless'"),
        ("own_worlds", r"nearest name is .*package\.module:factory \(docs/environments\.md#your-own\)"),
    ],
)
def test_what_cannot_be_brought_is_refused_in_a_sentence(name: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        get(name)


def test_a_picture_is_no_text() -> None:
    import numpy as np

    from tasks.arena.gymnasium_adapter import numbers

    assert numbers(None, {"place": np.array([0.12345, 2.0]), "goal": (3, 4)}) == "place: 0.123 2, goal: 3 4"
    with pytest.raises(UsageError, match="12288 numbers is no text"):
        numbers(None, np.zeros((64, 64, 3)))


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment.find_spec
    monkeypatch.setattr(environment, "find_spec", lambda name: None if name == "gymnasium" else found(name))
    assert not any(name.startswith("gymnasium/") for name in environment.names())
    with pytest.raises(Unavailable, match=r"needs the package gymnasium.*install forebay\[arena\]"):
        get("gymnasium/CartPole-v1")


def test_it_works_behind_a_guard(env: Environment) -> None:
    task = env.tasks("train", 1, seed=0)[0]
    actions, steps = at_random(env, task, seed=2)
    with Guarded(env) as guarded:
        assert guarded.step(task, actions) == steps[-1]
