"""What an environment with a verifiable reward is, how its tasks are split, and how one is found by name.

An episode is plain text: the task's prompt, then turns. The agent's action is what it writes up to the first
newline; the environment answers with an observation that is appended as it is, or ends the episode. `step` is
a pure function of the task and the actions so far, so any episode can be scored again from its text. What only some
environments can do is a protocol of its own: `Listed`, `Pictured`, `Expert`.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from tasks.core.digest import digest_json, sha256_bytes
from tasks.core.errors import Unavailable, UsageError
from tasks.replay.schema import DEEP_THINKING, INVALID_TURNS, MEMORY_TURNS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Split = Literal["train", "heldout"]
HELDOUT_SHARE = 0.25  # of all prompts, by hash
MISSES = 5_000  # candidates in a row without a new prompt, after which a family is taken to have no more


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt with what its verifier needs; `id` follows from the environment and the prompt alone.

    Tasks of one `family` are near copies of one another (one template with the same numbers), so their rewards say less
    than as many separate ones; by default a task is its own family.
    """

    id: str
    env: str
    env_version: str
    split: Split
    seed: int
    prompt: str
    payload: Mapping[str, Any]
    family: str = ""

    def __post_init__(self) -> None:
        if not self.family:
            object.__setattr__(self, "family", self.id)


@dataclass(frozen=True, slots=True)
class Step:
    """What the environment says after an action. `reward` and `components` count only when `done`.

    `valid` is of the action: it had the right form, and was possible.
    """

    observation: str
    done: bool
    reward: float = 0.0
    components: Mapping[str, float] = field(default_factory=dict)
    valid: bool = True


class Environment(Protocol):
    """A family of tasks with its verifier; stateless, so one object serves any number of episodes."""

    @property
    def name(self) -> str:
        """What `get` knows it by."""

    @property
    def version(self) -> str:
        """Changes whenever the prompts or the rewards of the same seed change."""

    @property
    def licence(self) -> str:
        """SPDX identifier of the licence of the task texts."""

    @property
    def max_turns(self) -> int:
        """Most actions an episode may have."""

    @property
    def max_new_tokens(self) -> int:
        """Most tokens one action may have."""

    def tasks(self, split: Split, n: int, seed: int) -> list[Task]:
        """Draw `n` tasks with distinct prompts; the same arguments give the same tasks.

        Raises:
            UsageError: the family has fewer than `n` distinct prompts in this split.
        """

    def step(self, task: Task, actions: Sequence[str]) -> Step:
        """Answer the last of `actions`, given the ones before it."""

    def constant_baseline(self, tasks: Sequence[Task]) -> tuple[str, float]:
        """The one action that scores best when it is all that is ever written, and its mean reward."""

    def random_baseline(self, tasks: Sequence[Task], seed: int) -> float:
        """Mean reward of choosing blindly among the actions that have the right form.

        The exact expectation where there is one, which no `seed` changes; else of one episode for each task.

        Raises:
            UsageError: there are no tasks.
        """


@runtime_checkable
class Listed(Protocol):
    """An environment whose tasks have a finite list of actions."""

    def choices(self, task: Task) -> Sequence[str]:
        """Every action that has the right form in this task, whether it is possible at a given moment or not."""


@runtime_checkable
class Pictured(Protocol):
    """An environment that can be looked at."""

    def picture(self, task: Task, actions: Sequence[str]) -> NDArray[np.uint8]:
        """What there is to see after `actions`, as [height, width, 3] in RGB."""


@runtime_checkable
class Expert(Protocol):
    """An environment that knows how its tasks are solved."""

    def expert(self, task: Task, actions: Sequence[str]) -> str:
        """The action that an expert would write after `actions`, while the episode is not over.

        Raises:
            UsageError: the task cannot be solved any more.
        """


@runtime_checkable
class Hackable(Protocol):
    """An environment whose reward can be had the wrong way; its components `honest`, `forbidden` and `hacked` tell how."""

    def hack(self, task: Task, actions: Sequence[str]) -> str:
        """The action that an agent after the reward alone would write after `actions`, while the episode is not over."""


@runtime_checkable
class Batched(Protocol):
    """An environment that can answer several episodes at once."""

    def steps(self, turns: Sequence[tuple[Task, Sequence[str]]]) -> list[Step | Exception]:
        """Answer each (task, actions) as `Environment.step` does; what that would raise stands in the answer's place."""


class Wrapper:
    """An environment that only runs another one, `inside`, which alone says what an episode is worth."""

    inside: Environment

    @property
    def name(self) -> str:
        """See `Environment`."""
        return self.inside.name

    @property
    def version(self) -> str:
        """See `Environment`."""
        return self.inside.version

    @property
    def licence(self) -> str:
        """See `Environment`."""
        return self.inside.licence

    @property
    def max_turns(self) -> int:
        """See `Environment`."""
        return self.inside.max_turns

    @property
    def max_new_tokens(self) -> int:
        """See `Environment`."""
        return self.inside.max_new_tokens

    def tasks(self, split: Split, n: int, seed: int) -> list[Task]:
        """See `Environment.tasks`."""
        return self.inside.tasks(split, n, seed)

    def step(self, task: Task, actions: Sequence[str]) -> Step:
        """See `Environment.step`."""
        return self.inside.step(task, actions)

    def constant_baseline(self, tasks: Sequence[Task]) -> tuple[str, float]:
        """See `Environment.constant_baseline`."""
        return self.inside.constant_baseline(tasks)

    def random_baseline(self, tasks: Sequence[Task], seed: int) -> float:
        """See `Environment.random_baseline`."""
        return self.inside.random_baseline(tasks, seed)


def step_all(env: Environment, turns: Sequence[tuple[Task, Sequence[str]]]) -> list[Step | Exception]:
    """Answer each (task, actions); whatever the environment raises, or returns that is no proper `Step`, is an exception
    in the answer's place."""
    if isinstance(env, Batched):
        return env.steps(turns)
    answers: list[Step | Exception] = []
    for task, actions in turns:
        try:
            answers.append(checked(env.step(task, actions)))
        except Exception as error:  # whatever an environment raises costs this episode, not the others
            answers.append(error)
    return answers


def checked(step: object) -> Step:
    """Return `step` if it is what an episode can be made of.

    Raises:
        TypeError: it is no `Step`, or its fields have other types than theirs.
        ValueError: a number is not finite, a text has no UTF-8 form, or a component has a name of ours.
    """
    if not isinstance(step, Step):
        raise TypeError(f"the answer is of type {type(step).__name__}, not Step")
    texts = {"observation": step.observation} | {f"component {name!r}": name for name in step.components}
    ours = {INVALID_TURNS, MEMORY_TURNS, DEEP_THINKING} & {*step.components}
    if ours:
        raise ValueError(f"the component {min(ours)!r} has a name that Forebay keeps for itself")
    numbers = {"reward": step.reward} | {f"component {name!r}": n for name, n in step.components.items()}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise TypeError(f"the {name} is of type {type(text).__name__}, not str")
        text.encode()
    for name, number in numbers.items():
        if not isinstance(number, int | float):
            raise TypeError(f"the {name} is of type {type(number).__name__}, not float")
        if not math.isfinite(number):
            raise ValueError(f"the {name} is {number}")
    for name, flag in {"done": step.done, "valid": step.valid}.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} is of type {type(flag).__name__}, not bool")
    return step


_NUMBER = re.compile(r"\s*-?\d+\s*", re.ASCII)


def is_number(action: str) -> bool:
    """Whether `action` is one whole number, the form of many answers."""
    return _NUMBER.fullmatch(action) is not None


def cut(text: str, most: int) -> str:
    """Return `text`, or if it is longer than `most` characters its two ends with a note between them (the note alone if that is longer)."""
    if len(text) <= most:
        return text
    note = f"[{len(text)} characters, cut]"
    room = max(0, most - len(note))
    return text[: room - room // 2] + note + text[len(text) - room // 2 :]


def split_of(prompt: str) -> Split:
    """The split a prompt belongs to, whatever seed drew it: a threshold on the SHA-256 of its text."""
    fraction = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) / 2**64
    return "heldout" if fraction < HELDOUT_SHARE else "train"


def draw_tasks(
    env: Environment,
    candidates: Iterable[tuple[str, Mapping[str, Any]]],
    split: Split,
    n: int,
    seed: int,
    family: Callable[[Mapping[str, Any]], str] = lambda payload: "",
) -> list[Task]:
    """Take the first `n` distinct (prompt, payload) candidates that belong to `split`.

    `family` names the family of a payload; "" makes the task its own.

    Gives up after `MISSES` candidates in a row without a new prompt, so a family with few prompts ends in an error and
    not in an endless loop.

    Raises:
        UsageError: too few distinct prompts were seen.
    """
    found: dict[str, Task] = {}
    misses = 0
    for prompt, payload in candidates:
        if len(found) == n or misses == MISSES:
            break
        if split_of(prompt) == split and prompt not in found:
            task_id = f"{env.name}/{sha256_bytes(prompt.encode())[:16]}"
            found[prompt] = Task(
                task_id, env.name, env.version, split, seed, prompt, payload, family(payload)
            )
            misses = 0
        else:
            misses += 1
    if len(found) < n:
        raise UsageError(
            f"The environment {env.name} has only {len(found)} distinct prompts in its {split} split, "
            f"but {n} were asked for; ask for at most {len(found)}."
        )
    return list(found.values())


def draw_up_to(env: Environment, split: Split, n: int, seed: int) -> list[Task]:
    """Draw `n` tasks, or as many as there are."""
    tasks: list[Task] = []
    fewest, most = 0, n + 1  # a draw of `fewest` works, one of `most` need not be tried
    while most - fewest > 1:
        try:
            tasks, fewest = env.tasks(split, n, seed), n
        except UsageError:
            most = n
        n = (fewest + most) // 2
    return tasks


def require_some(tasks: Sequence[Task]) -> None:
    """Raise UsageError where there are no tasks that a baseline could be measured on."""
    if not tasks:
        raise UsageError("A baseline needs at least one task.")


def most_common_share(answers: Sequence[str]) -> tuple[str, float]:
    """The most frequent answer and its share of all: the constant baseline of an exact-match task."""
    if not answers:
        raise UsageError("A constant baseline needs at least one task.")
    answer, count = Counter(answers).most_common(1)[0]
    return answer, count / len(answers)


# Ours, with the classes that they are objects of.
_OWN: Mapping[str, str] = {
    "calculator": "tasks.arena.calculator:Calculator",
    "largest": "tasks.arena.largest:Largest",
    "python_tool": "tasks.arena.python_tool:PythonTool",
    "safety/lax_checker": "tasks.arena.safety:LaxChecker",
    "safety/leaky_tool": "tasks.arena.safety:LeakyTool",
    "safety/shortcut": "tasks.arena.safety:Shortcut",
}

_TOOLS = ("calculator", "python_tool")


@dataclass(frozen=True, slots=True)
class _Source:
    """Environments whose names begin alike.

    Attributes:
        known: import path of what stands behind the slash: a collection, or a function that gives it.
        make: import path of the function that makes one of them.
        package: what has to be installed for them, if anything, and `how`.
        open: it makes others than the known ones too.
    """

    known: str
    make: str
    package: str = ""
    how: str = "install forebay[arena]"
    open: bool = False


# By the prefix of the name. Two packages ask for old versions of much else (of numpy, say) that they do not need here.
_SOURCES: Mapping[str, _Source] = {
    "feedback": _Source("tasks.arena.topics:TOPICS", "tasks.arena.teachers:truthful"),
    "feedback_shuffled": _Source("tasks.arena.topics:TOPICS", "tasks.arena.teachers:shuffled"),
    "feedback_endpoint": _Source("tasks.arena.topics:TOPICS", "tasks.arena.teachers:by_endpoint"),
    "bfcl": _Source(
        "tasks.arena.bfcl_calls:CATEGORIES", "tasks.arena.bfcl_calls:Bfcl", "bfcl_eval",
        "pip install --no-deps bfcl-eval==2026.3.23",
    ),
    "textworld": _Source(
        "tasks.arena.textworld_games:GAMES", "tasks.arena.textworld_games:make", "textworld_express",
        "pip install --no-deps textworld-express==1.1.0 py4j, and have Java",
    ),
    "gymnasium": _Source(
        "tasks.arena.gymnasium_adapter:WORLDS", "tasks.arena.gymnasium_adapter:make", "gymnasium", open=True
    ),
    "minigrid": _Source("tasks.arena.minigrid_rooms:LEVELS", "tasks.arena.minigrid_rooms:make", "minigrid"),
    "textarena": _Source("tasks.arena.textarena_games:GAMES", "tasks.arena.textarena_games:make", "textarena"),
    "reasoning_gym": _Source("tasks.arena.reasoning:dataset_names", "tasks.arena.reasoning:ReasoningGym"),
}  # fmt: skip
_REMEMBERED = re.compile(r"memory_(0|[1-9][0-9]{0,9})/(.+)")


def plain_name(name: str) -> str:
    """The name without a memory: of the environment that draws the tasks and says what they are worth."""
    remembered = _REMEMBERED.fullmatch(name)
    return remembered[2] if remembered else name


def tasks_digest(name: str, tasks: Sequence[Task]) -> str:
    """Digest of the tasks that were asked in the environment `name`: figures with the same one are of the same split.

    A memory changes no task, and so not the digest. Without one it is that of an evaluation of this environment alone.
    """
    return digest_json({plain_name(name): [plain_name(task.id) for task in tasks]})


def names() -> list[str]:
    """Every environment that `get` knows by a name of ours and that can be used here."""
    from tasks.arena.teachers import configured

    usable = [prefix for prefix, source in _SOURCES.items() if _installed(source)]
    if not configured():
        usable.remove("feedback_endpoint")
    return [*_OWN, *(f"{prefix}/{name}" for prefix in usable for name in _known(_SOURCES[prefix]))]


def named(text: str) -> list[str]:
    """The names of environments joined by commas, as a command takes them.

    What comes before a slash names all that begin so (`textarena`), `tools` those with a tool, and a last part in any case
    the first of `names()` that has it (`sokoban`); reasoning-gym's riddles, one of them a sokoban too, are named in full.
    Anything else is a name already.
    """
    known = names()
    short = [name for name in known if not name.startswith("reasoning_gym/")]
    groups = {prefix: [name for name in known if name.startswith(f"{prefix}/")] for prefix in _SOURCES}
    groups |= {"safety": [name for name in known if name.startswith("safety/")], "tools": list(_TOOLS)}
    found: list[str] = []
    for word in filter(None, map(str.strip, text.split(","))):
        plain = plain_name(word)
        memory = word.removesuffix(plain)
        ends = [name for name in short if name.rpartition("/")[2].casefold() == plain.casefold()]
        meant = groups.get(plain) or (ends[:1] if ends and plain not in known else [plain])
        found += [memory + name for name in meant]
    return found


def get(name: str) -> Environment:
    """Return the environment called `name`: one of `names()`, `gymnasium/<id>`, or your own by `package.module:factory`;
    behind `memory_<n>/` with a memory of n turns (`tasks.arena.memory`).

    The factory takes no arguments and returns an `Environment` whose `name` is its own path.

    Raises:
        UsageError: there is no such environment, and the sentence names the nearest one; or the factory cannot be used;
            or no teacher is named for `feedback_endpoint`, see `tasks.arena.teachers`.
        Unavailable: the package that it comes from is not installed.
    """
    if name in _OWN:
        return _made(_OWN[name])
    if remembered := _REMEMBERED.fullmatch(name):
        from tasks.arena.memory import Memory

        return Memory(get(remembered[2]), int(remembered[1]))
    prefix, _, rest = name.partition("/")
    source = _SOURCES.get(prefix)
    if source is not None and not _installed(source):
        raise Unavailable(
            f"The environment {name} needs the package {source.package}, which is not installed; {source.how}."
        )
    if source is not None and rest and (source.open or rest in _known(source)):
        return _made(source.make, rest)
    if source is None and ":" in name:
        return _from_path(name)
    nearest = difflib.get_close_matches(name, names(), n=1, cutoff=0.0)[0]
    raise UsageError(
        f"There is no environment {name!r}; the nearest name is {nearest!r}. One of your own is named "
        "package.module:factory (docs/environments.md#your-own)."
    )


def _from_path(path: str) -> Environment:
    """The environment that somebody else's factory gives.

    Raises:
        UsageError: the path leads nowhere, the factory fails, or what it gives is no `Environment` of this name.
    """
    try:
        env = _made(path)
    except UsageError:
        raise
    except Exception as error:  # whatever the module does when it is imported
        raise UsageError(
            f"The environment {path} cannot be made ({type(error).__name__}: {error}); name package.module:factory, "
            "with its folder on PYTHONPATH."
        ) from None
    lacking = [member for member in _MEMBERS if not hasattr(env, member)]
    if lacking:
        raise UsageError(
            f"{path} gives an object of type {type(env).__name__}, which is no Environment: it lacks {', '.join(lacking)}."
        )
    if env.name != path:
        raise UsageError(f"The environment of {path} calls itself {env.name!r}; its name must be {path!r}.")
    return env


_MEMBERS = sorted(name for name in vars(Environment) if not name.startswith("_"))


def _at(path: str) -> Any:
    """What stands at the import path `package.module:name`."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def _made(path: str, *arguments: str) -> Environment:
    """What the function at the import path makes."""
    made: Environment = _at(path)(*arguments)
    return made


def _known(source: _Source) -> Collection[str]:
    found = _at(source.known)
    known: Collection[str] = found() if callable(found) else found
    return known


def _installed(source: _Source) -> bool:
    return not source.package or find_spec(source.package) is not None


def verifier_digest(env: Environment) -> str:
    """Identity of what scores an episode: the environment's name, version and source code, however it is run."""
    while isinstance(env, Wrapper):
        env = env.inside
    source = inspect.getsource(sys.modules[type(env).__module__])
    return digest_json({"name": env.name, "version": env.version, "source": sha256_bytes(source.encode())})
