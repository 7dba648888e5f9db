"""Train a reward model on pairs from replay, keep it as safetensors and JSON, and score episodes with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel

from models.causal_lm import load_policy
from models.packing import Sample
from models.reward_head import episode_features, fit_head
from tasks.core.digest import canonical_json, digest_files, digest_tree, write_atomic
from tasks.core.errors import Refused
from tasks.core.settings import Reward
from tasks.replay.schema import Episode
from tasks.reward.pairs import Pair, Split, make_pairs, split_pairs

SCHEMA = "forebay.reward_model/1"
# Where a small language model knows best what it has read: at two thirds of its depth, over the whole answer.
# SmolLM2-135M on calculator and chain_sum, held-out pairs: 0.90 there, 0.79 for the last token at that depth,
# 0.77 for the last token of the last layer.
DEPTH = 2 / 3
_FOLDS = 5


@dataclass(frozen=True)
class RewardModel:
    """A head on a language model: score = weight . features + bias, in nats of the Bradley-Terry model.

    Attributes:
        backbone: digest of the language model whose states are the features.
        layer: number of blocks after which they are taken.
        weight: [D] float64.
        digest: of the files, that is of all of the above.
    """

    path: Path
    digest: str
    backbone: str
    layer: int
    weight: Tensor
    bias: float

    @classmethod
    def load(cls, path: Path) -> RewardModel:
        """Read a reward model from its folder."""
        about, head = json.loads((path / "reward.json").read_text()), load_file(path / "head.safetensors")
        digest = digest_files(digest_tree(path))
        return cls(path, digest, about["backbone"], about["layer"], head["weight"], float(head["bias"]))

    def score(self, backbone: PreTrainedModel, episodes: Sequence[Episode]) -> list[float]:
        """Score episodes; differences within one prompt are what means something."""
        features = episode_features(backbone, [_sample(episode) for episode in episodes], self.layer)
        return (features @ self.weight + self.bias).tolist()


@dataclass(frozen=True)
class TrainedReward:
    """A reward model with the pairs it has not seen and its margins on them: [n], better less worse, nats."""

    model: RewardModel
    split: Split
    margins: tuple[float, ...]


def train_reward_model(
    episodes: Iterable[Episode],
    backbone: Path,
    backbone_digest: str,
    settings: Reward,
    *,
    seed: int,
    target: Path,
    device: str = "cpu",
    report: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> TrainedReward:
    """Fit a head on pairs of `episodes` and write it to the folder `target`.

    The head is fitted on all training pairs; its scale (how sure it is) on margins that five folds of groups
    gave one another, so that confidence is right on prompts it has not seen, whatever the penalty.

    Args:
        backbone: folder of the language model, frozen.
        report: told (episodes done, episodes in all, what) as the features come.

    Raises:
        Refused: no group has both a right and a wrong answer on each side of the split.
    """
    pairs = make_pairs(episodes, per_group=settings.pairs_per_group, seed=seed)
    split = split_pairs(pairs, holdout=settings.holdout, seed=seed)
    if not split.train or not split.heldout:
        groups = len({pair.group_id for pair in pairs})
        raise Refused(
            f"The dataset has {groups} groups with both a right and a wrong answer: "
            "too few to train and validate on; collect more, on tasks neither too easy nor too hard."
        )
    features = _features(pairs, backbone, device, report)
    differences = _differences(split.train, features)
    spread = differences.std(0, correction=0) + 1e-6
    unit = (
        spread * differences.shape[1] ** 0.5
    )  # so that `l2` means the same for any width and scale of states
    weight = fit_head(differences / unit, settings.l2) / unit
    weight = weight * _confidence(differences / unit, [pair.group_id for pair in split.train], settings.l2)
    centre = torch.stack([features.of(e) for pair in split.train for e in (pair.better, pair.worse)]).mean(0)
    about = {
        "schema": SCHEMA,
        "backbone": backbone_digest,
        "layer": features.layer,
        "pooling": "mean over the response",
        "l2": settings.l2,
        "seed": seed,
        "pairs": len(split.train),
        "groups": len({pair.group_id for pair in split.train}),
    }
    head = {"weight": weight.contiguous(), "bias": -(weight @ centre)}
    write_atomic(target / "head.safetensors", save(head))
    write_atomic(target / "reward.json", canonical_json(about))
    margins = (_differences(split.heldout, features) @ weight).tolist()
    return TrainedReward(RewardModel.load(target), split, tuple(margins))


@dataclass(frozen=True)
class _Features:
    """Features [E, D] of the episodes that occur in pairs."""

    layer: int
    rows: dict[str, int]
    values: Tensor

    def of(self, episode: Episode) -> Tensor:
        return self.values[self.rows[episode.episode_id]]


def _features(
    pairs: Sequence[Pair], backbone: Path, device: str, report: Callable[[int, int, str], None]
) -> _Features:
    used = {episode.episode_id: episode for pair in pairs for episode in (pair.better, pair.worse)}
    model = load_policy(backbone, device, "float32")
    layer = round(DEPTH * model.config.num_hidden_layers)
    samples = [_sample(episode) for episode in used.values()]
    values = episode_features(
        model, samples, layer, report=lambda done, total: report(done, total, "episodes read")
    )
    return _Features(layer, {name: row for row, name in enumerate(used)}, values)


def _differences(pairs: Sequence[Pair], features: _Features) -> Tensor:
    return torch.stack([features.of(pair.better) - features.of(pair.worse) for pair in pairs])


def _confidence(differences: Tensor, groups: Sequence[str], l2: float) -> float:
    """The factor that makes cross-fitted margins as sure as they are right; 1 with too few groups to tell."""
    names = sorted(set(groups))
    if len(names) < 2 * _FOLDS:
        return 1.0
    fold = torch.tensor([names.index(group) % _FOLDS for group in groups])
    margins = torch.cat(
        [differences[fold == k] @ fit_head(differences[fold != k], l2) for k in range(_FOLDS)]
    )
    # A weak penalty keeps the factor finite where every margin is right.
    return max(float(fit_head(margins[:, None] / margins.std(), 1e-3)) / float(margins.std()), 0.0)


def _sample(episode: Episode) -> Sample:
    return Sample(episode.prompt_ids, episode.response_ids, episode.loss_mask)
