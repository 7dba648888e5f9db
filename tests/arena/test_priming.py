"""Q-priming: the worked numbers, what is replaced, and that nothing private slips into what is imitated."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from tasks.arena.environment import get
from tasks.arena.feedback import Conversation, Feedback, reveals, transcript
from tasks.arena.priming import Primed, primed, question_probability
from tasks.arena.teachers import ThingQuestions

ENV = get("feedback/thing")
assert isinstance(ENV, Feedback)
TASKS = ENV.tasks("train", 300, 0)


def guesses(seed: int):
    """A student who guesses blindly."""
    rng = random.Random(seed)
    things = ENV.topic.answers({})

    def attempts(texts: Sequence[str]) -> list[str]:
        return [rng.choice(things) for _ in texts]

    return attempts


def run(**changes) -> list[Primed]:
    return primed(ENV, TASKS, guesses(1), ThingQuestions(), **{"seed": 0, **changes})


class Tells:
    """A questioner who gives the answer away."""

    def question(self, conversation: Conversation) -> str:
        return f"is it {conversation.private}?"


@pytest.mark.parametrize(
    ("first", "expected", "replacements"),
    [(0, [1, 0.75, 0.5625, 0.421875], 2.734375), (1, [0.75, 0.5625, 0.421875, 0.31640625], 2.05078125)],
)
def test_worked_probabilities(first: int, expected: list[float], replacements: float) -> None:
    found = [question_probability(turn, first=first) for turn in range(4)]
    assert found == expected
    assert sum(found) == replacements  # where all four turns are wrong
    assert question_probability(4) == pytest.approx(0.316406, abs=1e-6)


@pytest.mark.parametrize("first", [0, 1])
def test_wrong_turns_are_replaced_as_often_as_they_should_be(first: int) -> None:
    def never(texts: Sequence[str]) -> list[str]:
        return ["nothing"] * len(texts)

    class Asks:
        def question(self, conversation: Conversation) -> str:
            return "big?"

    found = primed(ENV, TASKS, never, Asks(), seed=0, first=first)
    for turn in range(4):
        share = sum(turn in one.replaced for one in found) / len(found)
        assert share == pytest.approx(question_probability(turn, first=first), abs=0.08)
    assert {action for one in found for action in one.actions} == {"nothing", "big?"}


def test_a_right_turn_is_never_replaced_and_the_conversation_ends_with_it() -> None:
    found = run()
    solved = [one for one in found if one.reward]
    assert 100 < len(solved) < 300
    for one in found:
        assert one.steps[-1].done
        assert not any(step.done for step in one.steps[:-1])
        for turn in one.replaced:
            assert one.actions[turn].endswith("?")
        if one.reward:
            assert one.actions[-1] == one.task.payload["answer"]
            assert len(one.actions) - 1 not in one.replaced
        assert [ENV.step(one.task, one.actions[: turn + 1]) for turn in range(len(one.actions))] == list(
            one.steps
        )


def test_it_depends_on_the_seed_alone_and_base_zero_replaces_nothing() -> None:
    assert run() == run()
    assert run() != run(seed=1)
    assert not any(one.replaced for one in run(base=0.0, first=1))


def test_no_private_string_is_in_what_the_student_sees() -> None:
    for one in run():
        public = transcript(one.task.prompt, [])
        for turn, (action, step) in enumerate(zip(one.actions, one.steps, strict=True)):
            if turn in one.replaced:
                assert not reveals(action, one.task.payload["answer"], public)
            public += transcript("", [(action, step)])
            if not step.done:
                assert not reveals(public, one.task.payload["answer"])


def test_a_question_that_gives_the_answer_away_is_not_used() -> None:
    found = primed(ENV, TASKS, guesses(1), Tells(), seed=0)
    assert not any(one.replaced for one in found)
