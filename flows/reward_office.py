"""Decide about a reward model and put it in office: by a signed record, and the compare-and-set of agents."""

from __future__ import annotations

import getpass
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import keys, progress
from flows.context import Context
from flows.judging import record_decision
from flows.registry import restore, settle
from flows.rewards import heldout, newest_verdict, open_source, reward
from flows.scoring import expiry, require_consent, require_unflagged, standing_fail
from tasks.core.errors import Corrupt, NotFound, Refused, UsageError

if TYPE_CHECKING:
    from tasks.core.ledger import Entry
    from tasks.reward.source import Preference


def decide_reward(context: Context, ref: str) -> dict[str, Any]:
    """Weigh a registered reward model against the champion of its office and record the decision, signed.

    Returns:
        The payload of `decision.made`, subject reward/N.

    Raises:
        NotFound: no such reward model. Refused: it is the champion already.
    """
    from tasks.evaluation.paired import Agent
    from tasks.promotion.evidence.item import FileRef
    from tasks.promotion.promote import champion
    from tasks.reward.office import NOBODY, RewardInputs, compare, decide_office, keep_comparison

    evidence = context.workspace.evidence
    entry = reward(context, ref)
    ours = entry.payload
    holder = champion(context.ledger, "reward")
    if holder == ours["version"]:
        raise Refused(f"{entry.subject} is the champion of its office already.")
    verdict = newest_verdict(context, ours["digest"])
    validation = None
    if verdict is not None:
        file = verdict["evidence"]
        place = (context.workspace.root / file["path"]).relative_to(evidence).as_posix()
        validation = FileRef(place, file["sha256"])
    comparison, theirs, problem, alone = None, NOBODY, "", ""
    try:
        source = open_source(context, ours)
    except (Corrupt, Refused) as error:
        problem = str(error).rstrip(".")
    if holder is not None:
        other = reward(context, str(holder)).payload
        theirs = Agent(holder, other["digest"])
        alone = next(filter(None, (_judges_tasks(context, side) for side in (ours, other))), "")
        if not problem and not alone:
            try:
                champion_source = open_source(context, other)
            except (NotFound, Corrupt, Refused, UsageError) as error:
                alone = f"reward/{holder} cannot be opened ({str(error).rstrip('.')})"
        unseen = [] if problem or alone else _unseen_by_both(context, ours, other)
        if unseen:
            with progress.current().bar("compare") as report:
                report(0, 1, f"{len(unseen)} comparisons, {entry.subject} and reward/{holder}")
                data = compare(source, champion_source, unseen)
                report(1, 1, "")
            comparison = keep_comparison(evidence, data)
    inputs = RewardInputs(
        Agent(int(ours["version"]), ours["digest"]),
        theirs,
        validation,
        (expiry(context, verdict) or _failed(context, verdict)) if verdict else "",
        comparison,
        problem,
        alone,
    )
    return record_decision(context, decide_office(evidence, inputs, context.policy), office="reward")


def promote_reward(context: Context, ref: str, reason: str) -> dict[str, Any]:
    """Put a reward model in office by its newest decision.

    Raises:
        NotFound: nothing was decided about it. Others: as `promote_by_decision`.
    """
    settle(context)
    return promote_by_decision(context, newest_reward_decision(context, ref), reason)


def promote_by_decision(context: Context, made: Entry, reason: str) -> dict[str, Any]:
    """Put a reward model in office by the decision `made`; the first one by the same checks as every other.

    Raises:
        Refused: the decision did not pass, is not signed, was rejected or lacks its approval.
        Conflict: the champion is another one by now.
    """
    from tasks.promotion.attest import read_signature
    from tasks.promotion.promote import promote

    trust = keys.ready(context)
    entry = reward(context, made.subject)
    open_source(context, entry.payload)  # hashes its files: months may lie between decision and office
    revision = require_unflagged(context, made.subject)
    done = promote(
        context.ledger,
        context.registry.for_office("reward"),
        entry.payload["version"],
        decision=made.payload["decision"],
        signature=read_signature(context.workspace.root, made),
        trust=trust,
        expected_champion=made.payload["champion"]["version"] or None,
        by=getpass.getuser(),
        reason=reason,
        revision=revision,
    )
    keys.sign_head(context, done)
    return {"kind": done.kind, "seq": done.seq, "subject": done.subject, **done.payload}


def rollback_reward(context: Context, reason: str, flagged: bool = False) -> dict[str, Any]:
    """Put the previous reward model back in office.

    Args:
        flagged: also one that learnt from revoked data, where the policy keeps such from office.

    Raises:
        NotFound: there is none to go back from, or to. Refused: it is flagged.
    """
    from tasks.promotion.promote import rollback, standing

    keys.ready(context)
    settle(context)
    now = standing(context.ledger, "reward")
    if now.champion is None:
        raise NotFound("There is no reward model in office to roll back from.")
    registry, by, flag = context.registry.for_office("reward"), getpass.getuser(), ""
    if now.previous is not None:
        flag = require_consent(context, f"reward/{now.previous}", flagged)
        restore(context, registry, now.previous)
    done = rollback(context.ledger, registry, expected_champion=now.champion, reason=reason, by=by, flag=flag)
    keys.sign_head(context, done)
    return {"kind": done.kind, "seq": done.seq, **done.payload}


def replay_reward_decision(context: Context, ref: str) -> dict[str, Any]:
    """Verify the signature of the newest decision about a reward model and recompute it from its evidence.

    Raises:
        NotFound, Corrupt, Refused: as for an agent's.
    """
    from tasks.promotion.attest import check_decision, read_signature
    from tasks.reward.office import recompute_office

    made = newest_reward_decision(context, ref)
    signature = read_signature(context.workspace.root, made)
    signer = check_decision(made, signature, keys.trust(context), made.seq).name
    again = recompute_office(context.workspace.root / made.payload["record"]["path"])
    return {
        "decision": again.digest,
        "verdict": again.verdict,
        "agent": made.subject,
        "signed_by": signer,
        "reasons": list(again.reasons),
    }


def newest_reward_decision(context: Context, ref: str) -> Entry:
    """Return the ledger's entry of the newest decision about a reward model.

    Raises:
        NotFound: there is none.
    """
    subject = reward(context, ref).subject
    made = context.ledger.last("decision.made", subject)
    if made is None:
        raise NotFound(
            f"The gate has not decided about {subject} yet; run `forebay reward decide {subject}`."
        )
    return made


def _failed(context: Context, verdict: Mapping[str, Any]) -> str:
    """Return why a verdict does not lift an earlier FAIL, "" where there is none that stands."""
    failed = standing_fail(context, verdict)
    return f"the model {failed}" if failed else ""


def _judges_tasks(context: Context, registered: Any) -> str:
    """Return why a source cannot score comparisons: an environment's verifier knows only tasks; "" for others."""
    from tasks.reward.folder import read_about

    if registered["kind"] != "verifier":
        return ""
    name = read_about(context.workspace.root / registered["path"])["settings"]["name"]
    return "" if ":" in name else f"the verifier of {name} judges its own tasks and no other comparison"


def _unseen_by_both(context: Context, ours: Any, theirs: Any) -> list[Preference]:
    """Return the comparisons that were held out from either, without prompts that the other was trained on."""
    from tasks.reward.folder import training_prompts
    from tasks.reward.preferences import distinct, prompt_digests

    folders = [Path(context.workspace.root / side["path"]) for side in (ours, theirs)]
    seen = training_prompts(folders[0]) | training_prompts(folders[1])
    found = distinct([*heldout(context, ours), *heldout(context, theirs)]).preferences
    return [p for p in found if not seen.intersection(prompt_digests([p]))]
