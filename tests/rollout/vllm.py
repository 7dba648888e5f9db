"""A server that generates with a real model and speaks the completions protocol as vLLM does."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from tasks.rollout.engine import Noise, start, uniform
from tests.served import Reply


def noise_of(seed: int) -> Noise:
    """What this server draws from for a request with this seed."""
    return (uniform("server", seed, token) for token in itertools.count())


class Vllm:
    """Answers as vLLM does; `spoil(number, reply)` changes a reply on its way out."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.model, self.name = model, name
        self.raw = False  # log-probabilities of temperature 1, whatever the temperature is
        self.spoil: Callable[[int, Reply], Reply] = lambda number, reply: reply
        self.most = 0  # requests that were under way at once
        self._now = 0
        self._lock = threading.Lock()

    def __call__(self, number: int, path: str, body: dict[str, Any] | None) -> Reply:
        if path == "models":
            return self.spoil(number, (200, {}, {"object": "list", "data": [{"id": self.name}]}))
        assert path == "completions"
        assert body is not None
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        reply = self._complete(body)
        with self._lock:
            self._now -= 1
        return self.spoil(number, (200, {}, reply))

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        greedy = body["temperature"] == 0
        assert {"top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0}.items() <= body.items()
        (action,) = start(self.model, [body["prompt"]], 1).act(
            None if greedy else [noise_of(body["seed"])],
            1.0 if greedy else body["temperature"],
            frozenset(body["stop_token_ids"]),
            body["max_tokens"],
        )
        logprobs = action.logprobs
        if self.raw:
            with torch.no_grad():
                logits = self.model(torch.tensor([body["prompt"] + action.ids])).logits[0]
            at = torch.arange(len(action.ids)) + len(body["prompt"]) - 1
            logprobs = logits.log_softmax(-1)[at, torch.tensor(action.ids)].tolist()
        told = {"tokens": [f"token_id:{i}" for i in action.ids], "token_logprobs": logprobs}
        ids = {"token_ids": action.ids, "prompt_token_ids": body["prompt"]}
        return {"choices": [{"index": 0, "text": "…", "finish_reason": "stop", "logprobs": told, **ids}]}
