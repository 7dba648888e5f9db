"""One cell, for real and small: a start from demonstrations, training on fresh groups, figures on held-out tasks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tasks.arena.environment import draw_up_to, get, tasks_digest
from tasks.arena.guarded import Guarded, Limits
from tasks.core.digest import digest_tree
from tasks.core.errors import Refused, UsageError
from tasks.leaderboard import cell
from tasks.leaderboard.cell import Plan, as_job, from_job, heldout_of, run_cell
from tasks.leaderboard.methods import METHODS, coordinates, training_settings
from tasks.leaderboard.settings import Arena, Judging, Method, Recipe, Start
from tasks.leaderboard.starter import demonstrations, start_from_own, start_from_scratch
from tasks.training.curve import read_curve
from tasks.training.settings import Guards
from tasks.training.trainer import check
from tests.leaderboard import doors

ENV = "minigrid/BabyAI-GoToLocalS5N2"
ARENA = Arena(
    start=Start(hidden=32, layers=1, heads=2, vocabulary=400, demonstrations=64, steps=40),
    recipe=Recipe(steps=4, groups_per_step=2, group_size=4, first_groups=8),
    judging=Judging(tasks=6, samples=2),
)


def plan(method: str = "sampo", seed: int = 0, arena: Arena = ARENA) -> Plan:
    return Plan(ENV, method, METHODS[method], seed, arena, None, None, "code")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_one_that_the_trainer_accepts(name: str):
    check(training_settings(METHODS[name], Recipe()))


def test_the_dimensions_are_independent_and_sampo_is_their_combination():
    sampo, grpo = (training_settings(METHODS[name], Recipe(format_penalty=0.2)) for name in ("sampo", "grpo"))
    assert (sampo.objective, sampo.unit, sampo.advantage) == ("sampo", "turn", "gigpo")
    assert sampo.admission.min_reward_std == 0.0
    assert grpo.admission.min_reward_std is None
    assert (sampo.mixture.tries, grpo.mixture.tries) == (3, 1)
    assert sampo.advantage_options == grpo.advantage_options == {"penalty": 0.2}
    swapped = METHODS["grpo"].model_copy(update={"advantage": "gigpo"})
    assert training_settings(swapped, Recipe(format_penalty=0.2)) == grpo.model_copy(
        update={"advantage": "gigpo"}
    )


def test_coordinates_are_equal_where_the_settings_are():
    placed = {name: coordinates(method) for name, method in METHODS.items()}
    assert placed["grpo_sm"] == placed["grpo"] | {
        "clipping": "grpo eps_lo=0.2, eps_hi=0.2, unit turn, mask 0.223"
    }
    assert placed["grpo_st"] == placed["grpo"] | {"aggregation": "seq-mean-token-mean"}
    assert placed["vespo"]["clipping"] == "vespo unit trajectory"
    assert placed["dapo"]["filtering"] == "yes"
    own = Method(advantage="gigpo", advantage_options={"omega": 0.5})
    assert coordinates(own)["advantage"] == "gigpo omega=0.5"
    assert len({tuple(each.values()) for each in placed.values()}) == len(METHODS)


def test_what_a_cell_does_about_a_collapse_is_the_recipes_and_part_of_its_key():
    assert training_settings(METHODS["grpo"], Recipe()).guards == Guards()
    stopped = Recipe(**ARENA.recipe.model_dump() | {"collapse": "stop"})
    assert training_settings(METHODS["grpo"], stopped).guards == Guards(collapse="stop")
    other = plan(arena=ARENA.model_copy(update={"recipe": stopped}))
    assert other.start_key() == plan().start_key()
    assert other.key() != plan().key()
    with pytest.raises(ValueError, match="collapse"):
        Recipe(collapse="pray")


def test_the_named_combinations_are_their_parts():
    """`_sm` changes the mask and nothing else; DAPO with GiGPO changes the advantage alone."""
    for base, mask in (("grpo", 0.223), ("sapo", 3e-3), ("cispo", 3e-3)):
        plain, masked = (training_settings(METHODS[name], Recipe()) for name in (base, f"{base}_sm"))
        assert plain.correction.sequence_mask is None
        assert masked.correction.sequence_mask == mask
        assert masked.model_copy(update={"correction": plain.correction}) == plain
    dapo, both = (training_settings(METHODS[name], Recipe()) for name in ("dapo", "dapo_gigpo"))
    assert (both.objective, both.options, both.advantage) == (
        "dapo",
        {"eps_lo": 0.2, "eps_hi": 0.28},
        "gigpo",
    )
    assert both.admission.min_reward_std == 0.0
    assert both.model_copy(update={"advantage": dapo.advantage}) == dapo


def own_advantage(outcomes, *, scale: float = 1.0, penalty: float = 0.0):
    return scale * (outcomes.rewards[outcomes.trajectory] - penalty * (~outcomes.valid).double())


@pytest.mark.parametrize(
    ("advantage", "given"),
    [
        ("empg_per_turn", {"penalty": 0.2}),
        ("group_norm_to_go", {"penalty": 0.2}),
        (f"{__name__}:own_advantage", {"penalty": 0.2}),
        ("empg", {}),
        ("group_norm", {}),
    ],
)
def test_the_format_penalty_goes_to_every_advantage_that_has_one(advantage, given):
    settings = training_settings(Method(advantage=advantage), Recipe(format_penalty=0.2))
    assert settings.advantage_options == given
    own = Method(advantage=advantage, advantage_options=dict.fromkeys(given, 0.7))
    assert training_settings(own, Recipe()).advantage_options == dict.fromkeys(given, 0.7)


def test_demonstrations_earn_everything_and_without_noise_are_the_experts():
    env = get(ENV)
    for task, turns in demonstrations(env, ARENA.start, 0):
        actions = [action for action, _ in turns]
        assert env.step(task, actions).reward >= 1.0
    for task, turns in demonstrations(env, ARENA.start.model_copy(update={"noise": 0.0}), 0):
        actions = [action for action, _ in turns]
        assert actions == [env.expert(task, actions[:n]) for n in range(len(actions))]


def test_an_environment_without_expert_and_list_of_actions_cannot_be_shown():
    with pytest.raises(UsageError, match=r"largest has neither an expert nor a list.*arena\.start\.policy"):
        demonstrations(get("largest"), ARENA.start, 0)


def test_an_environment_that_chance_never_solves_is_given_up_early():
    with pytest.raises(
        Refused, match=r"Of 4096 demonstrations .* only 0 .* it has no expert, so choose another"
    ):
        demonstrations(doors.Locked("plain"), ARENA.start, 0)


def test_an_expert_shows_an_environment_without_a_list_of_actions():
    """Whatever the noise: there is nothing to draw."""
    env = get("calculator")
    for task, turns in demonstrations(env, ARENA.start, 0):
        actions = [action for action, _ in turns]
        assert actions == [env.expert(task, actions[:n]) for n in range(2)]
        assert turns[-1][1].reward == 1.0


def test_an_environment_that_hangs_now_and_then_is_shown_without_those_episodes():
    settings = ARENA.start.model_copy(update={"demonstrations": 12, "noise": 0.5})
    with Guarded(doors.sleepy(), Limits(seconds=0.2)) as env:
        played = demonstrations(env, settings, 0)
        assert env.restarts > 0
    assert len(played) == 12
    assert all(turns[-1][0] == task.payload["side"] for task, turns in played)


def test_an_environment_that_always_hangs_is_given_up():
    with Guarded(doors.bed(), Limits(seconds=0.1)) as env:
        with pytest.raises(
            Refused, match=r"20 demonstrations in a row.*A step of .*:bed took more than 0.1 s"
        ):
            demonstrations(env, ARENA.start, 0)
        assert env.restarts == 20


def test_a_model_that_never_earns_anything_is_no_start(tiny, tmp_path):
    with pytest.raises(Refused, match="only 0 earned the full reward"):
        start_from_own(
            get("calculator"),
            tiny,
            Start(successes=2),
            0,
            tmp_path,
            temperature=1.0,
            batch_rows=64,
            device="cpu",
            dtype="float32",
        )


def test_a_small_environment_gives_what_it_has():
    env = get("minigrid/Empty-Random-6x6")
    tasks = draw_up_to(env, "heldout", 64, 0)
    assert 8 <= len(tasks) < 64
    with pytest.raises(UsageError):
        env.tasks("heldout", len(tasks) + 1, 0)


def test_a_start_whose_writing_was_cut_short_is_made_again(tmp_path):
    settings = ARENA.start.model_copy(update={"steps": 2, "demonstrations": 8})
    env = get(ENV)
    whole = start_from_scratch(env, settings, 0, tmp_path / "whole")
    aside = tmp_path / "cut" / ".aside-random"  # what a killed writer leaves
    aside.mkdir(parents=True)
    (aside / "model.safetensors").write_bytes(b"half")
    assert digest_tree(start_from_scratch(env, settings, 0, tmp_path / "cut")) == digest_tree(whole)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    root = tmp_path_factory.mktemp("straight")
    return root, run_cell(plan(), root)


def test_a_cell_trains_on_fresh_groups_and_is_judged_before_and_after(straight):
    root, found = straight
    assert (found["env"], found["method"], found["seed"]) == (ENV, "sampo", 0)
    assert found["stop_reason"] == "finished"
    assert found["steps"] == 4
    assert len(found["curve"]) == 4
    folder = root / "cells" / plan().key()[:16]
    fresh = sorted((folder / "fresh").glob("*.parquet"))
    rows = [pq.read_table(path) for path in fresh]
    assert found["episodes"] == sum(table.num_rows for table in rows)
    # Two updates a round: the second round's groups were sampled by the policy after two updates.
    versions = {name for table in rows for name in table["behaviour_version"].to_pylist()}
    assert versions == {"agent/0+0", "agent/0+2"}
    assert all(0 <= row["valid_format"] <= 1 for row in read_curve(folder))
    assert found["tasks_digest"] == tasks_digest(ENV, heldout_of(get(ENV), 6))
    for part in (found["before"], found["after"]):
        assert (part["tasks"], part["samples"]) == (6, 2)
        assert 0 <= part["figures"]["success"]["estimate"] <= part["figures"]["pass@2"]["estimate"] <= 1


def test_a_memory_is_compared_on_the_same_tasks_and_learnt_from_as_it_was_played(straight, tmp_path):
    remembering = get(f"memory_1/{ENV}")
    prompts = [task.prompt for task in heldout_of(get(ENV), 6)]
    assert [task.prompt for task in heldout_of(remembering, 6)] == prompts
    asked = tasks_digest(ENV, heldout_of(get(ENV), 6))
    assert tasks_digest(remembering.name, heldout_of(remembering, 6)) == asked
    assert tasks_digest(ENV, heldout_of(get(ENV), 5)) != asked
    shown = [[action for action, _ in turns] for _, turns in demonstrations(get(ENV), ARENA.start, 0)]
    assert shown == [
        [action for action, _ in turns] for _, turns in demonstrations(remembering, ARENA.start, 0)
    ]
    found = run_cell(replace(plan("grpo"), env=remembering.name), tmp_path)
    folder = next((tmp_path / "cells").iterdir())
    rows = [row for path in (folder / "fresh").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    assert {json.loads(row["reward_components"])["memory_turns"] for row in rows} == {1}
    assert max(row["turn_ids"][-1] for row in rows) > 2
    # The first update of a round is on the policy that sampled: read otherwise than played, it would not be.
    first = [row for row in read_curve(folder) if row["step"] % 2 == 1]
    assert max(abs(row["kl_k3"]) for row in first) < 1e-6
    assert found["stop_reason"] == "finished"


def test_a_cell_that_was_cut_short_ends_as_one_that_was_not(straight, tmp_path, monkeypatch):
    class Cut(Exception):
        pass

    def cut(path, metrics):
        if max(metrics) == 3:
            raise Cut

    with monkeypatch.context() as patched:
        patched.setattr(cell, "_keep_curve", cut)
        with pytest.raises(Cut):
            run_cell(plan(), tmp_path)
    file = tmp_path / "cells" / plan().key()[:16] / "spent.json"
    spent = json.loads(file.read_text())  # up to the second update
    assert spent["cpu_seconds"] > 0
    file.write_text(json.dumps({"cpu_seconds": 1000.0, "seconds": 2000.0}))  # as if that had been long
    found = run_cell(plan(), tmp_path)
    _same(found, straight[1])
    assert 1000 < found["cpu_seconds"] < 1100
    assert 2000 < found["seconds"] < 2200


def test_a_finished_cell_is_found_and_another_method_shares_the_start(straight, monkeypatch):
    root, found = straight
    with monkeypatch.context() as patched:
        patched.setattr(cell, "train", lambda **_: pytest.fail("trained again"))
        assert run_cell(plan(), root) == found
    other = run_cell(plan("vespo"), root)
    assert other["before"] == found["before"]
    assert len(list((root / "starts").iterdir())) == 1
    assert plan("vespo").start_key() == plan().start_key() != plan(seed=1).start_key()
    assert plan("vespo").key() != plan().key()
    others = {"code": "other", "limits": Limits(seconds=1), "device": "cuda", "policy_digest": "p", "seed": 2}
    assert len({plan().key(), *(replace(plan(), **{k: v}).key() for k, v in others.items())}) == 6


def test_a_plan_survives_the_way_to_another_process():
    assert from_job(as_job(plan("gspo", 3))) == plan("gspo", 3)


def _same(one: dict, two: dict) -> None:
    timing = ("cpu_seconds", "seconds")
    assert {k: v for k, v in one.items() if k not in timing} == {
        k: v for k, v in two.items() if k not in timing
    }
