"""How often does the canary roll back an agent that is no worse, and how soon one that is?

    python -m benchmarks.canary [--runs 300]

Groups of 8 answers in three environments of equal weight, in each of which a question has its own chance of a right
answer (Beta). Looks after every 10 groups of each agent, up to 400. Beside it: Student's interval looked at as often (how
often it would roll back equal agents), and bounds of each stream with alpha shared among the six, whose widths add up.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from scipy import stats

from models.machine import describe
from tasks.promotion.canary import upper_bound

ALPHA, ENVIRONMENTS, ANSWERS = 0.05, 3, 8
LOOKS = range(10, 401, 10)
WEIGHTS = np.full(ENVIRONMENTS, 1 / ENVIRONMENTS)
NONE = np.array([])


def draw(chance: np.random.Generator, mean: float, groups: int) -> list[np.ndarray]:
    """Mean rewards of groups by environment; questions differ (standard deviation of their chances about 0.3)."""
    k = 2.0 - 0.5
    each = groups // ENVIRONMENTS + 1
    chances = [chance.beta(mean * k, (1 - mean) * k, each) for _ in range(ENVIRONMENTS)]
    return [chance.binomial(ANSWERS, p) / ANSWERS for p in chances]


def first(new: list[np.ndarray], old: list[np.ndarray]) -> tuple[int | None, bool]:
    """Return after how many groups of each it would be rolled back, and whether Student would ever have done so."""
    naive, at = False, None
    for n in LOOKS:
        x, y = ([stream[: n // ENVIRONMENTS] for stream in streams] for streams in (new, old))
        naive |= stats.ttest_ind(np.concatenate(x), np.concatenate(y), alternative="less").pvalue < ALPHA
        if at is None and upper_bound(x, y, WEIGHTS, ALPHA) < 0:
            at = n
    return at, naive


def shared(new: list[np.ndarray], old: list[np.ndarray]) -> float:
    """The bound by one bound for each stream, alpha shared among all."""
    part = ALPHA / (2 * ENVIRONMENTS)
    one = np.array([1.0])
    up = [upper_bound([x], [NONE], one, part) for x in new]
    down = [1 - upper_bound([NONE], [y], one, part) for y in old]  # a mean nothing is known of is 1 at most
    return float(WEIGHTS @ (np.array(up) - np.array(down)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/canary.json"))
    words = parser.parse_args()
    chance = np.random.default_rng(0)
    equal = [first(draw(chance, 0.5, 400), draw(chance, 0.5, 400)) for _ in range(words.runs)]
    found = {
        "machine": describe(),
        "runs": words.runs,
        "alpha": ALPHA,
        "equal_rolled_back": float(np.mean([at is not None for at, _ in equal])),
        "equal_rolled_back_by_student": float(np.mean([naive for _, naive in equal])),
    }
    for drop in (0.1, 0.2, 0.3):
        ends = [
            first(draw(chance, 0.6 - drop, 400), draw(chance, 0.6, 400))[0] for _ in range(words.runs // 3)
        ]
        hit = [n for n in ends if n is not None]
        found[f"drop_{drop}"] = {
            "found": len(hit) / len(ends),
            "median_groups": float(np.median(hit)) if hit else None,
        }
    widths = []
    for _ in range(20):
        x, y = draw(chance, 0.5, 300), draw(chance, 0.5, 300)
        gap = float(WEIGHTS @ np.array([a.mean() - b.mean() for a, b in zip(x, y, strict=True)]))
        widths.append((upper_bound(x, y, WEIGHTS, ALPHA) - gap, shared(x, y) - gap))
    found["width_joint"], found["width_shared"] = np.mean(widths, axis=0).tolist()
    print(json.dumps(found, indent=2))
    words.out.parent.mkdir(parents=True, exist_ok=True)
    words.out.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
