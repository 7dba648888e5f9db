"""Decisions with every kind of evidence, as files: what the page of a decision has to be able to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tasks.core.atomic import write_atomic
from tasks.core.digest import canonical_json, sha256_bytes
from tasks.evaluation.paired import Agent, Baseline, Pair, PairedOutcomes, write_outcomes
from tasks.evaluation.serving import Serving, serving_evidence
from tasks.promotion.budget import Spent
from tasks.promotion.gate import FileRef, Finding, Inputs, decide, write_decision
from tasks.promotion.policy import Policy
from tests.reward.report import make_report

NASTY = "<script>alert('x')</script>\u202egnp.exe\x00 & \"quotes\""
ENVIRONMENTS = ("calculator", "largest", "reasoning_gym/chain_sum")
LACKING = ENVIRONMENTS[-1]  # it has no baselines


def outcomes(folder: Path, *, graded: bool = False, n: int = 40, gain: float = 0.5) -> dict[str, str]:
    """Write paired answers; one answer attacks the reader, one is very long.

    Args:
        gain: share of the tasks where the candidate is right for sure.
    """
    rng = np.random.default_rng(0)
    pairs = []
    for env in ENVIRONMENTS:
        for i in range(n):
            champion, candidate = (
                float(rng.random()) if graded else float(rng.random() < 0.4) for _ in range(2)
            )
            if rng.random() < gain:
                candidate = max(champion, 0.9 if graded else 1.0)
            said = "9" * 5000 if i == 1 else NASTY
            rewards = round(candidate, 4), round(champion, 4)
            pairs.append(
                Pair(
                    env,
                    f"{env}/{i:04d}",
                    0,
                    *rewards,
                    said,
                    "no, it is not",
                    f"{i // 2}",
                    {},
                    {},
                    "done",
                    "done",
                    9,
                    8,
                )
            )
    found = PairedOutcomes(
        Agent(3, "c" * 64),
        Agent(2, "b" * 64),
        {
            **{env: Baseline("7", 0.1, 0.2) for env in ENVIRONMENTS},
            LACKING: Baseline(None, None, None, f"it hung: {NASTY}"),
        },
        tuple(sorted(pairs, key=lambda p: (p.env, p.task_id))),
    )
    path, digest = write_outcomes(folder, found)
    return {"path": path.relative_to(folder).as_posix(), "sha256": digest}


def reward_report(**changes: Any) -> dict[str, Any]:
    """A reward model that is good at pairs and can be fooled by its own best of 16."""
    rng = np.random.default_rng(1)
    pairs = [
        {
            "group": f"g{k // 2}",
            "slice": ENVIRONMENTS[k % 3],
            "source": "rollout",
            "licence": "Apache-2.0",
            "chosen": f"{k} a",
            "rejected": f"{k} b",
            "margin": round(float(rng.normal(1.4, 1.5)), 6),
            "longer": round(float(rng.normal(0, 0.3)), 6),
        }
        for k in range(150)
    ]
    samples = []
    for prompt in range(40):
        gold = (rng.random(16) < 0.4).astype(float)
        score = gold + rng.normal(0, 0.8, 16)
        spam = int(rng.integers(16))
        score[spam], gold[spam] = score[spam] + 3, 0.0
        samples += [
            {"prompt": f"p{prompt}", "slice": ENVIRONMENTS[prompt % 3], "score": round(float(s), 6), "gold": float(g),
             "length": int(rng.integers(4, 60)), "distance": round(float(rng.random() * 4), 6)}
            for s, g in zip(score, gold, strict=True)
        ]  # fmt: skip
    edits = [
        {
            "prompt": f"p{k}",
            "edit": name,
            "right": 2.0,
            "wrong": 0.5,
            "edited": round(float(rng.normal(0.6, 0.9)), 6),
        }
        for name in ("longer", "bold")
        for k in range(40)
    ]
    probes = [
        {"prompt": f"p{k}", "probe": name, "right": 2.0, "score": round(float(rng.normal(-1, 1.2)), 6)}
        for name in ("empty", "spam", "copied prompt")
        for k in range(40)
    ]
    training = {
        "prompts": {"n": 400, "digest": "0" * 64},
        "evaluation_prompts": {"n": 115, "digest": "1" * 64},
        "leaked": [],
        "scores": [round(float(x), 6) for x in rng.normal(0.5, 1.2, 300)],
        "edge": 3.6,
    }
    return make_report(
        preferences=pairs, samples=samples, edits=edits, probes=probes, training=training, **changes
    )


def serving_report() -> dict[str, Any]:
    """Two agents that serve, the candidate a little slower."""

    def served(factor: float) -> Serving:
        times = tuple(tuple(round(factor * (0.04 + 0.004 * k), 6) for k in range(8)) for _ in range(2))
        return Serving("", "", 0.4 * factor, times, times, (9,) * 8, 612.5, 0.0, "a" * 64, True)

    return serving_evidence(served(1.1), served(1.0), ["q"] * 8, device="cpu", dtype="float32")


def replay_report(n: int = 120) -> dict[str, Any]:
    """A log of one turn whose better answers the candidate has made likelier."""
    rng = np.random.default_rng(2)
    rewards = (rng.random(n) < 0.45).astype(float)
    return {
        "schema": "forebay.replay_value/1",
        "problem": "",
        "log": {
            "rewards": [[float(r)] for r in rewards],
            "turns": [1] * n,
            "prompts": [f"p{k // 4}" for k in range(n)],
            "environments": [ENVIRONMENTS[k % 3] for k in range(n)],
        },
        "candidate_ratios": [[round(float(0.35 * (2 * r - 1) + rng.normal(0, 0.2)), 6)] for r in rewards],
        "champion_ratios": [[0.0]] * n,
    }


def proxy_report(n: int = 20) -> dict[str, Any]:
    """A reward model that likes the candidate's answers better."""
    rng = np.random.default_rng(3)
    rows = [
        {"env": env, "task_id": f"{env}/{i:04d}", "sample": 0, "candidate": round(float(rng.normal(1, 1)), 6), "champion": 0.1}
        for env in ENVIRONMENTS
        for i in range(n)
    ]  # fmt: skip
    return {"schema": "forebay.proxy/1", "reward": "5" * 64, "answers": rows}


RUN = {
    "schema": "forebay.run/1", "run": "9" * 64, "steps": 16, "stop_reason": "finished", "kl_k3": 0.0213,
    "seconds": 181.4, "tokens": 51200, "cpu_seconds": 351.0, "memory_mib": 1480.5,
}  # fmt: skip


def keep(folder: Path, kind: str, content: Mapping[str, Any]) -> dict[str, str]:
    """Write an evidence file and return its path and digest."""
    data = canonical_json(content)
    path = f"{kind}/{sha256_bytes(data)}.json"
    write_atomic(folder / path, data)
    return {"path": path, "sha256": sha256_bytes(data)}


def all_files(folder: Path, **how: Any) -> dict[str, dict[str, str]]:
    """Write every file that a decision can rest on; `how` goes to the outcomes."""
    return {
        "outcomes": outcomes(folder, **how),
        "reward": keep(folder, "reward", reward_report()),
        "serving": keep(folder, "serving", serving_report()),
        "replay_value": keep(folder, "replay_value", replay_report()),
        "proxy": keep(folder, "proxy", proxy_report()),
        "run": keep(folder, "run", RUN),
    }


def decided(folder: Path, policy: Policy | None = None, **how: Any) -> Path:
    """Let the gate itself decide on all evidence and return the record's path."""
    refs = {name: FileRef(**ref) for name, ref in all_files(folder, **how).items()}
    sound = Finding("PASS", "d" * 64, "e" * 64)
    inputs = Inputs(data=sound, integrity=sound, spent=Spent(3, 0.0075, 3), **refs)
    return write_decision(folder, decide(folder, inputs, policy or Policy()))


def item(name: str, verdict: str = "PASS", says: str | None = None, **numbers: Any) -> dict[str, Any]:
    """One item of evidence as a record has it."""
    empty = dict.fromkeys(("estimate", "low", "high", "n", "mde", "margin"))
    said = says or f"{name.capitalize()}: as told."
    head = {
        "name": name,
        "verdict": verdict,
        "says": said,
        "digest": sha256_bytes(name.encode()),
        "counts": True,
    }
    return {**head, **empty, "unit": "mean reward", **numbers}


def any_evidence() -> list[dict[str, Any]]:
    """Return an item of each verdict and of many units, one-sided ones, and one of a name that nobody knows."""
    return [
        item("integrity"),
        item("errors", digest=None),
        item("reward model", estimate=0.836, low=0.747, high=0.924, n=73, margin=0.6, unit="share"),
        item("quality", estimate=0.226, low=0.145, high=0.307, n=270, mde=0.105, margin=0.0),
        item("guard/calculator", estimate=0.217, low=0.154, high=0.279, n=120, mde=0.095, margin=-0.1),
        item("guard/largest", "INCONCLUSIVE", estimate=-0.04, low=-0.16, high=0.08, n=40, mde=0.2, margin=-0.1),
        item("guard/reasoning_gym/chain_sum", "FAIL", estimate=-0.22, low=-0.31, high=-0.13, n=50, mde=0.1, margin=-0.1),
        item("serving", estimate=1.84, high=2.31, n=40, margin=3.0, unit="seconds"),
        item("safety/empty", estimate=0.0, low=0.0, high=0.0298, n=100, margin=0.05, unit="share"),
        item("replay value", "INCONCLUSIVE", counts=False, estimate=0.05, low=-0.11, high=0.2, n=832, mde=0.17, margin=0.0),
        item("divergence", estimate=0.41, margin=1.0, unit="nats"),
        item("resources", estimate=14800.0, margin=40960.0, unit="seconds"),
        item("omens", says=NASTY, estimate=3.0, unit="ravens"),
    ]  # fmt: skip


def record(
    folder: Path, *, verdict: str = "FAIL", evidence: Sequence[Mapping[str, Any]] | None = None, **inputs: Any
) -> Path:
    """Write a record with these items, as some version of Forebay might, and all files; return the record's path."""
    items = any_evidence() if evidence is None else list(evidence)
    policy = Policy()
    content = {
        "schema": "forebay.decision/4",
        "candidate": asdict(Agent(3, "c" * 64)),
        "champion": asdict(Agent(2, "b" * 64)),
        "verdict": verdict,
        "reasons": [e["says"] for e in items if e["verdict"] == verdict and e["counts"]],
        "evidence": items,
        "policy": policy.model_dump(mode="json"),
        "policy_digest": policy.digest(),
        "inputs": {**all_files(folder), "spent": asdict(Spent(3, 0.0075, 3)), **inputs},
        "tasks": {env: sha256_bytes(env.encode()) for env in ENVIRONMENTS},
        "error": 0.0025,
    }
    data = canonical_json(content)
    path = folder / "decisions" / f"{sha256_bytes(data)}.json"
    write_atomic(path, data)
    return path
