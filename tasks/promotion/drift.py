"""Drift: what somebody changed in the registry without Forebay. Found by looking, never by asking to be told.

MLflow lets anybody move an alias, delete the champion's version or the whole registered model, and keeps no history
of it. So what is there is compared with what the ledger says. Its webhooks are sent once, best effort, by the server's
own store, over https only: a hint at most, which is why nothing here rests on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from tasks.core.digest import digest_json
from tasks.core.errors import Conflict
from tasks.core.ledger import Entry, Ledger, LedgerView
from tasks.promotion.promote import Aliases, Entries, Office, Standing, change, places, standing

_LOOKS = 20
What = Literal["model deleted", "version deleted", "digest changed", "alias moved", "alias deleted"]


@dataclass(frozen=True)
class Held:
    """A version as the registry has it: the digest it is tagged with, the logged model whose files it serves ("": none's)."""

    digest: str | None
    model: str


class Versions(Aliases, Protocol):
    """A registry that can be looked through; `tasks.promotion.registry.Registry` is one."""

    def versions(self) -> dict[int, Held] | None:
        """Return all versions of the office, None where the registered model itself is gone."""

    def trace(self) -> dict[str, str]:
        """Return what the registry knows of who changed it last, and when; perhaps nothing."""


@dataclass(frozen=True)
class Drift:
    """One thing that is not as the ledger says.

    Attributes:
        what: what happened to it.
        office: "agent" or "reward".
        alias: the alias that was moved or deleted.
        version: Forebay's number of the version the ledger has there, or of the one that was deleted or altered.
        place: the number under which the registry has, or had, that version.
        found: what the registry shows instead: a registry's number for an alias, a digest for a tag.
        known: Forebay's number of the version an alias was moved to, None where Forebay does not know it.
    """

    what: What
    office: Office
    version: int | None
    alias: str | None = None
    place: int | None = None
    found: str | None = None
    known: int | None = None

    @property
    def says(self) -> str:
        """Say it in words."""
        name = f"{self.office}/{self.version}"
        if self.what == "model deleted":
            return f"the registered model `{self.office}` was deleted with all its versions"
        if self.what == "version deleted":
            return f"{name} (version {self.place}) was deleted"
        if self.what == "digest changed":
            return f"the digest tag of {name} (version {self.place}) was changed to {self.found or 'nothing'}"
        due = "none" if self.version is None else name
        if self.what == "alias deleted":
            return f"the alias {self.alias} ({due}) was deleted"
        to = f"version {self.found}, which Forebay does not know" if self.known is None else ""
        return f"the alias {self.alias} ({due}) was moved to {to or f'{self.office}/{self.known}'}"


def look(ledger: Entries, registry: Versions) -> list[Drift]:
    """Return what differs in the versions that hold an alias and in the aliases themselves; empty: nothing.

    A change that is under way is no drift: aliases may be as before it or as after it. One that came while the
    registry was asked is none either: then both are read again.

    Raises:
        Conflict: the ledger changes faster than the registry answers.
    """
    for _ in range(_LOOKS):
        before = standing(ledger, registry.office), places(ledger, registry.office)
        found = _look(ledger, registry)
        if before == (standing(ledger, registry.office), places(ledger, registry.office)):
            return found
    raise Conflict(f"The {registry.office}s in office keep changing while they are looked at; look again.")


def _look(ledger: Entries, registry: Versions) -> list[Drift]:
    office, place = registry.office, places(ledger, registry.office)
    now = standing(ledger, office)
    if now.newest is None:
        return []
    offices: list[Standing] = [now]
    if now.intent is not None:
        offices.append(standing(ledger, office, without=now.intent.seq))
    held = registry.versions()
    if held is None:
        return [Drift("model deleted", office, now.champion)]
    found: list[Drift] = []
    registered = _registered(ledger, office)
    wanted = sorted({v for view in offices for v in view.aliases().values() if v is not None})
    for version in wanted:
        at, there = place[version], held.get(place[version])
        if there is None or not is_same(there, registered[version]):
            found.append(Drift("version deleted", office, version, place=at))
        elif there.digest != registered[version]["digest"]:
            found.append(Drift("digest changed", office, version, place=at, found=there.digest))
    gone = {drift.version for drift in found if drift.what == "version deleted"}
    aliases = registry.aliases()
    for alias in now.aliases():
        due = [view.aliases()[alias] for view in offices]
        at_last = aliases.get(alias)
        if any(at_last == (None if v is None else place[v]) for v in due):
            continue
        if at_last is None and due[0] not in gone:  # where its version was deleted the alias went with it
            found.append(Drift("alias deleted", office, due[0], alias=alias))
        elif at_last is not None:
            known = _known(at_last, held, place, registered)
            found.append(Drift("alias moved", office, due[0], alias, found=str(at_last), known=known))
    return found


def record(
    ledger: Ledger, found: Sequence[Drift], did: str, trace: Mapping[str, str], by: str
) -> Entry | None:
    """Write what was found and what is done about it; None where that was written and nothing has changed since.

    So what is only reported, or cannot be put back, is written once and not at every look.

    Args:
        did: the policy: "restore", "adopt" or "report".
        trace: what the registry knows of who and when.
    """
    facts = [{**asdict(drift), "says": drift.says} for drift in found]
    key = digest_json([facts, did])  # not the trace: when the registry last changed tells nothing new
    last = _open(ledger, found[0].office)
    if last is not None and last.payload["key"] == key:
        return None
    payload = {"key": key, "found": facts, "policy": did, "trace": dict(trace), "by": by}
    return ledger.append("registry.drift", found[0].office, payload)


def settle(ledger: Ledger, office: Office) -> None:
    """Write that the registry is as the ledger says again, once after a drift: the same drift later is a new one."""
    last = _open(ledger, office)
    if last is not None:
        ledger.append("registry.settled", office, {"drift": last.seq})


def _open(ledger: Entries, office: Office) -> Entry | None:
    """Return the newest record of drift, None where it is settled."""
    last, settled = ledger.last("registry.drift", office), ledger.last("registry.settled", office)
    return None if last is None or (settled is not None and settled.seq > last.seq) else last


def adopt(
    ledger: Ledger, registry: Aliases, version: int, *, expected: Standing, policy: str, by: str
) -> Entry:
    """Make the version that somebody gave the alias `champion` the champion, by the name of the policy.

    The caller has hashed its files. Return the committed entry.

    Args:
        expected: how things stood before the alias was looked at; a change since then wins over the alias.

    Raises:
        Conflict: there was a change since, or one is under way; the alias is elsewhere by now, or at the champion.
        NotFound: the registry does not have the version as the ledger knows it.
    """
    office = registry.office

    def check(view: LedgerView) -> None:
        now = standing(view, office)
        if now.intent is not None or now.changed != expected.changed or now.champion == version:
            raise Conflict(f"The champion is {office}/{now.champion} by now; look again.")

    payload = {
        "to": version,
        "from": expected.champion,
        "decision": None,
        "reason": f"adopted from the registry (policy {policy[:12]}, registry.on_drift: adopt)",
        "by": by,
        "policy_digest": policy,
    }
    if registry.aliases().get("champion") != places(ledger, office)[version]:
        raise Conflict(f"The alias champion is not at {office}/{version} any more; look again.")
    return change(ledger, registry, "promotion", version, payload, check)


def _registered(ledger: Entries, office: Office) -> dict[int, Mapping[str, Any]]:
    """Return the newest registration of each version, with the logged model that has its files now."""
    found: dict[int, Mapping[str, Any]] = {}
    for entry in [*ledger.entries(f"{office}.registered"), *ledger.entries(f"{office}.restored")]:
        found[entry.payload["version"]] = {**found.get(entry.payload["version"], {}), **entry.payload}
    return found


def is_same(there: Held, registered: Mapping[str, Any]) -> bool:
    """Tell whether a version serves the logged model that was registered: after a deletion numbers come again."""
    return bool(there.model == registered.get("mlflow", {}).get("model_id", ""))


def _known(
    at: int,
    held: Mapping[int, Held],
    place: Mapping[int, int],
    registered: Mapping[int, Mapping[str, Any]],
) -> int | None:
    """Return Forebay's number of the registry's version `at`, if it is what was registered under it."""
    for version, where in place.items():
        there, known = held.get(at), registered[version]
        if where == at and there and is_same(there, known) and there.digest == known["digest"]:
            return version
    return None
