"""An environment of which the policy reads the prompt and the newest turns only: `memory_2/textarena/Sokoban`.

What the policy does not read costs nothing, so an episode may be longer than its context, and a prompt is about as long in
the last turn as in the third. Where an observation tells all that matters nothing is lost. Tasks, rewards and baselines
are those of the environment inside. The recipe of ARL-Arena (arXiv 2602.21534, section 4) has a memory of two turns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tasks.arena.environment import Environment, Split, Task, Wrapper
from tasks.core.errors import UsageError
from tasks.replay.schema import MOST_TURNS

# What only some environments can do. Set on the object, for later versions of Python look for them there.
_ABILITIES = ("choices", "expert", "hack", "picture", "steps")


@dataclass(frozen=True)
class Memory(Wrapper):
    """The environment `inside`, with a memory of so many turns (1 at least: the newest observation is part of a turn).

    It can do what the one inside can (`Listed`, `Expert` and so on).
    """

    inside: Environment
    memory_turns: int

    def __post_init__(self) -> None:
        if not 1 <= self.memory_turns <= MOST_TURNS:
            raise UsageError(
                f"A memory of {self.memory_turns} turns cannot be: the newest is needed, for what the environment answered "
                f"last, and an episode has at most {MOST_TURNS}; name memory_1/{self.inside.name} or more."
            )
        if isinstance(self.inside, Memory):
            raise UsageError(f"{self.inside.name} has a memory already; name one.")
        for ability in _ABILITIES:
            if hasattr(self.inside, ability):
                object.__setattr__(self, ability, getattr(self.inside, ability))

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
