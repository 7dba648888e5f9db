"""Two offices in one ledger: reward models are put in office as agents are, and neither disturbs the other."""

from __future__ import annotations

import pytest

from tasks.core.errors import Conflict, NotFound, Refused
from tasks.promotion.drift import Drift, record
from tasks.promotion.promote import approve, champion, crown, promote, reconcile, reject, rollback, standing
from tests.promotion.support import (
    LEE,
    TRUST,
    FileAliases,
    add_agent,
    add_decision,
    envelope,
    open_ledger,
    record_agent,
)


@pytest.fixture
def world(tmp_path):
    """agent/1 and reward/1 are champions; agent/2 and reward/2 are registered."""
    ledger = open_ledger(tmp_path)
    registries = {office: FileAliases(tmp_path / office, office) for office in ("agent", "reward")}
    for registry in registries.values():
        add_agent(ledger, registry, 1)
        crown(ledger, registry, 1, by="kim")
        add_agent(ledger, registry, 2)
    return ledger, registries


def put(ledger, registry, decision, version=2):
    return promote(
        ledger,
        registry,
        version,
        decision=decision,
        signature=envelope(ledger, decision),
        trust=TRUST,
        expected_champion=1,
        by="kim",
    )


def test_a_reward_model_comes_and_goes_while_the_agent_stays(world):
    ledger, registries = world
    decision = add_decision(ledger, 2, 1, office="reward", approval="required")
    with pytest.raises(Refused, match="forebay approve reward/2"):
        put(ledger, registries["reward"], decision)
    answer = approve(
        ledger, decision, signature=envelope(ledger, decision), key=LEE, trust=TRUST, reason="read"
    )
    assert answer.subject == "reward/2"
    assert put(ledger, registries["reward"], decision).subject == "reward/2"
    assert (champion(ledger, "reward"), champion(ledger)) == (2, 1)
    assert registries["reward"].aliases() == {"champion": 2, "previous": 1}
    assert registries["agent"].aliases() == {"champion": 1}
    assert standing(ledger).candidate == 2
    rollback(ledger, registries["reward"], expected_champion=2, reason="drill", by="kim")
    assert (champion(ledger, "reward"), standing(ledger).champions) == (1, (1,))


NOBODY = {"version": 0, "digest": ""}


def first(ledger, registry, decision):
    signature = envelope(ledger, decision)
    asked = {"decision": decision, "signature": signature, "trust": TRUST, "expected_champion": None}
    return promote(ledger, registry, 1, **asked, by="kim")


def test_the_first_reward_model_needs_all_that_a_later_one_needs(tmp_path):
    ledger, registry = open_ledger(tmp_path), FileAliases(tmp_path / "reward", "reward")
    add_agent(ledger, registry, 1)
    asked = {"office": "reward", "approval": "required", "champion": NOBODY}
    rejected = add_decision(ledger, 1, 0, **asked)
    reject(ledger, rejected, key=LEE, trust=TRUST, reason="not yet")
    with pytest.raises(Refused, match="was rejected by `lee`"):
        first(ledger, registry, rejected)
    other = add_decision(ledger, 1, 0, **asked, candidate={"version": 1, "digest": "f" * 64})
    with pytest.raises(Refused, match="not about reward/1 as it is registered"):
        first(ledger, registry, other)
    over = add_decision(ledger, 1, 9, office="reward")
    with pytest.raises(Refused, match="not about reward/0"):
        first(ledger, registry, over)
    decision = add_decision(ledger, 1, 0, **asked, note="again")
    with pytest.raises(Refused, match="forebay approve reward/1"):
        first(ledger, registry, decision)
    approve(ledger, decision, signature=envelope(ledger, decision), key=LEE, trust=TRUST, reason="read")
    entry = first(ledger, registry, decision)
    assert (entry.payload["from"], entry.payload["decision"]) == (None, decision)
    with pytest.raises(Conflict, match="acted already"):
        reject(ledger, decision, key=LEE, trust=TRUST, reason="too late")


def test_an_unfinished_change_in_one_office_holds_up_only_that_one(world):
    ledger, registries = world
    payload = {"to": 2, "from": 1, "decision": None, "reason": "", "by": "kim"}
    ledger.append("promotion.intent", "reward/2", payload)
    assert put(ledger, registries["agent"], add_decision(ledger, 2, 1)).payload["to"] == 2
    assert standing(ledger, "reward").intent is not None
    (finished,) = reconcile(ledger, registries["reward"]).finished
    assert finished.subject == "reward/2"


def test_versions_of_one_office_are_unknown_in_the_other(world):
    ledger, registries = world
    add_agent(ledger, registries["agent"], 3)
    decision = add_decision(ledger, 3, 1)
    with pytest.raises(NotFound, match="no reward/3"):
        put(ledger, registries["reward"], decision, 3)


def test_a_drift_is_reported_once_whatever_else_changed_in_the_registry_since(world):
    ledger, _ = world
    found = [Drift("alias deleted", "agent", 1, alias="champion")]
    assert record(ledger, found, "report", {"changed": "1"}, "kim") is not None
    assert record(ledger, found, "report", {"changed": "2"}, "kim") is None


def test_mlflow_keeps_both_under_their_own_names(registry, tiny, tmp_path):
    ledger, rewards = open_ledger(tmp_path), registry.for_office("reward")
    for store, office, digest in ((registry, "agent", "a" * 64), (rewards, "reward", "b" * 64)):
        assert store.register(tiny, digest).version == 1
        record_agent(ledger, 1, digest, office)
        crown(ledger, store, 1, by="kim")
    assert (registry.digest(1), rewards.digest(1)) == ("a" * 64, "b" * 64)
    assert registry.aliases() == rewards.aliases() == {"champion": 1}
    assert registry.find("b" * 64) is None
    (laid_out,) = (tmp_path / "artifacts" / "rewards").rglob("MLmodel")
    assert "office: reward" in laid_out.read_text()
