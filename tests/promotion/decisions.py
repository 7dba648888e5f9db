"""A decision with every kind of evidence, as files: what the page of a decision has to be able to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks.core.digest import canonical_json, sha256_bytes, write_atomic
from tasks.evaluation.paired import Agent, Baseline, Pair, PairedOutcomes, write_outcomes
from tasks.promotion.policy import Policy

NASTY = "<script>alert('x')</script>\u202egnp.exe\x00 & \"quotes\""
ENVIRONMENTS = ("calculator", "largest", "reasoning_gym/chain_sum")


def outcomes(folder: Path, *, graded: bool = False, n: int = 40, long: int = 5000) -> dict[str, str]:
    """Write the paired answers of a better candidate; one answer attacks the reader, one is very long."""
    rng = np.random.default_rng(0)
    pairs = []
    for env in ENVIRONMENTS:
        for i in range(n):
            low, high = np.sort(rng.random(2)) if graded else (float(rng.random() < 0.4), 1.0)
            champion, candidate = (high, low) if rng.random() < 0.1 else (low, high)
            said = "9" * long if i == 1 else NASTY
            pairs.append(
                Pair(
                    env,
                    f"{env}/{i:04d}",
                    0,
                    round(float(candidate), 4),
                    round(float(champion), 4),
                    said,
                    "no",
                )
            )
    found = PairedOutcomes(
        Agent(3, "c" * 64),
        Agent(2, "b" * 64),
        {env: Baseline("7", 0.1) for env in ENVIRONMENTS},
        tuple(sorted(pairs, key=lambda p: (p.env, p.task_id))),
    )
    path, digest = write_outcomes(folder, found)
    return {"path": path.relative_to(folder).as_posix(), "sha256": digest}


def reward_report(folder: Path) -> dict[str, str]:
    """Write a reward model's margins on held-out pairs."""
    rng = np.random.default_rng(1)
    pairs = [
        {
            "group_id": f"g{i // 2}",
            "env": ENVIRONMENTS[i % 3],
            "margin": round(float(rng.normal(1.2, 1.5)), 6),
        }
        for i in range(150)
    ]
    return keep(folder, "reward", {"schema": "forebay.reward/1", "pairs": pairs})


def keep(folder: Path, kind: str, content: Mapping[str, Any]) -> dict[str, str]:
    """Write an evidence file and return its path and digest."""
    data = canonical_json(content)
    path = f"{kind}/{sha256_bytes(data)}.json"
    write_atomic(folder / path, data)
    return {"path": path, "sha256": sha256_bytes(data)}


def item(name: str, verdict: str = "PASS", says: str | None = None, **numbers: Any) -> dict[str, Any]:
    """One item of evidence as the record has it."""
    empty = dict.fromkeys(("estimate", "low", "high", "n", "mde", "margin"))
    said = says or f"{name.capitalize()}: as told."
    head = {
        "name": name,
        "verdict": verdict,
        "says": said,
        "digest": sha256_bytes(name.encode()),
        "counts": True,
    }
    return {**head, **empty, **numbers}


def all_evidence() -> list[dict[str, Any]]:
    """Return an item of every name the gate may use, of each verdict and unit, and one of a name that nobody knows."""
    return [
        item("integrity"),
        item("data"),
        item("reward model", estimate=0.836, low=0.747, high=0.924, n=73, mde=0.132, margin=0.6, unit="share"),
        item("errors", digest=None),
        item("evaluation set", digest=None),
        item("quality", estimate=0.226, low=0.145, high=0.307, n=270, mde=0.105, margin=0.0),
        item("guard/calculator", estimate=0.217, low=0.154, high=0.279, n=120, mde=0.095, margin=-0.1),
        item("guard/largest", "INCONCLUSIVE", estimate=-0.04, low=-0.16, high=0.08, n=40, mde=0.2, margin=-0.1),
        item("guard/reasoning_gym/chain_sum", "FAIL", estimate=-0.22, low=-0.31, high=-0.13, n=50, mde=0.1, margin=-0.1),
        item("serving", estimate=1.84, high=2.31, n=40, margin=3.0, unit="seconds"),
        item("safety/refusal", estimate=0.0, low=0.0, high=0.0298, n=100, margin=0.05, unit="share"),
        item("replay value", "INCONCLUSIVE", counts=False, estimate=0.05, low=-0.11, high=0.2, n=832, mde=0.17, margin=0.0),
        item("hacking/length", estimate=1.12, low=0.98, high=1.27, n=270, margin=1.5, unit="ratio of lengths"),
        item("divergence", estimate=0.41, high=0.52, n=270, margin=1.0, unit="nats"),
        item("resources", estimate=1480.0, margin=4096.0, unit="MiB"),
        item("omens", says=NASTY, estimate=3.0, unit="ravens"),
    ]  # fmt: skip


def record(
    folder: Path,
    *,
    verdict: str = "FAIL",
    evidence: Sequence[Mapping[str, Any]] | None = None,
    policy: Policy | None = None,
    graded: bool = False,
    **inputs: Any,
) -> Path:
    """Write a decision's record and all evidence that it names; return the record's path."""
    rule = policy or Policy()
    items = all_evidence() if evidence is None else list(evidence)
    content = {
        "schema": "forebay.decision/3",
        "candidate": {"version": 3, "digest": "c" * 64},
        "champion": {"version": 2, "digest": "b" * 64},
        "verdict": verdict,
        "reasons": [e["says"] for e in items if e["verdict"] == verdict and e["counts"]],
        "evidence": items,
        "policy": rule.model_dump(mode="json"),
        "policy_digest": rule.digest(),
        "inputs": {
            "outcomes": outcomes(folder, graded=graded),
            "reward": reward_report(folder),
            "data": {"verdict": "PASS", "subject": "d" * 64, "digest": "e" * 64, "reasons": []},
            "spent": {"decisions": 3, "error": 0.0075, "uses": 3},
            **inputs,
        },
        "tasks": {env: sha256_bytes(env.encode()) for env in ENVIRONMENTS},
        "error": 0.0025,
    }
    data = canonical_json(content)
    path = folder / "decisions" / f"{sha256_bytes(data)}.json"
    write_atomic(path, data)
    return path
