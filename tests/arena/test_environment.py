from __future__ import annotations

import itertools

import pytest

from tasks.arena import environment
from tasks.arena.environment import Environment, get, split_of, verifier_digest
from tasks.arena.playing import expert_baseline
from tasks.core.errors import UsageError
from tests.arena import sandboxed

NAMES = [
    "calculator",
    "largest",
    "python_tool",
    "reasoning_gym/chain_sum",
    "reasoning_gym/gcd",
    "reasoning_gym/letter_counting",
]


@pytest.fixture(params=NAMES)
def env(request: pytest.FixtureRequest) -> Environment:
    if request.param == "python_tool" and not sandboxed.isolation():
        pytest.skip("no sandbox starts here")
    return get(request.param)


def test_the_same_arguments_give_the_same_tasks_and_another_seed_others(env: Environment) -> None:
    assert env.tasks("train", 10, seed=3) == get(env.name).tasks("train", 10, seed=3)
    assert env.tasks("train", 10, seed=3) != env.tasks("train", 10, seed=4)
    assert env.tasks("train", 5, seed=3) == env.tasks("train", 10, seed=3)[:5]


def test_no_prompt_is_in_both_splits_whatever_the_seeds(env: Environment) -> None:
    train, heldout = (
        {task.prompt for seed in range(4) for task in env.tasks(split, 20, seed)}
        for split in ("train", "heldout")
    )
    assert not train & heldout
    assert {split_of(prompt) for prompt in heldout} == {"heldout"}


def test_tasks_are_distinct_and_know_where_they_come_from(env: Environment) -> None:
    tasks = env.tasks("heldout", 25, seed=1)
    assert len({task.prompt for task in tasks}) == len({task.id for task in tasks}) == 25
    assert {(task.env, task.env_version, task.split) for task in tasks} == {
        (env.name, env.version, "heldout")
    }


def test_the_true_answer_is_rewarded_and_a_wrong_one_is_not(env: Environment) -> None:
    for task in env.tasks("train", 10, seed=0):
        truth = str(task.payload["answer"])
        first = ["calc(1 + 1)"] * (env.max_turns - 1)
        assert env.step(task, [*first, f" {truth}"]).reward == 1.0
        assert env.step(task, [*first, " nonsense"]).reward == 0.0
        assert env.step(task, [*first, ""]).done


def test_the_constant_baseline_is_the_best_of_all_true_answers(env: Environment) -> None:
    tasks = env.tasks("train", 30, seed=0)
    first = ["calc(1 + 1)"] * (env.max_turns - 1)

    def score(answer: str) -> float:
        return sum(env.step(task, [*first, answer]).reward for task in tasks) / len(tasks)

    answer, baseline = env.constant_baseline(tasks)
    assert score(answer) == pytest.approx(baseline)
    assert baseline == pytest.approx(max(score(str(task.payload["answer"])) for task in tasks))


def test_a_family_that_is_too_small_says_how_many_it_has() -> None:
    with pytest.raises(
        UsageError, match=r"chain_sum has only \d+ distinct prompts in its heldout split, but 99"
    ):
        get("reasoning_gym/chain_sum").tasks("heldout", 99, seed=0)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("calcualtor", "'calculator'"), ("reasoning_gym/chainsum", "'reasoning_gym/chain_sum'"), ("", "'")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UsageError, match="nearest name is") as caught:
        get(name)
    assert nearest in str(caught.value)


def test_verifiers_have_different_digests_that_stay() -> None:
    digests = [verifier_digest(get(name)) for name in NAMES]
    assert len(set(digests)) == len(NAMES)
    assert digests == [verifier_digest(get(name)) for name in NAMES]


def test_about_a_quarter_is_held_out() -> None:
    share = sum(split_of(f"prompt {i}") == "heldout" for i in range(4000)) / 4000
    assert share == pytest.approx(environment.HELDOUT_SHARE, abs=0.03)


def test_names_are_all_found() -> None:
    assert {get(name).name for name in itertools.islice(environment.names(), 12)} <= set(environment.names())


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("sokoban,tools", ["textarena/Sokoban", "calculator", "python_tool"]),
        (" calculator , ", ["calculator"]),
        ("memory_2/sokoban", ["memory_2/textarena/Sokoban"]),
        ("memory_2/textarena/Sokoban,largest", ["memory_2/textarena/Sokoban", "largest"]),
        ("safety", ["safety/lax_checker", "safety/leaky_tool", "safety/shortcut"]),
        ("babyai-opendoor,gcd", ["minigrid/BabyAI-OpenDoor", "gcd"]),
        ("number,nothing", ["feedback/number", "nothing"]),
        ("my.module:Factory", ["my.module:Factory"]),
        ("", []),
    ],
)
def test_a_command_takes_short_names(text: str, meant: list[str]) -> None:
    assert environment.named(text) == meant


@pytest.mark.parametrize("name", ["calculator", "python_tool"])
def test_experts_of_tools_earn_everything(name: str) -> None:
    env = get(name)
    assert expert_baseline(env, env.tasks("heldout", 12, 0)) == 1.0
