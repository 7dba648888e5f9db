"""Reward reports with known content, for tests of whoever reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tasks.reward.checks import SCHEMA


def make_report(
    margins: Sequence[float] = (), groups: Sequence[str] | None = None, **changes: Any
) -> dict[str, Any]:
    """A report on held-out pairs with these margins, a prompt each, and on nothing else."""
    groups = [f"g{k}" for k in range(len(margins))] if groups is None else groups
    pairs = [
        {"group": group, "slice": "sums", "source": "test", "licence": "CC0-1.0", "chosen": f"{k} a", "rejected": f"{k} b", "margin": float(margin), "longer": 0.0}
        for k, (margin, group) in enumerate(zip(margins, groups, strict=True))
    ]  # fmt: skip
    return {
        "schema": SCHEMA,
        "source": {"kind": "head", "digest": "5" * 64},
        "dataset": "d" * 64,
        "policy": None,
        "preferences": pairs,
        "samples": [],
        "edits": [],
        "probes": [],
        "training": {
            "prompts": {"n": 9, "digest": "0" * 64},
            "evaluation_prompts": {"n": len(set(groups)), "digest": "0" * 64},
            "leaked": [],
            "scores": [],
            "edge": None,
        },
        "frame": None,
        **changes,
    }


def sure_margins(accuracy: float, n: int, scale: float | None = None) -> list[float]:
    """Margins right with probability `accuracy`, as sure as they are right unless `scale` says otherwise."""
    size = float(np.log(accuracy / (1 - accuracy))) if scale is None else scale
    return [size if k < accuracy * n else -size for k in range(n)]


def make_samples(
    scores: Sequence[Sequence[float]], gold: Sequence[Sequence[float]], **changes: Any
) -> list[dict[str, Any]]:
    """Samples of a report: one list of scores and one of verified rewards a prompt."""
    return [
        {"prompt": f"p{k}", "slice": "sums", "score": float(s), "gold": float(g), "length": 10, "distance": None, **changes}
        for k, (row, right) in enumerate(zip(scores, gold, strict=True))
        for s, g in zip(row, right, strict=True)
    ]  # fmt: skip
