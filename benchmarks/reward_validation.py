"""Which flaws of a reward model the validation finds, and by which check; and two reward models on real data.

    python -m benchmarks.reward_validation [--seeds 20] [--save]
    python -m benchmarks.reward_validation --real FOLDER [--save]

The first writes the confusion table of `benchmarks.reward_zoo`: every model of the zoo, in as many worlds as there are seeds,
validated by the same functions and default rule as a registered one. A flaw is caught where the verdict is FAIL; it is
caught by its own check where that one is among the failing.

The second trains an outcome reward model on solutions of grade-school questions and a preference model on human
comparisons (the files of FOLDER, see `benchmarks.reward_models`) and reports what the validation says of them.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.reward_zoo import ZOO, make_world
from tasks.evaluation.statistics import clopper_pearson
from tasks.promotion.policy import Policy
from tasks.reward.checks import Check, judge_report
from tasks.reward.validation import measure

BASELINE = Path(__file__).parent / "baselines" / "reward_validation.json"
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


def _named(checks: Sequence[Check], verdict: str) -> list[str]:
    return [check.name for check in checks if check.counts and check.verdict == verdict]


def _show(table: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    shown = Table("reward model", "PASS", "FAIL", "INCONCLUSIVE", "by its own check", "pair accuracy", "failing checks")
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
    parser.add_argument("--save", action="store_true", help=f"write {BASELINE.name}")
    args = parser.parse_args()
    console, started, cpu = Console(), perf_counter(), process_time()
    kept = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    if args.real:
        raise SystemExit("see below")
    table = confusion([validate_zoo(seed) for seed in range(args.seeds)])
    _show(table, console)
    kept |= {
        "zoo": {
            "seeds": args.seeds,
            "table": table,
            "seconds": {"cpu": round(process_time() - cpu, 1), "wall": round(perf_counter() - started, 1)},
            "machine": describe(),
        }
    }
    if args.save:
        BASELINE.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
