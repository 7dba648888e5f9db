"""Judge a reward model on pairs of prompts it has not seen; the verdict is part of the gate."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from tasks.core.digest import canonical_json, sha256_bytes, write_atomic
from tasks.core.workspace import Workspace
from tasks.promotion.policy import RewardModel as Rule
from tasks.reward.metrics import Bin, calibration_error, judge_reward, pair_accuracy, reliability
from tasks.reward.source import Preference, RewardSource

SCHEMA = "forebay.reward/1"
_DECIMALS = 6  # of a margin in the evidence: nats, far below what any verdict rests on


def validate_reward_model(
    source: RewardSource,
    heldout: Sequence[Preference],
    rule: Rule,
    workspace: Workspace,
    *,
    dataset: str,
    path: str,
) -> dict[str, Any]:
    """Keep the evidence (held-out pairs with margins, a reliability diagram); return the ledger's payload.

    Args:
        dataset: root of the dataset the pairs come from.
        path: of the source's folder, relative to the workspace.

    Returns:
        {digest, dataset, verdict, reasons, accuracy: {estimate, low, high, n}, ece, slices: {env: accuracy},
        evidence: {path, sha256}, plot: {path, sha256}, path}; paths relative to the workspace.
    """
    scores = source.score([answer for pair in heldout for answer in (pair.better, pair.worse)])
    margins = [round(a - b, _DECIMALS) for a, b in zip(scores[::2], scores[1::2], strict=True)]
    groups = [pair.group for pair in heldout]
    pairs = heldout
    accuracy = pair_accuracy(margins, groups, alpha=rule.alpha)
    bars = reliability(margins)
    ece = calibration_error(bars)
    verdict = judge_reward(accuracy, ece, min_accuracy=rule.min_accuracy, max_ece=rule.max_ece)
    slices = {}
    for env in sorted({pair.slice for pair in pairs}):
        of_env = [i for i, pair in enumerate(pairs) if pair.slice == env]
        part = pair_accuracy([margins[i] for i in of_env], [groups[i] for i in of_env], alpha=rule.alpha)
        slices[env] = {"estimate": part.estimate, "low": part.low, "high": part.high, "n": part.n}
    report = {
        "schema": SCHEMA,
        "reward_model": source.digest,
        "dataset": dataset,
        "pairs": [
            {
                "group_id": pair.group,
                "env": pair.slice,
                "better": pair.chosen_id,
                "worse": pair.rejected_id,
                "source": pair.source,
                "licence": pair.licence,
                "margin": margin,
            }
            for pair, margin in zip(pairs, margins, strict=True)
        ],
    }
    return {
        "digest": source.digest,
        "dataset": dataset,
        "verdict": verdict,
        "reasons": [
            f"right on {accuracy.estimate:.3f} of {accuracy.n} held-out pairs "
            f"[{accuracy.low:.3f}, {accuracy.high:.3f}], needed above {rule.min_accuracy:.2f}",
            f"calibration error {ece:.3f}, allowed {rule.max_ece:.2f}",
        ],
        "accuracy": {
            "estimate": accuracy.estimate,
            "low": accuracy.low,
            "high": accuracy.high,
            "n": accuracy.n,
        },
        "ece": ece,
        "slices": slices,
        "evidence": _keep(workspace, canonical_json(report), "json"),
        "plot": _keep(workspace, reliability_plot(bars), "png"),
        "path": path,
    }


def reliability_plot(bars: Sequence[Bin]) -> bytes:
    """Draw how often the model is right against how sure it is; return a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0.5, 1], [0.5, 1], color="0.6", linestyle="--", linewidth=1)
    axes.plot([bar.confidence for bar in bars], [bar.accuracy for bar in bars], marker="o", color="#1f6f8b")
    for bar in bars:
        axes.annotate(
            f"{bar.n}",
            (bar.confidence, bar.accuracy),
            textcoords="offset points",
            xytext=(5, -12),
            fontsize=8,
        )
    axes.set(
        xlabel="how sure",
        ylabel="how often right",
        xlim=(0.5, 1.02),
        ylim=(0, 1.05),
        title="Reward model, held out",
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _keep(workspace: Workspace, data: bytes, suffix: str) -> dict[str, str]:
    digest = sha256_bytes(data)
    path = workspace.evidence / "reward" / f"{digest}.{suffix}"
    write_atomic(path, data)
    return {"path": workspace.relative(path), "sha256": digest}
