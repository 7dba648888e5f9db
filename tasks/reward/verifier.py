"""Verifiers as reward sources: a function of prompt and answer, or the verifier that an environment has anyway."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal

from tasks.arena.environment import Environment, Task, get, verifier_digest
from tasks.core.digest import digest_json, sha256_file
from tasks.core.errors import Refused, UsageError
from tasks.reward.source import Answer

_FIRST = 64  # tasks that are drawn at first when those of some prompts are looked for
_MOST = 1 << 20


@dataclass(frozen=True)
class VerifierSource:
    """`judge(answer)` in [0, 1] as a reward source.

    Attributes:
        name: module:function, or an environment's name.
        digest: of name, version and source code.
    """

    name: str
    digest: str
    judge: Callable[[Answer], float] = field(repr=False)
    kind: Literal["verifier"] = "verifier"

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """Return rewards in [0, 1].

        Raises:
            Refused: the verifier raised, or gave something else than a number in [0, 1].
        """
        return [self._score(answer) for answer in answers]

    def _score(self, answer: Answer) -> float:
        try:
            value = float(self.judge(answer))
        except Refused:
            raise
        except Exception as error:  # whatever a user's function raises
            raise Refused(
                f"The verifier {self.name} raised {type(error).__name__} on the answer "
                f"{answer.response[:60]!r}: {error}"
            ) from error
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise Refused(
                f"The verifier {self.name} gave {value} to the answer {answer.response[:60]!r}; rewards are "
                "numbers from 0 to 1."
            )
        return value


def function_verifier(name: str) -> VerifierSource:
    """Return the function `module:function`, called with prompt and response.

    Its identity is the source of its whole module, of which it may use any part; what that imports is not followed.
    `VERSION` of the module, where there is one, counts as well.

    Raises:
        UsageError: there is no such function.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = import_module(module_name)
        function = getattr(module, attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"The verifier {name} cannot be imported ({error}); name module:function, with its folder on PYTHONPATH."
        ) from None
    if not callable(function):
        raise UsageError(f"The verifier {name} is of type {type(function).__name__}, not a function.")
    file = inspect.getsourcefile(module)
    if file is None:
        raise UsageError(f"The verifier {name} has no source file, so it has no identity.")
    identity = {
        "name": name,
        "version": str(getattr(module, "VERSION", "")),
        "source": sha256_file(Path(file)),
    }
    return VerifierSource(
        name, digest_json(identity), lambda answer: function(answer.prompt, answer.response)
    )


def environment_verifier(name: str, tasks: Mapping[str, Task] | None = None) -> VerifierSource:
    """Return an environment's verifier; its digest is that of rows which the environment rewarded itself.

    Args:
        tasks: {prompt: task}, of which answers are known; see `tasks_of`.

    Raises:
        UsageError: there is no such environment.
    """
    env = get(name)
    known = tasks or {}

    def judge(answer: Answer) -> float:
        task = known.get(answer.prompt)
        if task is None:
            raise Refused(f"{name} has no task with the prompt {answer.prompt[-60:]!r}; it cannot verify it.")
        return replay(env, task, answer.response)

    return VerifierSource(name, verifier_digest(env), judge)


def replay(env: Environment, task: Task, response: str) -> float:
    """Return the reward of an episode from its text alone: actions are read off between the observations.

    An action ends at a line break (or with the text); what the environment then says must follow, else the
    episode did not happen so and its reward is 0.
    """
    actions: list[str] = []
    rest = response
    for _ in range(env.max_turns):
        action, broke, rest = rest.partition("\n")
        actions.append(_plain(action))
        step = env.step(task, actions)
        if step.done:
            return step.reward
        rest = rest.lstrip()  # the token that ended the action may have held more than a line break
        if not broke or not rest.startswith(step.observation.lstrip()):
            return 0.0
        rest = rest.removeprefix(step.observation.lstrip())
    return 0.0


def tasks_of(name: str, wanted: Iterable[tuple[str, int, str]]) -> dict[str, Task]:
    """Draw tasks again until all that are wanted are there.

    Args:
        wanted: (task id, seed of its drawing, split) of each.

    Returns:
        {prompt: task}.

    Raises:
        Refused: some are not among what the environment draws from its seed today.
    """
    env = get(name)
    left: dict[tuple[int, str], set[str]] = {}
    for task_id, seed, split in wanted:
        left.setdefault((seed, split), set()).add(task_id)
    found: dict[str, Task] = {}
    for (seed, split), ids in left.items():
        drawn: dict[str, Task] = {}
        n = max(_FIRST, len(ids))
        while not ids <= drawn.keys():
            drawn = {task.id: task for task in _draw(env, split, n, seed)}
            if (len(drawn) < n or n > _MOST) and not ids <= drawn.keys():
                raise Refused(
                    f"{name} does not draw {len(ids - drawn.keys())} of the tasks any more; another version made them."
                )
            n *= 2
        found |= {drawn[i].prompt: drawn[i] for i in ids}
    return found


def _draw(env: Environment, split: str, n: int, seed: int) -> list[Task]:
    """Draw n tasks, or as many as there are."""
    tasks: list[Task] = []
    if split not in ("train", "heldout"):
        raise Refused(f"{env.name} has no split {split!r}.")
    fewest, most = 0, n + 1  # a draw of `fewest` works, one of `most` need not be tried
    while most - fewest > 1:
        try:
            tasks, fewest = env.tasks(split, n, seed), n  # type: ignore[arg-type]
        except UsageError:
            most = n
        n = (fewest + most) // 2
    return tasks


def _plain(action: str) -> str:
    """An action as environments see it: without the special tokens that ended it."""
    return action.partition("<|")[0] if action.rstrip().endswith("|>") else action
