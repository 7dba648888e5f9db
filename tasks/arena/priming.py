"""Q-priming: conversations in which wrong attempts are replaced by questions, to be imitated before online RL.

While conversations are generated, a wrong action of turn t is replaced with probability P(t) = base^t by a question,
which is written from the attempt and the teacher's private knowledge; the student's own context holds the public
history alone. Imitating these makes questions likely enough for RL to find out what they are worth.

Source: 2602.16488, section 4.4, as others tell it: whether t begins at 0 or 1 is not known to us, so it is an argument.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tasks.arena.environment import Step, Task
from tasks.arena.feedback import Conversation, Feedback, reveals, transcript

BASE = 0.75


class Questioner(Protocol):
    """Writes the question that should have been asked."""

    def question(self, conversation: Conversation) -> str:
        """A question in the place of `conversation.action`; "" where there is none to ask."""


Attempts = Callable[[Sequence[str]], Sequence[str]]
"""The student: the next action after each of these transcripts."""


@dataclass(frozen=True, slots=True)
class Primed:
    """A conversation as it went: `replaced` are the turns, from 0, whose action is a question put in its place."""

    task: Task
    actions: tuple[str, ...]
    steps: tuple[Step, ...]
    replaced: tuple[int, ...]

    @property
    def reward(self) -> float:
        """Of the whole conversation."""
        return self.steps[-1].reward


def question_probability(turn: int, *, base: float = BASE, first: int = 0) -> float:
    """P(t) that a wrong action of turn `turn` (from 0) is replaced; `first` is what t is in the first turn, 0 or 1."""
    return base ** (turn + first)


def primed(
    env: Feedback,
    tasks: Sequence[Task],
    attempts: Attempts,
    questioner: Questioner,
    *,
    seed: int,
    base: float = BASE,
    first: int = 0,
) -> list[Primed]:
    """One conversation for each of `tasks`, in their order; a task may come several times.

    A right action is never replaced. Nor is one by a question that gives the answer away: by the words of the answer
    in a row, where the public history does not hold them.

    Args:
        attempts: asked once a turn, with the transcripts of all conversations that go on.
        base, first: of `question_probability`; base 0 with first 1 replaces nothing.
    """
    actions: list[list[str]] = [[] for _ in tasks]
    steps: list[list[Step]] = [[] for _ in tasks]
    replaced: list[list[int]] = [[] for _ in tasks]
    draws = [random.Random(f"{seed}/{place}/{task.id}") for place, task in enumerate(tasks)]
    live = list(range(len(tasks)))
    for turn in range(env.max_turns):
        if not live:
            break
        public = [transcript(tasks[i].prompt, zip(actions[i], steps[i], strict=True)) for i in live]
        for i, history, action in zip(live, public, attempts(public), strict=True):
            task = tasks[i]
            wrong = action.strip() != task.payload["answer"]
            if wrong and draws[i].random() < question_probability(turn, base=base, first=first):
                said = tuple(env.said(task, actions[i]))
                private = Conversation(task.prompt, said, action.strip(), task.payload["answer"])
                question = questioner.question(private)
                if question and not reveals(question, task.payload["answer"], history):
                    action = question
                    replaced[i].append(turn)
            actions[i].append(action.strip())
            steps[i].append(env.step(task, actions[i]))
        live = [i for i in live if not steps[i][-1].done]
    return [
        Primed(task, tuple(actions[i]), tuple(steps[i]), tuple(replaced[i])) for i, task in enumerate(tasks)
    ]
