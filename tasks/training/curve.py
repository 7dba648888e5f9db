"""The metrics of a run, one line of JSON a step, as its folder keeps them."""

from __future__ import annotations

import json
from pathlib import Path

FILE = "metrics.jsonl"


def read_curve(folder: Path) -> list[dict[str, float]]:
    """Return the metrics of the run in `folder`, one mapping per step.

    Where a run went back, after a kill or to before a collapse, what it had done from there on counts no more.
    """
    path = folder / FILE
    rows: list[dict[str, float]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a process that was killed
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        rows.append(row)
    return rows
