"""Any family of reasoning-gym as a single-turn environment, scored by the family's own `score_answer`.

The prompt shows three solved items of the family and asks the next one. A small model needs short prompts and
easy items: `FAMILIES` holds what differs from the general form for the families where that has been tried.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version as package_version
from typing import Any

from tasks.arena.environment import Split, Step, Task, draw_tasks, require_some
from tasks.core.digest import digest_json
from tasks.core.errors import UsageError

SHOTS = 3
_ONE_LINE = re.compile(r"\s*\S.*")
_CHUNK = 256  # items a reasoning-gym dataset object holds; a longer stream re-seeds


@dataclass(frozen=True)
class Family:
    """How the items of one dataset are made and shown.

    The prompt of an item is `form` with {question} filled in, where the question is first cut down to the
    group of `compact` (a regular expression), if that is given.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    compact: str | None = None
    form: str = "Question: {question}\nAnswer:"
    gap: str = "\n\n"  # between two shots
    max_new_tokens: int = 32

    def show(self, question: str) -> str:
        """The text that asks `question`, up to where its answer starts (after a space)."""
        if self.compact is not None and (match := re.search(self.compact, question, re.DOTALL)):
            question = match[1]
        return self.form.format(question=question)


GENERAL = Family()
FAMILIES: Mapping[str, Family] = {
    "chain_sum": Family(
        config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        compact=r"problem: (.*)",
        form="{question}",
        gap="\n",
        max_new_tokens=5,
    ),
    "gcd": Family(
        config={"min_value": 2, "max_value": 30},
        compact=r"numbers: ([\d, ]+)\.",
        form="gcd of {question}:",
        gap="\n",
        max_new_tokens=5,
    ),
}


def dataset_names() -> list[str]:
    """The datasets of the installed reasoning-gym that can be made from a name alone."""
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS.keys() - {"composite"})


class ReasoningGym:
    """One dataset of reasoning-gym; see the module's docstring."""

    licence = "Apache-2.0"
    max_turns = 1

    def __init__(self, dataset: str) -> None:
        self.dataset = dataset
        self.family = FAMILIES.get(dataset, GENERAL)
        self.name = f"reasoning_gym/{dataset}"
        self.max_new_tokens = self.family.max_new_tokens

    @cached_property
    def version(self) -> str:
        """Ours, the library's, and a digest of how the family is made and shown."""
        shown = digest_json([self.family.config, self.family.compact, self.family.form, self.family.gap])[:8]
        return f"1+reasoning-gym-{package_version('reasoning-gym')}+{shown}"

    def tasks(self, split: Split, n: int, seed: int) -> list[Task]:
        """See `Environment.tasks`; items that the prompt shows solved are left out."""
        shown = {item["question"] for item in self._shots}
        candidates = (
            (self._prefix + self.family.show(item["question"]), item)
            for item in self._items(f"tasks/{seed}")
            if item["question"] not in shown
        )
        return draw_tasks(self, candidates, split, n, seed)

    def step(self, task: Task, actions: Sequence[str]) -> Step:
        """Score the only action; some families give part of the reward to an answer that is nearly right."""
        answer = actions[0].strip()
        score = self._score(answer, task.payload)
        return Step("", True, score, {"correct": float(score >= 1.0)}, valid=bool(answer))

    def constant_baseline(self, tasks: Sequence[Task]) -> tuple[str, float]:
        """The best of the true answers of `tasks`, each scored against every task."""
        means = self._means(tasks)
        best = max(means, key=lambda answer: means[answer])
        return best, means[best]

    def random_baseline(self, tasks: Sequence[Task], seed: int) -> float:
        """Expected reward of the true answer of a task drawn at random, whatever is asked."""
        means = self._means(tasks)
        return sum(means[str(task.payload["answer"])] for task in tasks) / len(tasks)

    def _means(self, tasks: Sequence[Task]) -> dict[str, float]:
        """The mean reward over `tasks` of each of their true answers."""
        require_some(tasks)
        answers = dict.fromkeys(str(task.payload["answer"]) for task in tasks)
        return {a: sum(self._score(a, task.payload) for task in tasks) / len(tasks) for a in answers}

    def _make(self, seed: int, size: int) -> Any:
        import reasoning_gym

        return reasoning_gym.create_dataset(self.dataset, seed=seed, size=size, **self.family.config)

    def _items(self, stream: str) -> Iterator[Mapping[str, Any]]:
        rng = random.Random(f"{self.name}/{stream}")
        while True:
            yield from self._make(rng.getrandbits(31), _CHUNK)

    def _score(self, answer: str, item: Mapping[str, Any]) -> float:
        return float(self._scorer.score_answer(answer, dict(item)))

    @cached_property
    def _scorer(self) -> Any:
        return self._make(seed=0, size=1)

    @cached_property
    def _shots(self) -> list[Mapping[str, Any]]:
        """Solved items whose answers fit on the line that an action is; different answers first.

        Raises:
            UsageError: the family has no such items (many valid answers, or answers of several lines).
        """
        items = itertools.islice(self._items("shots"), 8 * SHOTS)
        short = [
            item for item in items if isinstance(item["answer"], str) and _ONE_LINE.fullmatch(item["answer"])
        ]
        if len(short) < SHOTS:
            raise UsageError(
                f"{self.name} has no short worked answers to show in a prompt (they have several lines, "
                "or none is given); choose another dataset."
            )
        by_answer = {item["answer"]: item for item in reversed(short)}
        different = [item for item in short if item is by_answer[item["answer"]]]
        alike = [item for item in short if item is not by_answer[item["answer"]]]
        return (different + alike)[:SHOTS]

    @cached_property
    def _prefix(self) -> str:
        show = self.family.show
        return "".join(f"{show(item['question'])} {item['answer']}{self.family.gap}" for item in self._shots)
