"""What somebody changed in MLflow without Forebay: found, recorded, and put back or adopted as the policy says."""

from __future__ import annotations

import getpass
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from flows import keys
from flows.context import Context
from tasks.core.errors import Conflict, Corrupt, ForebayError, Unavailable
from tasks.core.ledger import Entry, LedgerView

if TYPE_CHECKING:
    from tasks.promotion.drift import Drift
    from tasks.promotion.promote import Office, Reconciled, Standing
    from tasks.promotion.registry import Registered, Registry


def enter(context: Context, office: Office, registered: Registered, payload: Mapping[str, Any]) -> Entry:
    """Write into the ledger that MLflow has a new version, under a number of Forebay's own; return the entry.

    The number is MLflow's, unless that gave out small ones anew after the registered model was deleted. The version
    says at MLflow whose it is, in the tag `forebay.agent`.

    Args:
        payload: what else the ledger keeps: `digest`, `files` and `path` at least, by which it can be put back.
    """
    ledger, kind = context.ledger, f"{office}.registered"
    while True:
        known = [entry.payload["version"] for entry in ledger.entries(kind)]
        number = max(registered.version, max(known, default=0) + 1)
        subject = f"{office}/{number}"

        def check(view: LedgerView, subject: str = subject) -> None:
            if view.last(kind, subject) is not None:
                raise Conflict(f"{subject} was registered meanwhile.")

        try:
            values = {"version": number, "mlflow": asdict(registered), **payload}
            entry = ledger.append(kind, subject, values, check)
        except Conflict:  # another process registered one in between: take the next number
            continue
        context.registry.for_office(office).tag(registered.version, {"forebay.agent": subject})
        return entry


def settle(context: Context) -> None:
    """Finish a promotion or rollback whose process died; costs one look at the ledger where there is none."""
    from tasks.promotion.promote import OFFICES, reconcile, standing

    for office in OFFICES:
        if standing(context.ledger, office).intent is not None:
            reconcile(context.ledger, context.registry.for_office(office))
    keys.catch_up(context)


def reconcile_registry(context: Context, dry_run: bool = False) -> dict[str, Any]:
    """Look for drift, record it, deal with it by the policy, and finish what a crash left open.

    Args:
        dry_run: only look; nothing is written anywhere.

    Raises:
        Corrupt: the champion cannot be put back because its files in the workspace are not what was registered.
        Unavailable: the registry cannot be reached.
    """
    from tasks.promotion.drift import look, record
    from tasks.promotion.drift import settle as settle_drift
    from tasks.promotion.promote import OFFICES, standing

    rule = context.policy.registry.on_drift
    found: list[Drift] = []
    did: list[str] = []
    done: list[Reconciled] = []
    for office in OFFICES:
        before = standing(context.ledger, office)
        if before.newest is None:
            continue
        registry = context.registry.for_office(office)
        drift = look(context.ledger, registry)
        found += drift
        if dry_run:
            continue
        if drift and record(context.ledger, drift, rule, registry.trace(), getpass.getuser()) is not None:
            _tell(context, office, drift)
        done += _settle(context, registry, drift, rule, did, before)
        if not (drift and look(context.ledger, registry)):
            settle_drift(context.ledger, office)
    if not dry_run:
        keys.catch_up(context)
    return {
        "drift": [{**asdict(drift), "says": drift.says} for drift in found],
        "policy": rule,
        "did": did,
        "finished": [
            {"kind": e.kind, "agent": e.subject, "seq": e.seq} for each in done for e in each.finished
        ],
        "repairs": [asdict(repair) for each in done for repair in each.repairs],
    }


def _settle(
    context: Context,
    registry: Registry,
    drift: Sequence[Drift],
    rule: str,
    did: list[str],
    before: Standing,
) -> list[Reconciled]:
    """Deal with the drift of one office; say in `did` what was done. `before`: how things stood before the look."""
    from tasks.promotion.promote import reconcile, standing

    now = standing(context.ledger, registry.office)
    if drift and rule == "report":
        return [reconcile(context.ledger, registry)] if now.intent is not None else []
    restored = {v for v in now.aliases().values() if v is not None} if drift else set()
    for version in sorted(restored):
        try:
            did += [line] if (line := restore(context, registry, version)) else []
        except Unavailable:
            raise
        except ForebayError as error:
            if version == now.champion:
                raise
            did.append(f"{registry.office}/{version} cannot be put back: {error}")
    done = [reconcile(context.ledger, registry)] if now.intent is not None else []
    chosen = [d.known for d in drift if d.alias == "champion" and d.known is not None]
    if rule == "adopt" and chosen and before.intent is None and before.champion is not None:
        try:
            did.append(_adopt(context, registry, chosen[0], before))
        except Unavailable:
            raise
        except ForebayError as error:  # then the alias goes back to where the ledger has it
            did.append(f"{registry.office}/{chosen[0]} is not adopted: {error}")
    return [*done, reconcile(context.ledger, registry)]


def restore(context: Context, registry: Registry, version: int) -> str:
    """Make the registry have a version as the ledger knows it; return a sentence, empty where it has.

    MLflow never gives a number twice, so a version that was deleted comes back under another one. It serves a logged
    model that the ledger knows as this version's, or a new one: never one that somebody tagged with its digest.

    Raises:
        Corrupt: its files in the workspace, or those that MLflow then serves, are not what was registered.
    """
    from tasks.promotion.drift import Held, is_same
    from tasks.promotion.promote import places
    from tasks.promotion.registry import DIGEST_TAG

    office = registry.office
    subject, at = f"{office}/{version}", places(context.ledger, office)[version]
    held = (registry.versions() or {}).get(at, Held(None, ""))
    payload = _registration(context, office, version)
    if is_same(held, payload):
        if held.digest == payload["digest"]:
            return ""
        registry.tag(at, {DIGEST_TAG: payload["digest"], "forebay.agent": subject})
        return f"the digest tag of {subject} is as it was"
    folder = context.weights(payload)
    for among in (_logged_models(context, office, subject), ()):
        registered = registry.register(
            folder,
            payload["digest"],
            run_id=payload["mlflow"]["run_id"],
            tags={"forebay.origin": payload.get("origin", office)},
            among=among,
        )
        if registry.served(registered.version) == payload["digest"]:
            break
    else:
        raise Corrupt(
            f"MLflow's version {registered.version} of `{office}` cannot be shown to serve the files of {subject}; "
            "look at MLflow's artifact store and run `forebay reconcile` again."
        )
    registry.tag(registered.version, {"forebay.agent": subject})
    entry = {"version": version, "digest": payload["digest"], "mlflow": asdict(registered), "was": at}
    context.ledger.append(f"{office}.restored", subject, entry)
    return f"{subject} is registered again, now MLflow's version {registered.version}"


def absence(context: Context, version: int) -> str:
    """Return why the registry does not have an agent as the ledger knows it, "" where it does."""
    from tasks.promotion.drift import is_same
    from tasks.promotion.promote import places

    at, payload = places(context.ledger)[version], _registration(context, "agent", version)
    try:
        held = (context.registry.versions() or {}).get(at)
    except ForebayError as error:
        return f"MLflow cannot be asked whether it has agent/{version}: {error}"
    if held is None or not is_same(held, payload):
        return (
            f"MLflow lacks agent/{version} (its version {at}); a rollback registers it again from its files."
        )
    if held.digest != payload["digest"]:
        return f"MLflow's version {at} of agent/{version} has another digest tag; a rollback sets it right."
    return ""


def _logged_models(context: Context, office: Office, subject: str) -> set[str]:
    """Return the logged models that the ledger knows to have had a version's files."""
    kinds = (f"{office}.registered", f"{office}.restored")
    known = [e.payload["mlflow"]["model_id"] for kind in kinds for e in context.ledger.entries(kind, subject)]
    return {model for model in known if model}


def _adopt(context: Context, registry: Registry, version: int, before: Standing) -> str:
    """Make a known agent whose bytes verify the champion, because somebody gave it the alias."""
    from tasks.promotion.drift import adopt

    office = registry.office
    keys.ready(context)
    payload = _registration(context, office, version)
    context.weights(payload)
    served = registry.served(payload["mlflow"]["version"])
    if served != payload["digest"]:
        raise Corrupt(f"MLflow cannot be shown to serve the files of {office}/{version} as registered.")
    entry = adopt(
        context.ledger,
        registry,
        version,
        expected=before,
        policy=context.policy.digest(),
        by=registry.trace().get("user", "somebody in MLflow"),
    )
    keys.sign_head(context, entry)
    return f"{office}/{version} is adopted as champion (was {office}/{before.champion})"


def _registration(context: Context, office: Office, version: int) -> dict[str, Any]:
    """Return what the ledger knows of a version, with where MLflow has it now."""
    subject = f"{office}/{version}"
    restored = context.ledger.last(f"{office}.restored", subject)
    found = context.registration(subject)
    assert found is not None  # whatever holds an alias is registered
    return {**found, **(restored.payload if restored else {})}


def _tell(context: Context, office: str, drift: Sequence[Drift]) -> None:
    from flows.deployments import emit_drift

    emit_drift(context.workspace, office, [d.says for d in drift])
