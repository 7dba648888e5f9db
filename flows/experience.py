"""Experience: collected from environments or imported, sealed into dataset versions, checked."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flows import progress
from flows.context import Context
from tasks.core.digest import sha256_bytes, sha256_file
from tasks.core.errors import UsageError
from tasks.core.stages import derive_seed, once

if TYPE_CHECKING:
    from tasks.rollout.rollout import BehaviourIdentity


def collect_into_segment(
    context: Context, version: str = "champion", round: int | None = None
) -> dict[str, Any]:
    """Roll out an agent on the environments of the settings and append its episodes to an open segment.

    A collection is named by the agent's digest, the settings and the round, so one that was cut short goes on
    with the groups it lacks, and a finished one is found again.

    Args:
        round: how many collections were finished before; by default counted from the ledger.
    """
    from tasks.arena.environment import get, verifier_digest

    agent = context.agent(version).payload
    settings = context.settings.collect
    if round is None:
        round = finished_collections(context)
    inputs = {
        "agent": agent["digest"],
        "settings": settings.model_dump(mode="json"),
        "seed": context.settings.seed,
        "round": round,
        "dataset": context.settings.replay.dataset,
        "verifiers": {name: verifier_digest(get(name)) for name in settings.environments},
    }
    outputs, _ = once(context.ledger, "collect", inputs, lambda key: _collect(context, agent, key, round))
    return outputs


def finished_collections(context: Context) -> int:
    """Return how many collections were finished in this workspace."""
    return sum(e.payload["stage"] == "collect" for e in context.ledger.entries("stage.done"))


def _collect(context: Context, agent: Mapping[str, Any], key: str, round: int) -> dict[str, Any]:
    from flows.hybrid import allowed
    from models.causal_lm import load_policy, load_tokenizer
    from tasks.arena.floors import floor_of
    from tasks.lineage.revocation import revoked
    from tasks.replay.segments import SegmentWriter, open_folder
    from tasks.rollout.deep_thinking import measured
    from tasks.rollout.remote import open_engine
    from tasks.rollout.rollout import rollout

    folder = context.weights(agent)
    model, tokenizer = load_policy(folder, context.device(), context.dtype()), load_tokenizer(folder)
    settings = context.settings.collect
    segment = open_folder(context.workspace, context.settings.replay.dataset)
    summary = {}
    now = revoked(context.ledger, context.workspace)
    with (
        SegmentWriter(segment, f"collect-{key[:12]}") as writer,
        context.environments() as environments,
        open_engine(settings, model, tokenizer, agent["digest"]) as engine,
    ):
        for name, groups in allowed(settings.environments, now).items():
            env = environments(name)
            seed = derive_seed(context.settings.seed, name, round)
            tasks = [
                task
                for task in env.tasks("train", groups, seed)
                if not now.prompt(sha256_bytes(task.prompt.encode()))
            ]
            floor = floor_of(env, tasks, seed)
            wanted = {task.id for task in tasks}
            rewards: dict[str, list[float]] = {}
            for row in _open_rows(segment):
                made_by = row["seed"], row["behaviour_digest"], row["temperature"]
                if made_by == (seed, agent["digest"], settings.temperature) and row["task_id"] in wanted:
                    rewards.setdefault(row["task_id"], []).append(row["reward"])
            with progress.current().bar(f"collect {name}") as report:
                report(len(rewards), groups, "groups")
                for group in rollout(
                    engine,
                    tokenizer,
                    env,
                    tasks,
                    group_size=settings.group_size,
                    temperature=settings.temperature,
                    seed=seed,
                    batch_rows=settings.batch_rows,
                    identity=identity(agent),
                    done=set(rewards),
                ):
                    group = measured(model, group, settings.deep_thinking)
                    writer.append(group)
                    rewards[group[0].task_id] = [episode.reward for episode in group]
                    report(len(rewards), groups, f"mean reward {_mean(rewards):.3f}")
            summary[name] = {
                "groups": len(rewards),
                "episodes": sum(len(r) for r in rewards.values()),
                "reward": _mean(rewards),
                "mixed": sum(len(set(r)) > 1 for r in rewards.values()) / max(len(rewards), 1),
                "constant": floor.constant,
                "constant_answer": floor.constant_action,
                "random": floor.random,
                "baseline_error": floor.error,
            }
    return {
        "agent": agent["digest"],
        "version": agent["version"],
        "round": round,
        "groups": sum(row["groups"] for row in summary.values()),
        "episodes": sum(row["episodes"] for row in summary.values()),
        "environments": summary,
    }


def intact(context: Context, file: Mapping[str, str]) -> bool:
    """Tell whether an evidence file {path, sha256} is there with the bytes it was recorded with."""
    path = context.workspace.root / file["path"]
    return path.is_file() and sha256_file(path) == file["sha256"]


def import_experience(
    context: Context,
    what: str,
    kind: Literal["chat", "traces"],
    *,
    written_by: str,
    recompute: bool,
    source: str,
    licence: str,
    feedback: str,
) -> dict[str, Any]:
    """Bring experience that others recorded into an open segment.

    Args:
        what: a file (chat JSONL, or a JSON list of exported traces), or for traces the name of an MLflow experiment.
        written_by: the behaviour policy: a registered agent ("agent/1", "champion") or any other name.
        recompute: let that agent's checkpoint compute log-probabilities that the records lack; else such rows are
            marked, and objectives that need them refuse them.
        feedback: name of the feedback that is the reward of a trace.

    Returns:
        {groups, episodes, errors: [sentence]}; good records are kept whatever the errors. What is revoked is left out
        and said, with revoked: {what: groups}.
    """
    from models.causal_lm import load_policy, load_tokenizer
    from tasks.lineage.revocation import revoked
    from tasks.replay.importers import Origin, import_chat, import_traces
    from tasks.replay.segments import SegmentWriter, open_folder
    from tasks.rollout.rollout import recompute_logprobs

    policy = context.agent("champion").payload
    registered = re.fullmatch(r"champion|candidate|previous|agent[/@]\w+|\d+", written_by) is not None
    writer = context.agent(written_by).payload if registered else None
    if recompute and writer is None:
        raise UsageError(
            f"--recompute needs the checkpoint that wrote the records, and `{written_by}` is no agent here."
        )
    model = load_policy(context.weights(writer)) if recompute and writer else None
    origin = Origin(
        tokenizer=load_tokenizer(context.weights(policy)),
        tokenizer_digest=policy["tokenizer_digest"],
        template_digest=policy["template_digest"],
        behaviour_version=f"agent/{writer['version']}" if writer else f"import/{written_by}",
        behaviour_digest=writer["digest"] if writer else "",
        source=source,
        licence=licence,
        recompute=partial(recompute_logprobs, model) if model is not None else None,
    )
    file = Path(what)
    if kind == "chat":
        report = import_chat(file, origin)
    elif file.is_file():
        report = import_traces(_json_list(file), origin, feedback)
    else:
        report = import_traces(context.registry.traces(what), origin, feedback)
    now = revoked(context.ledger, context.workspace)
    kept, dropped = [], Counter[str]()
    for group in report.groups:
        why = next(filter(None, map(now.reason, group)), None) if now else None
        if why is None:
            kept.append(group)
        else:
            dropped[why] += 1
    segment = open_folder(context.workspace, context.settings.replay.dataset)
    with SegmentWriter(segment, "import") as out:
        for group in kept:
            out.append(group)
    return {
        "groups": len(kept),
        "episodes": sum(map(len, kept)),
        **({"revoked": dict(dropped)} if dropped else {}),
        "errors": [
            *(str(error) for error in report.errors),
            *(f"{count} groups were left out: {why} is revoked." for why, count in dropped.items()),
        ],
    }


def _json_list(path: Path) -> list[dict[str, Any]]:
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not JSON ({error}); export traces as a JSON list.") from None
    if not isinstance(value, list):
        raise UsageError(f"{path} must hold a JSON list of traces, not a {type(value).__name__}.")
    return value


def seal_dataset(context: Context, announce: bool = True) -> dict[str, Any]:
    """Seal what waits in open segments as the next dataset version.

    Args:
        announce: emit the event that schedules with `--on dataset.sealed` wait for, if the servers are up.
    """
    from tasks.replay.seal import seal

    sealed = seal(context.workspace, context.ledger, context.settings.replay)
    entry = context.ledger.last("dataset.sealed", sealed.manifest.subject)
    assert entry is not None  # seal() ends with this entry
    if announce:
        from flows.deployments import emit_sealed

        manifest = sealed.manifest
        progress.current().say(emit_sealed(context.workspace, sealed.root, manifest.name, manifest.version))
    return dict(entry.payload)


def validate_dataset(context: Context, ref: str | None = None, agent: int | None = None) -> dict[str, Any]:
    """Check a sealed dataset for the policy that would train on it; a failing one is quarantined.

    Args:
        ref: name, name/vN or the start of a root; the newest version of the workspace's dataset by default.
        agent: version of the policy to be trained; the champion by default.
    """
    from flows.judging import heldout_tasks
    from tasks.core.digest import digest_json, sha256_bytes
    from tasks.lineage.revocation import require_not_erased
    from tasks.replay.seal import find
    from tasks.replay.validation import Expected, validate_dataset

    sealed = find(context.ledger, ref or context.settings.replay.dataset)
    require_not_erased(context.ledger, sealed.manifest.subject, map(asdict, sealed.manifest.shards))
    policy = context.agent("champion" if agent is None else str(agent)).payload
    prompts = {
        sha256_bytes(task.prompt.encode()) for tasks in heldout_tasks(context).values() for task in tasks
    }
    settings = context.settings.validation
    expected = Expected(
        tokenizer_digest=policy["tokenizer_digest"],
        template_digest=policy["template_digest"],
        policy_version=policy["version"],
        max_policy_lag=settings.max_policy_lag,
        min_groups=settings.min_groups,
        evaluation_prompts=frozenset(prompts),
    )
    inputs = {
        "root": sealed.root,
        "policy": policy["version"],
        "tokenizer": policy["tokenizer_digest"],
        "settings": settings.model_dump(mode="json"),
        "prompts": digest_json(sorted(prompts)),
    }

    def work(key: str) -> dict[str, Any]:
        return validate_dataset(context.workspace, context.ledger, sealed, expected).to_payload()

    def stands(outputs: Mapping[str, Any]) -> bool:
        newest = context.ledger.last("dataset.validated", sealed.root)
        return newest is not None and newest.payload == outputs and intact(context, outputs["evidence"])

    outputs, _ = once(context.ledger, "validate", inputs, work, stands)
    return outputs


def identity(agent: Mapping[str, Any]) -> BehaviourIdentity:
    """Return what rollouts write into every row about the agent that acts."""
    from tasks.rollout.rollout import BehaviourIdentity

    return BehaviourIdentity(
        f"agent/{agent['version']}", agent["digest"], agent["tokenizer_digest"], agent["template_digest"]
    )


def waiting_groups(context: Context) -> int:
    """Return how many groups wait to be sealed, those of a seal that was cut short included."""
    from tasks.replay import segments

    return len(segments.waiting_groups(context.workspace, context.settings.replay.dataset))


def unsealed_rows(context: Context, dataset: str) -> Iterator[dict[str, Any]]:
    """Yield the episodes of `dataset` that wait to be sealed; a segment that a seal takes away meanwhile is left out."""
    from tasks.replay.segments import open_folder

    try:
        yield from _open_rows(open_folder(context.workspace, dataset))
    except FileNotFoundError:
        return


def _open_rows(folder: Path) -> Iterator[dict[str, Any]]:
    from tasks.replay.segments import read_line, scan

    for path in sorted(folder.glob("*.jsonl")):
        for group in scan(path).require_intact().groups:
            yield from (read_line(line) for line in group)


def _mean(rewards: Mapping[str, Sequence[float]]) -> float:
    values = [value for group in rewards.values() for value in group]
    return sum(values) / max(len(values), 1)
