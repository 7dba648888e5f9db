"""Who is champion: decided in the ledger by compare-and-set, then shown in the registry's aliases.

There is one champion for each office: the agent in production, and the reward model that gives rewards. What is said
of one holds for the other; `registry.office` and the subjects of the ledger (`agent/3`, `reward/2`) tell them apart.
A version's number is the ledger's; where the registry has it under another number (it was registered again after
somebody deleted it), the ledger knows that number as its place.

The ledger's intent row is the point of no return. It is written only if, under the ledger's lock, everything
still holds: the champion is the one the candidate was compared with, the decision passed, nobody else is
under way. After that the change will happen: its writer sets the aliases, reads them back and commits, and if
the writer dies anybody who calls `reconcile` does the rest. Every step can be done twice, so helping a writer
who is still alive does no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tasks.core.errors import Conflict, Corrupt, ForebayError, NotFound, Refused, Unavailable
from tasks.core.keys import PrivateKey, Trust
from tasks.core.ledger import Entry, Ledger, LedgerView
from tasks.promotion.attest import Answer, answer_payload, check_answer, check_decision

Office = Literal["agent", "reward"]
OFFICES: tuple[Office, ...] = ("agent", "reward")
_CHANGES = ("promotion", "rollback")
_WORDS: Mapping[Answer, str] = {"approval": "approval.granted", "rejection": "approval.rejected"}
_REVOCATIONS = ("data.revoked", "data.reinstated")
_NOBODY = (0, "")  # version and digest of the champion in a decision about a vacant office
_ATTEMPTS = 20  # of aligning the aliases while others keep changing the ledger


class Aliases(Protocol):
    """What promotion needs of a registry; `tasks.promotion.registry.Registry` has it. Versions are the registry's."""

    @property
    def office(self) -> Office:
        """Whose versions these are."""

    def digest(self, version: int) -> str | None:
        """Return the digest of a registered version's files, None where it does not exist."""

    def aliases(self) -> dict[str, int]:
        """Return {alias: version}."""

    def set_alias(self, alias: str, version: int) -> None:
        """Point `alias` at `version`."""

    def delete_alias(self, alias: str) -> None:
        """Remove `alias`."""


class Entries(Protocol):
    """The reading side of the ledger: a `Ledger`, or a `LedgerView` inside a transaction."""

    def entries(self, kind: str | None = None, subject: str | None = None) -> list[Entry]:
        """Return the entries in order."""

    def last(self, kind: str | None = None, subject: str | None = None) -> Entry | None:
        """Return the newest entry."""


@dataclass(frozen=True)
class Standing:
    """Who holds which office, by the ledger, counting a change whose intent is written.

    Attributes:
        champions: versions from the first champion to the present one; a rollback takes off the end.
        newest: the newest registered version, None where there is none.
        intent: the change that is not yet committed.
        office: which office it is.
        changed: ledger entry of the newest change, 0 where there is none: the same champions may come again.
    """

    champions: tuple[int, ...]
    newest: int | None
    intent: Entry | None
    office: Office = "agent"
    changed: int = 0

    @property
    def champion(self) -> int | None:
        """The version in production."""
        return self.champions[-1] if self.champions else None

    @property
    def previous(self) -> int | None:
        """The champion's predecessor, to which a rollback leads."""
        return self.champions[-2] if len(self.champions) > 1 else None

    @property
    def candidate(self) -> int | None:
        """The newest version, where it is not in the line of champions."""
        return None if self.newest in self.champions else self.newest

    def aliases(self) -> dict[str, int | None]:
        """Return what the registry's aliases must be; None: absent."""
        return {"champion": self.champion, "previous": self.previous, "candidate": self.candidate}


@dataclass(frozen=True)
class Repair:
    """An alias that did not say what the ledger says: `found` and `wrote` are versions, None where absent."""

    alias: str
    found: int | None
    wrote: int | None


@dataclass(frozen=True)
class Reconciled:
    """What `reconcile` did: changes it finished (or dropped) and aliases it set right. Empty: all agreed."""

    finished: tuple[Entry, ...]
    repairs: tuple[Repair, ...]


def standing(ledger: Entries, office: Office = "agent", without: int | None = None) -> Standing:
    """Read from the ledger who is champion, who was, and what is under way.

    Args:
        without: entry of an intent that is left out: how things stood before it.

    Raises:
        Corrupt: a rollback leads to what never was champion.
    """
    changes = [entry for entry in _changes(ledger, office) if entry.seq != without]
    closed = {e.payload["intent_seq"] for word in _CHANGES for e in ledger.entries(f"{word}.committed")}
    dropped = {e.payload["intent_seq"] for word in _CHANGES for e in ledger.entries(f"{word}.dropped")}
    line: list[int] = []
    intent = None
    for entry in changes:
        if entry.seq in dropped:
            continue
        to = entry.payload["to"]
        if entry.kind == "rollback.intent":
            while line and line[-1] != to:  # back to its latest term
                line.pop()
            if not line:
                raise Corrupt(
                    f"Ledger entry {entry.seq} rolls back to {office}/{to}, which never was champion."
                )
        else:
            line.append(to)
        intent = None if entry.seq in closed else entry
    newest = ledger.last(f"{office}.registered")
    changed = changes[-1].seq if changes else 0
    return Standing(
        tuple(line), None if newest is None else newest.payload["version"], intent, office, changed
    )


def champion(ledger: Entries, office: Office = "agent") -> int | None:
    """Return the version in production, by the ledger."""
    return standing(ledger, office).champion


def previous(ledger: Entries, office: Office = "agent") -> int | None:
    """Return the champion's predecessor, by the ledger."""
    return standing(ledger, office).previous


def places(ledger: Entries, office: Office = "agent") -> dict[int, int]:
    """Return under which number the registry has each version: its own, unless it was registered again."""
    known = [*ledger.entries(f"{office}.registered"), *ledger.entries(f"{office}.restored")]
    return {
        e.payload["version"]: e.payload.get("mlflow", {}).get("version", e.payload["version"]) for e in known
    }


def crown(ledger: Ledger, registry: Aliases, version: int, *, by: str) -> Entry:
    """Make `version` the first champion without a decision: the base agent, before there is a gate to pass.

    Raises:
        Conflict: there is a champion already.
        NotFound: the version is not registered.
    """

    def check(view: LedgerView) -> None:
        now = standing(view, office)
        if now.champion is not None:
            raise Conflict(
                f"{office}/{now.champion} is champion already; {office}/{version} has to pass the gate."
            )

    office = registry.office

    payload = {"to": version, "from": None, "decision": None, "reason": "first champion", "by": by}
    return change(ledger, registry, "promotion", version, payload, check)


def promote(
    ledger: Ledger,
    registry: Aliases,
    version: int,
    *,
    decision: str,
    signature: bytes | None,
    trust: Trust,
    expected_champion: int | None,
    by: str,
    reason: str = "",
    revision: int | None = None,
) -> Entry:
    """Make `version` champion in place of `expected_champion`; return the committed entry.

    Args:
        decision: digest of a decision in the ledger that says PASS for exactly these two agents.
        signature: the envelope that the decision's entry names.
        trust: the keys that may sign, as of now.
        expected_champion: whom the decision compared it with; None: the office was vacant.
        by: who asks, as the caller knows them.
        revision: the newest revocation or reinstatement of data (its ledger entry, 0 for none) as the caller knew it when
            looking whether the agent learnt from revoked data; None: nobody looked.

    Raises:
        Conflict: the champion is another one by now (it is named), a change is under way, data was revoked since
        `revision`, or the decision was used. Refused: the decision did not pass, is about other agents, is not signed by a trusted service key,
        was rejected, or lacks the approval its policy requires. Corrupt: its signature is not of this decision.
        NotFound: the decision or the version does not exist. Unavailable: the registry cannot be reached;
        `reconcile` finishes what has begun.
    """

    def check(view: LedgerView) -> None:
        entry = _decision(view, decision)
        made = entry.payload
        now = standing(view, office)
        if now.intent is not None:
            raise Conflict(
                f"{_who(now.intent)} is under way; wait, or run `forebay reconcile` if its process died."
            )
        if now.champion == version:
            raise Conflict(f"{office}/{version} is champion already.")
        if now.champion != expected_champion:
            changes = _changes(view, office)
            why = (
                f"the champion is {office}/{now.champion} since {_who(changes[-1])}"
                if changes
                else "there is no champion"
            )
            raise Conflict(
                f"{office}/{version} was compared with {over}, but {why}; "
                "evaluate it against the champion again."
            )
        moved = [e for kind in _REVOCATIONS if (e := view.last(kind)) and e.seq > (revision or 0)]
        if revision is not None and moved:
            raise Conflict(
                f"{moved[0].payload['what']} was revoked or reinstated meanwhile (ledger entry {moved[0].seq}); promote again: "
                f"it is looked at whether {office}/{version} learnt from it."
            )
        used = [e for e in view.entries("promotion.intent") if e.payload["decision"] == decision]
        if used:
            raise Conflict(
                f"The decision {decision[:12]}… was used by {_who(used[-1])}; a decision promotes once."
            )
        check_decision(entry, signature, trust)
        if made["verdict"] != "PASS":
            raise Refused(
                f"The gate said {made['verdict']} to {office}/{version}: {' '.join(made['reasons'])}"
            )
        judged = {role: (made[role]["version"], made[role]["digest"]) for role in ("candidate", "champion")}
        for role, asked in (("candidate", version), ("champion", expected_champion)):
            due = _NOBODY if asked is None else (asked, _registered(view, office, asked))
            if judged[role] != due:
                raise Refused(
                    f"The decision {decision[:12]}… is about {office}/{judged[role][0]} "
                    f"({judged[role][1][:12]}…) as {role}, not about {office}/{due[0]} as it is registered."
                )
        _refuse_rejected(view, decision, trust)
        if made["approval"] == "required":
            _require_approval(view, decision, f"{office}/{version}", trust)

    office = registry.office
    over = "nobody" if expected_champion is None else f"{office}/{expected_champion}"
    payload = {"to": version, "from": expected_champion, "decision": decision, "reason": reason, "by": by}
    return change(ledger, registry, "promotion", version, payload, check)


def rollback(
    ledger: Ledger,
    registry: Aliases,
    *,
    expected_champion: int,
    reason: str,
    by: str,
    to: int | None = None,
    evidence: Mapping[str, str] | None = None,
    flag: str = "",
) -> Entry:
    """Put an earlier champion back in office (by default the predecessor); return the committed entry.

    Args:
        evidence: the file {path, sha256} that led to it, where it was not a person.
        flag: how who comes back learnt from revoked data, where it did; kept in the entry.

    Raises:
        Conflict: the champion is not `expected_champion`, or a change is under way.
        NotFound: there is no predecessor, `to` never was champion before it, or it is gone from the registry.
    """
    office = registry.office
    before = standing(ledger, office)
    target = before.previous if to is None else to
    if target is None or target not in before.champions[:-1] or target == before.champion:
        line = ", ".join(f"{office}/{v}" for v in before.champions[:-1]) or "none"
        raise NotFound(f"There is no such champion to roll back to; earlier champions: {line}.")

    def check(view: LedgerView) -> None:
        now = standing(view, office)
        if now.intent is not None:
            raise Conflict(
                f"{_who(now.intent)} is under way; wait, or run `forebay reconcile` if its process died."
            )
        if now.champions != before.champions or now.champion != expected_champion:
            raise Conflict(
                f"The champion is {office}/{now.champion}, not {office}/{expected_champion}; "
                "look at `forebay status` and decide again."
            )

    payload: dict[str, Any] = {
        "to": target,
        "from": expected_champion,
        "decision": None,
        "reason": reason,
        "by": by,
    }
    if evidence is not None:
        payload["evidence"] = dict(evidence)
    if flag:
        payload["flag"] = flag
    return change(ledger, registry, "rollback", target, payload, check)


def approve(
    ledger: Ledger, decision: str, *, signature: bytes | None, key: PrivateKey, trust: Trust, reason: str
) -> Entry:
    """Record that a person lets a passed decision act, signed with their key over this decision's digest.

    The same approval again adds nothing.

    Raises:
        NotFound, Refused: as `record_answer`.
    """
    payload = answer_payload("approval", decision, reason, key, trust)
    _refuse_rejected(ledger, decision, trust)
    return _recorded(ledger, payload) or record_answer(
        ledger, "approval", payload, signature=signature, trust=trust
    )


def reject(ledger: Ledger, decision: str, *, key: PrivateKey, trust: Trust, reason: str) -> Entry:
    """Record that a person does not let a decision act; it is final for this decision. Again: adds nothing.

    Raises:
        NotFound, Refused, Conflict: as `record_answer`.
    """
    payload = answer_payload("rejection", decision, reason, key, trust)
    return _recorded(ledger, payload) or record_answer(
        ledger, "rejection", payload, signature=None, trust=trust
    )


def record_answer(
    ledger: Ledger, kind: Answer, payload: Mapping[str, Any], *, signature: bytes | None, trust: Trust
) -> Entry:
    """Record a person's answer to a decision, however it came here.

    Args:
        payload: from `tasks.promotion.attest.read_statement` or `answer_payload`: the signature is verified.
        signature: the service's, of the decision; for an approval.

    Raises:
        NotFound: no such decision.
        Refused: an approval of what did not pass (it cannot overrule the gate), was rejected, or is not signed by a
        trusted service key.
        Conflict: this very statement was recorded before, or the decision to be rejected has promoted already; only
        a rollback helps.
    """
    decision = payload["decision"]
    subject = _decision(ledger, decision).subject

    def check(view: LedgerView) -> None:
        known = _recorded(view, payload)
        if known is not None:
            raise Conflict(
                f"This {kind} by `{payload['by']}` is in the ledger already (entry {known.seq}); a statement counts once."
            )
        if kind == "rejection":
            used = [e for e in view.entries("promotion.intent") if e.payload["decision"] == decision]
            if used:
                raise Conflict(
                    f"The decision has acted already in {_who(used[-1])}; `forebay rollback` undoes it."
                )
            return
        made = _decision(view, decision)
        check_decision(made, signature, trust)
        if made.payload["verdict"] != "PASS":
            raise Refused(f"The gate said {made.payload['verdict']}; an approval cannot overrule it.")
        _refuse_rejected(view, decision, trust)

    return ledger.append(_WORDS[kind], subject, payload, check)


def _recorded(view: Entries, payload: Mapping[str, Any]) -> Entry | None:
    answers = (e for word in _WORDS.values() for e in view.entries(word))
    return next((e for e in answers if e.payload.get("signature") == payload["signature"]), None)


def reconcile(ledger: Ledger, registry: Aliases) -> Reconciled:
    """Finish what a crash left open and make the registry's aliases say what the ledger says.

    A change whose version has vanished from the registry is dropped: the champion stays.

    Raises:
        NotFound: the champion's own version is gone from the registry; only a rollback helps.
        Unavailable: the registry cannot be reached or does not keep what is written.
    """
    finished: list[Entry] = []
    repairs: list[Repair] = []
    for _ in range(_ATTEMPTS):
        now = standing(ledger, registry.office)
        place = _holders(ledger, registry, now)
        if now.intent is not None and place[now.intent.payload["to"]] is None:
            finished += _close(ledger, now.intent, "dropped")
            continue
        wrote = _project(registry, now, place)
        repairs += wrote
        if now.intent is not None:
            finished += _close(ledger, now.intent, "committed")
        elif not wrote and standing(ledger, registry.office) == now:
            return Reconciled(tuple(finished), tuple(repairs))
    raise Unavailable(
        "The registry's aliases do not stay as the ledger wants them; something else is writing them."
    )


def show_candidate(ledger: Ledger, registry: Aliases) -> None:
    """Make the alias `candidate` say what the ledger says, after a registration.

    The other aliases stay as they are: whoever moved them did it unrecorded, and the policy says what becomes of it.
    """
    for _ in range(_ATTEMPTS):
        now = standing(ledger, registry.office)
        if now.candidate is not None:
            registry.set_alias("candidate", places(ledger, registry.office)[now.candidate])
        elif "candidate" in registry.aliases():
            registry.delete_alias("candidate")
        if standing(ledger, registry.office) == now:
            return
    raise Unavailable("The ledger keeps changing while the alias `candidate` is set; try again.")


def change(
    ledger: Ledger,
    registry: Aliases,
    word: Literal["promotion", "rollback"],
    version: int,
    payload: Mapping[str, Any],
    check: Callable[[LedgerView], None],
) -> Entry:
    """Put `version` in office: intent (if `check` allows it, under the ledger's lock), aliases, committed entry.

    Raises:
        NotFound: the registry does not have the version as the ledger knows it. Unavailable: as `reconcile`.
    """
    subject = f"{registry.office}/{version}"
    _present(ledger, registry, version)
    intent = ledger.append(f"{word}.intent", subject, payload, check)
    reconcile(ledger, registry)
    for entry in ledger.entries(f"{word}.committed", subject):
        if entry.payload["intent_seq"] == intent.seq:
            return entry
    raise NotFound(f"{subject} vanished from the registry while it was put in office; nothing has changed.")


def _holders(ledger: Ledger, registry: Aliases, now: Standing) -> dict[int, int | None]:
    """Return under which number the registry has the version of each alias, None where it lacks it.

    A number alone proves nothing: after the registered model was deleted the same numbers are given to others.
    """
    place = places(ledger, registry.office)
    wanted = {v for v in now.aliases().values() if v is not None}
    return {
        v: place[v] if registry.digest(place[v]) == _registered(ledger, registry.office, v) else None
        for v in wanted
    }


def _project(registry: Aliases, now: Standing, place: Mapping[int, int | None]) -> list[Repair]:
    found = registry.aliases()
    repairs = []
    for alias, version in now.aliases().items():
        at = None if version is None else place[version]
        if version is not None and at is None and alias == "champion":
            raise NotFound(
                f"{now.office}/{version} is champion by the ledger but gone from the registry; roll back to "
                f"{'an earlier champion' if now.previous is None else f'{now.office}/{now.previous}'}."
            )
        if found.get(alias) == at:
            continue  # perhaps nothing to point at: an office may be vacant, except the champion's
        if at is not None:
            registry.set_alias(alias, at)
        elif alias in found:
            registry.delete_alias(alias)
        else:
            continue
        repairs.append(Repair(alias, found.get(alias), at))
    return repairs


def _close(ledger: Ledger, intent: Entry, word: str) -> list[Entry]:
    """Commit or drop an open intent; nothing where somebody else was faster."""

    def check(view: LedgerView) -> None:
        still = standing(view, office).intent
        if still is None or still.seq != intent.seq:
            raise _Closed

    office = _office(intent)
    payload = {**intent.payload, "intent_seq": intent.seq}
    try:
        return [ledger.append(intent.kind.replace("intent", word), intent.subject, payload, check)]
    except _Closed:
        return []


class _Closed(Exception):
    """The intent was closed by another process."""


def _changes(ledger: Entries, office: Office) -> list[Entry]:
    """Return the intents of an office in order."""
    found = [e for word in _CHANGES for e in ledger.entries(f"{word}.intent") if _office(e) == office]
    return sorted(found, key=lambda e: e.seq)


def _office(entry: Entry) -> Office:
    return "reward" if entry.subject.startswith("reward/") else "agent"


def _decision(view: Entries, digest: str) -> Entry:
    # The newest first: one that was signed later comes after the unsigned.
    for entry in reversed(view.entries("decision.made")):
        if entry.payload["decision"] == digest:
            return entry
    raise NotFound(
        f"The ledger knows no decision {digest[:12]}…; `forebay decision show` lists what there is."
    )


def _registered(view: Entries, office: Office, version: int) -> str:
    entry = view.last(f"{office}.registered", f"{office}/{version}")
    if entry is None:
        raise NotFound(f"There is no {office}/{version}; `forebay status` lists what there is.")
    return str(entry.payload["digest"])


def _present(ledger: Ledger, registry: Aliases, version: int) -> None:
    """Refuse early what the registry lacks; not under the ledger's lock, which must not wait for a server."""
    digest = _registered(ledger, registry.office, version)
    if registry.digest(places(ledger, registry.office)[version]) != digest:
        raise NotFound(
            f"{registry.office}/{version} is not in the registry as the ledger knows it; register its files again."
        )


def _refuse_rejected(view: Entries, decision: str, trust: Trust) -> None:
    """Refuse what anybody rejected. A rejection whose signature is bad holds too: the doubt is on the safe side."""
    for entry in view.entries("approval.rejected"):
        if entry.payload["decision"] == decision:
            try:
                who = f"`{check_answer(entry, trust, at=entry.seq).name}`"
            except ForebayError as error:
                who = f"somebody whose signature does not hold ({error})"
            raise Refused(
                f"The decision {decision[:12]}… was rejected by {who} (ledger entry {entry.seq}): "
                f"{entry.payload['reason']}"
            )


def _require_approval(view: Entries, decision: str, subject: str, trust: Trust) -> None:
    found = ""
    for entry in view.entries("approval.granted", subject):
        if entry.payload["decision"] != decision:
            continue
        try:
            check_answer(entry, trust)
            return
        except ForebayError as error:
            found = f" The one in ledger entry {entry.seq} does not count: {error}"
    raise Refused(f"The policy asks for an approval; give it with `forebay approve {subject}`.{found}")


def _who(intent: Entry) -> str:
    old, word = intent.payload["from"], intent.kind.partition(".")[0]
    over = "" if old is None else f" over {_office(intent)}/{old}"
    return f"the {word} of {intent.subject}{over} by {intent.payload['by']} (ledger entry {intent.seq})"
