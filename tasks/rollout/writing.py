"""One line after any text: a policy as a student who goes on with a conversation, or as a teacher who answers a chat."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.rollout.engine import Noise, start, uniform
from tasks.rollout.rollout import stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Writer:
    """Writes with `model`; a pure function of the texts.

    Attributes:
        max_new_tokens: of a line.
        temperature: above 0; None takes the most probable token.
        seed: of the noise, which also depends on the text and its place among the texts.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    temperature: float | None = None
    seed: int = 0

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """The line that follows each of `texts`, without its line break.

        Raises:
            Refused: the model's logits are not numbers.
        """
        prompts = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        noise = None
        if self.temperature is not None:
            noise = [_noise(self.seed, text, place) for place, text in enumerate(texts)]
        rows = start(self.model, prompts, 1)
        stop = stop_tokens(self.tokenizer)
        actions = rows.act(noise, self.temperature or 1.0, stop, self.max_new_tokens, last=True)
        written = (self.tokenizer.decode(action.ids, skip_special_tokens=True) for action in actions)
        return [str(text).partition("\n")[0].strip() for text in written]

    def complete(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The line after chat messages: by the tokenizer's chat template, where it has one."""
        text = "".join(f"{message['content']}\n" for message in messages)
        if self.tokenizer.chat_template:
            chat = [dict(message) for message in messages]
            text = str(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        return self([text])[0]


def _noise(seed: int, text: str, place: int) -> Noise:
    return (uniform(seed, text, place, token) for token in itertools.count())
