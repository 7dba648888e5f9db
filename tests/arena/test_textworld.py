"""Games of TextWorldExpress, played for real, and the end of every Java machine."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tasks.arena import environment, textworld_games
from tasks.arena.environment import Expert, Step, Task, get, split_of
from tasks.arena.guarded import Guarded
from tasks.arena.playing import expert_baseline, play
from tasks.arena.textworld_games import GAMES, TextWorld
from tasks.core.errors import Unavailable, UsageError
from tasks.reward.verifier import replay

pytest.importorskip("textworld_express")
pytest.importorskip("py4j")
if shutil.which("java") is None:
    pytest.skip("there is no Java here", allow_module_level=True)

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=GAMES, scope="module")
def env(request: pytest.FixtureRequest) -> TextWorld:
    made = get(f"textworld/{request.param}")
    assert isinstance(made, TextWorld)
    return made


def at_random(env: TextWorld, task: Task, seed: int) -> tuple[list[str], list[Step]]:
    rng = random.Random(seed)
    actions: list[str] = []

    def policy(before: Sequence[str]) -> str:
        actions.append(" " + rng.choice([*env.possible(task, before), "dance"]))
        return actions[-1]

    return actions, play(env, task, policy)


def test_tasks_are_distinct_repeat_and_keep_to_their_split(env: TextWorld) -> None:
    tasks = env.tasks("heldout", 5, seed=3)
    assert tasks == get(env.name).tasks("heldout", 5, seed=3)
    assert {split_of(task.prompt) for task in tasks} == {"heldout"}
    assert len({task.id for task in tasks}) == 5
    assert all(task.prompt.endswith("\nact:") and len(task.prompt) < 1300 for task in tasks)


def test_an_episode_is_a_function_of_its_actions(env: TextWorld) -> None:
    """Three samples of one level side by side, from the end alone, and by another object: the same all ways."""
    for task in env.tasks("train", 2, seed=5):
        episodes = [at_random(env, task, seed) for seed in range(3)]
        other = get(env.name)
        for actions, steps in reversed(episodes):
            assert other.step(task, actions) == steps[-1]
        for turn in range(env.max_turns):
            for actions, steps in episodes:
                if turn < len(steps):
                    assert env.step(task, actions[: turn + 1]) == steps[turn]


def test_only_what_is_possible_is_valid_and_nonsense_takes_its_turns(env: TextWorld) -> None:
    task = env.tasks("train", 1, seed=7)[0]
    actions, steps = at_random(env, task, 0)
    assert [step.valid for step in steps] == [action != " dance" for action in actions]
    assert steps[-1].components["valid_action"] == pytest.approx(sum(s.valid for s in steps) / len(steps))
    nonsense = play(env, task, lambda before: "dance")
    assert (len(nonsense), nonsense[-1].reward, nonsense[-1].valid) == (env.max_turns, 0.0, False)
    assert len({step.observation for step in nonsense[:-1]}) == 1
    assert nonsense[0].observation.startswith("not possible\nactions: ")


def test_the_gold_path_solves_every_task_and_leaving_it_is_said(env: TextWorld) -> None:
    tasks = env.tasks("heldout", 6, seed=1)
    if env.game == "coin":
        assert not isinstance(env, Expert)
        return
    assert isinstance(env, Expert)
    assert expert_baseline(env, tasks) == 1.0
    with pytest.raises(UsageError, match="left the gold path"):
        env.expert(tasks[0], ["dance"])


def test_baselines_are_worse_than_the_expert() -> None:
    env = get("textworld/twc")
    tasks = env.tasks("heldout", 6, seed=0)
    action, constant = env.constant_baseline(tasks)
    assert constant == sum(play(env, t, lambda _: action)[-1].reward for t in tasks) / len(tasks) < 1
    assert env.random_baseline(tasks, 0) == env.random_baseline(tasks, 0) < 1
    with pytest.raises(UsageError, match="at least one task"):
        env.constant_baseline([])


def test_rewards_are_found_again_in_the_text() -> None:
    env = get("textworld/coin")
    assert isinstance(env, TextWorld)
    task = env.tasks("train", 1, seed=9)[0]
    actions, steps = at_random(env, task, 1)
    text = "".join(f"{a}\n{step.observation}" for a, step in zip(actions, steps, strict=True))
    assert replay(env, task, text) == steps[-1].reward


def test_a_machine_that_was_killed_is_replaced() -> None:
    env = get("textworld/simonsays")
    task = env.tasks("train", 1, seed=0)[0]
    before = env.step(task, ["dance"])
    machine = textworld_games._machine()
    os.kill(machine.process.pid, signal.SIGKILL)
    machine.process.wait()
    assert env.step(task, ["dance"]) == before
    assert textworld_games._machine() is not machine


def test_a_guard_has_machines_of_its_own_and_ends_them() -> None:
    env = get("textworld/simonsays")
    task = env.tasks("train", 1, seed=0)[0]
    assert isinstance(env, Expert)
    actions: list[str] = []
    while not (actions and env.step(task, actions).done):
        actions.append(env.expert(task, actions))
    before = set(_machines())
    with Guarded(env, workers=2) as guarded:
        turns = [(task, actions[: i + 1]) for i in range(len(actions))]
        assert guarded.steps(turns) == [env.step(*turn) for turn in turns]
        started = set(_machines()) - before
        assert len(started) >= 2
    _gone(started)
    assert set(_machines()) == before


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_no_machine_outlives_its_process(end: str) -> None:
    code = (
        "import os, sys, signal\n"
        "from tasks.arena.environment import get\n"
        "from tasks.arena import textworld_games\n"
        "env = get('textworld/simonsays'); task = env.tasks('train', 3, 0)[0]; env.step(task, ['dance'])\n"
        "print(textworld_games._machine().process.pid, flush=True)\n"
        "if sys.argv[1] == 'kill': os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, end], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.returncode == (0 if end == "exit" else -signal.SIGKILL)
    _gone([int(done.stdout)])


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(
            environment, "find_spec", lambda name: None if name == "textworld_express" else found(name)
        )
        assert not any(name.startswith("textworld/") for name in environment.names())
        with pytest.raises(Unavailable, match=r"needs the package textworld_express.*pip install --no-deps"):
            get("textworld/coin")
    monkeypatch.setattr(textworld_games, "_MACHINES", [])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(Unavailable, match="need Java 11 or newer"):
        get("textworld/coin").tasks("train", 1, 0)


def _machines() -> list[int]:
    """The Java machines among our descendants."""
    return [child.pid for child in psutil.Process().children(recursive=True) if child.name() == "java"]


def _gone(pids: Sequence[int]) -> None:
    end = time.monotonic() + 20
    while any(
        psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids
    ):
        assert time.monotonic() < end, "a Java machine is still there"
        time.sleep(0.05)
