"""Give a dataset the rewards of a registered source, and refuse what rests on a reward model that nobody trusts."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from flows import progress
from flows.context import Context
from flows.rewards import (
    REGISTERED,
    Decoder,
    episodes,
    newest_verdict,
    open_source,
    registered_digests,
    reward,
    verified,
)
from tasks.core.digest import canonical_json
from tasks.core.errors import Conflict, Corrupt, NotFound, Refused, UsageError

if TYPE_CHECKING:
    from tasks.core.ledger import Ledger, LedgerView
    from tasks.lineage.revocation import Revoked
    from tasks.replay.schema import Episode
    from tasks.reward.source import Answer, RewardSource

SCORED, SCORING = "dataset.scored", "dataset.scoring"
VALIDATED = "reward.validated"
_NATS = ("head", "classifier")
_BATCH = 256  # answers scored at once; a group is never divided


def score_dataset(context: Context, ref: str, dataset: str, into: str) -> dict[str, Any]:
    """Write the episodes of a sealed dataset, rewarded anew, into an open segment of the dataset `into`.

    Everything but the reward stays: ids, tokens, log-probabilities. What a verifier said is kept among the
    components as `before`, the raw score as `score`; `reward_digest` names the source. Groups that `into` has already are
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
    models = registered_digests(context)
    if waiting:
        _claim(context, into, entry.subject, registered["digest"], sealed.root)
    before: list[float] = []
    after: list[float] = []
    with (
        progress.current().bar("score") as report,
        SegmentWriter(open_folder(context.workspace, into), f"score-{registered['digest'][:12]}") as writer,
    ):
        done = 0
        for part in _batches(waiting):
            rows = [row for group in part for row in group]
            made = iter(rescored(rows, source, decode, models))
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


def rescored(
    rows: Sequence[Episode], source: RewardSource, decode: Any, models: Set[str] = frozenset()
) -> list[Episode]:
    """Return copies of `rows` with the rewards of `source`; see `score_dataset`.

    Args:
        models: digests of the registered sources; of rewards that one of them gave, what a verifier said is kept.

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
        components = {**json.loads(row.reward_components), "before": verified(row, models), "score": score}
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


def resting_on(context: Context, root: str) -> dict[str, Any] | None:
    """Return the ledger payload of the registered reward model that a dataset version rests on, None for none.

    Raises:
        Refused: it holds rewards of several, whose scales differ.
    """
    from tasks.replay.seal import find, read_rows

    registered = {e.payload["digest"]: dict(e.payload) for e in context.ledger.entries(REGISTERED)}
    if not registered:
        return None
    table = read_rows(context.workspace, find(context.ledger, root).manifest, columns=["reward_digest"])
    named = set(table["reward_digest"].unique().to_pylist())
    found = [registered[digest] for digest in sorted(named & registered.keys())]
    if len(found) > 1:
        names = ", ".join(f"reward/{model['version']}" for model in found)
        raise Refused(f"The dataset {root[:12]} holds rewards of {names}; score it anew with one of them.")
    return found[0] if found else None


def require_valid_reward(context: Context, root: str) -> None:
    """Veto: what rests on a reward model needs its newest verdict to be PASS and not expired.

    Args:
        root: of the dataset version.

    Raises:
        Refused: the model was never validated, did not pass, or its verdict has expired; it is named.
        NotFound, Corrupt: the report of its newest validation is missing or was changed.
    """
    model = resting_on(context, root)
    if model is None:
        return
    name = f"reward/{model['version']}"
    rests = f"The dataset {root[:12]} rests on {name}"
    told = newest_verdict(context, model["digest"])
    if told is None:
        raise Refused(f"{rests}, which nobody has validated; run `forebay reward validate {name}`.")
    verdict, says = _judged_again(context, told)
    if verdict != "PASS":
        raise Refused(f"{rests}, whose validation says {verdict}: {says}")
    reason = expiry(context, told)
    if reason:
        raise Refused(f"{rests}, whose verdict has expired: {reason}.")
    failed = standing_fail(context, told)
    if failed:
        raise Refused(f"{rests}, which {failed}. Validate it on newer data, or train another.")


def standing_fail(context: Context, told: Mapping[str, Any]) -> str | None:
    """Return how a reward model failed another validation than `told`, where `told` does not lift that; else None.

    Each report is judged again under the present policy. A FAIL stands until the model passes on newer data: asking
    again, with another seed or on an older dataset, does not lift it.

    Args:
        told: payload of a `reward.validated`, the newest as a rule.
    """
    for entry in context.ledger.entries(VALIDATED, told["digest"]):
        other = entry.payload
        if other == told or _newer(context, told, other):
            continue
        try:
            verdict, says = _judged_again(context, other)
        except (NotFound, Corrupt, Refused):  # its report is gone, or another version wrote it
            verdict, says = other["verdict"], " ".join(other["reasons"])
        if verdict == "FAIL":
            return f"failed on data no older than that of its newest validation: {says.rstrip('.')}"
    return None


def require_unflagged(context: Context, subject: str) -> int:
    """Veto: what learnt from revoked data, itself or through others, is not put in office where the policy says so.

    Args:
        subject: agent/3 or reward/2.

    Returns:
        The ledger entry of the newest revocation that was looked at, for the promotion's compare-and-set.

    Raises:
        Refused: it did, and how.
    """
    from tasks.lineage.revocation import revoked

    now = revoked(context.ledger, context.workspace)
    why = _flag(context, subject, now)
    if why and context.policy.revocation.block_promotion:
        raise Refused(
            f"{subject} {why}; the policy keeps it from office. `forebay revoke --list` says what is revoked and what to "
            "train anew."
        )
    return now.revision


def flag_of(context: Context, subject: str) -> str:
    """Return how an agent or a reward model learnt from what is revoked now, "" where it did not."""
    from tasks.lineage.revocation import revoked

    return _flag(context, subject, revoked(context.ledger, context.workspace))


def require_consent(context: Context, subject: str, flagged: bool) -> str:
    """Return the flag of who is to be put back in office by a rollback, "" for none.

    Args:
        flagged: the person who asks knows of flags, and wants it all the same.

    Raises:
        Refused: it is flagged, the policy keeps such from office, and nobody has said that they want it.
    """
    why = flag_of(context, subject)
    if why and context.policy.revocation.block_promotion and not flagged:
        raise Refused(
            f"{subject} {why}; the policy keeps it from office. Roll back with --flagged if what is in office is worse, and "
            "train anew by the plan of `forebay revoke --list`."
        )
    return why


def _flag(context: Context, subject: str, now: Revoked) -> str:
    from tasks.lineage.flagged import descendants_of

    flags = descendants_of(context.ledger, context.workspace, now)
    return next((flag.why for flag in flags if flag.ref == subject), "")


def _judged_again(context: Context, told: Mapping[str, Any]) -> tuple[str, str]:
    """Return (verdict, its sentences) of a recorded validation, by its report and the present policy."""
    from tasks.promotion.evidence.item import read_json
    from tasks.reward.checks import judge_report, reasons

    file = told["evidence"]
    report = read_json(context.workspace.root / file["path"], file["sha256"])
    if report["source"]["digest"] != told["digest"]:
        raise Corrupt(f"{file['path']} is about another reward model than {told['digest'][:12]}.")
    verdict, checks = judge_report(report, context.policy.reward_model)
    return verdict, " ".join(reasons(verdict, checks))


def _newer(context: Context, told: Mapping[str, Any], earlier: Mapping[str, Any]) -> bool:
    """Tell whether a validation's dataset was first sealed after that of an earlier one, of no older policy."""
    sealings = reversed(context.ledger.entries("dataset.sealed"))  # the same data again is no newer
    sealed = {entry.payload["root"]: entry.seq for entry in sealings}
    policies = [(each["policy"] or {"version": 0})["version"] for each in (told, earlier)]
    return sealed.get(told["dataset"], 0) > sealed.get(earlier["dataset"], 0) and policies[0] >= policies[1]


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
    _require_no_other(context.ledger, into, digest)
    started = newest(context.ledger, into) is not None or waiting_groups(context.workspace, into)
    if started and not scored and not _left_by(context, into, digest):
        raise Conflict(f"The dataset {into} holds episodes that were not scored so; choose another --into.")


def _require_no_other(ledger: Ledger | LedgerView, into: str, digest: str) -> None:
    entries = [e for kind in (SCORED, SCORING) for e in ledger.entries(kind, f"dataset:{into}")]
    others = sorted({e.payload["reward"] for e in entries if e.payload["digest"] != digest})
    if others:
        raise Conflict(f"The dataset {into} holds rewards of {', '.join(others)}; choose another --into.")


def _claim(context: Context, into: str, name: str, digest: str, root: str) -> None:
    """Record before the first write that `into` is this source's: of two that begin at once, one is refused."""
    context.ledger.append(
        SCORING,
        f"dataset:{into}",
        {"reward": name, "digest": digest, "root": root},
        lambda view: _require_no_other(view, into, digest),
    )


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
