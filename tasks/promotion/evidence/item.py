"""An item of evidence, the files it rests on, and how numbers and words are written so that equal inputs give equal bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.core.digest import sha256_bytes
from tasks.core.errors import Corrupt, NotFound
from tasks.evaluation.statistics import Estimate, Verdict

_DIGITS = 10  # of a number in the record: below what another build of numpy may change


@dataclass(frozen=True)
class FileRef:
    """An evidence file: its path relative to the evidence folder, and its SHA-256."""

    path: str
    sha256: str


@dataclass(frozen=True)
class Evidence:
    """One item weighed by the gate. `counts` is False where the policy does not require it.

    Numbers are in `unit`; None where the item has none. `margin` is what the estimate is held against.
    """

    name: str
    verdict: Verdict
    says: str
    digest: str | None
    counts: bool = True
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    mde: float | None = None
    margin: float | None = None
    unit: str = "mean reward"


def measured(
    name: str,
    verdict: Verdict,
    says: str,
    digest: str | None,
    by: Estimate,
    margin: float | None,
    counts: bool = True,
    unit: str = "mean reward",
) -> Evidence:
    """Return the item of an estimate with its interval and minimum detectable effect."""
    estimate, low, high, mde = map(rounded, (by.estimate, by.low, by.high, by.mde))
    return Evidence(name, verdict, says, digest, counts, estimate, low, high, by.n, mde, margin, unit)


def rounded(x: float) -> float:
    """Return `x` to ten digits."""
    return float(f"{x:.{_DIGITS}g}")


def words(gain: Estimate) -> str:
    """Say a paired difference."""
    return f"{gain.estimate:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] on {gain.n} paired answers"


def read_evidence(folder: Path, ref: FileRef | None) -> dict[str, Any] | None:
    """Read a JSON evidence file, None where there is none.

    Raises:
        NotFound, Corrupt: it is missing, or is not what its digest says.
    """
    return None if ref is None else read_json(folder / ref.path, ref.sha256)


def read_json(path: Path, sha256: str) -> dict[str, Any]:
    """Read a JSON file whose bytes have the digest `sha256`.

    Raises:
        NotFound, Corrupt: it is missing, or is not what its digest says.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"There is no {path.name} in {path.parent}; restore it from a backup.") from None
    if sha256_bytes(data) != sha256:
        raise Corrupt(f"{path} was changed: its bytes are not those of the digest {sha256[:12]}….")
    found: dict[str, Any] = json.loads(data)
    return found
