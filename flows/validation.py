"""Validate a registered reward source on a sealed dataset: on prompts it has not seen, answered by the newest policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from flows import progress
from flows.context import Context
from flows.experience import intact
from flows.judging import heldout_tasks
from flows.rewards import (
    Decoder,
    episodes,
    heldout,
    newest_verdict,
    open_source,
    registered_digests,
    reward,
    verified,
)
from flows.scoring import VALIDATED, answer, expiry, tasks_for
from tasks.core.digest import digest_json, sha256_bytes
from tasks.core.errors import Refused
from tasks.core.stages import once

if TYPE_CHECKING:
    from tasks.replay.schema import Episode
    from tasks.reward.source import Preference
    from tasks.reward.validation import Sample

_MOST_PROMPTS = 256  # of the policy's answers: enough for every bound, and scoring costs time


def validate_reward(context: Context, ref: str = "champion", dataset: str | None = None) -> dict[str, Any]:
    """Validate reward/N, reward@champion, … on a sealed dataset; see `validate_registered`.

    Args:
        dataset: main, main/v3 or the start of a root; the newest of the workspace by default.

    Raises:
        NotFound: there is no such reward model or dataset.
    """
    from flows.cycle import sealed_payload

    registered = reward(context, ref).payload
    return validate_registered(
        context, registered, sealed_payload(context, dataset or context.settings.replay.dataset)
    )


def validate_registered(
    context: Context, registered: Mapping[str, Any], dataset: Mapping[str, Any]
) -> dict[str, Any]:
    """Validate a registered source and record the verdict; the same question within its time finds the answer.

    Preferences are the held-out ones: of the dataset, or of the imported set that the source was trained on. Samples are
    the newest policy's answers in the dataset, to prompts that the source was not trained on. What is right is what
    a verifier said, also where the dataset's rewards are a reward model's.

    Args:
        registered: payload of `reward.registered`.
        dataset: payload of `dataset.sealed`.

    Returns:
        The payload of `reward.validated`.
    """
    evaluation = frozenset(
        sha256_bytes(task.prompt.encode()) for tasks in heldout_tasks(context).values() for task in tasks
    )
    rule = context.policy.reward_model
    inputs = {
        "reward": registered["digest"],
        "dataset": dataset["root"],
        "pairs_per_group": context.settings.reward.pairs_per_group,
        "seed": context.settings.seed,
        "evaluation": digest_json(sorted(evaluation)),
        "policy": rule.model_dump(mode="json"),
    }
    if context.revoked:
        inputs["revoked"] = context.revoked

    def work(key: str) -> dict[str, Any]:
        from tasks.reward.validation import Material, Training, validate_source

        rows, decode = _verified_episodes(context, registered, dataset)
        folder = context.workspace.root / registered["path"]
        source = open_source(context, registered, tasks_for(context, registered, [[row] for row in rows]))
        training = Training.of(source.kind, folder)
        samples, policy = _samples(context, rows, decode, training.prompts if training else frozenset())
        material = Material(
            _unseen(context, registered, rows, decode), samples, evaluation, policy, dataset["root"]
        )
        with progress.current().bar("validate reward") as report:
            report(0, 1, "scores of answers, edits and hacks")
            outputs = validate_source(
                source,
                material,
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


def require_no_fail(verdict: Mapping[str, Any]) -> None:
    """Refuse a verdict of FAIL.

    Raises:
        Refused: with the reasons.
    """
    if verdict["verdict"] == "FAIL":
        raise Refused(f"The reward model {verdict['digest'][:12]} fails: {' '.join(verdict['reasons'])}")


def _verified_episodes(
    context: Context, registered: Mapping[str, Any], dataset: Mapping[str, Any]
) -> tuple[list[Episode], Decoder]:
    """Return the episodes with the rewards that a verifier gave, of one environment where the source judges one."""
    from tasks.reward.folder import read_about

    models = registered_digests(context)
    decode = Decoder(context, "champion")
    env = None
    if registered["kind"] == "verifier":
        env = read_about(context.workspace.root / registered["path"])["settings"]["name"]
    rows = [
        replace(row, reward=verified(row, models))
        for row in map(decode.checked, episodes(context, dataset))
        if env is None or ":" in env or row.env == env
    ]
    return rows, decode


def _unseen(
    context: Context, registered: Mapping[str, Any], rows: Sequence[Episode], decode: Decoder
) -> Sequence[Preference]:
    """Return preferences that the source has not seen; a group is on one side of the split in every set."""
    from tasks.reward.pairs import replay_preferences
    from tasks.reward.preferences import distinct, split_preferences

    if registered["parents"]["preferences"] is not None and registered["parents"]["dataset"] is None:
        return heldout(context, registered)  # of the imported set that it was trained on
    settings = context.settings.reward
    found = distinct(
        replay_preferences(rows, decode, per_group=settings.pairs_per_group, seed=context.settings.seed)
    ).preferences
    if registered["holdout"] is None:  # nothing was trained
        return found
    return split_preferences(found, holdout=registered["holdout"]).heldout


def _samples(
    context: Context, rows: Sequence[Episode], decode: Decoder, seen: frozenset[str]
) -> tuple[list[Sample], dict[str, Any] | None]:
    """Return the newest policy's answers to prompts not in `seen`, and {version, digest} of that policy."""
    from tasks.reward.validation import Sample

    agents = {entry.payload["digest"]: int(entry.payload["version"]) for entry in context.ledger.entries("agent.registered")}  # fmt: skip
    known = [(agents[row.behaviour_digest], row.behaviour_digest) for row in rows if row.behaviour_digest in agents]  # fmt: skip
    if not known:
        return [], None
    version, digest = max(known)
    found: dict[str, list[Sample]] = {}
    for row in rows:
        if row.behaviour_digest == digest:
            asked = answer(row, decode)
            prompt = sha256_bytes(asked.prompt.encode())
            found.setdefault(prompt, []).append(Sample(asked, row.env, row.reward))
    chosen = sorted(found.keys() - seen)[:_MOST_PROMPTS]
    policy = {"version": version, "digest": digest}
    return [sample for prompt in chosen for sample in found[prompt]], policy
