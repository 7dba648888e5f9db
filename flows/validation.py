"""Validate a registered reward source on a sealed dataset: on prompts it has not seen, answered by the present policy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from flows import progress
from flows.context import Context
from flows.experience import intact
from flows.judging import heldout_tasks
from flows.rewards import (
    REGISTERED,
    Decoder,
    episodes,
    heldout,
    newest_verdict,
    open_source,
    read_set,
    replay_set,
    reward,
    split_of,
)
from tasks.core.digest import digest_json, sha256_bytes
from tasks.core.errors import Refused
from tasks.core.stages import once

if TYPE_CHECKING:
    from tasks.replay.schema import Episode
    from tasks.reward.source import Preference
    from tasks.reward.validation import Sample, Training

VALIDATED = "reward.validated"
_MOST_PROMPTS = 256  # of the policy's answers: enough for every bound, and scoring costs time


def validate_reward(context: Context, ref: str = "champion", dataset: str | None = None) -> dict[str, Any]:
    """Validate reward/N, reward@champion, … on a sealed dataset; see `validate_registered`.

    Args:
        dataset: main, main/v3 or the start of a root; the newest of the workspace by default.

    Raises:
        NotFound: there is no such reward model or dataset.
    """
    from flows.cycle import sealed_payload

    sealed = sealed_payload(context, dataset or context.settings.replay.dataset)
    return validate_registered(context, reward(context, ref).payload, sealed)


def validate_registered(
    context: Context, registered: Mapping[str, Any], dataset: Mapping[str, Any]
) -> dict[str, Any]:
    """Validate a registered source and record the verdict; the same question within its time finds the answer.

    Preferences are the held-out ones: of the dataset, or of the imported set that the source was trained on.
    Samples are the newest policy's answers in the dataset, to prompts that the source was not trained on; their gold
    is what a verifier gave, also where the dataset's rewards are a reward model's.

    Args:
        registered: payload of `reward.registered`.
        dataset: payload of `dataset.sealed`.

    Returns:
        The payload of `reward.validated`.
    """
    preferences = replay_set(context, dataset)
    evaluation = frozenset(
        sha256_bytes(task.prompt.encode()) for tasks in heldout_tasks(context).values() for task in tasks
    )
    rule = context.policy.reward_model
    inputs = {
        "reward": registered["digest"],
        "dataset": dataset["root"],
        "preferences": preferences["digest"],
        "evaluation": digest_json(sorted(evaluation)),
        "policy": rule.model_dump(mode="json"),
    }

    def work(key: str) -> dict[str, Any]:
        from tasks.reward.validation import Material, Training, validate_source

        with progress.current().bar("validate reward") as report:
            report(0, 1, "the policy's answers, edits and probes")
            folder = context.workspace.root / registered["path"]
            source = open_source(context, registered)
            training = Training.of(source, folder)
            samples, policy = _samples(context, dataset, training)
            outputs = validate_source(
                source,
                Material(
                    _unseen(context, registered, preferences), samples, evaluation, policy, dataset["root"]
                ),
                rule,
                context.workspace,
                training=training,
                time=datetime.now(UTC).isoformat(),
                path=folder,
            )
            report(1, 1, outputs["verdict"])
        context.ledger.append(VALIDATED, outputs["digest"], outputs)
        return outputs

    def stands(outputs: Mapping[str, Any]) -> bool:
        newest = newest_verdict(context, registered["digest"])
        return newest == outputs and intact(context, outputs["evidence"]) and expiry(context, outputs) is None

    outputs, _ = once(context.ledger, "validate reward", inputs, work, stands)
    return outputs


def expiry(context: Context, verdict: Mapping[str, Any]) -> str | None:
    """Return why a recorded verdict holds no more under the present champion and policy, or None."""
    from tasks.reward.expiry import expired

    champion = context.agent("champion").payload["version"]
    return expired(verdict, datetime.now(UTC), champion, context.policy.reward_model)


def require_pass(verdict: Mapping[str, Any]) -> None:
    """Refuse a verdict of FAIL.

    Raises:
        Refused: with the reasons.
    """
    if verdict["verdict"] == "FAIL":
        raise Refused(f"The reward model {verdict['digest'][:12]} fails: {' '.join(verdict['reasons'])}")


def _unseen(
    context: Context, registered: Mapping[str, Any], preferences: Mapping[str, Any]
) -> list[Preference]:
    """Return preferences that the source has not seen; groups are on one side of the split in every set."""
    if registered["holdout"] is None:  # nothing was trained
        return read_set(context, preferences)
    if registered["parents"]["dataset"] is None:  # trained on an imported set
        return list(heldout(context, registered))
    return list(split_of(context, preferences, registered["holdout"])[1])


def _samples(
    context: Context, dataset: Mapping[str, Any], training: Training | None
) -> tuple[list[Sample], dict[str, Any] | None]:
    """Return the newest policy's answers to prompts not trained on, and {version, digest} of that policy."""
    from tasks.reward.source import Answer
    from tasks.reward.validation import Sample

    agents = {e.payload["digest"]: int(e.payload["version"]) for e in context.ledger.entries("agent.registered")}  # fmt: skip
    rows = [row for row in episodes(context, dataset) if row.behaviour_digest in agents]
    if not rows:
        return [], None
    version, digest = max((agents[row.behaviour_digest], row.behaviour_digest) for row in rows)
    models = {e.payload["digest"] for e in context.ledger.entries(REGISTERED)}
    decode = Decoder(context, "champion")
    found: dict[str, list[Sample]] = {}
    for row in rows:
        if row.behaviour_digest != digest:
            continue
        prompt = decode(decode.checked(row).prompt_ids)
        sample = Sample(Answer(prompt, row.response_text), row.env, _verified(row, models))
        found.setdefault(sha256_bytes(prompt.encode()), []).append(sample)
    seen = training.prompts if training is not None else frozenset()
    chosen = sorted(found.keys() - seen)[:_MOST_PROMPTS]
    return [sample for prompt in chosen for sample in found[prompt]], {"version": version, "digest": digest}


def _verified(row: Episode, models: set[str]) -> float:
    """Return the reward that a verifier gave; a dataset that was scored anew keeps it among the components."""
    if row.reward_digest not in models:
        return row.reward
    return float(json.loads(row.reward_components)["before"])
