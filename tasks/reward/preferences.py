"""Sets of preferences: what a reward model learns from and is judged on, content-addressed and never leaking.

A set is a canonical JSONL file named by the SHA-256 of its bytes. Which side of a split a preference is on
depends on its group alone, by hash: whatever set it comes in, a prompt that was held out once stays held out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tasks.core.atomic import write_atomic
from tasks.core.digest import canonical_json, digest_json, sha256_bytes
from tasks.core.errors import Corrupt, NotFound
from tasks.reward.source import Preference


@dataclass(frozen=True)
class Split:
    """Preferences to train on and preferences held out; no group is on both sides."""

    train: tuple[Preference, ...]
    heldout: tuple[Preference, ...]


@dataclass(frozen=True)
class Distinct:
    """Preferences without repetition, in canonical order, and how many were dropped and why."""

    preferences: tuple[Preference, ...]
    duplicates: int
    equal: int


def distinct(preferences: Iterable[Preference]) -> Distinct:
    """Drop pairs of equal answers and pairs that were there before; the order of what is left is canonical."""
    kept: dict[tuple[str, str, str], Preference] = {}
    duplicates = equal = 0
    for preference in preferences:
        key = (preference.prompt, preference.chosen, preference.rejected)
        if preference.chosen == preference.rejected:
            equal += 1
        elif key in kept:
            duplicates += 1
        else:
            kept[key] = preference
    ordered = sorted(kept.values(), key=lambda p: (p.group, p.prompt, p.chosen, p.rejected))
    return Distinct(tuple(ordered), duplicates, equal)


def split_preferences(preferences: Iterable[Preference], *, holdout: float) -> Split:
    """Hold out about the share `holdout` of all groups, by the hash of their names, each with all its pairs.

    A larger share holds out the same groups and more.
    """
    train: list[Preference] = []
    heldout: list[Preference] = []
    for preference in preferences:
        (heldout if fraction(preference.group) < holdout else train).append(preference)
    return Split(tuple(train), tuple(heldout))


def fraction(group: str, salt: str = "heldout") -> float:
    """Return where in [0, 1) a group falls; another `salt` divides independently."""
    return int.from_bytes(hashlib.sha256(f"{salt}/{group}".encode()).digest()[:8]) / 2**64


def prompt_digests(preferences: Iterable[Preference]) -> list[str]:
    """Return the sorted SHA-256 of all prompts: what evaluation prompts must not be among."""
    return sorted({sha256_bytes(preference.prompt.encode()) for preference in preferences})


def set_digest(preferences: Sequence[Preference]) -> str:
    """Return the SHA-256 of the file that `write_preferences` makes of them."""
    return sha256_bytes(_lines(preferences))


def write_preferences(folder: Path, preferences: Sequence[Preference]) -> tuple[Path, str]:
    """Write folder/<digest>.jsonl, one preference a line; return the path and the digest."""
    data = _lines(preferences)
    digest = sha256_bytes(data)
    path = folder / f"{digest}.jsonl"
    if not path.exists():
        write_atomic(path, data)
    return path, digest


def read_preferences(path: Path, sha256: str) -> list[Preference]:
    """Read a set whose bytes must have this digest.

    Raises:
        NotFound: it is not there. Corrupt: its bytes are others.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"The preferences {path} are gone; import them again.") from None
    if sha256_bytes(data) != sha256:
        raise Corrupt(f"{path} was changed: its bytes are not those of the digest {sha256[:12]}….")
    return [Preference(**json.loads(line)) for line in data.split(b"\n") if line]


def prompts_digest(digests: Sequence[str]) -> str:
    """Return the digest of a list of prompt digests."""
    return digest_json(list(digests))


def _lines(preferences: Sequence[Preference]) -> bytes:
    return b"".join(canonical_json(asdict(preference)) + b"\n" for preference in preferences)
