"""Envelopes: the encoding of the DSSE specification, and every way in which a signature may not hold."""

from __future__ import annotations

import base64
import json

import pytest

from tasks.core.dsse import open_envelope as open_
from tasks.core.dsse import pae, sign
from tasks.core.errors import Corrupt, Refused
from tests.promotion.support import EVE, LEE, SERVICE, TRUST

DIGEST = "d" * 64


def envelope(key=SERVICE, kind="gate-decision", **predicate) -> bytes:
    return sign(kind, {"decision": DIGEST}, predicate or {"verdict": "PASS"}, key)


def test_the_encoding_of_the_specification():
    """The test vector of https://github.com/secure-systems-lab/dsse/blob/master/protocol.md."""
    expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pae("http://example.com/HelloWorld", b"hello world") == expected
    assert pae("é", b"") == b"DSSEv1 2 \xc3\xa9 0 "  # lengths are of bytes


def test_an_envelope_is_a_statement_that_other_tools_read():
    outer = json.loads(envelope())
    assert outer["payloadType"] == "application/vnd.in-toto+json"
    assert outer["signatures"][0]["keyid"] == SERVICE.id
    assert json.loads(base64.b64decode(outer["payload"])) == {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "decision", "digest": {"sha256": DIGEST}}],
        "predicateType": "https://forebay/gate-decision/v1",
        "predicate": {"verdict": "PASS"},
    }
    assert envelope() == envelope()
    said = open_(envelope(), ("gate-decision",), TRUST, "service")
    assert (said.subjects, said.predicate, said.key.name) == (
        {"decision": DIGEST},
        {"verdict": "PASS"},
        "service",
    )


def changed(name: str, value) -> bytes:
    return json.dumps({**json.loads(envelope()), name: value}).encode()


FORGED = json.loads(envelope(verdict="FAIL"))["payload"]
SIGNATURE = json.loads(envelope())["signatures"][0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "not a DSSE envelope"),
        (b"[]", "not a DSSE envelope"),
        (changed("payload", "%%%"), "not a DSSE envelope"),
        (changed("payload", FORGED), "forged: it is not one of `service`"),
        (changed("payloadType", "text/plain"), "forged: it is not one of `service`"),
        (changed("signatures", []), "is not signed"),
        (changed("signatures", [{**SIGNATURE, "keyid": LEE.id}]), "forged: it is not one of `lee`"),
        (envelope(kind="approval"), "signed is a https://forebay/approval/v1, not a gate-decision"),
    ],
)
def test_what_is_not_genuine_is_corrupt(data: bytes, message: str):
    with pytest.raises(Corrupt, match=message):
        open_(data, ("gate-decision",), TRUST, "service")


def test_whose_key_it_is_decides():
    with pytest.raises(Refused, match=r"not in keys.yaml"):
        open_(envelope(EVE), ("gate-decision",), TRUST, "service")
    with pytest.raises(Refused, match=r"`lee` .* is the key of an approver"):
        open_(envelope(LEE), ("gate-decision",), TRUST, "service")
    with pytest.raises(Refused, match=r"`service` .* was removed"):
        open_(envelope(), ("gate-decision",), TRUST.remove("service", 3), "service")


def test_one_good_signature_among_several_is_enough():
    both = [{**SIGNATURE, "keyid": EVE.id}, SIGNATURE]
    assert open_(changed("signatures", both), ("gate-decision",), TRUST, "service").key.name == "service"
