"""What a conversation with a teacher can be about: tasks with an answer, and what a truthful teacher says of an action.

Every topic has actions of a fixed form. Most are attempts; one that ends in "?" is a question. `remark` is a pure
function of the answer and the action, so what a history of remarks leaves open can be counted (`possible`), and with
it what a remark was worth (`bits`) and how well the topic can be played (`best_action`).

The hidden answer of a task is named in its prompt by a number that is a digest of it and of a salt: a prompt has one
truth, and nothing can be read from the number.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tasks.core.digest import digest_json
from tasks.core.errors import UsageError


class Topic(Protocol):
    """A family of tasks; stateless. The payload of a task holds its `answer`, a text."""

    @property
    def name(self) -> str:
        """What `topic` knows it by."""

    @property
    def max_new_tokens(self) -> int:
        """Most tokens of an action."""

    @property
    def cue(self) -> str:
        """What an action follows, at the end of the prompt and of every remark."""

    def candidates(self, seed: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Endless (prompt, payload) pairs; the prompt is without the cue."""

    def answers(self, payload: Mapping[str, Any]) -> Sequence[str]:
        """The answers that the prompt leaves open to one who can do everything but guess."""

    def choices(self, payload: Mapping[str, Any]) -> Sequence[str]:
        """Every action of the right form."""

    def remark(self, answer: str, action: str) -> str:
        """What a teacher who takes `answer` for the truth says of another action than that."""

    def __hash__(self) -> int:
        """Equal topics, equal hash: what is drawn of a topic is kept."""


@dataclass(frozen=True)
class Ordered:
    """One of a few things in a row; after a wrong guess the teacher says on which side of it the answer is.

    T guesses can find one of 2^T - 1 things, since a remark is one bit at most.
    """

    name: str
    things: tuple[str, ...]
    what: str
    after: str  # said where the answer comes later in the row
    before: str
    cue = "guess:"
    max_new_tokens = 6

    def candidates(self, seed: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """See `Topic`."""
        rng = random.Random(f"{self.name}/{seed}")
        while True:
            answer = rng.choice(self.things)
            game = _game(self.name, answer, rng)
            prompt = f"Guess the {self.what} from {self.things[0]} to {self.things[-1]} (game {game}).\n"
            yield prompt, {"answer": answer}

    def answers(self, payload: Mapping[str, Any]) -> Sequence[str]:
        """See `Topic`."""
        return self.things

    def choices(self, payload: Mapping[str, Any]) -> Sequence[str]:
        """See `Topic`."""
        return self.things

    def remark(self, answer: str, action: str) -> str:
        """See `Topic`."""
        if action not in self.things:
            return f"That is no {self.what} of this game."
        later = self.things.index(answer) > self.things.index(action)
        return f"It is {self.after if later else self.before} than {action}."


WORDS = (("big", "small"), ("red", "blue"), ("round", "square"))


class Thing:
    """One of eight things, told by three words; a wrong guess is only called wrong, and questions get a yes or no.

    Four guesses find one in two; three questions and a guess find all. So it pays to ask.
    """

    name = "thing"
    cue = "say:"
    max_new_tokens = 8

    _things = tuple(map(" ".join, itertools.product(*WORDS)))
    _questions = tuple(f"{word}?" for pair in WORDS for word in pair)

    def candidates(self, seed: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """See `Topic`."""
        rng = random.Random(f"{self.name}/{seed}")
        pairs = ", ".join(" or ".join(pair) for pair in WORDS)
        while True:
            answer = rng.choice(self._things)
            game = _game(self.name, answer, rng)
            yield (
                f"What is it (game {game}): {pairs}? Say all three words, or ask for one.\n",
                {"answer": answer},
            )

    def answers(self, payload: Mapping[str, Any]) -> Sequence[str]:
        """See `Topic`."""
        return self._things

    def choices(self, payload: Mapping[str, Any]) -> Sequence[str]:
        """See `Topic`."""
        return (*self._things, *self._questions)

    def remark(self, answer: str, action: str) -> str:
        """See `Topic`."""
        if action in self._questions:
            return f"{'Yes' if action[:-1] in answer.split() else 'No'}, {action[:-1]}."
        return "That is not it." if action in self._things else "Say three words, or one and a question mark."


class Sum:
    """A sum of two numbers below fifty; the teacher says which digit of a wrong result is too low or too high."""

    name = "sum"
    cue = "result:"
    max_new_tokens = 6

    _results = tuple(map(str, range(10, 100)))

    def candidates(self, seed: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """See `Topic`."""
        rng = random.Random(f"{self.name}/{seed}")
        while True:
            a, b = rng.randint(10, 49), rng.randint(10, 49)
            yield f"{a} + {b} = ?\n", {"answer": str(a + b), "a": a, "b": b}

    def answers(self, payload: Mapping[str, Any]) -> Sequence[str]:
        """See `Topic`: the sum leaves nothing open."""
        return (payload["answer"],)

    def choices(self, payload: Mapping[str, Any]) -> Sequence[str]:
        """See `Topic`."""
        return self._results

    def remark(self, answer: str, action: str) -> str:
        """See `Topic`: the ones come first."""
        if action not in self._results:
            return "That is no number of two digits."
        name, right, written = next(
            (name, right, written)
            for name, right, written in zip(("ones", "tens"), answer[::-1], action[::-1], strict=True)
            if right != written
        )
        return f"The {name} digit is too {'low' if written < right else 'high'}."


_ALL: tuple[Topic, ...] = (
    Ordered("number", tuple("0123456789"), "number", "higher", "lower"),
    Ordered("letter", tuple("abcdefghij"), "letter", "later", "earlier"),
    Sum(),
    Thing(),
)
TOPICS: Mapping[str, Topic] = {topic.name: topic for topic in _ALL}
"""All topics, by name."""


def is_question(action: str) -> bool:
    """Whether an action asks and does not answer: it ends in a question mark, by this rule and no other."""
    return action.rstrip().endswith("?")


def possible(topic: Topic, payload: Mapping[str, Any], said: Sequence[tuple[str, str]]) -> list[str]:
    """The answers that agree with every (action, remark) of a truthful teacher, none of the actions having been right."""
    return [
        answer
        for answer in topic.answers(payload)
        if all(answer != action and topic.remark(answer, action) == remark for action, remark in said)
    ]


def bits(topic: Topic, payload: Mapping[str, Any], said: Sequence[tuple[str, str]]) -> float:
    """Information in the last remark: log2 of how much it cut the possible answers, which the action itself had
    already lessened by one if it was one of them; 0 where it contradicts what was said before."""
    before = possible(topic, payload, said[:-1])
    action, _ = said[-1]
    after = len(possible(topic, payload, said))
    return math.log2(sum(answer != action for answer in before) / after) if after else 0.0


def best_action(topic: Topic, payload: Mapping[str, Any], said: Sequence[tuple[str, str]], turns: int) -> str:
    """The action that leaves the fewest answers possible in the mean, with `turns` actions left; in the last turn, and
    where all is known, an answer.

    Raises:
        UsageError: what was said has left no answer.
    """
    left = possible(topic, payload, said)
    if not left:
        raise UsageError(f"No answer of the topic {topic.name} agrees with what was said; start again.")
    if turns == 1 or len(left) == 1:
        return left[0]

    def remain(action: str) -> int:
        remarks = Counter(topic.remark(answer, action) for answer in left if answer != action)
        return sum(count * count for count in remarks.values())

    return min(topic.choices(payload), key=remain)


def _game(name: str, answer: str, rng: random.Random) -> int:
    return int(digest_json([name, answer, rng.getrandbits(64)])[:8], 16) % 100_000
