"""Give a dataset the rewards of a registered source, and refuse what rests on a reward model that nobody trusts."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from flows import progress
from flows.context import Context
from flows.rewards import REGISTERED, Decoder, episodes, newest_verdict, open_source, reward
from tasks.core.digest import canonical_json
from tasks.core.errors import Conflict, Refused, UsageError

if TYPE_CHECKING:
    from tasks.replay.schema import Episode
    from tasks.reward.source import Answer, RewardSource

SCORED = "dataset.scored"
_NATS = ("head", "classifier")
_BATCH = 256  # answers scored at once; a group is never divided


def score_dataset(context: Context, ref: str, dataset: str, into: str) -> dict[str, Any]:
    """Write the episodes of a sealed dataset, rewarded anew, into an open segment of the dataset `into`.

    Everything but the reward stays: ids, tokens, log-probabilities. The old reward is kept among the components
    as `before`, the raw score as `score`; `reward_digest` names the source. Groups that `into` has already are
    passed over, so that a run that was cut short goes on. Seal it afterwards.

    Args:
        ref: reward/N or reward@champion.
        dataset: main, main/v3, or a root.
        into: the name of another dataset, which holds rewards of this source only.

    Returns:
        {reward, digest, from, root, into, groups, episodes, passed_over, before, after}; the last two are mean rewards.

    Raises:
        NotFound: there is no such source or dataset. UsageError: `into` is the dataset itself, or no name.
        Conflict: `into` holds other rewards. Refused: the source gives something that is no reward.
    """
    from tasks.core.settings import Replay, build_section
    from tasks.replay.seal import find, known_groups
    from tasks.replay.segments import SegmentWriter, open_folder

    entry = reward(context, ref)
    registered = entry.payload
    sealed = find(context.ledger, dataset)
    build_section(Replay, {"dataset": into}, "--into")
    if into == sealed.manifest.name:
        raise UsageError(
            f"Rewards of {sealed.manifest.subject} go into another dataset; choose another --into."
        )
    _require_alone(context, into, registered["digest"])
    decode = Decoder(context, "champion")
    groups: dict[str, list[Episode]] = defaultdict(list)
    for episode in episodes(context, {"root": sealed.root}):
        groups[episode.group_id].append(decode.checked(episode))
    known = known_groups(context.workspace, context.ledger, into)
    waiting = [
        sorted(rows, key=lambda e: e.sample_index) for name, rows in groups.items() if name not in known
    ]
    source = open_source(context, registered, tasks_for(context, registered, waiting))
    before: list[float] = []
    after: list[float] = []
    with (
        progress.current().bar("score") as report,
        SegmentWriter(open_folder(context.workspace, into), f"score-{registered['digest'][:12]}") as writer,
    ):
        done = 0
        for part in _batches(waiting):
            rows = [row for group in part for row in group]
            made = iter(rescored(rows, source, decode))
            for group in part:
                new = [next(made) for _ in group]
                writer.append(new)
                before += [row.reward for row in group]
                after += [row.reward for row in new]
            done += len(part)
            report(done, len(waiting), f"mean reward {sum(after) / len(after):.3f}")
    outputs = {
        "reward": entry.subject,
        "digest": registered["digest"],
        "from": sealed.manifest.subject,
        "root": sealed.root,
        "into": into,
        "groups": len(waiting),
        "episodes": len(after),
        "passed_over": len(groups) - len(waiting),
        "before": _mean(before),
        "after": _mean(after),
    }
    if waiting:
        context.ledger.append(SCORED, f"dataset:{into}", outputs)
    return outputs


def rescored(rows: Sequence[Episode], source: RewardSource, decode: Any) -> list[Episode]:
    """Return copies of `rows` with the rewards of `source`; see `score_dataset`.

    Raises:
        Refused: a score is not a finite number.
    """
    found: list[Episode] = []
    for row, score in zip(rows, source.score([answer(row, decode) for row in rows]), strict=True):
        if not math.isfinite(score):
            raise Refused(
                f"The reward source {source.digest[:12]}… gave {score} to episode {row.episode_id}; nothing is kept."
            )
        value = _sigmoid(score) if source.kind in _NATS else score
        components = {**json.loads(row.reward_components), "before": row.reward, "score": score}
        found.append(
            replace(
                row,
                reward=value,
                reward_components=canonical_json(components).decode(),
                reward_digest=source.digest,
            )
        )
    return found


def answer(episode: Episode, decode: Any) -> Answer:
    """Return what a reward source reads of an episode."""
    from tasks.reward.source import Answer

    return Answer(decode(episode.prompt_ids), episode.response_text)


def resting_on(context: Context, root: str) -> list[dict[str, Any]]:
    """Return the registered reward models that gave rewards in a dataset version, as their ledger payloads."""
    from tasks.replay.seal import find, read_rows

    registered = {e.payload["digest"]: dict(e.payload) for e in context.ledger.entries(REGISTERED)}
    if not registered:
        return []
    table = read_rows(context.workspace, find(context.ledger, root).manifest, columns=["reward_digest"])
    named = set(table["reward_digest"].unique().to_pylist())
    return [registered[digest] for digest in sorted(named & registered.keys())]


def require_valid_reward(context: Context, root: str) -> None:
    """Veto: what rests on a reward model needs its newest verdict to be PASS and not expired.

    Args:
        root: of the dataset version.

    Raises:
        Refused: a model was never validated, did not pass, or its verdict has expired; it is named.
    """
    for model in resting_on(context, root):
        name = f"reward/{model['version']}"
        verdict = newest_verdict(context, model["digest"])
        rests = f"The dataset {root[:12]} rests on {name}"
        if verdict is None:
            raise Refused(f"{rests}, which nobody has validated; run `forebay reward validate {name}`.")
        if verdict["verdict"] != "PASS":
            raise Refused(
                f"{rests}, whose validation says {verdict['verdict']}: {'; '.join(verdict['reasons'])}."
            )
        reason = expiry(context, verdict)
        if reason:
            raise Refused(f"{rests}, whose verdict has expired: {reason}.")


def expiry(context: Context, verdict: Mapping[str, Any]) -> str | None:
    """Return why a recorded verdict holds no more under the present champion and policy, or None."""
    from tasks.reward.expiry import expired

    champion = context.agent("champion").payload["version"]
    return expired(verdict, datetime.now(UTC), champion, context.policy.reward_model)


def _require_alone(context: Context, into: str, digest: str) -> None:
    """A dataset of rewards from two sources would teach the difference of their scales."""
    from tasks.replay.seal import newest
    from tasks.replay.segments import waiting_groups

    scored = context.ledger.entries(SCORED, f"dataset:{into}")
    others = sorted({e.payload["reward"] for e in scored if e.payload["digest"] != digest})
    if others:
        raise Conflict(f"The dataset {into} holds rewards of {', '.join(others)}; choose another --into.")
    started = newest(context.ledger, into) is not None or waiting_groups(context.workspace, into)
    if started and not scored and not _left_by(context, into, digest):
        raise Conflict(f"The dataset {into} holds episodes that were not scored so; choose another --into.")


def _left_by(context: Context, into: str, digest: str) -> bool:
    """Tell whether all that waits in `into` was written by a run of this source that was cut short."""
    from tasks.replay.seal import newest
    from tasks.replay.segments import open_folder

    files = list(open_folder(context.workspace, into).glob("*.jsonl"))
    ours = all(file.name.startswith(f"score-{digest[:12]}.") for file in files)
    return newest(context.ledger, into) is None and ours


def tasks_for(context: Context, registered: Mapping[str, Any], groups: Sequence[Sequence[Episode]]) -> Any:
    """Return the tasks that an environment's verifier is asked about, None for every other source."""
    from tasks.reward.folder import read_about
    from tasks.reward.verifier import tasks_of

    if registered["kind"] != "verifier":
        return None
    name = read_about(context.workspace.root / registered["path"])["settings"]["name"]
    if ":" in name:
        return None
    odd = next((group[0] for group in groups if group[0].env != name), None)
    if odd is not None:
        raise Refused(f"The verifier of {name} cannot judge episodes of {odd.env}.")
    return tasks_of(name, ((group[0].task_id, group[0].seed, group[0].split) for group in groups))


def _batches(groups: Sequence[list[Episode]]) -> list[list[list[Episode]]]:
    parts: list[list[list[Episode]]] = []
    size = _BATCH
    for group in groups:
        if size + len(group) > _BATCH:
            parts.append([])
            size = 0
        parts[-1].append(group)
        size += len(group)
    return parts


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
