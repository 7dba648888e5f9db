"""Agents: registered, promoted, rolled back, approved, verified."""

from __future__ import annotations

import getpass
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows import progress
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
    """
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
    """Promote an agent by its newest decision.

    Raises:
        NotFound: nothing was decided about it.
        Conflict, Refused: see `tasks.promotion.promote.promote`.
    """
    from tasks.promotion.promote import promote

    subject = f"agent/{context.agent(version).payload['version']}"
    made = context.ledger.last("decision.made", subject)
    if made is None:
        raise NotFound(
            f"The gate has not decided about {subject} yet; `forebay retrain` evaluates and decides."
        )
    context.weights(context.agent(subject).payload)  # months may lie between the decision and an approval
    entry = promote(
        context.ledger,
        context.registry,
        made.payload["candidate"]["version"],
        decision=made.payload["decision"],
        expected_champion=made.payload["champion"]["version"],
        by=getpass.getuser(),
        reason=reason,
    )
    return _change(entry)


def approve_agent(context: Context, version: str, reason: str) -> dict[str, Any]:
    """Record a person's approval of the newest decision about an agent."""
    from tasks.promotion.promote import approve

    subject = f"agent/{context.agent(version).payload['version']}"
    made = context.ledger.last("decision.made", subject)
    if made is None:
        raise NotFound(f"The gate has not decided about {subject} yet; there is nothing to approve.")
    entry = approve(context.ledger, made.payload["decision"], by=getpass.getuser(), reason=reason)
    return {"approved": subject, **entry.payload}


def rollback_champion(context: Context, reason: str) -> dict[str, Any]:
    """Put the previous champion back."""
    from tasks.promotion.promote import champion, rollback

    settle(context)
    now = champion(context.ledger)
    if now is None:
        raise NotFound("There is no champion to roll back from.")
    entry = rollback(
        context.ledger, context.registry, expected_champion=now, reason=reason, by=getpass.getuser()
    )
    return _change(entry)


def settle(context: Context) -> None:
    """Finish a promotion or rollback whose process died; costs one look at the ledger where there is none."""
    from tasks.promotion.promote import reconcile, standing

    if standing(context.ledger).intent is not None:
        reconcile(context.ledger, context.registry)


def reconcile_registry(context: Context) -> dict[str, Any]:
    """Make the registry's aliases say what the ledger says, and finish what a crash left open."""
    from tasks.promotion.promote import reconcile

    done = reconcile(context.ledger, context.registry)
    return {
        "finished": [{"kind": e.kind, "agent": e.subject, "seq": e.seq} for e in done.finished],
        "repairs": [asdict(repair) for repair in done.repairs],
    }


def verify_ref(context: Context, ref: str) -> dict[str, Any]:
    """Hash every byte behind `ref` again; see `tasks.lineage.verify`."""
    from tasks.lineage.verify import verify

    with progress.current().bar("verify") as report:
        return asdict(verify(context.ledger, context.workspace, ref, report))


def _change(entry: Entry) -> dict[str, Any]:
    return {"kind": entry.kind, "seq": entry.seq, **entry.payload}
