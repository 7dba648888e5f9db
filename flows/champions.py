"""Agents: registered, promoted, rolled back, approved, verified."""

from __future__ import annotations

import getpass
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flows import keys, progress
from flows.context import Context
from flows.registry import enter, restore, settle
from flows.reproduce import remember
from flows.reward_office import newest_reward_decision, promote_by_decision
from flows.scoring import require_consent, require_unflagged, require_valid_reward
from flows.service import start_canary
from tasks.core.digest import digest_files
from tasks.core.errors import ForebayError, NotFound
from tasks.core.ledger import Entry

if TYPE_CHECKING:
    from tasks.lineage.stores import Store
    from tasks.promotion.attest import Answer

Source = Literal["remote", "mlflow"]
"""Where to read files instead of in the workspace."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


def register_agent(
    context: Context,
    folder: Path,
    files: Mapping[str, str],
    *,
    origin: str,
    parents: Mapping[str, Any],
    source: Mapping[str, Any],
    metrics: Mapping[str, float],
    tokenizer: str,
    template: str,
    run_id: str | None = None,
    dataset: Any = None,
) -> int:
    """Register the model in `folder` with MLflow and in the ledger; the same files give the same version.

    Returns:
        The version: a whole number from 1.

    Raises:
        Refused: a file can run code when it is loaded.
    """
    from tasks.promotion.inert import require_inert

    require_inert(folder, files)
    digest = digest_files(files)
    for entry in context.ledger.entries("agent.registered"):
        if entry.payload["digest"] == digest:
            return int(entry.payload["version"])
    registered = context.registry.register(
        folder, digest, run_id=run_id, metrics=metrics, tags={"forebay.origin": origin}, dataset=dataset
    )
    payload = {
        "digest": digest,
        "files": dict(files),
        "origin": origin,
        "path": context.workspace.relative(folder),
        "parents": dict(parents),
        "tokenizer_digest": tokenizer,
        "template_digest": template,
        "source": dict(source),
    }
    version = int(enter(context, "agent", registered, payload).payload["version"])
    with suppress(ForebayError):  # a branch that is checked out, say: the next one brings this one along
        remember(context)
    return version


def promote_agent(context: Context, version: str, reason: str) -> dict[str, Any]:
    """Promote an agent, or a reward model, by its newest decision: its signature verified, its files hashed.

    Raises:
        NotFound: nothing was decided about it.
        Conflict, Refused, Corrupt: see `tasks.promotion.promote.promote`.
    """
    return _promote(context, _newest_decision(context, version), reason)


def _promote(context: Context, made: Entry, reason: str) -> dict[str, Any]:
    from tasks.promotion.attest import read_signature
    from tasks.promotion.promote import promote

    if made.subject.startswith("reward/"):
        return promote_by_decision(context, made, reason)
    trust = keys.ready(context)  # before anything has changed
    dataset = context.agent(made.subject).payload["parents"].get("dataset")
    if dataset:
        require_valid_reward(context, dataset)
    revision = require_unflagged(context, made.subject)
    context.weights(context.agent(made.subject).payload)  # months may lie between decision and approval
    entry = promote(
        context.ledger,
        context.registry,
        made.payload["candidate"]["version"],
        decision=made.payload["decision"],
        signature=read_signature(context.workspace.root, made),
        trust=trust,
        expected_champion=made.payload["champion"]["version"],
        by=getpass.getuser(),
        reason=reason,
        revision=revision,
    )
    change = _change(context, entry)
    start_canary(context)
    return change


def says_promoted(change: Mapping[str, Any]) -> str:
    """Say a promotion in one sentence: who is in office, and who was."""
    office = str(change["subject"]).partition("/")[0]
    was = "nobody" if change["from"] is None else f"{office}/{change['from']}"
    return f"{change['subject']} is the champion (was {was})."


def approve_agent(context: Context, ref: str, reason: str, key: str | None = None) -> dict[str, Any]:
    """Record a person's approval of a decision, signed with their own key.

    Args:
        ref: an agent or a reward model, whose newest decision is meant, or the digest of a decision.
    """
    from tasks.promotion.attest import read_signature
    from tasks.promotion.promote import approve

    made = _newest_decision(context, ref)
    trust = keys.trust(context)
    signer = keys.approver_key(context, key)
    signature = read_signature(context.workspace.root, made)
    entry = approve(
        context.ledger, made.payload["decision"], signature=signature, key=signer, trust=trust, reason=reason
    )
    return {"approved": made.subject, **entry.payload}


def reject_agent(context: Context, ref: str, reason: str, key: str | None = None) -> dict[str, Any]:
    """Record that a person does not let a decision act, signed with their own key; `ref` as for `approve_agent`."""
    from tasks.promotion.promote import reject

    made = _newest_decision(context, ref)
    trust, signer = keys.trust(context), keys.approver_key(context, key)
    entry = reject(context.ledger, made.payload["decision"], key=signer, trust=trust, reason=reason)
    return {"rejected": made.subject, **entry.payload}


def statement_of(start: Path, kind: Answer, ref: str, reason: str, key: str | None = None) -> str:
    """Return a signed answer to a decision as one line of text; records nothing.

    Args:
        start: where a workspace is, if there is one; the whole digest of a decision and a key need none.
    """
    from tasks.promotion.attest import make_statement

    if _DIGEST.fullmatch(ref):
        return make_statement(kind, ref, reason, keys.own_key(key))
    context = Context.open(start)
    made = _newest_decision(context, ref)
    return make_statement(kind, made.payload["decision"], reason, keys.approver_key(context, key))


def answer_decision(context: Context, line: str) -> dict[str, Any]:
    """Verify a signed answer that came from elsewhere, record it, and promote if it lets a passed decision act.

    Raises:
        UsageError, Corrupt, Refused, Conflict, NotFound: as `read_statement`, `record_answer` and `promote_agent`.
    """
    from tasks.promotion.attest import read_signature, read_statement
    from tasks.promotion.promote import record_answer

    trust = keys.trust(context)
    kind, payload = read_statement(line, trust)
    made = _newest_decision(context, payload["decision"])
    signature = read_signature(context.workspace.root, made)
    entry = record_answer(context.ledger, kind, payload, signature=signature, trust=trust)
    result = {"answer": kind, "agent": made.subject, **entry.payload, "promoted": None}
    if kind == "approval":
        result["promoted"] = _promote(context, made, f"approved by {payload['by']}: {payload['reason']}")
    return result


def rollback_champion(context: Context, reason: str, flagged: bool = False) -> dict[str, Any]:
    """Put the previous champion back, its bytes verified first; `seconds` is how long it took.

    Args:
        flagged: also one that learnt from revoked data, where the policy keeps such from office.

    Raises:
        NotFound: there is none to go back from, or to. Refused: it is flagged.
    """
    from tasks.promotion.promote import rollback, standing

    started = time.perf_counter()
    keys.ready(context)
    settle(context)
    now = standing(context.ledger)
    if now.champion is None:
        raise NotFound("There is no champion to roll back from.")
    flag = ""
    if now.previous is not None:
        flag = require_consent(context, f"agent/{now.previous}", flagged)
        restore(context, context.registry, now.previous)
    entry = rollback(
        context.ledger,
        context.registry,
        expected_champion=now.champion,
        reason=reason,
        by=getpass.getuser(),
        flag=flag,
    )
    return {**_change(context, entry), "seconds": round(time.perf_counter() - started, 3)}


def verify_ref(
    context: Context, ref: str, *, full: bool = False, sources: Sequence[Source] = ()
) -> dict[str, Any]:
    """Verify everything behind `ref`; see `tasks.lineage.verify`.

    Args:
        full: read every byte again. Else a file is taken for unchanged whose stat is that of its last hashing.
        sources: "remote": shards are read in the DVC remote. "mlflow": agents are read in MLflow's artifact store.
            The rest is read in the workspace.

    Returns:
        The report, and its problems a second time in `by_problem`, sorted into their kinds.
    """
    from tasks.lineage.verify import DigestCache, verify

    cache = None if full else DigestCache(context.workspace.digests)
    with progress.current().bar("verify") as report:
        found = verify(
            context.ledger, context.workspace, ref, report, cache=cache, stores=_stores(context, sources)
        )
    kinds = {word: [asdict(problem) for problem in problems] for word, problems in found.by_kind().items()}
    return {**asdict(found), "full": full, "sources": list(sources), "by_problem": kinds}


def _stores(context: Context, sources: Sequence[Source]) -> list[Store]:
    from tasks.lineage.stores import RemoteStore, ServedStore
    from tasks.replay.dvc_store import remote

    made: dict[Source, Callable[[], Store]] = {
        "remote": lambda: RemoteStore(remote(context.workspace)),
        "mlflow": lambda: ServedStore(context.registry),
    }
    return [made[source]() for source in dict.fromkeys(sources)]


def _newest_decision(context: Context, ref: str) -> Entry:
    """Return the newest decision about an agent or `reward/N`, or the one of this digest (at least eight digits)."""
    if re.fullmatch(r"[0-9a-f]{8,64}", ref) and not ref.isdecimal():
        found = [e for e in context.ledger.entries("decision.made") if e.payload["decision"].startswith(ref)]
        if len({e.payload["decision"] for e in found}) == 1:
            return found[-1]
        raise NotFound(
            f"The ledger knows {'several decisions' if found else 'no decision'} {ref[:12]}…; `forebay decision list` "
            "shows all."
        )
    if ref.startswith(("reward/", "reward@")):
        return newest_reward_decision(context, ref)
    subject = f"agent/{context.agent(ref).payload['version']}"
    made = context.ledger.last("decision.made", subject)
    if made is None:
        raise NotFound(
            f"The gate has not decided about {subject} yet; `forebay retrain` evaluates and decides."
        )
    return made


def _change(context: Context, entry: Entry) -> dict[str, Any]:
    keys.sign_head(context, entry)
    return {"kind": entry.kind, "seq": entry.seq, "subject": entry.subject, **entry.payload}
