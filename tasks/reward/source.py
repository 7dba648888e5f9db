"""What gives rewards: an answer, a preference between two answers, and the one interface of all that scores.

A head on a language model, a fine-tuned classifier, a verifier function and an LLM judge are all a
`RewardSource`: plain text in, one finite number an answer out. Text, because it is what the four have in
common; a digest, because a reward is worth what can be said about its origin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Kind = Literal["head", "classifier", "verifier", "judge"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a reward source scores: plain text.

    Attributes:
        response: all turns of the agent, with their observations.
    """

    prompt: str
    response: str


@dataclass(frozen=True, slots=True)
class Preference:
    """One comparison of two answers to one prompt.

    Attributes:
        group: what all preferences of one prompt (or question) share: one cluster, one side of a split.
        slice: environment, topic or author; reports are per slice.
        source: where it comes from.
        licence: SPDX identifier, or what the source says.
        chosen_id: episode ids, where the answers come from replay.
    """

    prompt: str
    chosen: str
    rejected: str
    group: str
    slice: str
    source: str
    licence: str
    chosen_id: str = ""
    rejected_id: str = ""

    @property
    def better(self) -> Answer:
        """The chosen answer."""
        return Answer(self.prompt, self.chosen)

    @property
    def worse(self) -> Answer:
        """The rejected answer."""
        return Answer(self.prompt, self.rejected)


class RewardSource(Protocol):
    """Anything that scores answers.

    Attributes:
        kind: what it is.
        digest: SHA-256 of all that decides its scores: weights and backbone; the code of a verifier; the model
            name, rubric and way of reading of a judge.
    """

    @property
    def kind(self) -> Kind: ...  # noqa: D102  (see the class)

    @property
    def digest(self) -> str: ...  # noqa: D102

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """Return one finite number an answer; differences within one prompt are what counts.

        Trained models score in nats of the Bradley-Terry model, verifiers and judges in [0, 1].
        """
        ...
