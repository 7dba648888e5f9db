"""Who may let a decision act: forged, borrowed and foreign signatures are refused by name."""

from __future__ import annotations

import base64
from dataclasses import replace

import pytest

from tasks.core.dsse import sign
from tasks.core.errors import Conflict, Corrupt, NotFound, Refused, UsageError
from tasks.core.keys import Trust, trusted
from tasks.promotion.attest import (
    Unsigned,
    answer_payload,
    check_answer,
    check_decision,
    read_signature,
    read_statement,
    sign_decision,
    signature_of,
)
from tasks.promotion.promote import approve, champion, crown, promote, reject
from tests.promotion.support import (
    EVE,
    LEE,
    SERVICE,
    TRUST,
    FileAliases,
    add_agent,
    add_decision,
    decision_payload,
    envelope,
    files_digest,
    open_ledger,
    record_agent,
)


@pytest.fixture
def world(tmp_path):
    """agent/1 is champion; agent/2 passed against it under a policy that asks for an approval."""
    ledger, registry = open_ledger(tmp_path), FileAliases(tmp_path)
    for version in (1, 2, 3):
        add_agent(ledger, registry, version)
    crown(ledger, registry, 1, by="kim")
    return ledger, registry, add_decision(ledger, 2, 1, approval="required")


def go(ledger, registry, decision, trust=TRUST, signature=None):
    asked = {"decision": decision, "signature": signature or envelope(ledger, decision), "trust": trust}
    return promote(ledger, registry, 2, **asked, expected_champion=1, by="kim")


def yes(ledger, decision, key=LEE, trust=TRUST):
    signature = envelope(ledger, decision)
    return approve(ledger, decision, signature=signature, key=key, trust=trust, reason="looks right")


def refused(world, match, **changes):
    """The promotion is refused with these words, and nothing has changed."""
    ledger, registry, decision = world
    before = ledger.head()
    with pytest.raises((Refused, Corrupt), match=match):
        go(ledger, registry, decision, **changes)
    assert ledger.head() == before
    assert champion(ledger) == registry.aliases()["champion"] == 1


def put(world, **changes):
    """Put an approval into the ledger as somebody does who can write the table but has no approver's key."""
    ledger, _, decision = world
    genuine = answer_payload("approval", decision, "looks right", LEE, TRUST)
    ledger.append("approval.granted", "agent/2", {**genuine, **changes})


def signed(key, decision, kind="approval", reason="looks right"):
    return base64.b64encode(sign(kind, {"decision": decision}, {"reason": reason}, key)).decode()


def test_an_approval_names_the_owner_of_the_key_and_lets_the_decision_act(world):
    ledger, registry, decision = world
    refused(world, "asks for an approval; give it with `forebay approve agent/2`.$")
    entry = yes(ledger, decision)
    assert (entry.payload["by"], entry.payload["key"]) == ("lee", LEE.id)
    assert check_answer(entry, TRUST).name == "lee"
    assert go(ledger, registry, decision).payload["to"] == 2


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (lambda d: {"signature": "AAAA"}, "not a DSSE envelope"),
        (lambda d: {"signature": signed(EVE, d), "key": EVE.id}, "not in keys.yaml"),
        (lambda d: {"signature": signed(SERVICE, d)}, "`service` .* is the key of the service"),
        (lambda d: {"signature": signed(LEE, "0" * 64)}, "was given by `lee` to the decision 000000000000…"),
        (lambda d: {"signature": signed(LEE, d, "rejection")}, "is a https://forebay/rejection/v1"),
        (lambda d: {"reason": "as told by phone"}, "says other words than `lee` signed"),
        (lambda d: {"by": "kim"}, "says other words than `lee` signed"),
    ],
    ids=[
        "no envelope",
        "unknown key",
        "service key",
        "replayed",
        "turned around",
        "other words",
        "other name",
    ],
)
def test_an_approval_that_is_not_one_does_not_count(world, changes, match):
    put(world, **changes(world[2]))
    refused(world, f"asks for an approval.*does not count: .*{match}")


def test_an_unsigned_approval_of_an_earlier_release_does_not_count(world):
    world[0].append("approval.granted", "agent/2", {"decision": world[2], "by": "lee", "reason": "typed"})
    refused(world, "is not signed")


def test_an_approver_who_was_removed_lets_nothing_act_any_more(world):
    ledger, registry, decision = world
    yes(ledger, decision)
    refused(world, "`lee` .* was removed", trust=TRUST.remove("lee", 99))
    with pytest.raises(Refused, match=r"`lee` .* was removed"):
        yes(ledger, decision, trust=TRUST.remove("lee", 99))
    go(ledger, registry, decision)


def test_the_service_and_strangers_cannot_approve(world):
    ledger, _, decision = world
    for key, match in ((SERVICE, "is the key of the service"), (EVE, "not in keys.yaml")):
        with pytest.raises(Refused, match=match):
            yes(ledger, decision, key)
    assert ledger.entries("approval.granted") == []


def test_a_rejection_blocks_this_decision_for_good(world):
    ledger, registry, decision = world
    yes(ledger, decision)
    reject(ledger, decision, key=LEE, trust=TRUST, reason="not on a Friday")
    refused(world, "was rejected by `lee` .*not on a Friday")
    with pytest.raises(Refused, match="was rejected"):
        yes(ledger, decision)
    refused(world, "was rejected", trust=Trust((trusted(SERVICE, "service"),)))  # lee has left; the no stays
    other = add_decision(ledger, 2, 1, note="evaluated again")
    assert go(ledger, registry, other).payload["to"] == 2
    with pytest.raises(Conflict, match="acted already in the promotion of agent/2"):
        reject(ledger, other, key=LEE, trust=TRUST, reason="too late")


def test_a_rejection_needs_an_approvers_key_and_no_pass(world):
    ledger = world[0]
    failed = add_decision(ledger, 3, 1, "FAIL")
    with pytest.raises(Refused, match="is the key of the service"):
        reject(ledger, failed, key=SERVICE, trust=TRUST, reason="no")
    assert reject(ledger, failed, key=LEE, trust=TRUST, reason="no").payload["by"] == "lee"


def test_a_decision_without_signature_is_told_how_to_get_one(world):
    ledger, registry, _ = world
    payload = decision_payload(2, 1, note="of an earlier release")
    ledger.append("decision.made", "agent/2", payload)
    with pytest.raises(Unsigned, match="`forebay decision replay agent/2 --sign`"):
        go(ledger, registry, payload["decision"], signature=b"none")


def test_a_reward_model_s_unsigned_decision_is_told_its_own_command(world, tmp_path):
    ledger, _, _ = world
    record_agent(ledger, 2, files_digest(2), "reward")
    made = ledger.append("decision.made", "reward/2", decision_payload(2, 1))
    with pytest.raises(Unsigned, match="`forebay reward decide reward/2`"):
        check_decision(made, None, TRUST)
    named = replace(made, payload={**made.payload, "signature": {"path": "gone.json"}})
    with pytest.raises(NotFound, match="`forebay reward decide reward/2`"):
        read_signature(tmp_path, named)


def test_json_that_is_nested_too_deeply_is_no_statement():
    deep = base64.b64encode(b"[" * 100_000).decode()
    with pytest.raises(UsageError, match="no signed statement"):
        read_statement(deep, TRUST)


def forge(ledger, key=SERVICE, signed_as=None, **changes):
    """Put a decision into the ledger that carries a signature over `signed_as`, by `key`."""
    payload = decision_payload(2, 1, note="forged")
    data = sign_decision({**payload, **(signed_as or {})}, key)
    payload |= {"signature": signature_of("beside", data, key), **changes}
    ledger.append("decision.made", "agent/2", payload)
    return payload["decision"], data


@pytest.mark.parametrize(
    ("forgery", "error", "match"),
    [
        ({"signed_as": {"verdict": "FAIL"}}, Corrupt, "`service` signed another verdict"),
        ({"signed_as": {"approval": "required"}}, Corrupt, "`service` signed another approval"),
        ({"signed_as": {"policy_digest": "1" * 64}}, Corrupt, "signed another policy_digest"),
        ({"signed_as": {"decision": "1" * 64}}, Corrupt, "is about the decision 111111111111…"),
        ({"key": EVE}, Refused, "not in keys.yaml"),
        ({"key": LEE}, Refused, "`lee` .* is the key of an approver"),
    ],
    ids=["verdict", "approval", "policy", "another decision", "unknown key", "approver's key"],
)
def test_a_row_cannot_say_more_than_the_gate_signed(world, forgery, error, match):
    ledger, registry, _ = world
    decision, data = forge(ledger, **forgery)
    with pytest.raises(error, match=match):
        go(ledger, registry, decision, signature=data)
    assert champion(ledger) == 1


def test_another_envelope_than_the_ledger_names_is_refused(world):
    refused(world, "its bytes are not those in the ledger", signature=b"{}")
