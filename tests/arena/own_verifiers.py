"""Environments with the method signatures of verifiers: the form of 0.1.5, and that of 0.1.6 and later.

The package needs dozens of others; what is written here is what a user's class looks like, and the parts of the base classes that
an adapter meets: datasets, `setup_state`, `is_completed`, `env_response`, the rubric's lists.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tasks.arena.verifiers_adapter import Verifiers

HERE = __name__
WORDS = [
    "abc", "hello", "tree", "stone", "river", "cloud", "apple", "house", "light", "music", "paper", "glass", "brick",
    "chair", "table", "plant", "lemon", "onion", "grape", "berry",
]  # fmt: skip


class Parser:
    def parse_answer(self, completion: Any) -> str:
        return str(completion[-1]["content"])


class Rubric:
    """0.1.5: `reward_funcs` and `reward_weights`."""

    def __init__(self, funcs: list[Callable[..., Any]], weights: list[float] | None = None) -> None:
        self.reward_funcs = funcs
        self.reward_weights = weights or [1.0] * len(funcs)
        self.parser = Parser()
        self.class_objects = {"parser": self.parser}


class LaterRubric:
    """0.1.6 and later: `funcs` and `weights`."""

    def __init__(self, funcs: list[Callable[..., Any]], weights: list[float] | None = None) -> None:
        self.funcs = funcs
        self.weights = weights or [1.0] * len(funcs)
        self.parser = Parser()
        self.class_objects = {"parser": self.parser}


class RubricGroup:
    def __init__(self, *rubrics: Any) -> None:
        self.rubrics = rubrics


def rows(system: str | None = None) -> list[dict[str, Any]]:
    head = [{"role": "system", "content": system}] if system else []
    return [
        {
            "id": i,
            "prompt": [*head, {"role": "user", "content": f"Reverse {word}."}],
            "answer": word[::-1],
            "info": json.dumps({"n": len(word)}) if i % 2 else {"n": len(word)},
        }
        for i, word in enumerate(WORDS)
    ]


class MultiTurnEnv:
    """0.1.5: -1 turns are no limit; `is_completed(messages, state)`."""

    max_turns = -1
    message_type = "chat"

    def __init__(self, dataset: list[dict[str, Any]], rubric: Any) -> None:
        self.dataset, self.rubric = dataset, rubric

    def get_dataset(self, n: int = -1, seed: int | None = None) -> Any:
        return self.dataset

    def get_eval_dataset(self, n: int = -1, seed: int | None = None) -> Any:
        return self.get_dataset(n, seed)

    async def setup_state(self, state: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return state

    async def is_completed(self, messages: Any, state: dict[str, Any], **kwargs: Any) -> bool:
        return 0 < self.max_turns <= state["turn"]


class SingleTurnEnv(MultiTurnEnv):
    async def is_completed(self, messages: Any, state: dict[str, Any], **kwargs: Any) -> bool:
        return len(state["responses"]) > 0

    async def env_response(self, messages: Any, state: dict[str, Any], **kwargs: Any) -> Any:
        raise AssertionError("never called")


class Hints(MultiTurnEnv):
    """0.1.5, several turns: the environment answers in (messages, state), here without async."""

    max_turns = 3

    async def is_completed(self, messages: Any, state: dict[str, Any], **kwargs: Any) -> bool:
        return state["turn"] >= self.max_turns or messages[-1]["content"] == state["answer"]

    def env_response(self, messages: Any, state: dict[str, Any], **kwargs: Any) -> Any:
        state["hints"] = state.get("hints", 0) + 1
        return [{"role": "user", "content": f"It begins with {state['answer'][: state['hints']]}."}], state


class LaterHints(MultiTurnEnv):
    """Later: state alone, messages alone, attributes, a final answer of the environment."""

    max_turns = 3

    async def setup_state(self, state: dict[str, Any]) -> None:  # type: ignore[override]
        state["hints"] = 0

    async def is_completed(self, state: dict[str, Any], **kwargs: Any) -> bool:  # type: ignore[override]
        return len(state["trajectory"]) >= self.max_turns or state.get("final_env_response") is not None

    async def env_response(self, messages: Any, state: dict[str, Any], **kwargs: Any) -> Any:
        if messages[-1].content == state["answer"]:
            state["final_env_response"] = [{"role": "user", "content": "right"}]
            return state["final_env_response"]
        state["hints"] += 1
        parts = [{"type": "text", "text": f"It begins with {state['answer'][: state['hints']]}."}]
        return [{"role": "user", "content": parts}]


class Completion(SingleTurnEnv):
    """`message_type` "completion": prompts are text."""

    message_type = "completion"


def exact(completion: Any, answer: str, parser: Parser, **kwargs: Any) -> float:
    return float(parser.parse_answer(completion) == answer)


async def length(completion: Any, info: dict[str, Any]) -> float:
    return float(len(completion[-1]["content"]) == info["n"])


def found(completion: Any, answer: str) -> float:
    return float(
        any(message["role"] == "assistant" and message["content"] == answer for message in completion)
    )


def turns(state: dict[str, Any]) -> int:
    return len(state["trajectory"])


def text(completion: str, answer: str) -> float:
    return float(completion.strip() == answer)


def best(completions: Any, answers: Any) -> list[float]:
    return [0.0]


def shouts(completion: Any) -> float:
    raise KeyError("no such key")


def made(name: str, env: Any, **more: Any) -> Verifiers:
    return Verifiers(f"{HERE}:{name}", env, licence="Apache-2.0", **more)


def single() -> Verifiers:
    rubric = Rubric([exact, length], [1.0, 0.5])
    return made("single", SingleTurnEnv(rows("Be brief."), rubric))


def hints() -> Verifiers:
    return made("hints", Hints(rows(), Rubric([found, turns], [1.0, 0.0])))


def later_hints() -> Verifiers:
    return made(
        "later_hints", LaterHints(rows(), RubricGroup(LaterRubric([found]), LaterRubric([turns], [0.0])))
    )


def completion() -> Verifiers:
    data = [{"prompt": f"{word} reversed:", "answer": word[::-1]} for word in WORDS]
    return made("completion", Completion(data, Rubric([text])))


def grouped() -> Verifiers:
    return made("grouped", SingleTurnEnv(rows(), LaterRubric([best])))


def worthless() -> Verifiers:
    return made("worthless", SingleTurnEnv(rows(), Rubric([exact], [0.0])))


def endless() -> Verifiers:
    env = Hints(rows(), Rubric([found]))
    env.max_turns = -1
    return made("endless", env)


def raising() -> Verifiers:
    return made("raising", SingleTurnEnv(rows(), Rubric([shouts])))
