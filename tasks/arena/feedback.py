"""A task becomes a conversation: a teacher who knows the answer says in words what is wrong with each attempt.

The student sees the prompt, what it wrote and what the teacher said; the teacher also sees the answer. The episode ends
with the first right answer or after the last turn, and the reward is 1 or 0 by comparison with the answer, whatever
the teacher says. With `shuffled`, the teacher takes the answer of another task for the truth: same words, same manner,
no information. What a student gains from true over shuffled feedback is what it has learnt to make of feedback.

Source: social meta-learning (arXiv 2602.16488), beside RL2F (2602.16066). `tasks.arena.topics` has the tasks,
`tasks.arena.teachers` the teachers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from tasks.arena.environment import Split, Step, Task, draw_tasks, most_common_share, require_some
from tasks.arena.topics import Topic, best_action, is_question, possible
from tasks.core.errors import UsageError

TURNS = 4  # of a conversation in training (2602.16488)
WITHHELD = "That is not right."
_OTHERS = 32  # other tasks of which a shuffled teacher takes the answer


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a teacher knows when it is to speak: the public history, and what is private.

    Attributes:
        prompt: the task, as the student sees it.
        said: (action, remark) of the turns before.
        action: the student's last one, which is not right.
        private: the answer; never part of what the student sees.
    """

    prompt: str
    said: tuple[tuple[str, str], ...]
    action: str
    private: str


class Teacher(Protocol):
    """Says something about an attempt; a pure function of the conversation."""

    @property
    def identity(self) -> str:
        """Changes whenever its remarks may change; part of the environment's version."""

    @property
    def parallel(self) -> int:
        """How many conversations it may be asked about at one time."""

    def reply(self, conversation: Conversation) -> str:
        """One remark, on one line.

        Raises:
            Unavailable: the teacher cannot be reached.
        """


@dataclass(frozen=True)
class Feedback:
    """Conversations about `topic` with `teacher`; see the module's docstring.

    Attributes:
        prefix: name of the teacher's kind; the environment is called <prefix>/<topic>.
        shuffled: whether the teacher goes by the answer of another task.
        max_turns: attempts of a conversation. The prompt does not tell it, so that a student may be evaluated with more.

    Components of an episode, by fixed rules: `success`; `valid_format`, the share of actions of the right form;
    `repeated`, of those written before; `questions`; `premature`, of answers given although the topic's own remarks on
    the actions so far leave more than one possible; `withheld`, of remarks that gave the answer away and were replaced.
    """

    topic: Topic
    teacher: Teacher
    prefix: str = "feedback"
    shuffled: bool = False
    max_turns: int = TURNS
    licence = "Apache-2.0"

    def __post_init__(self) -> None:
        if self.max_turns < 1:
            raise UsageError(f"A conversation needs at least one turn, not {self.max_turns}.")

    @property
    def name(self) -> str:
        """See `Environment`."""
        return f"{self.prefix}/{self.topic.name}"

    @property
    def version(self) -> str:
        """Ours, the number of turns, and who teaches."""
        return f"1+{self.max_turns}+{self.teacher.identity}{'+shuffled' if self.shuffled else ''}"

    @property
    def max_new_tokens(self) -> int:
        """See `Environment`."""
        return self.topic.max_new_tokens

    def tasks(self, split: Split, n: int, seed: int) -> list[Task]:
        """See `Environment.tasks`; the same prompts whoever teaches."""
        candidates = (
            (prompt + self.topic.cue, payload) for prompt, payload in self.topic.candidates(f"tasks/{seed}")
        )
        return draw_tasks(self, candidates, split, n, seed)

    def step(self, task: Task, actions: Sequence[str]) -> Step:
        """Compare the last action with the answer, and let the teacher speak if it is another."""
        action, answer = actions[-1].strip(), task.payload["answer"]
        valid = action in self.topic.choices(task.payload)
        if action == answer or len(actions) == self.max_turns:
            right = float(action == answer)
            components = {"success": right, **self._shares(task, actions)}
            return Step("", done=True, reward=right, components=components, valid=valid)
        _, remark = self.said(task, actions)[-1]
        return Step(f"{remark}\n{self.topic.cue}", done=False, valid=valid)

    def steps(self, turns: Sequence[tuple[Task, Sequence[str]]]) -> list[Step | Exception]:
        """See `Batched`: as many at once as the teacher takes."""

        def answer(turn: tuple[Task, Sequence[str]]) -> Step | Exception:
            try:
                return self.step(*turn)
            except Exception as error:  # a teacher that cannot be reached costs this episode, not the others
                return error

        if self.teacher.parallel == 1:
            return list(map(answer, turns))
        with ThreadPoolExecutor(self.teacher.parallel) as pool:
            return list(pool.map(answer, turns))

    def said(self, task: Task, actions: Sequence[str]) -> list[tuple[str, str]]:
        """Every (action, remark) of these actions, none of which is right."""
        return [(action, remark) for action, remark, _ in self._exchanges(task, actions)]

    def choices(self, task: Task) -> Sequence[str]:
        """See `Listed`."""
        return self.topic.choices(task.payload)

    def expert(self, task: Task, actions: Sequence[str]) -> str:
        """See `Expert`: one who believes the teacher, and once that has left no answer writes what was not tried yet."""
        said = self.said(task, actions)
        if possible(self.topic, task.payload, said):
            return best_action(self.topic, task.payload, said, self.max_turns - len(actions))
        tried = {action for action, _ in said}
        untried = (action for action in self.topic.answers(task.payload) if action not in tried)
        return next(untried, task.payload["answer"])

    def constant_baseline(self, tasks: Sequence[Task]) -> tuple[str, float]:
        """The most common answer, written in every turn."""
        return most_common_share([task.payload["answer"] for task in tasks])

    def random_baseline(self, tasks: Sequence[Task], seed: int) -> float:
        """Expected reward of drawing every action blindly among those of the right form."""
        require_some(tasks)
        missed = [(1 - 1 / len(self.choices(task))) ** self.max_turns for task in tasks]
        return 1 - sum(missed) / len(missed)

    def retry_baseline(self, tasks: Sequence[Task]) -> float:
        """Expected reward of answers that are drawn blindly and never repeated: the best without any feedback."""
        require_some(tasks)
        answers = [sum(not is_question(action) for action in self.choices(task)) for task in tasks]
        return sum(min(1.0, self.max_turns / count) for count in answers) / len(tasks)

    def _exchanges(self, task: Task, actions: Sequence[str]) -> list[tuple[str, str, bool]]:
        """(action, remark, whether it was withheld) of each action."""
        found: list[tuple[str, str, bool]] = []
        for number, action in enumerate(map(str.strip, actions), start=1):
            private = self._another(task, actions[:number]) if self.shuffled else task.payload["answer"]
            said = tuple((written, remark) for written, remark, _ in found)
            remark = self.teacher.reply(Conversation(task.prompt, said, action, private))
            leaks = reveals(remark, task.payload["answer"])
            found.append((action, WITHHELD if leaks else remark, leaks))
        return found

    def _another(self, task: Task, actions: Sequence[str]) -> str:
        """The answer of another task, the same one as long as the student has not tried it.

        It is drawn without regard to the task's own answer, with which it may agree by chance: if it never did, it
        would tell what the answer is not.
        """
        others = _others(self.topic, task.prompt)
        tried = set(map(str.strip, actions))
        untried = (other for other in others if other not in tried)
        return next(untried, None) or next(other for other in others if other != actions[-1].strip())

    def _shares(self, task: Task, actions: Sequence[str]) -> dict[str, float]:
        written = [action.strip() for action in actions]
        withheld = [leaks for _, _, leaks in self._exchanges(task, written[:-1])]
        said = [(action, self.topic.remark(task.payload["answer"], action)) for action in written[:-1]]
        left = [len(possible(self.topic, task.payload, said[:turn])) for turn in range(len(written))]
        answers = [turn for turn, action in enumerate(written) if not is_question(action)]
        premature = [turn for turn in answers if left[turn] > 1]
        valid = self.choices(task)
        counts = {
            "valid_format": sum(action in valid for action in written),
            "repeated": len(written) - len(set(written)),
            "questions": len(written) - len(answers),
            "premature": len(premature),
            "withheld": sum(withheld),
        }
        return {name: count / len(written) for name, count in counts.items()}


def reveals(text: str, private: str, public: str = "") -> bool:
    """Whether the words of `private` stand in a row in `text` and not in `public`; case and punctuation do not count."""
    words = _words(private)
    return _holds(_words(text), words) and not _holds(_words(public), words)


def transcript(prompt: str, steps: Iterable[tuple[str, Step]]) -> str:
    """The public history as the student reads it: the prompt, and each action with the observation that follows it."""
    return prompt + "".join(f" {action.strip()}\n{step.observation}" for action, step in steps)


def success_by_turn(solved: Sequence[int | None], turns: int) -> list[float]:
    """Share of the conversations that were solved in turn t or before, for t = 1..`turns`; None was not solved.

    Raises:
        UsageError: there are no conversations.
    """
    if not solved:
        raise UsageError("A share of solved conversations needs at least one.")
    return [sum(turn is not None and turn <= t for turn in solved) / len(solved) for t in range(1, turns + 1)]


def turns_to_success(solved: Sequence[int | None], turns: int) -> float:
    """Mean number of turns until a conversation is solved; one that is not counts `turns` + 1, so that giving up the
    hard ones makes nothing better.

    Raises:
        UsageError: there are no conversations.
    """
    if not solved:
        raise UsageError("A mean number of turns needs at least one conversation.")
    return sum(turns + 1 if turn is None else turn for turn in solved) / len(solved)


@lru_cache(maxsize=4096)
def _others(topic: Topic, prompt: str) -> tuple[str, ...]:
    """Answers of other tasks, in an order that the prompt decides."""
    drawn = itertools.islice(topic.candidates(f"another/{prompt}"), _OTHERS)
    answers: dict[str, None] = dict.fromkeys(payload["answer"] for _, payload in drawn)
    return tuple(answers)


def _words(text: str) -> list[str]:
    plain = "".join(sign.lower() if sign.isalnum() else " " for sign in text)
    return plain.split()


def _holds(text: Sequence[str], words: Sequence[str]) -> bool:
    return any(text[i : i + len(words)] == words for i in range(len(text) - len(words) + 1))
