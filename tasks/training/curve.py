"""The metrics of a run, one line of JSON a step, as its folder keeps them."""

from __future__ import annotations

import json
from pathlib import Path

FILE = "metrics.jsonl"


def read_curve(folder: Path) -> list[dict[str, float]]:
    """Return the metrics of the run in `folder`, one mapping per step; of a step done twice (after a kill) the last."""
    path = folder / FILE
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a process that was killed
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]
