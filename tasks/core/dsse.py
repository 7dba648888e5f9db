"""Signed statements: in-toto Statement v1 in a DSSE envelope, with Forebay's own predicate types.

The signature covers the pre-authentication encoding of DSSE v1, so payload and type cannot be exchanged for others.
Any DSSE tool reads the envelopes: https://github.com/secure-systems-lab/dsse, https://in-toto.io/Statement/v1.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tasks.core.digest import canonical_json
from tasks.core.errors import Corrupt, ForebayError
from tasks.core.keys import PrivateKey, Role, Trust, TrustedKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
Predicate = Literal[
    "gate-decision", "approval", "rejection", "promotion", "rollback", "ledger-head", "provenance", "export", "recipe",
]  # fmt: skip
SLSA_PROVENANCE = "https://slsa.dev/provenance/v1"


@dataclass(frozen=True)
class Statement:
    """What somebody said about `subjects` ({name: SHA-256}); `key` is the trusted key that signed it."""

    kind: Predicate
    subjects: Mapping[str, str]
    predicate: Mapping[str, Any]
    key: TrustedKey


def pae(payload_type: str, payload: bytes) -> bytes:
    """Return the pre-authentication encoding of DSSE v1."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def predicate_type(kind: Predicate) -> str:
    """Return the type URI of a predicate: Forebay's own, but SLSA's for how something was made."""
    return SLSA_PROVENANCE if kind == "provenance" else f"https://forebay/{kind}/v1"


def sign(
    kind: Predicate, subjects: Mapping[str, str], predicate: Mapping[str, Any], key: PrivateKey
) -> bytes:
    """Return the envelope of a statement as canonical JSON; equal statements give equal bytes."""
    payload = canonical_json(
        {
            "_type": STATEMENT,
            "subject": [{"name": name, "digest": {"sha256": d}} for name, d in sorted(subjects.items())],
            "predicateType": predicate_type(kind),
            "predicate": dict(predicate),
        }
    )
    signature = {"keyid": key.id, "sig": _text(key.sign(pae(PAYLOAD_TYPE, payload)))}
    return canonical_json({"payloadType": PAYLOAD_TYPE, "payload": _text(payload), "signatures": [signature]})


def open_envelope(
    envelope: bytes, kinds: tuple[Predicate, ...], trust: Trust, role: Role, at: int | None = None
) -> Statement:
    """Verify an envelope and return its statement.

    Args:
        kinds: the predicates of which it must hold one; the first names it in errors.
        at: ledger entry that carries it; see `Trust.check`.

    Raises:
        Corrupt: it is no envelope, no signature in it is genuine, or it states something of another kind.
        Refused: the key is unknown, removed, or has another role; it is named.
    """
    kind = kinds[0]
    try:
        outer = json.loads(envelope)
        payload, payload_type = _bytes(outer["payload"]), outer["payloadType"]
        signatures = [(str(item["keyid"]), _bytes(item["sig"])) for item in outer["signatures"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Corrupt(f"The signature of the {kind} is not a DSSE envelope.") from None
    wrong: ForebayError = Corrupt(f"The {kind} is not signed.")
    for key_id, signature in signatures:
        key = trust.find(key_id)
        if key is not None and not key.verify(signature, pae(str(payload_type), payload)):
            wrong = Corrupt(f"The signature of the {kind} is forged: it is not one of `{key.name}`.")
            continue
        try:
            key = trust.check(key_id, role, at)
        except ForebayError as error:
            wrong = error
            continue
        return _statement(payload, str(payload_type), kinds, key)
    raise wrong


def _statement(payload: bytes, payload_type: str, kinds: tuple[Predicate, ...], key: TrustedKey) -> Statement:
    try:
        value = json.loads(payload)
        plain = (payload_type, value["_type"]) == (PAYLOAD_TYPE, STATEMENT)
        known = {predicate_type(kind): kind for kind in kinds}
        if not plain or value["predicateType"] not in known:
            raise Corrupt(f"What `{key.name}` signed is a {value['predicateType']}, not a {kinds[0]}.")
        subjects = {item["name"]: item["digest"]["sha256"] for item in value["subject"]}
        return Statement(known[value["predicateType"]], subjects, dict(value["predicate"]), key)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Corrupt(f"What `{key.name}` signed is not an in-toto statement.") from None


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
