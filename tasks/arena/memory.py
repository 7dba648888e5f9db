"""An environment of which the policy reads the prompt and the newest turns only: `memory_2/textarena/Sokoban`.

What the policy does not read costs nothing, so an episode may be longer than its context, and a prompt is about as long in
the last turn as in the third. Where an observation tells all that matters nothing is lost. Tasks, rewards and baselines
are those of the environment inside. The recipe of ARL-Arena (arXiv 2602.21534, section 4) has a memory of two turns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tasks.arena.environment import Environment, Split, Task, Wrapper
from tasks.core.errors import UsageError


@dataclass(frozen=True)
class Memory(Wrapper):
    """The environment `inside`, with a memory of so many turns (1 at least: the newest observation is part of a turn).

    It can do what the one inside can (`Listed`, `Expert` and so on).
    """

    inside: Environment
    memory_turns: int

    def __post_init__(self) -> None:
        if self.memory_turns < 1:
            raise UsageError(
                f"A memory of {self.memory_turns} turns has no place for what the environment answered last; "
                f"name memory_1/{self.inside.name} or more."
            )
        if isinstance(self.inside, Memory):
            raise UsageError(f"{self.inside.name} has a memory already; name one.")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inside":  # asked for while an object is unpickled
            raise AttributeError(name)
        return getattr(self.inside, name)

    @property
    def name(self) -> str:
        """See `Environment`."""
        return f"memory_{self.memory_turns}/{self.inside.name}"

    def tasks(self, split: Split, n: int, seed: int) -> list[Task]:
        """See `Environment.tasks`."""
        prefix = f"memory_{self.memory_turns}/"
        return [
            replace(task, id=prefix + task.id, env=self.name) for task in self.inside.tasks(split, n, seed)
        ]


def memory_turns(env: Environment) -> int | None:
    """Turns that a policy reads beside the prompt; None: all of them."""
    while isinstance(env, Wrapper):
        if isinstance(env, Memory):
            return env.memory_turns
        env = env.inside
    return None
