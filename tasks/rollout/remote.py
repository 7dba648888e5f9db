"""An engine on a server: vLLM, or any that speaks its form of the OpenAI completions protocol.

Prompts go out as token ids, and token ids come back with their log-probabilities, so nothing is ever tokenised twice.
Each action is one request with a seed of its own, which follows from the noise of its row; the server's prefix cache
shares the prompt among the samples of a group. What the server would choose by itself (top-p, penalties: vLLM takes
them from the model's generation_config.json) is sent as "none".

Before anything is collected two things are checked: that the server lists the model by the expected name, and that its
log-probabilities are those of the agent's weights here, to within the rounding of another engine. The second finds
other weights, another temperature, or heavy quantisation; it cannot tell apart agents that differ by less than that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tasks.core.endpoint import Endpoint, Garbled
from tasks.core.errors import Refused
from tasks.core.settings import Collect
from tasks.rollout.engine import Action, Engine, Local, Noise, log_distribution, uniform

if TYPE_CHECKING:
    import httpx
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LARGEST_GAP = 0.1  # nats a token on average; bfloat16 and other kernels make about 0.01 to 0.03
_PROBE_TEXT, _PROBE_ROWS, _PROBE_TOKENS = "Once upon a time", 8, 16
_TOKEN_ID = "token_id:"
# What decides the distribution beside the temperature.
_PLAIN = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@contextmanager
def open_engine(
    settings: Collect, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, digest: str
) -> Iterator[Engine]:
    """Yield what generates for the agent with this digest, whose weights are `model`: them, or the server of the settings.

    Raises:
        UsageError: the server's address or key cannot be used.
        Unavailable: it does not answer.
        Refused: it serves something else, or cannot say which tokens it wrote; the sentence names the option of vLLM.
    """
    if settings.engine is None:
        yield Local(model)
        return
    endpoint = Endpoint(
        url=settings.engine.url,
        section="collect.engine",
        who="The engine",
        kept="the groups that are finished are kept, run the same command again",
        api_key_env=settings.engine.api_key_env,
        timeout_s=settings.engine.timeout_s,
        retries=settings.engine.retries,
    )
    endpoint.check()
    parallel = settings.engine.parallel
    # The client is closed first: after an interrupt nobody asks again, and the pool ends.
    with ThreadPoolExecutor(parallel) as pool, endpoint.client(parallel) as client:
        name = settings.engine.model or digest
        engine = ServedEngine(endpoint, client, pool, name, model.config.get_text_config().vocab_size)
        engine.require_listed(str(model.name_or_path))
        prompt = tokenizer(_PROBE_TEXT, add_special_tokens=False)["input_ids"]
        require_agreement(engine, model, prompt, settings.temperature)
        yield engine


@dataclass(frozen=True)
class ServedEngine:
    """A model on a server, by the name it has there. `vocabulary` is the number of its token ids."""

    endpoint: Endpoint
    client: httpx.Client
    pool: ThreadPoolExecutor
    model: str
    vocabulary: int

    def start(self, prompts: Sequence[Sequence[int]], copies: int) -> ServedRows:
        """See `Engine.start`; nothing is sent yet."""
        return ServedRows(self, [list(prompt) for prompt in prompts for _ in range(copies)])

    def require_listed(self, folder: str) -> None:
        """Find the model, whose files are in `folder`, among those that the server lists.

        Raises:
            Unavailable: the server does not answer.
            Refused: it serves no model of this name.
        """
        served = self.endpoint.ask(self.client, "models", None, _model_names)
        if self.model not in served:
            raise Refused(
                f"The engine at {self.endpoint.url} serves {', '.join(served[:10]) or 'nothing'}, not {self.model}; start "
                f"`vllm serve {folder} --served-model-name {self.model}`."
            )

    def write(
        self,
        prompt: Sequence[int],
        seed: int | None,
        temperature: float,
        stop: frozenset[int],
        max_new_tokens: int,
    ) -> Action:
        """Ask for one action after `prompt`; without a seed the most probable tokens.

        Raises:
            Unavailable: the server does not answer, or with nothing usable.
            Refused: it refuses the request, changes the prompt, or does not say which tokens it wrote.
        """
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": max_new_tokens,
            "temperature": 0.0 if seed is None else temperature,
            "seed": seed,
            **_PLAIN,
            "stop_token_ids": sorted(stop),
            "ignore_eos": True,  # it is among the tokens that stop
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # how earlier versions of vLLM say it
        }
        return self.endpoint.ask(
            self.client,
            "completions",
            body,
            lambda reply: read_action(reply, prompt, stop, max_new_tokens, self.vocabulary),
        )


class ServedRows:
    """Rows whose tokens are kept here; the server sees a row only while it writes an action."""

    def __init__(self, engine: ServedEngine, sequences: list[list[int]]) -> None:
        """Rows that hold `sequences`."""
        self._engine = engine
        self._sequences = sequences

    def act(
        self,
        noise: Sequence[Noise] | None,
        temperature: float,
        stop: frozenset[int],
        max_new_tokens: int,
        last: bool = False,
    ) -> list[Action]:
        """See `Batch.act`; one number of a row's noise becomes the seed of its action.

        Raises:
            Unavailable, Refused: see `ServedEngine.write`.
        """
        # 53 bits, all that a number has.
        seeds = [None] * len(self._sequences) if noise is None else [int(next(one) * 2**53) for one in noise]

        def write(prompt: Sequence[int], seed: int | None) -> Action:
            return self._engine.write(prompt, seed, temperature, stop, max_new_tokens)

        actions = list(self._engine.pool.map(write, self._sequences, seeds))
        for sequence, action in zip(self._sequences, actions, strict=True):
            sequence += action.ids[:-1]
        return actions

    def keep(self, rows: Sequence[int]) -> None:
        """See `Batch.keep`."""
        self._sequences = [self._sequences[row] for row in rows]

    def feed(self, chunks: Sequence[Sequence[int]]) -> None:
        """See `Batch.feed`."""
        for sequence, chunk in zip(self._sequences, chunks, strict=True):
            sequence += chunk


def read_action(
    reply: Any, prompt: Sequence[int], stop: frozenset[int], max_new_tokens: int, vocabulary: int
) -> Action:
    """Return the action in the JSON value of a completion.

    What stands after the first stopping token is dropped: a server that does not know `stop_token_ids` writes on.

    Raises:
        Garbled: the value is no completion, its numbers make no sense, or it ends early without a stopping token.
        Refused: it does not say which tokens it holds, or which it was asked for are not those that were sent.
    """
    try:
        choice = reply["choices"][0]
        told = choice.get("logprobs") or {}
        logprobs, texts = told.get("token_logprobs"), told.get("tokens") or []
        ids, read_prompt = choice.get("token_ids"), choice.get("prompt_token_ids")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Garbled("the reply is no completion") from None
    if ids is None and texts and all(str(text).startswith(_TOKEN_ID) for text in texts):
        numbers = [str(text).removeprefix(_TOKEN_ID) for text in texts]
        ids = [int(number) for number in numbers if number.isdecimal()]
    if ids is None or logprobs is None:
        raise Refused(
            "The engine's replies have no token ids with log-probabilities; serve the agent with vLLM 0.10.2 or later "
            "(option return_token_ids), or start an earlier one with --return-tokens-as-token-ids."
        )
    if read_prompt is not None and read_prompt != list(prompt):
        raise Refused(
            f"The engine read a prompt of {len(read_prompt)} tokens where {len(prompt)} others were sent: it serves a "
            "model with another tokenizer, or cuts prompts; raise its --max-model-len."
        )
    if not (isinstance(ids, list) and isinstance(logprobs, list) and len(ids) == len(logprobs)):
        raise Garbled("token ids and log-probabilities do not belong together")
    if not all(type(i) is int and 0 <= i < vocabulary for i in ids):
        raise Garbled(f"a token id is not in 0..{vocabulary - 1}")
    if not all(type(number) in (int, float) and math.isfinite(number) for number in logprobs):
        raise Garbled("a log-probability is no number")
    length = next((i + 1 for i, token in enumerate(ids) if token in stop), len(ids))
    if not 1 <= length <= max_new_tokens:
        raise Garbled(f"{length} tokens, where 1 to {max_new_tokens} were asked for")
    if length < max_new_tokens and ids[length - 1] not in stop:
        raise Garbled(f"it ends after {length} of {max_new_tokens} tokens without a token that stops")
    return Action(ids[:length], [min(0.0, float(number)) for number in logprobs[:length]])


def require_agreement(
    engine: Engine, model: PreTrainedModel, prompt: Sequence[int], temperature: float
) -> None:
    """Let the engine write a little after `prompt` and compare its log-probabilities with those of `model`.

    Raises:
        Refused: they are those of another temperature, or differ by more than `LARGEST_GAP`.
    """
    noise = [iter([uniform("engine", row)]) for row in range(_PROBE_ROWS)]
    actions = engine.start([prompt], _PROBE_ROWS).act(
        noise, temperature, frozenset(), _PROBE_TOKENS, last=True
    )
    gap, gap_at_one = (_gap(model, prompt, actions, at) for at in (temperature, 1.0))
    if gap_at_one < gap:
        raise Refused(
            f"The engine's log-probabilities are those of temperature 1, not of collect.temperature {temperature}; start "
            "vLLM with --logprobs-mode processed_logprobs."
        )
    if gap > LARGEST_GAP:
        raise Refused(
            f"The engine's log-probabilities differ from the agent's by {gap:.3f} nats a token on average, more than "
            f"{LARGEST_GAP}: it serves other weights, or coarsely quantised ones; serve the agent's folder."
        )


@torch.inference_mode()
def _gap(
    model: PreTrainedModel, prompt: Sequence[int], actions: Sequence[Action], temperature: float
) -> float:
    """Mean absolute difference in nats; the actions are equally long."""
    written = torch.tensor([action.ids for action in actions], device=model.device)
    start = torch.tensor([list(prompt)] * len(actions), device=model.device)
    logits = model(torch.cat([start, written], dim=1)).logits[:, len(prompt) - 1 : -1]
    found = log_distribution(logits.flatten(0, 1), temperature).gather(1, written.flatten()[:, None])[:, 0]
    told = torch.tensor([action.logprobs for action in actions], device=model.device).flatten()
    return float((found - told).abs().mean())


def _model_names(reply: Any) -> list[str]:
    try:
        return [str(one["id"]) for one in reply["data"]]
    except (KeyError, TypeError):
        raise Garbled("the reply is no list of models") from None
