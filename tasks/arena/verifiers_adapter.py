"""Environments written for the package verifiers (tried: 0.1.5, 0.1.8), as text, without its clients and its trainer.

What is used of one is its dataset (rows of `prompt`, `answer`, `info`), `setup_state`, `env_response`, `is_completed`, and
its rubric's functions and weights, each plain or async; the package itself is not imported here. Both of its forms are
known: `is_completed(messages, state)` with `env_response` giving (messages, state), and `is_completed(state)` with
`env_response` giving messages and a `trajectory` in the state.

An action is the assistant's message: one line of text, so no tool calls by message field. The reward is the weighted sum
of the rubric, as a share of the sum of its positive weights, cut to [0, 1]; functions of weight 0 are metrics. Each function's
value is a component. A function that raises costs the episode (verifiers itself would count it as 0).

All rows are split anew by the hash of their prompt, as every environment's are, whichever dataset they come from.

    def load():
        import reverse_text
        return Verifiers("my_tasks:load", reverse_text.load_environment(), licence="Apache-2.0")
"""

from __future__ import annotations

import asyncio
import inspect
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from tasks.arena.environment import Split, Step, Task, draw_tasks, get
from tasks.arena.playing import Games, best_of, mean_reward
from tasks.core.digest import digest_json
from tasks.core.errors import UsageError

_TRIED = 20  # answers that the constant baseline tries
_GROUPED = {
    "states",
    "prompts",
    "completions",
    "answers",
    "tasks",
    "infos",
}  # what functions of whole groups ask for


class _Message(dict[str, Any]):
    """A chat message that is read by key or by attribute; verifiers has had both."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def told(messages: Sequence[Mapping[str, Any]]) -> str:
    """Chat as plain text, one paragraph a message with its role before it (none before a system message)."""
    return "\n".join(
        message["content"] if message["role"] == "system" else f"{message['role']}: {message['content']}"
        for message in messages
    )


@dataclass
class _Dialogue:
    """An episode in progress; `messages` is text where the environment's are completions, as `heard` then is."""

    prompt: Any
    messages: Any
    state: dict[str, Any]
    heard: Any = field(default_factory=list)  # the environment's last words
    turns: int = 0
    over: bool = False
    valid: bool = True


@dataclass(frozen=True)
class _Function:
    """One of a rubric; `objects` are what its rubric has for it beside the episode."""

    name: str
    function: Callable[..., Any]
    weight: float
    objects: Mapping[str, Any]


class Verifiers:
    """One such environment; see the module's docstring.

    Args:
        name: the path of the factory that makes this object, module:factory.
        env: a `SingleTurnEnv`, `MultiTurnEnv` or the like.
        licence: SPDX identifier of the licence of the task texts.
        version: changes whenever prompts or rewards change; the dataset's content is part of it by itself.
        max_turns: by default the environment's own.

    Raises:
        UsageError: there is no limit of turns, a rubric scores groups only, or it has no function of a positive weight.
    """

    def __init__(
        self,
        name: str,
        env: Any,
        *,
        licence: str,
        version: str = "1",
        max_turns: int | None = None,
        max_new_tokens: int = 64,
        show: Callable[[Sequence[Mapping[str, Any]]], str] = told,
    ) -> None:
        self.name = name
        self.licence = licence
        self.max_new_tokens = max_new_tokens
        self._env, self._show = env, show
        limit = max_turns or int(getattr(env, "max_turns", 0))
        if limit < 1 and any(base.__name__ == "SingleTurnEnv" for base in type(env).__mro__):
            limit = 1
        if limit < 1:
            raise UsageError(f"{name} has no limit of turns; give Verifiers(…, max_turns=…).")
        self.max_turns = limit
        self._functions = _functions(name, env.rubric)
        self._rows = _rows(env)
        self.version = f"{version}+{digest_json(self._rows)[:8]}"
        self._games: Games[_Dialogue] = Games(self._begin, self._advance)

    def __reduce__(self) -> tuple[Any, ...]:
        return get, (self.name,)  # another process makes it anew: such environments hold what cannot be sent

    def tasks(self, split: Split, n: int, seed: int) -> list[Task]:
        """See `Environment.tasks`; the rows come in an order drawn by `seed`."""
        order = list(range(len(self._rows)))
        random.Random(f"{self.name}/{seed}").shuffle(order)
        candidates = ((self._ask(self._rows[i]["prompt"]), {"row": i}) for i in order)
        return draw_tasks(self, candidates, split, n, seed)

    def step(self, task: Task, actions: Sequence[str]) -> Step:
        """See `Environment.step`."""
        with self._games.after(task.payload["row"], actions) as dialogue:
            if not dialogue.over:
                return Step(self._ask(dialogue.heard), done=False, valid=dialogue.valid)
            scores = {one.name: self._score(one, dialogue.state) for one in self._functions}
        earned = sum(one.weight * scores[one.name] for one in self._functions)
        most = sum(max(0.0, one.weight) for one in self._functions)
        reward = min(1.0, max(0.0, earned / most))
        return Step("", True, reward, {"success": float(reward >= 1.0), **scores}, dialogue.valid)

    def constant_baseline(self, tasks: Sequence[Task]) -> tuple[str, float]:
        """The best of the most common true answers, written in every turn."""
        answers = Counter(self._answer(task) for task in tasks).most_common(_TRIED)
        return best_of(self, tasks, (answer for answer, _ in answers))

    def random_baseline(self, tasks: Sequence[Task], seed: int) -> float:
        """Mean reward of the true answer of a task drawn at random, whatever is asked, in every turn."""
        rng = random.Random(f"{self.name}/random/{seed}")
        return mean_reward(self, tasks, lambda task, actions: self._answer(rng.choice(tasks)))

    def _answer(self, task: Task) -> str:
        return " ".join(str(self._rows[task.payload["row"]]["answer"]).split())

    def _ask(self, messages: Any) -> str:
        return messages if isinstance(messages, str) else f"{self._show(messages)}\nassistant:"

    def _begin(self, row: int) -> _Dialogue:
        given = deepcopy(self._rows[row])
        prompt = given["prompt"]
        state = {
            **given,
            "id": row,
            "example_id": row,
            "input": given,
            "completion": "" if isinstance(prompt, str) else [],
            "responses": [],
            "trajectory": [],
            "turn": 0,
            "timing": {"generation_ms": 0.0, "scoring_ms": 0.0, "total_ms": 0.0},
        }
        if hasattr(self._env, "setup_state"):
            state = _settled(self._env.setup_state(state)) or state
        return _Dialogue(prompt, prompt if isinstance(prompt, str) else list(prompt), state)

    def _advance(self, dialogue: _Dialogue, action: str) -> None:
        if dialogue.over:
            return
        state, said = dialogue.state, action.strip()
        dialogue.turns += 1
        dialogue.valid = bool(said)
        before = dialogue.messages[:]
        _extend(dialogue, said if isinstance(dialogue.messages, str) else [_message("assistant", said)])
        state["turn"] += 1
        state["responses"].append(said)
        state["trajectory"].append(
            {"prompt": before, "completion": [_message("assistant", said)], "response": None}
        )
        dialogue.over = dialogue.turns == self.max_turns or self._completed(dialogue)
        if dialogue.over:
            return
        answer = _settled(self._env.env_response(dialogue.messages, state))
        if isinstance(answer, tuple):  # the older form
            answer, state = answer
            dialogue.state = state
        dialogue.heard = answer if isinstance(dialogue.messages, str) else _messages(answer)
        _extend(dialogue, dialogue.heard)
        dialogue.over = state.get("final_env_response") is not None or self._completed(dialogue)

    def _completed(self, dialogue: _Dialogue) -> bool:
        asked = inspect.signature(self._env.is_completed).parameters
        words = (dialogue.messages, dialogue.state) if "messages" in asked else (dialogue.state,)
        return bool(_settled(self._env.is_completed(*words)))

    def _score(self, one: _Function, state: Mapping[str, Any]) -> float:
        """Call a rubric's function with what it asks for by name."""
        known = {name: state[name] for name in ("prompt", "completion", "answer", "task", "info")}
        known |= {"state": state, **one.objects}
        asked = inspect.signature(one.function).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in asked.values()):
            known = {name: value for name, value in known.items() if name in asked}
        return float(_settled(one.function(**known)))


def _extend(dialogue: _Dialogue, more: Any) -> None:
    """Add to the messages, in place, and so to the completion, which is all after the prompt."""
    dialogue.messages += more
    dialogue.state["completion"] = dialogue.messages[len(dialogue.prompt) :]


def _message(role: str, content: str) -> _Message:
    return _Message(role=role, content=content)


def _messages(given: Any) -> list[_Message]:
    """Messages of any form as ours: dictionaries or objects, their content text or parts of text."""
    if isinstance(given, str):
        return [_message("user", given)]
    found = []
    for message in given:
        read = message.get if isinstance(message, Mapping) else lambda name, m=message: getattr(m, name, None)
        content = read("content") or ""
        if not isinstance(content, str):
            content = "".join(part["text"] for part in content if part.get("type") == "text")
        found.append(_message(str(read("role")), content))
    return found


def _rows(env: Any) -> list[dict[str, Any]]:
    """The rows of both datasets, each as {prompt, answer, task, info}."""
    found = []
    for dataset in _datasets(env):
        for row in dataset:
            info = row.get("info") or {}
            prompt = row["prompt"]
            found.append(
                {
                    "prompt": prompt if isinstance(prompt, str) else _messages(prompt),
                    "answer": row.get("answer", ""),
                    "task": row.get("task", "default"),
                    "info": json.loads(info) if isinstance(info, str) else dict(info),
                }
            )
    return found


def _datasets(env: Any) -> Iterator[Any]:
    """The training and the evaluation dataset, where there are both."""
    seen: list[Any] = []
    for which in (env.get_dataset, getattr(env, "get_eval_dataset", env.get_dataset)):
        try:
            dataset = which()
        except ValueError:  # it has the other one alone
            continue
        if not any(dataset is other for other in seen):
            seen.append(dataset)
            yield dataset


def _functions(name: str, rubric: Any) -> list[_Function]:
    """The functions of a rubric and of those it is made of, each under a name of its own.

    Raises:
        UsageError: a function scores a group, or no weight is positive.
    """
    found: dict[str, _Function] = {}
    for one in (rubric, *getattr(rubric, "rubrics", ())):
        functions = getattr(one, "funcs", None) or getattr(one, "reward_funcs", None) or ()
        weights = (
            getattr(one, "weights", None) or getattr(one, "reward_weights", None) or [1.0] * len(functions)
        )
        objects = {"parser": getattr(one, "parser", None), **getattr(one, "class_objects", {})}
        for function, weight in zip(functions, weights, strict=True):
            called = getattr(function, "__name__", type(function).__name__)
            if _GROUPED & inspect.signature(function).parameters.keys():
                raise UsageError(f"{name}: {called} scores whole groups; here an episode is scored alone.")
            while called in found:
                called += "_"
            found[called] = _Function(called, function, float(weight), objects)
    if not any(one.weight > 0 for one in found.values()):
        raise UsageError(
            f"{name}: the rubric has no function of a positive weight, so nothing could be earned."
        )
    return list(found.values())


def _settled(value: Any) -> Any:
    """Wait for `value` if it is awaitable, whether or not a loop is running here."""
    if not inspect.isawaitable(value):
        return value
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_wait(value))
    with ThreadPoolExecutor(1) as other:
        return other.submit(asyncio.run, _wait(value)).result()


async def _wait(value: Awaitable[Any]) -> Any:
    return await value
