"""Agents: registered, promoted, rolled back, approved, verified."""

from __future__ import annotations

import getpass
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows import keys, progress
from flows.context import Context
from tasks.core.digest import digest_files
from tasks.core.errors import NotFound
from tasks.core.ledger import Entry


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
    context.ledger.append(
        "agent.registered",
        f"agent/{registered.version}",
        {
            "version": registered.version,
            "digest": digest,
            "files": dict(files),
            "origin": origin,
            "path": context.workspace.relative(folder),
            "mlflow": {
                "model_id": registered.model_id,
                "run_id": registered.run_id,
                "version": registered.version,
            },
            "parents": dict(parents),
            "tokenizer_digest": tokenizer,
            "template_digest": template,
            "source": dict(source),
        },
    )
    return int(registered.version)


def promote_agent(context: Context, version: str, reason: str) -> dict[str, Any]:
    """Promote an agent by its newest decision, after its signature was verified and its files were hashed.

    Raises:
        NotFound: nothing was decided about it.
        Conflict, Refused, Corrupt: see `tasks.promotion.promote.promote`.
    """
    from tasks.promotion.attest import read_signature
    from tasks.promotion.promote import promote

    made = _newest_decision(context, version)
    trust = keys.ready(context)  # before anything has changed
    context.weights(context.agent(made.subject).payload)  # months may lie between decision and approval
    entry = promote(
        context.ledger,
        context.registry,
        made.payload["candidate"]["version"],
        decision=made.payload["decision"],
        signature=read_signature(context.workspace.root, made.payload),
        trust=trust,
        expected_champion=made.payload["champion"]["version"],
        by=getpass.getuser(),
        reason=reason,
    )
    return _change(context, entry)


def approve_agent(context: Context, version: str, reason: str, key: str | None = None) -> dict[str, Any]:
    """Record a person's approval of the newest decision about an agent, signed with their own key."""
    from tasks.promotion.attest import read_signature
    from tasks.promotion.promote import approve

    made = _newest_decision(context, version)
    trust = keys.trust(context)
    signer = keys.approver_key(context, key)
    signature = read_signature(context.workspace.root, made.payload)
    entry = approve(
        context.ledger, made.payload["decision"], signature=signature, key=signer, trust=trust, reason=reason
    )
    return {"approved": made.subject, **entry.payload}


def reject_agent(context: Context, version: str, reason: str, key: str | None = None) -> dict[str, Any]:
    """Record that a person does not let the newest decision about an agent act, signed with their own key."""
    from tasks.promotion.promote import reject

    made = _newest_decision(context, version)
    trust, signer = keys.trust(context), keys.approver_key(context, key)
    entry = reject(context.ledger, made.payload["decision"], key=signer, trust=trust, reason=reason)
    return {"rejected": made.subject, **entry.payload}


def rollback_champion(context: Context, reason: str) -> dict[str, Any]:
    """Put the previous champion back."""
    from tasks.promotion.promote import champion, rollback

    keys.ready(context)
    settle(context)
    now = champion(context.ledger)
    if now is None:
        raise NotFound("There is no champion to roll back from.")
    entry = rollback(
        context.ledger, context.registry, expected_champion=now, reason=reason, by=getpass.getuser()
    )
    return _change(context, entry)


def settle(context: Context) -> None:
    """Finish a promotion or rollback whose process died; costs one look at the ledger where there is none."""
    from tasks.promotion.promote import OFFICES, reconcile, standing

    for office in OFFICES:
        if standing(context.ledger, office).intent is not None:
            reconcile(context.ledger, context.registry.for_office(office))
    keys.catch_up(context)


def reconcile_registry(context: Context) -> dict[str, Any]:
    """Make the registry's aliases say what the ledger says, and finish what a crash left open."""
    from tasks.promotion.promote import OFFICES, reconcile

    done = [
        reconcile(context.ledger, context.registry.for_office(office))
        for office in OFFICES
        if context.ledger.last(f"{office}.registered") is not None
    ]
    keys.catch_up(context)
    return {
        "finished": [
            {"kind": e.kind, "agent": e.subject, "seq": e.seq} for each in done for e in each.finished
        ],
        "repairs": [asdict(repair) for each in done for repair in each.repairs],
    }


def verify_ref(context: Context, ref: str) -> dict[str, Any]:
    """Hash every byte behind `ref` again; see `tasks.lineage.verify`."""
    from tasks.lineage.verify import verify

    with progress.current().bar("verify") as report:
        return asdict(verify(context.ledger, context.workspace, ref, report))


def _newest_decision(context: Context, version: str) -> Entry:
    subject = f"agent/{context.agent(version).payload['version']}"
    made = context.ledger.last("decision.made", subject)
    if made is None:
        raise NotFound(
            f"The gate has not decided about {subject} yet; `forebay retrain` evaluates and decides."
        )
    return made


def _change(context: Context, entry: Entry) -> dict[str, Any]:
    keys.sign_head(context, entry)
    return {"kind": entry.kind, "seq": entry.seq, **entry.payload}
