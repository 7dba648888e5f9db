"""A reward model as a fine-tuned sequence classifier or encoder; see `models.reward_classifier`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor

from models.reward_classifier import Fit, Scorer, fine_tune, load_base, load_scorer, score_rows
from models.reward_support import support_of
from tasks.core.atomic import whole_directory
from tasks.core.digest import digest_tree
from tasks.core.errors import Refused, UsageError
from tasks.core.settings import ClassifierModel
from tasks.promotion.inert import require_inert
from tasks.reward.folder import SUPPORT, folder_digest, provenance, read_about, write_about
from tasks.reward.preferences import fraction
from tasks.reward.source import Answer, Preference

Report = Callable[[int, int, str], None]
_PICTURED = 1024  # answers that draw the picture of the training data


@dataclass(frozen=True)
class ClassifierSource:
    """score = scale * (the model's number - centre), in nats of the Bradley-Terry model."""

    path: Path
    digest: str
    scorer: Scorer
    scale: float
    centre: float
    max_tokens: int
    kind: Literal["classifier"] = "classifier"

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> ClassifierSource:
        """Read a classifier from its folder."""
        about = read_about(path)
        require_inert(path, digest_tree(path))
        settings = about["settings"]
        return cls(
            path,
            folder_digest(path),
            load_scorer(path, device),
            about["scale"],
            about["centre"],
            settings["max_tokens"],
        )

    def features(self, answers: Sequence[Answer]) -> Tensor:
        """Return [n, D] float64: the mean last states over the tokens of each answer."""
        return self.read(answers)[1]

    def score(self, answers: Sequence[Answer]) -> list[float]:
        """Return nats; differences within one prompt are what means something."""
        return self.read(answers)[0] if answers else []

    def read(self, answers: Sequence[Answer]) -> tuple[list[float], Tensor]:
        """Return scores and features of at least one answer, from one pass."""
        rows = self.scorer.encode([_pair(a) for a in answers], self.max_tokens)
        raw, features = score_rows(self.scorer, rows)
        scores: list[float] = (self.scale * (raw - self.centre)).tolist()
        return scores, features


def train_classifier(
    train: Sequence[Preference],
    settings: ClassifierModel,
    *,
    seed: int,
    target: Path,
    origin: dict[str, Any],
    device: str = "cpu",
    report: Report = lambda done, total, text: None,
) -> ClassifierSource:
    """Fine-tune a classifier on `train` and write it to the folder `target`, whole or not at all.

    A share of the groups, by hash, is kept out of the gradient: it ends training and sets the scale of the
    margins, so that how sure the model is is as right as it can be on prompts it has not seen.

    Raises:
        ModelError: the base cannot be read. Refused: too few groups to train and calibrate on.
        UsageError: training diverged.
    """
    aside = [p for p in train if fraction(p.group, "calibration") < settings.calibration]
    fitted = [p for p in train if fraction(p.group, "calibration") >= settings.calibration]
    if not aside or not fitted:
        raise Refused(
            f"{len({p.group for p in train})} prompts are too few to train and calibrate a classifier on; "
            "import more, or use reward.model.kind=head."
        )
    scorer = load_base(settings.base, seed=seed, device=device)
    rows = dict(_encoded(scorer, train, settings.max_tokens))

    def pairs(preferences: Sequence[Preference]) -> list[Any]:
        return [(rows[p.better], rows[p.worse]) for p in preferences]

    fit = Fit(
        settings.epochs,
        settings.learning_rate,
        settings.warmup,
        settings.weight_decay,
        settings.batch_pairs,
    )
    try:
        scale = fine_tune(
            scorer, pairs(fitted), [p.group for p in fitted], pairs(aside), fit, seed=seed, report=report
        )
    except ValueError as error:
        raise UsageError(f"reward.model: {error}.") from None
    group_of = {answer: p.group for p in train for answer in (p.better, p.worse)}
    pictured = list(rows)[:_PICTURED]  # sets are in the order of hashes, so these are as good as any
    raw, features = score_rows(scorer, [rows[answer] for answer in pictured])
    centre = float(raw.mean())
    support = support_of(features, [group_of[answer] for answer in pictured], scale * (raw - centre))
    with whole_directory(target) as folder:
        scorer.save(folder)
        save_file(support, folder / SUPPORT)
        about = {
            "kind": "classifier",
            "pooling": "the model's own head" if scorer.head is None else "mean over the answer",
            "scale": scale,
            "centre": centre,
            "calibration_pairs": len(aside),
            "seed": seed,
            "settings": settings.model_dump(mode="json"),
            **origin,
            **provenance(train, folder),
        }
        write_about(folder, about)
    return ClassifierSource.load(target, device)


def _encoded(scorer: Scorer, train: Sequence[Preference], max_tokens: int) -> list[tuple[Answer, Any]]:
    answers = list(dict.fromkeys(answer for p in train for answer in (p.better, p.worse)))
    return list(zip(answers, scorer.encode([_pair(a) for a in answers], max_tokens), strict=True))


def _pair(answer: Answer) -> tuple[str, str]:
    return answer.prompt, answer.response
