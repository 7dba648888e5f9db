"""Verifiers as reward sources: a function of prompt and answer, or the verifier that an environment has anyway."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Literal

from tasks.arena.environment import Environment, Task, draw_up_to, get, verifier_digest
from tasks.core.digest import digest_json, sha256_bytes
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
    `VERSION` of the module, where there is one, counts as well. What runs is what was hashed.

    Raises:
        UsageError: there is no such function.
    """
    module_name, _, attribute = name.partition(":")
    try:
        file = _source_file(module_name)
        source = file.read_bytes() if file else b""
        module = _executed(module_name, source) if file else None
        function = getattr(module, attribute) if module else None
    except Exception as error:  # whatever a user's module raises
        raise UsageError(
            f"The verifier {name} cannot be imported ({error}); name module:function, with its folder on PYTHONPATH."
        ) from None
    if module is None:
        raise UsageError(f"The verifier {name} has no source file, so it has no identity.")
    if not callable(function):
        raise UsageError(f"The verifier {name} is of type {type(function).__name__}, not a function.")
    identity = {
        "name": name,
        "version": str(getattr(module, "VERSION", "")),
        "source": sha256_bytes(source),
    }
    return VerifierSource(
        name, digest_json(identity), lambda answer: function(answer.prompt, answer.response)
    )


def _source_file(module: str) -> Path | None:
    spec = find_spec(module)
    if spec is None:
        raise ImportError(f"No module named {module!r}")
    return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None


@cache
def _executed(name: str, source: bytes) -> ModuleType:
    """Return the module that these bytes make. One imported earlier may come from a file that has changed since."""
    spec = find_spec(name)
    assert spec is not None  # its file was read
    module, before = module_from_spec(spec), sys.modules.get(name)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        exec(compile(source, str(spec.origin), "exec"), module.__dict__)
    except BaseException:
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before
        raise
    return module


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
        if split not in ("train", "heldout"):
            raise Refused(f"{env.name} has no split {split!r}.")
        drawn: dict[str, Task] = {}
        n = max(_FIRST, len(ids))
        while not ids <= drawn.keys():
            drawn = {task.id: task for task in draw_up_to(env, split, n, seed)}  # type: ignore[arg-type]
            if (len(drawn) < n or n > _MOST) and not ids <= drawn.keys():
                raise Refused(
                    f"{name} does not draw {len(ids - drawn.keys())} of the tasks any more; another version made them."
                )
            n *= 2
        found |= {drawn[i].prompt: drawn[i] for i in ids}
    return found


def _plain(action: str) -> str:
    """An action as environments see it: without the special tokens that ended it."""
    return action.partition("<|")[0] if action.rstrip().endswith("|>") else action
