"""The stages of one cycle, their content keys, and the rule that makes each safe to run again."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tasks.core.digest import digest_json, sha256_file
from tasks.core.ledger import Ledger

STAGES = ("collect", "seal", "validate", "reward", "train", "register", "evaluate", "decide", "promote")
"""Order of the stages; `flows/run.py` and `dvc.yaml` both follow it, and a test holds them to it."""

_PROJECT = Path(__file__).resolve().parents[2]
_PAGES = (Path("tasks", "pages"), Path("tasks", "promotion", "page"), Path("tasks", "lineage", "page"))
_JOINS = ("evidence", "experience", "hybrid", "judging", "rewards", "scoring", "training", "validation")


@lru_cache
def code_digest() -> str:
    """Return the digest of the code that computes results: `tasks/`, `models/`, and what joins the stations in `flows/`.

    The rest of `flows/` and the pages order and show the work, so another help text retrains nothing.
    """
    return digest_code(_PROJECT)


def digest_code(project: Path) -> str:
    """Return what `code_digest` would be of the code in the folder `project`; nothing of it is run."""
    stations = (
        p
        for name in ("tasks", "models")
        for p in (project / name).rglob("*.py")
        if not any(p.is_relative_to(project / page) for page in _PAGES)
    )
    joins = (project / "flows" / f"{name}.py" for name in _JOINS)
    files = sorted([*stations, *(p for p in joins if p.exists())])
    return digest_json({p.relative_to(project).as_posix(): sha256_file(p) for p in files})


@lru_cache
def lock_digest() -> str | None:
    """Return the SHA-256 of the pinned environment, or None where the project was installed without its file."""
    path = _PROJECT / "constraints.txt"
    return sha256_file(path) if path.exists() else None


@lru_cache
def code_commit() -> dict[str, Any]:
    """Return the git commit of the project's code and whether the tree differs from it."""

    def git(*words: str) -> str | None:
        done = subprocess.run(
            ["git", "-C", str(_PROJECT), *words], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--", "tasks", "models", "flows", "constraints.txt")
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(changed),
        "digest": code_digest(),
        "lock": lock_digest(),
    }


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed that depends on every part and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def stage_key(stage: str, inputs: Mapping[str, Any]) -> str:
    """Return the name under which the ledger holds the result of a stage for these inputs, code and environment."""
    return digest_json({"stage": stage, "inputs": dict(inputs), "code": code_digest(), "lock": lock_digest()})


def once(
    ledger: Ledger,
    stage: str,
    inputs: Mapping[str, Any],
    work: Callable[[str], Mapping[str, Any]],
    usable: Callable[[Mapping[str, Any]], bool] = lambda outputs: True,
) -> tuple[dict[str, Any], bool]:
    """Run `work(key)` unless the ledger holds its result for the same inputs, code and environment.

    Args:
        inputs: everything that the result depends on, as JSON values; their digest is the stage's key.
        usable: tells whether a recorded result still stands (its files are there); if not, the work is done again.

    Returns:
        The outputs, and True if they were found rather than made.
    """
    key = stage_key(stage, inputs)
    done = ledger.last("stage.done", key)
    if done is not None and usable(done.payload["outputs"]):
        return dict(done.payload["outputs"]), True
    outputs = dict(work(key))
    ledger.append("stage.done", key, {"stage": stage, "inputs": dict(inputs), "outputs": outputs})
    return outputs, False
