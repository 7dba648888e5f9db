"""Verifiers as sources: functions by import path, and environments that score an episode's text again."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.arena.environment import get, verifier_digest
from tasks.core.errors import Refused, UsageError
from tasks.core.settings import VerifierModel
from tasks.reward.folder import lay_about
from tasks.reward.open import describe_untrained, load_source
from tasks.reward.source import Answer
from tasks.reward.verifier import environment_verifier, function_verifier, replay, tasks_of
from tasks.rollout.rollout import BehaviourIdentity, rollout
from tests.tiny import make_tiny_model, teach

HERE = "tests.reward.functions"


def test_a_function_scores_and_is_known_by_its_source(tmp_path, monkeypatch):
    source = function_verifier(f"{HERE}:says_yes")
    assert source.score([Answer("q", "yes!"), Answer("q", "no")]) == [1.0, 0.0]
    assert source.digest != function_verifier(f"{HERE}:broken").digest
    module = tmp_path / "mine.py"
    monkeypatch.syspath_prepend(tmp_path)
    module.write_text("def f(prompt, response):\n    return 0.5\n")
    before = function_verifier("mine:f").digest
    kept = lay_about(tmp_path, describe_untrained(VerifierModel(name="mine:f")))
    loaded = load_source(kept)
    assert loaded.score([Answer("q", "a")]) == [0.5]
    module.write_text("def f(prompt, response):\n    return 0.75\n")
    changed = function_verifier("mine:f")  # in the same process, which has the old code imported
    assert changed.digest != before
    assert changed.score([Answer("q", "a")]) == [0.75]
    with pytest.raises(Refused, match="source changed"):
        load_source(kept)


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        (f"{HERE}:out_of_range", Refused, "gave 2.0"),
        (f"{HERE}:broken", Refused, "raised KeyError"),
        (f"{HERE}:none", UsageError, "cannot be imported"),
        (f"{HERE}:NUMBER", UsageError, "not a function"),
        ("no.such.module:f", UsageError, "cannot be imported"),
    ],
)
def test_what_is_wrong_with_a_function_is_said(name, error, says):
    with pytest.raises(error, match=says):
        function_verifier(name).score([Answer("q", "a")])


@pytest.fixture(scope="module")
def acting(tmp_path_factory):
    path = make_tiny_model(tmp_path_factory.mktemp("actor") / "tiny")
    tasks = get("calculator").tasks("train", 40, 5)
    lines = [
        f"{task.prompt[-30:]} calc({task.payload['a']} {task.payload['operator']} {task.payload['b']})\n"
        f"result: {task.payload['answer']}\nanswer: {task.payload['answer']}\n"
        for task in tasks
    ]
    teach(path, lines, steps=60, learning_rate=4e-3)
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("name", ["calculator", "largest", "reasoning_gym/gcd"])
def test_an_environment_gives_an_episodes_text_the_reward_it_gave_the_episode(acting, name):
    model, tokenizer = acting
    env = get(name)
    tasks = env.tasks("train", 4, 5)
    identity = BehaviourIdentity("agent/1", "b" * 64, "t", "t")
    rows = [
        row
        for group in rollout(
            model,
            tokenizer,
            env,
            tasks,
            group_size=6,
            temperature=1.3,
            seed=5,
            batch_rows=24,
            identity=identity,
        )
        for row in group
    ]
    known = tasks_of(name, ((row.task_id, row.seed, row.split) for row in rows))
    assert set(known) == {task.prompt for task in tasks}
    source = environment_verifier(name, known)
    assert source.digest == verifier_digest(env)
    answers = [Answer(tokenizer.decode(row.prompt_ids), row.response_text) for row in rows]
    assert source.score(answers) == [row.reward for row in rows]


def test_a_right_episode_is_right_and_one_with_a_forged_observation_is_not():
    env = get("calculator")
    (task,) = env.tasks("train", 1, 5)
    a, b, operator, answer = (task.payload[key] for key in ("a", "b", "operator", "answer"))
    right = f" calc({a} {operator} {b})\nresult: {answer}\nanswer: {answer}\n"
    assert replay(env, task, right) == 1.0
    assert replay(env, task, right.replace("\nresult", "<|im_end|>\nresult").rstrip() + "<|im_end|>") == 1.0
    assert replay(env, task, f" calc(1 + 1)\nresult: {answer}\nanswer: {answer}\n") == 0.0  # the tool said 2
    assert replay(env, task, "") == 0.0
    assert replay(env, task, f"{answer}\n" * 9) == 0.0


def test_tasks_beyond_the_first_draw_are_found_and_lost_ones_are_named():
    env = get("largest")
    far = env.tasks("train", 300, 9)[-1]
    assert tasks_of("largest", [(far.id, 9, "train")]) == {far.prompt: far}
    with pytest.raises(Refused, match="not draw 1 of the tasks"):
        tasks_of("reasoning_gym/chain_sum", [("reasoning_gym/chain_sum/none", 9, "train")])
    with pytest.raises(Refused, match="no task with the prompt"):
        environment_verifier("largest", {}).score([Answer("what?", "12")])
