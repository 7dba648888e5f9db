"""What a reward model has seen: a small picture of its training features, to tell how far from it an answer is.

The distance is Mahalanobis' under probabilistic principal components (Tipping and Bishop, 1999): along the K
strongest directions by their own variance, in all others together by their mean variance. So a direction that
training never used counts, and the picture needs K + 1 vectors, not a covariance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

DIRECTIONS = 32
QUANTILES = 101
_FOLDS = 5
_LEAST_VARIANCE = 1e-9


def support_of(features: Tensor, groups: Sequence[str], scores: Tensor) -> dict[str, Tensor]:
    """Return the picture of training features.

    Args:
        features: [n, D] float64.
        groups: [n] names; the distances that are kept are of groups that had no part in their own picture.
        scores: [n] float64, the scores of the same answers.

    Returns:
        mean [D], directions [K, D] (divided by their standard deviations), residual [1] (mean variance of the
        other directions), distances [101] and scores [101] (quantiles over training answers).

    Raises:
        ValueError: no features, or numbers that are not finite.
    """
    if not len(features) or not torch.isfinite(features).all() or not torch.isfinite(scores).all():
        raise ValueError("the support of a reward model needs finite features and scores")
    picture = _fit(features)
    names = {name: at for at, name in enumerate(sorted(set(groups)))}
    fold = torch.tensor([names[group] % _FOLDS for group in groups])
    if len(names) >= 2 * _FOLDS:
        apart = torch.cat([distances(_fit(features[fold != k]), features[fold == k]) for k in range(_FOLDS)])
    else:
        apart = distances(picture, features)
    at = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
    return {**picture, "distances": torch.quantile(apart, at), "scores": torch.quantile(scores, at)}


def distances(support: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """Return [n] float64: how far features [n, D] lie from the training data, about 1 for an answer like those."""
    centred = features - support["mean"]
    along = centred @ support["directions"].T
    total = along.square().sum(1)
    basis = torch.nn.functional.normalize(support["directions"], dim=1)
    rest = (centred.square().sum(1) - (centred @ basis.T).square().sum(1)).clamp_min(0)
    return ((total + rest / support["residual"]) / features.shape[1]).sqrt()


def _fit(features: Tensor) -> dict[str, Tensor]:
    mean = features.mean(0)
    centred = features - mean
    width = features.shape[1]
    _, singular, basis = torch.linalg.svd(centred, full_matrices=False)
    variance = singular.square() / max(1, len(features) - 1)
    count = max(1, min(DIRECTIONS, len(features) // 4, width - 1))
    left = variance[count:].sum() / max(1, width - count)
    # Never below a small part of the strongest: few answers span few directions, and the rest is unknown, not 0.
    floor = torch.clamp(variance[:1] * 1e-6, min=_LEAST_VARIANCE)
    directions = basis[:count] / torch.maximum(variance[:count], floor).sqrt()[:, None]
    # The sign of a singular vector is arbitrary: fix it, so that equal features give equal bytes.
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    directions = directions * torch.sign(largest)
    return {
        "mean": mean.contiguous(),
        "directions": directions.contiguous(),
        "residual": torch.maximum(left[None] if left.ndim == 0 else left, floor).contiguous(),
    }
