"""What is signed about promotions: the gate's decision by the service, the answer of a person by their own key.

The decision's record stays as it is; its signature is an envelope beside it, and the ledger's entry names both. The
signed statement repeats what the entry says, so that a row put into the ledger cannot say more than the gate did.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tasks.core.atomic import write_atomic
from tasks.core.digest import canonical_json, sha256_bytes
from tasks.core.dsse import open_envelope, sign
from tasks.core.errors import Corrupt, NotFound, Refused, UsageError
from tasks.core.keys import PrivateKey, Trust, TrustedKey
from tasks.core.ledger import Entry

Answer = Literal["approval", "rejection"]
SUFFIX = ".dsse.json"
_CLAIMS = ("verdict", "approval", "policy_digest", "candidate", "champion")
_KINDS: Mapping[str, Answer] = {"approval.granted": "approval", "approval.rejected": "rejection"}


class Unsigned(Refused):
    """Something was recorded before the workspace had keys, or without one."""


class Changed(Corrupt):
    """The file of a signature is not the one that the ledger names."""


def sign_decision(payload: Mapping[str, Any], key: PrivateKey) -> bytes:
    """Return the signed statement that the gate made this decision (`payload` of `decision.made`)."""
    return sign("gate-decision", {"decision": payload["decision"]}, _claims(payload), key)


def write_signature(record: Path, envelope: bytes) -> Path:
    """Keep the envelope beside the decision's record and return its path."""
    path = record.with_name(f"{record.stem}{SUFFIX}")
    write_atomic(path, envelope)
    return path


def signature_of(path: str, envelope: bytes, key: PrivateKey) -> dict[str, str]:
    """Return what the ledger's entry says of a signature; `path` is relative to the workspace."""
    return {"path": path, "sha256": sha256_bytes(envelope), "key": key.id}


def read_signature(root: Path, made: Entry) -> bytes | None:
    """Return the envelope that the entry `decision.made` names, None where it names none.

    Raises:
        NotFound: the file is gone.
    """
    named = made.payload.get("signature")
    if named is None:
        return None
    try:
        path: Path = root / named["path"]
        return path.read_bytes()
    except FileNotFoundError:
        raise NotFound(
            f"The signature {named['path']} of the decision {made.payload['decision'][:12]}… is gone; restore it from "
            f"a backup, or `{_sign_again(made)}`."
        ) from None


def check_decision(made: Entry, envelope: bytes | None, trust: Trust, at: int | None = None) -> TrustedKey:
    """Return the service key that signed exactly this decision.

    Args:
        made: the entry `decision.made`, about an agent or a reward model.
        at: the entry's number to judge the key as of then; None: as of now.

    Raises:
        Unsigned: there is no signature. Corrupt: it is forged, changed, or of another decision.
        Refused: the key is unknown, removed, or not one of the service.
    """
    payload = made.payload
    short = payload["decision"][:12]
    named = payload.get("signature")
    if named is None or envelope is None:
        raise Unsigned(
            f"The decision {short}… is not signed, as none was before this workspace had keys; "
            f"`{_sign_again(made)}` decides again from the evidence and signs."
        )
    if sha256_bytes(envelope) != named["sha256"]:
        raise Changed(f"The signature {named['path']} was changed: its bytes are not those in the ledger.")
    said = open_envelope(envelope, ("gate-decision",), trust, "service", at)
    if said.key.id != named["key"]:
        raise Corrupt(
            f"The ledger says that another key than `{said.key.name}` signed the decision {short}…."
        )
    about = said.subjects.get("decision")
    if about != payload["decision"]:
        raise Corrupt(
            f"The signature in {named['path']} is about the decision {str(about)[:12]}…, not {short}…."
        )
    odd = [name for name, value in _claims(payload).items() if said.predicate.get(name) != value]
    if odd:
        raise Corrupt(
            f"The ledger's entry of the decision {short}… was altered: `{said.key.name}` signed another {odd[0]}."
        )
    return said.key


def _sign_again(made: Entry) -> str:
    """Return the command that signs a decision anew; each office has its own."""
    if made.subject.startswith("reward/"):
        return f"forebay reward decide {made.subject}"
    return f"forebay decision replay {made.subject} --sign"


def make_statement(kind: Answer, decision: str, reason: str, key: PrivateKey) -> str:
    """Return a person's answer to a decision as one line of text: needs the key and the digest, and no workspace.

    It names the decision alone, and so no workspace: it holds wherever this very decision was made, as in a copy of the
    workspace. That is the same candidate, champion, policy and evidence, by their digests, which the decision's digest
    covers.
    """
    return base64.b64encode(sign(kind, {"decision": decision}, {"reason": reason}, key)).decode()


def read_statement(line: str, trust: Trust) -> tuple[Answer, dict[str, Any]]:
    """Verify what `make_statement` made; return which answer it is, and the ledger's payload of it.

    Raises:
        UsageError: it is no such line.
        Corrupt: the signature is forged, or it is one of something else.
        Refused: the key is unknown, removed, or none of an approver.
    """
    text = "".join(line.split())  # mail programs break long lines
    try:
        envelope = base64.b64decode(text, validate=True)
        json.loads(envelope)
    except (ValueError, RecursionError):  # nested too deeply to be read
        raise UsageError(
            "This is no signed statement; `forebay approve … --print` and `forebay reject … --print` make one."
        ) from None
    said = open_envelope(envelope, ("approval", "rejection"), trust, "approver")
    payload = {
        "decision": said.subjects.get("decision", ""),
        "by": said.key.name,
        "reason": str(said.predicate.get("reason", "")),
        "key": said.key.id,
        "signature": text,
    }
    return ("approval" if said.kind == "approval" else "rejection"), payload


def answer_payload(kind: Answer, decision: str, reason: str, key: PrivateKey, trust: Trust) -> dict[str, Any]:
    """Return the ledger's payload of a signed approval or rejection.

    Raises:
        Refused: the key may not approve; it is named.
    """
    trust.check(key.id, "approver")
    return read_statement(make_statement(kind, decision, reason, key), trust)[1]


def check_answer(entry: Entry, trust: Trust, at: int | None = None) -> TrustedKey:
    """Return the approver's key that signed exactly this approval or rejection.

    Raises:
        Unsigned: nobody did. Corrupt: the signature is forged, or of another decision or reason.
        Refused: the key is unknown, removed, or none of an approver.
    """
    p, kind = entry.payload, _KINDS[entry.kind]
    if "signature" not in p:
        raise Unsigned(f"The {kind} by {p['by']} (ledger entry {entry.seq}) is not signed.")
    try:
        envelope = base64.b64decode(p["signature"], validate=True)
    except ValueError:
        raise Corrupt(f"The {kind} in ledger entry {entry.seq} has no readable signature.") from None
    said = open_envelope(envelope, (kind,), trust, "approver", at)
    about = said.subjects.get("decision")
    if about != p["decision"]:
        raise Corrupt(
            f"The {kind} in ledger entry {entry.seq} was given by `{said.key.name}` to the decision "
            f"{str(about)[:12]}…, not to {p['decision'][:12]}…."
        )
    if (said.predicate.get("reason"), said.key.name, said.key.id) != (p["reason"], p["by"], p["key"]):
        raise Corrupt(
            f"The {kind} in ledger entry {entry.seq} says other words than `{said.key.name}` signed."
        )
    return said.key


def _claims(payload: Mapping[str, Any]) -> dict[str, Any]:
    claims: dict[str, Any] = json.loads(canonical_json({name: payload[name] for name in _CLAIMS}))
    return claims
