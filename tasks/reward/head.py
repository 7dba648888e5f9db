"""A reward model as a linear head on a frozen language model or encoder; see `models.reward_head`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.causal_lm import load_policy, load_tokenizer
from models.packing import Sample
from models.reward_classifier import encode, load_scorer, score_rows
from models.reward_head import confidence, episode_features, fit_head
from models.reward_support import support_of
from tasks.core.atomic import whole_directory
from tasks.core.settings import HeadModel
from tasks.reward.folder import SUPPORT, folder_digest, provenance, read_about, write_about
from tasks.reward.hardening import harden
from tasks.reward.source import Answer, Preference

HEAD = "head.safetensors"
# Where a small language model knows best what it has read: at two thirds of its depth, over the whole answer.
# SmolLM2-135M on calculator and chain_sum, held-out pairs: 0.90 there, 0.79 for the last token at that depth,
# 0.77 for the last token of the last layer.
DEPTH = 2 / 3
_FOLDS = 5

Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Backbone:
    """A frozen model whose states are features.

    Attributes:
        form: a causal language model (states at two thirds of its depth) or an encoder (last states).
        digest: of its files.
    """

    folder: Path
    digest: str
    form: Literal["language model", "encoder"]
    device: str = "cpu"

    def features(
        self, answers: Sequence[Answer], max_tokens: int, report: Report = lambda done, total, text: None
    ) -> Tensor:
        """Return [n, D] float64: the mean state over the tokens of each answer."""
        texts = [(answer.prompt, answer.response) for answer in answers]

        def told(done: int, total: int) -> None:
            report(done, total, "answers read")

        if self.form == "encoder":
            rows = self._scorer.encode(texts, max_tokens)
            return score_rows(self._scorer, rows, report=told)[1]
        model = self._model
        rows = encode(self._tokenizer, texts, min(max_tokens, model.config.max_position_embeddings))
        samples = [
            Sample(row.ids[: row.start], row.ids[row.start :], [True] * (len(row.ids) - row.start))
            for row in rows
        ]
        return episode_features(model, samples, self._depth, report=told)

    @property
    def layer(self) -> int | None:
        """Number of blocks after which the states are taken; None: after the last."""
        return None if self.form == "encoder" else self._depth

    @property
    def _depth(self) -> int:
        blocks: int = self._model.config.num_hidden_layers
        return round(DEPTH * blocks)

    @cached_property
    def _model(self) -> Any:
        return load_policy(self.folder, self.device, "float32")

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.folder)

    @cached_property
    def _scorer(self) -> Any:
        return load_scorer(self.folder, self.device)


@dataclass(frozen=True)
class HeadSource:
    """score = weight . features + bias, in nats of the Bradley-Terry model.

    Attributes:
        weight: [D] float64.
        digest: of the folder's files, the backbone's digest among what they say.
    """

    path: Path
    digest: str
    backbone: Backbone
    weight: Tensor
    bias: float
    max_tokens: int
    kind: Literal["head"] = "head"

    @classmethod
    def load(cls, path: Path, backbone: Backbone) -> HeadSource:
        """Read a head from its folder; `backbone` must be the one that `reward.json` names."""
        about, head = read_about(path), load_file(path / HEAD)
        if about["backbone"]["digest"] != backbone.digest:
            raise ValueError(f"{path} belongs to the backbone {about['backbone']['digest'][:12]}…")
        bias, window = float(head["bias"]), about["settings"]["max_tokens"]
        return cls(path, folder_digest(path), backbone, head["weight"], bias, window)

    def features(self, answers: Sequence[Answer]) -> Tensor:
        """Return [n, D] float64: what the head sees."""
        return self.backbone.features(answers, self.max_tokens)

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """Return nats; differences within one prompt are what means something."""
        return self.read(answers)[0] if answers else []

    def read(self, answers: Sequence[Answer]) -> tuple[list[float], Tensor]:
        """Return scores and features of at least one answer, from one pass."""
        features = self.features(answers)
        scores: list[float] = (features @ self.weight + self.bias).tolist()
        return scores, features


def train_head(
    train: Sequence[Preference],
    backbone: Backbone,
    settings: HeadModel,
    *,
    target: Path,
    origin: dict[str, Any],
    report: Report = lambda done, total, text: None,
) -> HeadSource:
    """Fit a head on `train` and write it to the folder `target`, whole or not at all.

    The head is fitted on all pairs and on copied parts of the prompts as further wrong answers (`harden`); its scale
    (how sure it is) on margins of the pairs alone that five folds of groups gave one another, so that confidence is
    right on prompts it has not seen, whatever the penalty. There is no seed: the fit is exact.

    Args:
        origin: what else `reward.json` is to say of where this comes from.

    Raises:
        ValueError: there are no preferences.
    """
    if not train:
        raise ValueError("a reward head needs preferences")
    fitted = [*train, *harden(train, settings.hardening)]
    answers = list(dict.fromkeys(answer for p in fitted for answer in (p.better, p.worse)))
    place = {answer: row for row, answer in enumerate(answers)}
    features = backbone.features(answers, settings.max_tokens, report)
    differences = torch.stack([features[place[p.better]] - features[place[p.worse]] for p in fitted])
    groups = [p.group for p in fitted]
    spread = differences.std(0, correction=0) + 1e-6
    unit = (
        spread * differences.shape[1] ** 0.5
    )  # so that `l2` means the same for any width and scale of states
    weight = fit_head(differences / unit, settings.l2) / unit
    weight = weight * _confidence(differences / unit, groups, settings.l2, pairs=len(train))
    sides = torch.stack([features[place[answer]] for p in train for answer in (p.better, p.worse)])
    bias = -(weight @ sides.mean(0))
    group_of = {answer: p.group for p in train for answer in (p.better, p.worse)}
    seen = features[: len(group_of)]  # the copies come after them, and are no answers like those of training
    support = support_of(seen, list(group_of.values()), seen @ weight + bias)
    with whole_directory(target) as folder:
        save_file({"weight": weight.contiguous(), "bias": bias}, folder / HEAD)
        save_file(support, folder / SUPPORT)
        about = {
            "kind": "head",
            "backbone": {"digest": backbone.digest, "form": backbone.form},
            "layer": backbone.layer,
            "pooling": "mean over the answer",
            "settings": settings.model_dump(mode="json"),
            **origin,
            **provenance(train, folder),
        }
        write_about(folder, about)
    return HeadSource.load(target, backbone)


def _confidence(differences: Tensor, groups: Sequence[str], l2: float, pairs: int) -> float:
    """The factor that makes cross-fitted margins of the first `pairs` as sure as they are right; 1 with too few groups."""
    names = {name: at for at, name in enumerate(sorted(set(groups)))}
    if len(names) < 2 * _FOLDS:
        return 1.0
    fold = torch.tensor([names[group] % _FOLDS for group in groups])
    judged = torch.arange(len(differences)) < pairs
    margins = [
        differences[(fold == k) & judged] @ fit_head(differences[fold != k], l2) for k in range(_FOLDS)
    ]
    return confidence(torch.cat(margins))
