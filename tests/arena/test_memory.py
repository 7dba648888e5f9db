from __future__ import annotations

import pickle

import pytest

from tasks.arena.environment import Batched, Expert, Hackable, Listed, Pictured, get, names, verifier_digest
from tasks.arena.guarded import Guarded
from tasks.arena.memory import Memory, memory_turns
from tasks.arena.playing import play
from tasks.core.errors import UsageError

ROOM = "minigrid/BabyAI-GoToLocalS5N2"


def test_it_is_the_environment_inside_under_another_name() -> None:
    inside, env = get(ROOM), get(f"memory_2/{ROOM}")
    assert env.name == f"memory_2/{ROOM}"
    assert memory_turns(env) == 2
    assert memory_turns(inside) is None
    theirs, ours = inside.tasks("heldout", 6, seed=3), env.tasks("heldout", 6, seed=3)
    assert [t.prompt for t in ours] == [t.prompt for t in theirs]
    assert [t.family for t in ours] == [t.family for t in theirs]
    assert {t.env for t in ours} == {env.name}
    assert not {t.id for t in ours} & {t.id for t in theirs}
    assert env.constant_baseline(ours) == inside.constant_baseline(theirs)
    assert env.random_baseline(ours, 1) == inside.random_baseline(theirs, 1)
    assert verifier_digest(env) == verifier_digest(inside)


def test_it_can_do_what_the_one_inside_can() -> None:
    env = get(f"memory_2/{ROOM}")
    assert isinstance(env, Expert)
    assert isinstance(env, Listed)
    assert isinstance(env, Pictured)
    assert not isinstance(env, Batched | Hackable)
    task = env.tasks("train", 1, seed=0)[0]
    assert play(env, task, lambda actions: env.expert(task, actions))[-1].reward == 1
    assert env.picture(task, []).shape[-1] == 3
    assert isinstance(get("memory_1/safety/leaky_tool"), Hackable)


def test_it_survives_a_guard() -> None:
    env = pickle.loads(pickle.dumps(get(f"memory_3/{ROOM}")))
    assert memory_turns(env) == 3
    with Guarded(env) as guarded:
        assert memory_turns(guarded) == 3
        task = guarded.tasks("train", 1, seed=0)[0]
        assert guarded.step(task, ["left"]) == env.step(task, ["left"])


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (f"memory_0/{ROOM}", "memory_1/minigrid"),
        (f"memory_99999/{ROOM}", "at most 32767"),
        (f"memory_02/{ROOM}", "There is no environment"),
        (f"memory_\uff12/{ROOM}", "There is no environment"),
        (f"memory_{'9' * 5000}/{ROOM}", "There is no environment"),
        (f"memory_2/memory_2/{ROOM}", "has a memory already"),
        ("memory_2/minigrid/BabyAI-GoToLokal", "There is no environment 'minigrid/BabyAI-GoToLokal'"),
        (f"memory_two/{ROOM}", "There is no environment"),
    ],
)
def test_names_that_are_none(name: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        get(name)


def test_one_of_ones_own_by_its_path() -> None:
    env = get("memory_2/tests.arena.own_worlds:lake")
    assert isinstance(env, Memory)
    assert env.inside.name == "tests.arena.own_worlds:lake"


def test_memories_are_not_listed() -> None:
    assert not [name for name in names() if name.startswith("memory_")]
