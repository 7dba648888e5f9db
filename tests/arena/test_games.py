"""Games of textarena and rooms of MiniGrid, played for real."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.arena import environment
from tasks.arena.environment import Environment, Expert, Listed, Pictured, Step, Task, get, split_of
from tasks.arena.playing import expert_baseline, play
from tasks.core.errors import Unavailable, UsageError
from tasks.replay.schema import arrow_schema
from tasks.reward.verifier import replay
from tasks.rollout.rollout import BehaviourIdentity, rollout
from tests.tiny import make_tiny_model

pytest.importorskip("textarena")
pytest.importorskip("minigrid")

NAMES = [name for name in environment.names() if name.startswith(("textarena/", "minigrid/"))]
ROOT = Path(__file__).parents[2]
FEW = 6  # tasks; the smallest held-out split has more


@pytest.fixture(scope="module", params=NAMES)
def env(request: pytest.FixtureRequest) -> Environment:
    return get(request.param)


def at_random(env: Environment, task: Task, seed: int) -> tuple[list[str], list[Step]]:
    """An episode of possible and impossible actions, and some that are none."""
    rng = random.Random(seed)
    assert isinstance(env, Listed)
    words = [*env.choices(task), "", "up and down", "[up]", "9 9", "forward forward"]
    actions: list[str] = []

    def policy(before: Sequence[str]) -> str:
        actions.append(" " + rng.choice(words))
        return actions[-1]

    return actions, play(env, task, policy)


def test_every_chosen_game_is_there() -> None:
    games = {
        "2048",
        "FrozenLake",
        "GuessTheNumber",
        "LightsOut",
        "Mastermind",
        "Minesweeper",
        "Sokoban",
        "TowerOfHanoi",
    }
    assert {f"textarena/{game}" for game in games} <= set(NAMES)
    assert {"minigrid/BabyAI-GoToRedBallGrey", "minigrid/DoorKey-5x5", "minigrid/Fetch-5x5-N2"} <= set(NAMES)


def test_tasks_are_distinct_repeat_and_keep_to_their_split(env: Environment) -> None:
    tasks = env.tasks("train", FEW, seed=3)
    assert tasks == get(env.name).tasks("train", FEW, seed=3)
    assert tasks[:2] == env.tasks("train", 2, seed=3)
    assert tasks != env.tasks("train", FEW, seed=4)
    heldout = env.tasks("heldout", FEW, seed=3)
    assert (
        len({task.id for task in tasks + heldout})
        == len({task.prompt for task in tasks + heldout})
        == 2 * FEW
    )
    assert {split_of(task.prompt) for task in heldout} == {"heldout"}


def test_prompts_are_short(env: Environment) -> None:
    for task in env.tasks("train", FEW, seed=0):
        assert len(task.prompt) < 450
        assert task.prompt.endswith(":")


def test_an_episode_is_a_function_of_its_actions(env: Environment) -> None:
    """Step by step, from its end alone, and by another object in another order: the same observations and rewards."""
    for task in env.tasks("train", 2, seed=5):
        episodes = [at_random(env, task, seed) for seed in range(3)]
        other = get(env.name)
        for actions, steps in reversed(episodes):
            assert other.step(task, actions) == steps[-1]
        for turn in range(env.max_turns):  # the three episodes in turns, as a rollout does
            for actions, steps in episodes:
                if turn < len(steps):
                    assert env.step(task, actions[: turn + 1]) == steps[turn]


def test_rewards_and_components_are_shares(env: Environment) -> None:
    for seed, task in enumerate(env.tasks("train", 4, seed=7)):
        actions, steps = at_random(env, task, seed)
        assert len(actions) <= env.max_turns
        end = steps[-1]
        assert set(end.components) == {"valid_format", "valid_action", "success", "score"}
        assert all(0 <= share <= 1 for share in end.components.values())
        assert end.components["valid_action"] <= end.components["valid_format"]
        assert end.reward == end.components["success"]
        assert isinstance(env, Listed)
        formatted = sum(action.strip() in env.choices(task) for action in actions) / len(actions)
        assert end.components["valid_format"] == pytest.approx(formatted)


def test_nonsense_only_takes_its_turns(env: Environment) -> None:
    task = env.tasks("train", 1, seed=0)[0]
    steps = play(env, task, lambda actions: "nonsense " * 50)
    assert len(steps) == env.max_turns
    assert (
        steps[-1].reward == steps[-1].components["valid_format"] == steps[-1].components["valid_action"] == 0
    )
    assert len({step.observation for step in steps[:-1]}) == 1  # nothing has changed


def test_the_expert_solves_every_task(env: Environment) -> None:
    if isinstance(env, Expert):
        assert expert_baseline(env, env.tasks("heldout", FEW, seed=1)) == 1.0
    else:
        assert env.name in {
            "textarena/2048",
            "textarena/Minesweeper",
            "minigrid/DoorKey-5x5",
            "minigrid/DoorKey-6x6",
            "minigrid/Empty-Random-6x6",
            "minigrid/Fetch-5x5-N2",
        }


@pytest.mark.parametrize(
    ("name", "beginning"),
    [
        ("minigrid/BabyAI-GoToLocalS5N2", ["nonsense", "left"]),
        ("textarena/TowerOfHanoi", ["nonsense", "A B"]),
        ("textarena/GuessTheNumber", ["0"]),
    ],
)
def test_the_expert_comes_back_from_a_strange_beginning(name: str, beginning: list[str]) -> None:
    env = get(name)
    assert isinstance(env, Expert)
    for task in env.tasks("train", FEW, seed=2):
        actions = list(beginning)
        while not (step := env.step(task, actions)).done:
            actions.append(env.expert(task, actions))
        assert step.reward == 1.0
        assert step.components["valid_format"] < 1.0


def test_an_expert_says_when_nothing_can_be_done() -> None:
    room = get("minigrid/BabyAI-GoToLocalS5N2")
    assert isinstance(room, Expert)
    with pytest.raises(UsageError, match="is over after 10 actions"):
        room.expert(room.tasks("train", 1, seed=0)[0], ["left"] * 10)
    for task, actions in _boxes_in_corners():
        with pytest.raises(UsageError, match="cannot be solved any more after"):
            get("textarena/Sokoban").expert(task, actions)  # type: ignore[attr-defined]


def _boxes_in_corners() -> list[tuple[Task, list[str]]]:
    """Beginnings of Sokoban episodes in which the box stands in a corner that is not its goal."""
    env = get("textarena/Sokoban")
    rng = random.Random(0)
    found = []
    for task in env.tasks("train", 10, seed=0) * 10:
        actions: list[str] = []
        while len(actions) < env.max_turns - 1:
            actions.append(rng.choice(("up", "down", "left", "right")))
            step = env.step(task, actions)
            if step.done:
                break
            rows = step.observation.removeprefix("not possible\n").split("\n")[:6]
            r, c = next((r, c) for r in range(6) for c in range(6) if rows[r][c] == "$")
            if "#" in rows[r - 1][c] + rows[r + 1][c] and "#" in rows[r][c - 1] + rows[r][c + 1]:
                found.append((task, list(actions)))
                break
    assert found
    return found[:3]


def test_baselines_are_better_than_nothing_and_worse_than_the_expert() -> None:
    env = get("textarena/Sokoban")
    tasks = env.tasks("heldout", 12, seed=0)
    action, constant = env.constant_baseline(tasks)
    assert action in ("up", "down", "left", "right")
    assert constant == sum(play(env, t, lambda _: action)[-1].reward for t in tasks) / len(tasks)
    assert constant < 1
    assert 0 <= env.random_baseline(tasks, seed=0) < 1


def test_rewards_are_found_again_in_the_text(env: Environment) -> None:
    task = env.tasks("train", 1, seed=9)[0]
    actions, steps = at_random(env, task, seed=1)
    text = "".join(f"{a}\n{step.observation}" for a, step in zip(actions, steps, strict=True))
    assert replay(env, task, text) == steps[-1].reward


def test_python_s_generator_is_left_alone(env: Environment) -> None:
    random.seed(1)
    before = random.getstate()
    task = env.tasks("train", 1, seed=0)[0]
    at_random(env, task, seed=0)
    assert random.getstate() == before


def test_hidden_things_are_not_in_the_prompt() -> None:
    env = get("textarena/GuessTheNumber")
    tasks = env.tasks("train", 30, seed=0)
    solved = {task.id: play(env, task, lambda a, t=task: env.expert(t, a)) for task in tasks}  # type: ignore[attr-defined]
    assert (
        len({len(steps) for steps in solved.values()}) > 2
    )  # the number is at different places of the range


def test_a_mine_ends_the_game_and_a_second_opening_does_not() -> None:
    env = get("textarena/Minesweeper")
    task = env.tasks("train", 1, seed=0)[0]
    assert isinstance(env, Listed)
    firsts = {cell: env.step(task, [cell]) for cell in env.choices(task)}
    lost = [step for step in firsts.values() if step.done and not step.reward]
    refused = [step for step in firsts.values() if step.observation.startswith("not possible\n")]
    assert len(lost) == 3
    assert all(step.components["valid_action"] == 1 for step in lost)
    rows = task.prompt.split("\n")[-5:-1]
    assert len(refused) == sum(cell != "." for row in rows for cell in row[2:])


def test_a_hole_ends_the_game_and_a_wall_does_not() -> None:
    env = get("textarena/FrozenLake")
    for task in env.tasks("train", 20, seed=0):
        rows = task.prompt.split("\n")[-5:-1]
        (row, column) = next((r, c) for r in range(4) for c in range(4) if rows[r][c] == "P")
        for action, (down, right) in {
            "up": (-1, 0),
            "down": (1, 0),
            "left": (0, -1),
            "right": (0, 1),
        }.items():
            r, c = row + down, column + right
            step = env.step(task, [action])
            if not (0 <= r < 4 and 0 <= c < 4):
                assert step.observation.startswith("not possible\n")
            else:
                assert step.done == (rows[r][c] in "HG")


def test_pictures_show_the_state() -> None:
    env = get("minigrid/BabyAI-GoToRedBallGrey")
    assert isinstance(env, Pictured)
    task = env.tasks("train", 1, seed=0)[0]
    first, turned = env.picture(task, []), env.picture(task, ["left"])
    assert first.dtype == np.uint8
    assert first.shape == (8 * 16, 8 * 16, 3)
    assert (first != turned).any()
    np.testing.assert_array_equal(env.picture(task, []), first)
    np.testing.assert_array_equal(env.picture(task, ["left", "right"]), first)
    assert ((first == (255, 0, 0)).all(axis=-1)).any()  # the red ball (or the red agent)
    assert not isinstance(get("textarena/Sokoban"), Pictured)


def test_the_codes_of_a_view_are_those_of_minigrid() -> None:
    from minigrid.core.constants import OBJECT_TO_IDX, STATE_TO_IDX

    from tasks.arena import minigrid_rooms as rooms

    codes = (rooms._UNSEEN, rooms._EMPTY, rooms._WALL, rooms._DOOR, rooms._GOAL)
    assert codes == tuple(OBJECT_TO_IDX[kind] for kind in ("unseen", "empty", "wall", "door", "goal"))
    assert STATE_TO_IDX == {"open": 0, "closed": 1, "locked": 2}


def test_keys_are_carried_and_doors_opened() -> None:
    """In two hundred random episodes all of it is seen."""
    env = get("minigrid/DoorKey-5x5")
    assert isinstance(env, Listed)
    rng = random.Random(0)
    texts = set()
    for task in env.tasks("train", 10, seed=0) * 20:
        choices = env.choices(task)
        for step in play(env, task, lambda actions, c=choices: rng.choice(c)):
            texts.update(step.observation.split("\n"))
    assert "carry: yellow key" in texts
    assert any("locked yellow door" in text for text in texts)
    assert any("open yellow door" in text for text in texts)


def test_a_view_tells_where_things_are() -> None:
    """Turning by four quarters comes back to the same text; what is ahead is on the right after a turn to the left."""
    env = get("minigrid/Fetch-5x5-N2")
    for task in env.tasks("train", 5, seed=1):
        first = "see: " + task.prompt.partition("\nsee: ")[2]
        assert env.step(task, ["left"] * 4).observation == first
        assert env.step(task, ["left", "right"]).observation == first


def test_importing_prints_nothing_and_needs_no_network() -> None:
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise SystemExit('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from tasks.arena.environment import get, names\n"
        "import sys; assert 'textarena' not in sys.modules and 'minigrid' not in sys.modules\n"
        "names()\n"
        "assert 'textarena' not in sys.modules and 'minigrid' not in sys.modules\n"
        "for name in ('textarena/Mastermind', 'minigrid/BabyAI-PickupDist'):\n"
        "    env = get(name); task = env.tasks('train', 20, 0)[0]; env.step(task, ['left'])\n"
    )
    plain = {
        k: v for k, v in os.environ.items() if k not in ("SDL_VIDEODRIVER", "PYGAME_HIDE_SUPPORT_PROMPT")
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=plain, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("package", ["textarena", "minigrid"])
def test_a_package_that_is_not_installed_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment.find_spec
    monkeypatch.setattr(environment, "find_spec", lambda name: None if name == package else found(name))
    assert not any(name.startswith(f"{package}/") for name in environment.names())
    with pytest.raises(Unavailable, match=rf"needs the package {package}.*install forebay\[arena\]"):
        get(f"{package}/Sokoban")
    with pytest.raises(UsageError, match="nearest name"):
        get("calcualtor")


def test_a_model_plays_groups_of_each(env: Environment, model: tuple) -> None:
    tasks = env.tasks("train", 2, seed=0)
    groups = list(
        rollout(
            *model,
            env,
            tasks,
            group_size=2,
            temperature=1.0,
            seed=0,
            batch_rows=4,
            identity=BehaviourIdentity("agent/1", "a" * 64, "b" * 64, "c" * 64),
            created_at="2026-01-01T00:00:00+00:00",
        )
    )
    rows = [{name: getattr(e, name) for name in arrow_schema().names} for group in groups for e in group]
    table = pa.Table.from_pylist(rows, schema=arrow_schema())
    table.validate(full=True)
    assert table.num_rows == 4
    for group, task in zip(groups, tasks, strict=True):
        for episode in group:
            assert episode.finish_reason in ("done", "length", "turns")
            assert episode.env == env.name
            assert len(episode.response_ids) == len(episode.loss_mask) == len(episode.turn_ids)
            assert max(episode.turn_ids) < env.max_turns
            assert replay(env, task, episode.response_text) == episode.reward


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    path = make_tiny_model(tmp_path_factory.mktemp("games") / "tiny")
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(
        path
    )
