"""A student in conversations with a teacher: nothing private reaches it, and its own tokens alone are learnt from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.packing import Sample, pack, packed_logprobs
from tasks.arena.environment import Task, get
from tasks.arena.feedback import Feedback, success_by_turn
from tasks.arena.guarded import Guarded
from tasks.replay.schema import Episode
from tasks.rollout.rollout import BehaviourIdentity, attempts, rollout
from tests.tiny import make_tiny_model, teach

ENV = get("feedback/number")
assert isinstance(ENV, Feedback)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_tiny_model(tmp_path_factory.mktemp("student") / "model", hidden_size=32)
    return teach(path, [f"guess: {number}\n" for number in range(10)] * 2, steps=80)


def play(path: Path, env, tasks: list[Task]) -> list[Episode]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    identity = BehaviourIdentity("agent/1", "a" * 64, "b" * 64, "c" * 64)
    groups = rollout(
        model, AutoTokenizer.from_pretrained(path), env, tasks,
        group_size=8, temperature=1.0, seed=1, batch_rows=16, identity=identity, created_at="t",
    )  # fmt: skip
    return [episode for group in groups for episode in group]


def test_another_answer_with_the_same_remarks_changes_no_log_probability(student: Path) -> None:
    (task,) = ENV.tasks("train", 1, 0)
    eight, nine = (play(student, ENV, [dataclasses.replace(task, payload={"answer": a})]) for a in "89")
    same = 0
    for one, other in zip(eight, nine, strict=True):
        written = one.response_text + other.response_text
        if not any(f" {number}\n" in written for number in "89"):  # else the remarks, or the end, may differ
            assert one.response_ids == other.response_ids
            # Rows of a batch differ, so the last bits do; what is said does not.
            assert one.behaviour_logprobs == pytest.approx(other.behaviour_logprobs, abs=1e-4)
            same += 1
    assert same >= 2


def test_what_the_teacher_wrote_and_the_task_have_no_gradient(student: Path) -> None:
    episode = max(play(student, ENV, ENV.tasks("train", 2, 0)), key=lambda one: len(one.response_ids))
    assert episode.turn_ids[-1] == 3
    tokenizer = AutoTokenizer.from_pretrained(student)
    teacher = [i for i, mine in zip(episode.response_ids, episode.loss_mask, strict=True) if not mine]
    assert tokenizer.decode(teacher).count("guess:") == 3
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    states: list[torch.Tensor] = []

    def keep(module, inputs, output) -> None:
        output.last_hidden_state.retain_grad()
        states.append(output.last_hidden_state)

    model.base_model.register_forward_hook(keep)
    sample = Sample(episode.prompt_ids, episode.response_ids, episode.loss_mask)
    logprobs, _ = packed_logprobs(model, pack([sample], 10_000)[0])
    assert len(logprobs) == sum(episode.loss_mask)
    assert logprobs.tolist() == pytest.approx(
        [p for p, mine in zip(episode.behaviour_logprobs, episode.loss_mask, strict=True) if mine], abs=1e-4
    )
    logprobs.sum().backward()
    assert states[-1].grad is not None
    reached = states[-1].grad[0].abs().sum(-1) > 0  # of the state from which the next token is predicted
    expected = [False] * (len(episode.prompt_ids) - 1) + episode.loss_mask
    assert reached[: len(expected)].tolist() == expected
    assert not reached[len(expected) :].any()


def test_with_one_turn_it_is_a_single_turn_task_and_feedback_is_never_given(student: Path) -> None:
    true, shuffled = (
        dataclasses.replace(get(f"{kind}/number"), max_turns=1) for kind in ("feedback", "feedback_shuffled")
    )
    tasks = true.tasks("train", 2, 0)
    episodes, others = play(student, true, tasks), play(student, shuffled, tasks)
    assert all(all(one.loss_mask) and set(one.turn_ids) == {0} for one in episodes)
    assert [(e.response_ids, e.reward) for e in episodes] == [(e.response_ids, e.reward) for e in others]


def test_a_student_may_be_judged_with_more_turns_than_it_was_trained_with(student: Path) -> None:
    """A conversation does not depend on how many turns there could be, so success by turn can be read from the long one."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    solved = {}
    for turns in (4, 8):
        env = dataclasses.replace(ENV, max_turns=turns)
        tasks = env.tasks("heldout", 6, 0)
        played = attempts(model, tokenizer, env, tasks, samples=4, temperature=1.0, seed=0, batch_rows=24)
        solved[turns] = [one.turns if one.reward else None for group in played for one in group]
    assert success_by_turn(solved[8], 8)[:4] == success_by_turn(solved[4], 4)
    assert success_by_turn(solved[8], 8)[-1] > success_by_turn(solved[4], 4)[-1]


def test_behind_a_guard_episodes_are_the_same(student: Path) -> None:
    tasks = ENV.tasks("train", 2, 0)
    with Guarded(ENV, workers=2) as guarded:
        assert play(student, guarded, tasks) == play(student, ENV, tasks)
