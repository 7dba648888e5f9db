"""The largest of three two-digit numbers, in one turn, exact match."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tasks.arena.environment import Split, Step, Task, draw_tasks, is_number, most_common_share, require_some

PREFIX = "largest of 42, 20, 51: 51\nlargest of 69, 17, 10: 69\nlargest of 15, 92, 56: 92\n"


class Largest:
    """See the module's docstring; copying any of the three numbers at random scores a third."""

    name = "largest"
    version = "1"
    licence = "Apache-2.0"
    max_turns = 1
    max_new_tokens = 5

    def tasks(self, split: Split, n: int, seed: int) -> list[Task]:
        """See `Environment.tasks`."""
        return draw_tasks(self, _candidates(seed), split, n, seed, _family)

    def step(self, task: Task, actions: Sequence[str]) -> Step:
        """Judge the only action; the text must be the number and nothing else."""
        correct = float(actions[0].strip() == str(task.payload["answer"]))
        return Step("", True, correct, {"correct": correct}, valid=is_number(actions[0]))

    def constant_baseline(self, tasks: Sequence[Task]) -> tuple[str, float]:
        """The most common answer."""
        return most_common_share([str(task.payload["answer"]) for task in tasks])

    def random_baseline(self, tasks: Sequence[Task], seed: int) -> float:
        """Expected reward of copying one of the three numbers, drawn at random."""
        require_some(tasks)
        return 1 / 3


def _family(payload: Mapping[str, Any]) -> str:
    """The same numbers in another order."""
    return " ".join(map(str, payload["numbers"]))


def _candidates(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    rng = random.Random(f"largest/{seed}")
    while True:
        numbers = rng.sample(range(10, 100), 3)
        payload = {"answer": max(numbers), "numbers": sorted(numbers)}
        yield f"{PREFIX}largest of {', '.join(map(str, numbers))}:", payload
