"""What `forebay arena run` found, told again from its kept results.

    forebay arena run --json > board.json
    python -m benchmarks.leaderboard --keep board.json --workspace DIR    # results of a run become the baseline
    python -m benchmarks.leaderboard [--page leaderboard.html]            # the tables as Markdown, and the page
    python -m benchmarks.leaderboard --baseline benchmarks/baselines/leaderboard_memory.json   # of another comparison

The run itself is the product's command; this only keeps its results, so that the tables in docs/leaderboard.md can be made
again without it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tasks.arena.floors import Floor
from tasks.leaderboard.causes import contrasts, meanings, troubles
from tasks.leaderboard.causes import verdict as told_of_runs
from tasks.leaderboard.page import Board, Failure, counted, firmness, leaderboard_page, verdict
from tasks.leaderboard.ranking import Mean, lines, ranks, starts
from tasks.leaderboard.settings import Method
from tasks.pages.parts import number

BASELINE = Path(__file__).parent / "baselines" / "leaderboard.json"


def keep(board: Path, workspace: Path, baseline: Path) -> None:
    """Write `baseline` from what the command printed, and the evidence that it names."""
    told = json.loads(board.read_text())
    results = json.loads((workspace / told["results"]["path"]).read_text())["results"]
    kept = {name: told[name] for name in ("floors", "machine")} | {"recipe": told.get("recipe", "")}
    kept |= {name: told[name] for name in ("methods", "failures")}
    baseline.write_text(json.dumps({**kept, "results": results}, indent=1, sort_keys=True) + "\n")


def load(baseline: Path) -> Board:
    """Return the comparison that is kept there."""
    kept = json.loads(baseline.read_text())
    results: list[dict[str, Any]] = kept["results"]
    floors = {env: Floor(**floor) for env, floor in kept["floors"].items()}
    spent = sum(one["cpu_seconds"] for one in results)
    methods = {name: Method(**one) for name, one in kept["methods"].items()}
    return Board(
        ranks(results),
        lines(results),
        floors,
        starts(results),
        results,
        spent,
        kept["machine"],
        kept["recipe"],
        failures=[Failure(**one) for one in kept.get("failures", [])],
        methods=methods,
    )


def markdown(board: Board) -> str:
    """Return the tables of docs/leaderboard.md."""
    told = [verdict(board.ranks), ""]
    told += ["| method | mean rank | 95 % | best in | mean success |", "|---|--:|---|--:|--:|"]
    told += [
        f"| {one.method} | {one.rank:.2f} | {' | '.join(firmness(one))} | {one.success:.3f} |"
        for one in board.ranks
    ]
    for env, floor in board.floors.items():
        told += [
            "",
            f"`{env}`: {floor.tasks} held-out tasks; start {_mean(board.starts[env])}, "
            + (
                f"no baselines: {floor.error}"
                if floor.error
                else f"always `{floor.constant_action}` {number(floor.constant)}, a blind choice {number(floor.random)}."
            ),
            "",
        ]
        found = [line for line in board.lines if line.env == env]
        names = list(found[0].figures)
        told.append(
            f"| method | {' | '.join(names)} | gain | CPU s a run | collapses | stopped |\n|---|{'--:|' * (len(names) + 2)}---|---|"
        )
        told += [
            f"| {line.method} | {' | '.join(_mean(line.figures[name]) for name in names)} | {_mean(line.gain)} | "
            f"{line.cpu_seconds:.0f} | {counted(line.collapses)} | {counted(line.stopped)} |"
            for line in found
        ]
    ailing = troubles(board.results)
    told += ["", told_of_runs(ailing)]
    told += [f"- {one.method}, `{one.env}`, seed {one.seed}: {one.course()}" for one in ailing]
    told += [f"- {meaning}" for meaning in meanings(ailing)]
    told += [
        f"- {pair.dimension} alone tells {pair.worse} ({pair.wrong[0]} of {pair.runs} runs went wrong) from {pair.better} "
        f"({pair.wrong[1]})"
        for pair in contrasts(board.methods, board.results)
    ]
    told += [
        f"- not finished: {one.method}, `{one.env}`, seed {one.seed}: {one.error}" for one in board.failures
    ]
    told += [
        "",
        f"{len(board.results)} runs, {board.cpu_seconds / 60:.0f} CPU minutes on {board.machine}. {board.recipe}",
    ]
    return "\n".join(told)


def _mean(value: Mean) -> str:
    return f"{value.estimate:.3f}" + ("" if value.half is None else f" ± {value.half:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--workspace", type=Path, default=Path())
    parser.add_argument("--page", type=Path)
    words = parser.parse_args()
    if words.keep:
        keep(words.keep, words.workspace, words.baseline)
    board = load(words.baseline)
    if words.page:
        words.page.write_text(leaderboard_page(board))
    print(markdown(board))


if __name__ == "__main__":
    main()
