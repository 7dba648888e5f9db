"""Evidence beside the answers themselves: what serving costs, what logged traffic says, what the reward model thinks.

Each piece is made once for its inputs, kept by content, and named {path, sha256} in the receipt of the stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from flows import progress
from flows.context import Context
from flows.experience import intact
from tasks.core.atomic import write_atomic
from tasks.core.digest import canonical_json, digest_json, sha256_bytes
from tasks.core.errors import Refused
from tasks.core.stages import once

if TYPE_CHECKING:
    from tasks.arena.environment import Task
    from tasks.evaluation.paired import PairedOutcomes
    from tasks.replay.schema import Episode

_PROMPTS = 2  # of each environment, for the serving probe
_PASSES = 2
_TRAINED = (
    "head",
    "classifier",
)  # sources that may be fooled; a verifier is the truth itself, a judge costs money
_NEVER = -1000.0  # log of a probability ratio that stands for 0

File = dict[str, str]


def measure_serving(
    context: Context, candidate: int, champion: int, tasks: Mapping[str, Sequence[Task]]
) -> File:
    """Serve both agents, each from a clean process, on a few of the held-out prompts."""
    from tasks.evaluation.serving import measure, serving_evidence

    sides = {
        name: context.agent(str(version)).payload
        for name, version in (("candidate", candidate), ("champion", champion))
    }
    prompts = [task.prompt for found in tasks.values() for task in found[:_PROMPTS]]
    conditions: dict[str, Any] = {
        "device": context.device(),
        "dtype": context.dtype(),
        "threads": context.settings.compute.threads,
    }
    inputs = {
        **{name: agent["digest"] for name, agent in sides.items()},
        "prompts": digest_json(prompts),
        **conditions,
    }

    def work(key: str) -> dict[str, Any]:
        served = {}
        with progress.current().bar("serving") as report:
            for done, (name, agent) in enumerate(sides.items()):
                report(done, 2, name)
                served[name] = measure(context.weights(agent), prompts, repeats=_PASSES, **conditions)
            report(2, 2, "")
        content = serving_evidence(served["candidate"], served["champion"], prompts, **conditions)
        again = any(one.fault == "machine" for one in served.values())
        return {"evidence": keep(context, "serving", content), "again": again}

    def stands(outputs: Mapping[str, Any]) -> bool:
        return not outputs["again"] and intact(context, outputs["evidence"])

    outputs, _ = once(context.ledger, "serving", inputs, work, stands)
    return dict(outputs["evidence"])


def estimate_on_replay(context: Context, candidate: int, champion: int, ref: str) -> File:
    """Score the episodes of a sealed dataset whose prompts neither agent was trained on, under both agents.

    Where there is none, or none that could be compared, the evidence says why.

    Args:
        ref: name, name/vN or root of the dataset.
    """
    from tasks.evaluation.replay_value import usable
    from tasks.lineage.revocation import require_not_erased, revoked, without
    from tasks.replay.seal import find, read_rows

    sealed = find(context.ledger, ref)
    agents = [context.agent(str(version)).payload for version in (candidate, champion)]
    known = trained_prompts(context, candidate) | trained_prompts(context, champion)
    inputs = {
        "candidate": agents[0]["digest"],
        "champion": agents[1]["digest"],
        "dataset": sealed.root,
        "without": digest_json(sorted(known)),
        "dtype": context.dtype(),
    }
    now = revoked(context.ledger, context.workspace)
    if now:
        inputs["revoked"] = context.revoked

    def work(key: str) -> dict[str, Any]:
        about = {
            "schema": "forebay.replay_value/1",
            **inputs,
            "subject": sealed.manifest.subject,
            "log": None,
            "problem": "",
        }
        try:
            require_not_erased(context.ledger, sealed.manifest.subject, map(asdict, sealed.manifest.shards))
            prompts = read_rows(context.workspace, sealed.manifest, columns=["prompt_sha256"])
            new = set(prompts["prompt_sha256"].unique().to_pylist()) - known
            rows = read_rows(context.workspace, sealed.manifest) if new else None
            episodes = (
                [] if rows is None else usable(without(rows, now), agents[0]["tokenizer_digest"], known)
            )
        except Refused as refused:
            return {"evidence": keep(context, "replay_value", {**about, "problem": str(refused)})}
        if not episodes:
            about["problem"] = (
                f"the agents could learn from every prompt of {sealed.manifest.subject}; set training.admission.holdout "
                "above 0, or look at traffic that is not trained on (`forebay evaluate replay --on logs`)."
            )
            return {"evidence": keep(context, "replay_value", about)}
        return {
            "evidence": keep(context, "replay_value", {**about, **_scored_log(context, agents, episodes)})
        }

    def stands(outputs: Mapping[str, Any]) -> bool:
        return intact(context, outputs["evidence"])

    outputs, _ = once(context.ledger, "replay value", inputs, work, stands)
    return dict(outputs["evidence"])


def trained_prompts(context: Context, version: int) -> set[str]:
    """Return the SHA-256 of every prompt that the agent, or one it was trained from, might have learnt from.

    That is all of each run's dataset but what `training.admission.holdout` kept back by hash. Groups that a run left out for
    their rewards (all alike) count as learnt from: a log chosen by its rewards would be no fair sample. Of rows that were
    erased since, the SHA-256 of the prompt was kept.

    Raises:
        NotFound, Unavailable: a shard is missing, was not erased and cannot be brought back. Corrupt: one was changed.
    """
    from tasks.lineage.erasure import Shards
    from tasks.replay.seal import find
    from tasks.training.admission import held_out

    look = Shards(context.ledger, context.workspace, checked=True)
    found: set[str] = set()
    for run in _runs(context, version):
        for shard in find(context.ledger, run["dataset"]).manifest.shards:
            table = look.facts(asdict(shard))
            ids = table["group_id"].to_pylist()
            prompts = zip(table["prompt_sha256"].to_pylist(), held_out(ids, run["holdout"]), strict=True)
            found |= {prompt for prompt, held in prompts if not held}
        for shard in run["fresh"]:
            found |= set(look.facts(shard)["prompt_sha256"].to_pylist())
    return found


def score_by_proxy(
    context: Context,
    verdict: Mapping[str, Any],
    outcomes: PairedOutcomes,
    tasks: Mapping[str, Sequence[Task]],
) -> File | None:
    """Let the cycle's reward model score both agents' answers to some tasks; None where it is no trained model.

    Args:
        verdict: payload of the model's validation.
    """
    from flows.rewards import REGISTERED, open_source
    from tasks.reward.source import Answer

    registered = next(
        (
            e.payload
            for e in context.ledger.entries(REGISTERED)
            if e.payload["digest"] == verdict.get("digest")
        ),
        None,
    )
    if registered is None or registered["kind"] not in _TRAINED:
        return None
    prompts = {task.id: task.prompt for found in tasks.values() for task in found}
    chosen = set(
        sorted(prompts, key=lambda name: sha256_bytes(name.encode()))[
            : context.settings.evaluation.proxy_tasks
        ]
    )
    pairs = [pair for pair in outcomes.pairs if pair.task_id in chosen]
    if not pairs:
        return None
    inputs = {
        "reward": registered["digest"],
        "answers": digest_json([[p.task_id, p.candidate_response, p.champion_response] for p in pairs]),
    }

    def work(key: str) -> dict[str, Any]:
        answers = [
            Answer(prompts[pair.task_id], text)
            for pair in pairs
            for text in (pair.candidate_response, pair.champion_response)
        ]
        with progress.current().bar("proxy") as report:
            report(0, 1, f"reward/{registered['version']}")
            scores = iter(open_source(context, registered).score(answers))
            report(1, 1, "")
        rows = [
            {
                "env": pair.env,
                "task_id": pair.task_id,
                "sample": pair.sample,
                "candidate": round(next(scores), 6),
                "champion": round(next(scores), 6),
            }
            for pair in pairs
        ]
        content = {"schema": "forebay.proxy/1", "reward": registered["digest"], "answers": rows}
        return {"evidence": keep(context, "proxy", content)}

    def stands(outputs: Mapping[str, Any]) -> bool:
        return intact(context, outputs["evidence"])

    outputs, _ = once(context.ledger, "proxy", inputs, work, stands)
    return dict(outputs["evidence"])


def record_run(context: Context, run: Mapping[str, Any]) -> File:
    """Keep what the training run reports about its divergence and what it used.

    Args:
        run: receipt of the stage `train`.
    """
    from flows.training import read_curve

    curve = read_curve(context, run["key"])
    used = run.get("resources", {})
    content = {
        "schema": "forebay.run/1",
        "run": run["key"],
        "steps": run["steps"],
        "stop_reason": run["stop_reason"],
        "kl_k3": run["metrics"].get("kl_k3"),
        "seconds": round(sum(row["seconds"] for row in curve), 3) if curve else None,
        "tokens": round(sum(row["seconds"] * row["tokens_per_second"] for row in curve)) if curve else None,
        "cpu_seconds": used.get("cpu_seconds"),
        "memory_mib": used.get("memory_mib"),
    }
    return keep(context, "run", content)


def evaluate_replay(context: Context, candidate: str, champion: str, ref: str) -> dict[str, Any]:
    """Judge what a candidate would have earned on a logged dataset under the policy's section `replay_value`.

    Returns:
        {evidence, subject, verdict, says, estimate, low, high, n, mde, margin}.
    """
    from tasks.promotion.evidence.item import FileRef, read_json
    from tasks.promotion.evidence.replay_value import replay_value_evidence

    versions = [context.agent(name).payload["version"] for name in (candidate, champion)]
    file = estimate_on_replay(context, versions[0], versions[1], ref)
    report = read_json(context.workspace.root / file["path"], file["sha256"])
    found = asdict(replay_value_evidence(report, FileRef(file["path"], file["sha256"]), context.policy))
    numbers = {
        name: found[name] for name in ("verdict", "says", "estimate", "low", "high", "n", "mde", "margin")
    }
    return {
        "candidate": versions[0],
        "champion": versions[1],
        "on": report["subject"],
        "evidence": file,
        **numbers,
    }


def keep(context: Context, kind: str, content: Mapping[str, Any]) -> File:
    """Write evidence/<kind>/<SHA-256>.json and return {path, sha256}."""
    data = canonical_json(content)
    digest = sha256_bytes(data)
    path = context.workspace.evidence / kind / f"{digest}.json"
    write_atomic(path, data)
    return {"path": context.workspace.relative(path), "sha256": digest}


def _runs(context: Context, version: int) -> Iterator[dict[str, Any]]:
    """The training runs behind an agent, newest first: {dataset: root, holdout, fresh: shards}."""
    name: str | None = f"agent/{version}"
    while name is not None:
        parents = context.agent(name).payload["parents"]
        key = parents.get("run")
        started = context.ledger.last("run.started", key) if key else None
        finished = context.ledger.last("run.finished", key) if key else None
        if started is not None and finished is not None:
            admission = started.payload["settings"].get("admission", {})
            yield {
                "dataset": parents["dataset"],
                "holdout": admission.get("holdout", 0.0),
                "fresh": finished.payload["outputs"].get("fresh", ()),
            }
        name = parents.get("init")


def _scored_log(
    context: Context, agents: Sequence[Mapping[str, Any]], episodes: Sequence[Episode]
) -> dict[str, Any]:
    """Return the log and both agents' log ratios; the agents are in memory one after the other."""
    import numpy as np

    from models.causal_lm import load_policy
    from tasks.evaluation.replay_value import log_ratios, logged

    log, sides = logged(episodes), []
    with progress.current().bar("replay value") as report:
        for done, agent in enumerate(agents):
            report(done, len(agents), f"agent/{agent['version']} on {len(episodes)} episodes")
            policy = load_policy(context.weights(agent), context.device(), context.dtype())
            ratios = np.maximum(log_ratios(policy, episodes), _NEVER)
            sides.append(np.round(ratios, 6).tolist())
        report(len(agents), len(agents), "")
    return {
        "log": {
            "rewards": log.rewards.tolist(),
            "turns": log.turns.tolist(),
            "prompts": list(log.prompts),
            "environments": list(log.environments),
        },
        "candidate_ratios": sides[0],
        "champion_ratios": sides[1],
    }
