"""A campaign of tampering over a signed history: whatever is done to it, `verify` finds it and names it.

The forger of these tests can write every file and every row, but has no private key.
"""

from __future__ import annotations

import json

import pytest

from tasks.core.heads import write_head
from tasks.core.keys import Trust, trusted, write_trust
from tasks.lineage.verify import VerifyReport, verify
from tasks.promotion.attest import answer_payload, sign_decision, signature_of, write_signature
from tasks.promotion.canary import Group, Rule, Traffic, make_record, write_record
from tests.lineage.signed import SignedWorld, adopt_keys, put_back, rows
from tests.lineage.world import World
from tests.promotion.support import EVE, LEE, SERVICE, TRUST


@pytest.fixture
def world(tmp_path):
    """agent/1 -> agent/2 -> agent/3, the champion."""
    world = SignedWorld(tmp_path / "workspace")
    adopt_keys(world)
    world.crown(world.base())
    world.generation(1)
    world.generation(2)
    return world


def check(world) -> VerifyReport:
    return verify(world.ledger, world.workspace, "agent@champion")


def found(world) -> set[tuple[str, str]]:
    report = check(world)
    assert report.ok is not bool(report.problems)
    return {(problem.problem, problem.path) for problem in report.problems}


def number(world, kind: str) -> int:
    """Return the index of the newest row of a kind."""
    return max(i for i, row in enumerate(rows(world)) if row["kind"] == kind)


def test_a_signed_history_verifies(world):
    report = check(world)
    assert report.ok, report.problems
    assert (
        report.signatures == 3 + 2 + 2 + 2
    )  # heads of 3 promotions and 2 decisions; 2 decisions, 2 approvals
    assert report.unsigned == ()


CHANGES = {
    "the payload of a promotion": ("promotion.committed", "payload", lambda t: t.replace("ada", "eve")),
    "the verdict of a decision": ("decision.made", "payload", lambda t: t.replace('"PASS"', '"FAIL"', 1)),
    "who an approval is by": ("approval.granted", "payload", lambda t: t.replace('"lee"', '"kim"')),
    "the time of a row": ("agent.registered", "time", lambda t: "2020" + t[4:]),
    "the subject of a row": ("run.started", "subject", lambda t: "0" * 64),
}


@pytest.mark.parametrize("rechain", [False, True], ids=["as it is", "chain made anew"])
@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_row_is_found(world, what, rechain):
    kind, column, change = CHANGES[what]
    ledger, at = rows(world), number(world, kind)
    assert change(ledger[at][column]) != ledger[at][column]
    ledger[at][column] = change(ledger[at][column])
    put_back(world, ledger, rechain=rechain)
    assert ("changed", "ledger") in found(world)


@pytest.mark.parametrize("rechain", [False, True], ids=["as it is", "chain made anew"])
@pytest.mark.parametrize("kind", ["decision.made", "promotion.committed", "dataset.validated", "key.trusted"])
def test_a_deleted_row_is_found(world, kind, rechain):
    ledger = rows(world)
    del ledger[number(world, kind)]
    put_back(world, ledger, rechain=rechain)
    assert found(world) & {("changed", "ledger"), ("missing", "ledger")}


@pytest.mark.parametrize("rechain", [False, True], ids=["as it is", "chain made anew"])
def test_rows_in_another_order_are_found(world, rechain):
    ledger = rows(world)
    at = number(world, "decision.made")
    ledger[at], ledger[at - 1] = ledger[at - 1], ledger[at]
    if not rechain:  # the primary key orders the rows, so the numbers change places with them
        ledger[at]["seq"], ledger[at - 1]["seq"] = ledger[at - 1]["seq"], ledger[at]["seq"]
    put_back(world, ledger, rechain=rechain)
    assert ("changed", "ledger") in found(world)


@pytest.mark.parametrize("cut", [1, 2, 9])
def test_a_cut_off_end_is_found_though_the_chain_holds(world, cut):
    put_back(world, rows(world)[:-cut], rechain=False)
    assert world.ledger.verify_chain() == len(rows(world))
    report = check(world)
    assert ("missing", "ledger") in {(p.problem, p.path) for p in report.problems}
    assert any("was cut off: `service` signed entry" in p.owner for p in report.problems)


def test_an_emptied_ledger_is_found(world):
    put_back(world, [], rechain=False)
    assert ("missing", "ledger") in found(world)


def test_signed_heads_that_are_gone_are_missed(world):
    for path in world.workspace.heads.iterdir():
        path.unlink()
    assert found(world) == {("missing", ".forebay/heads")}


def test_keys_that_are_gone_are_missed(world):
    world.workspace.trust.unlink()
    assert found(world) == {("missing", "keys.yaml")}


def test_a_list_of_trust_in_which_another_key_took_the_services_place(world):
    write_trust(world.workspace.trust, Trust((trusted(EVE, "service"), trusted(LEE, "approver"))))
    assert {problem for problem, _ in found(world)} == {"wrong key"}


def test_a_removed_key_signed_well_until_it_was_removed(world):
    newest = len(rows(world))
    write_trust(world.workspace.trust, TRUST.remove("service", newest))
    assert check(world).ok
    write_trust(world.workspace.trust, TRUST.remove("service", number(world, "decision.made")))
    assert {problem for problem, _ in found(world)} == {"wrong key"}


def last_decision(world) -> dict:
    entry = world.ledger.last("decision.made")
    return dict(entry.payload)


def test_a_signature_that_is_gone_or_changed_is_named(world):
    path = last_decision(world)["signature"]["path"]
    file = world.workspace.root / path
    data = file.read_bytes()
    file.write_bytes(data[:-2] + b" }")
    assert found(world) == {("changed", path)}
    file.unlink()
    assert found(world) == {("missing", path)}


@pytest.mark.parametrize("key", [EVE, LEE], ids=["stranger", "approver"])
def test_a_decision_signed_by_a_wrong_key_is_named(world, key):
    payload = last_decision(world)
    data = sign_decision(payload, key)
    record = world.workspace.root / payload["record"]["path"]
    path = world.workspace.relative(write_signature(record, data))
    World.append(world, "decision.made", "agent/3", {**payload, "signature": signature_of(path, data, key)})
    assert ("wrong key", payload["record"]["path"]) in found(world)


def test_a_decision_without_signature_is_a_finding_once_there_are_keys(world):
    payload = last_decision(world)
    del payload["signature"]
    World.append(world, "decision.made", "agent/3", payload)
    assert found(world) == {("unsigned", payload["record"]["path"])}


def test_swapped_evidence_is_named(world):
    """The outcomes of one decision in place of another's: both genuine, each in its place only."""
    files = [
        world.workspace.root / e.payload["outcomes"]["path"] for e in world.ledger.entries("evaluation.done")
    ]
    files[1].write_bytes(files[0].read_bytes())
    assert found(world) == {("changed", world.workspace.relative(files[1]))}


@pytest.mark.parametrize("kind", ["canary.looked", "canary.ended"])
def test_an_altered_look_of_a_canary_is_named(world, kind):
    """Changed bytes, and a record whose digest fits but whose groups lead to another result."""
    evidence = world.workspace.evidence
    good, bad = (tuple(Group(str(i), mean, 8) for i in range(60)) for mean in (0.9, 0.1))
    record, _ = make_record({"a": Traffic(bad, good)}, Rule(0.05, 0.0, 10, {"a": 1.0}, "concurrent"), {})
    path, sha256 = write_record(evidence, record)
    file = {"path": world.workspace.relative(path), "sha256": sha256}
    World.append(world, kind, "agent/3", {"promotion": 1, "record": file})
    assert check(world).ok
    data = path.read_bytes()
    path.write_bytes(data.replace(b"HARM", b"FINE"))
    assert found(world) == {("changed", file["path"])}
    path.write_bytes(data)
    record["result"]["verdict"] = "PROVEN"
    path, sha256 = write_record(evidence, record)
    file = {"path": world.workspace.relative(path), "sha256": sha256}
    World.append(world, kind, "agent/3", {"promotion": 1, "record": file})
    assert found(world) == {("changed", file["path"])}


def test_a_swapped_checkpoint_is_named(world):
    folders = [world.workspace.root / world.agents[v]["path"] for v in (2, 3)]
    (folders[1] / "model.safetensors").write_bytes((folders[0] / "model.safetensors").read_bytes())
    name = f"{world.agents[3]['path']}/model.safetensors"
    assert ("changed", name) in found(world)


def test_a_forged_approval_is_named(world):
    payload = answer_payload("approval", last_decision(world)["decision"], "good", LEE, TRUST)
    other = answer_payload("approval", "0" * 64, "good", LEE, TRUST)
    World.append(world, "approval.granted", "agent/3", {**payload, "signature": other["signature"]})
    (problem,) = check(world).problems
    assert problem.problem == "forged"
    assert "was given by `lee` to the decision 000000000000…" in problem.owner


def test_a_history_from_before_the_keys_is_unsigned_and_no_fault(tmp_path):
    world = World(tmp_path / "workspace")
    world.crown(world.base())
    world.generation(1)
    report = check(world)
    assert report.ok
    assert (report.signatures, len(report.unsigned)) == (0, 1)
    world.ledger.append("key.trusted", "key/service", {"name": "service", "id": SERVICE.id})
    write_trust(world.workspace.trust, TRUST)
    write_head(world.ledger, world.workspace.heads, world.ledger.last(), SERVICE, TRUST)
    report = check(world)
    assert report.ok
    assert (report.signatures, len(report.unsigned)) == (1, 1)
    at = number(world, "run.started")
    ledger = rows(world)
    ledger[at]["payload"] = json.dumps({**json.loads(ledger[at]["payload"]), "seed": 1})
    put_back(world, ledger, rechain=True)  # from now on, the old history is under a signed head as well
    assert ("changed", "ledger") in found(world)
