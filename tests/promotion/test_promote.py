"""Compare-and-set, crash safety and rollback, with real processes on a shared SQLite ledger."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time

import pytest

from tasks.core.errors import Conflict, ForebayError, NotFound, Refused, Unavailable
from tasks.promotion.drift import Held, adopt, look
from tasks.promotion.promote import approve, champion, crown, previous, promote, reconcile, rollback, standing
from tests.promotion.support import (
    LEE,
    TRUST,
    FileAliases,
    add_agent,
    add_decision,
    envelope,
    files_digest,
    open_ledger,
)

fork = multiprocessing.get_context("fork")


@pytest.fixture
def world(tmp_path):
    """A ledger and a registry in which agent/1 is champion and agents 2 and 3 have passed against it."""
    ledger, registry = open_ledger(tmp_path), FileAliases(tmp_path)
    add_agent(ledger, registry, 1)
    crown(ledger, registry, 1, by="kim")
    for version in (2, 3):
        add_agent(ledger, registry, version)
        add_decision(ledger, version, 1)
    return ledger, registry


def decision_for(ledger, version):
    return ledger.last("decision.made", f"agent/{version}").payload["decision"]


def go(ledger, registry, version, expected=1, decision=None, trust=TRUST, signature=None, revision=None):
    decision = decision or decision_for(ledger, version)
    return promote(
        ledger,
        registry,
        version,
        decision=decision,
        signature=signature or envelope(ledger, decision),
        trust=trust,
        expected_champion=expected,
        by="kim",
        revision=revision,
    )


def yes(ledger, decision, key=LEE, trust=TRUST):
    signature = envelope(ledger, decision)
    return approve(ledger, decision, signature=signature, key=key, trust=trust, reason="looks right")


def test_promotion_moves_ledger_and_aliases_together(world):
    ledger, registry = world
    entry = go(ledger, registry, 2)
    assert entry.kind == "promotion.committed"
    assert (entry.payload["to"], entry.payload["from"]) == (2, 1)
    assert (champion(ledger), previous(ledger)) == (2, 1)
    assert registry.aliases() == {"champion": 2, "previous": 1, "candidate": 3}
    assert reconcile(ledger, registry).repairs == ()


class Looked(FileAliases):
    """A registry that can be looked through; `meanwhile` is done once, while it is."""

    held: dict | None = None
    meanwhile = None

    def versions(self):
        if self.meanwhile is not None:
            do, self.meanwhile = self.meanwhile, None
            do()
        return self.held


def test_a_promotion_during_the_look_is_no_drift_and_wins_over_the_alias(world, tmp_path):
    ledger, _ = world
    registry = Looked(tmp_path)
    registry.held = {v: Held(files_digest(v), "") for v in (1, 2, 3)}
    before = standing(ledger)
    registry.meanwhile = lambda: go(ledger, registry, 3)
    assert look(ledger, registry) == []
    registry.set_alias("champion", 2)
    for expected, version in ((before, 2), (standing(ledger), 3), (standing(ledger), 1)):
        with pytest.raises(Conflict, match="look again"):
            adopt(ledger, registry, version, expected=expected, policy="0" * 64, by="kim")
    assert standing(ledger).champions == (1, 3)
    adopt(ledger, registry, 2, expected=standing(ledger), policy="0" * 64, by="kim")
    assert standing(ledger).champions == (1, 3, 2)


def test_a_number_that_was_given_to_another_version_is_not_taken_for_the_old_one(world, tmp_path):
    ledger, _ = world
    registry = Looked(tmp_path)
    go(ledger, registry, 2)
    registry.add(1, files_digest(3))  # the registered model was deleted, and numbers began anew
    reconcile(ledger, registry)
    assert registry.aliases() == {"champion": 2, "candidate": 3}
    again = {"version": 3, "digest": files_digest(3), "mlflow": {"version": 1, "model_id": "m-3"}}
    ledger.append("agent.restored", "agent/3", again)
    registry.held = {1: Held(files_digest(3), "m-3"), 2: Held(files_digest(2), "")}
    registry.set_alias("champion", 1)
    assert [d.known for d in look(ledger, registry) if d.alias == "champion"] == [3]


def test_the_first_champion_is_crowned_once(world):
    ledger, registry = world
    with pytest.raises(Conflict, match="agent/1 is champion already"):
        crown(ledger, registry, 2, by="kim")


def test_a_stale_expectation_is_refused_and_names_the_winner(world):
    ledger, registry = world
    go(ledger, registry, 2)
    with pytest.raises(
        Conflict, match=r"compared with agent/1, but the champion is agent/2 since the promotion of agent/2"
    ):
        go(ledger, registry, 3)
    assert registry.aliases()["champion"] == 2


@pytest.mark.parametrize("kind", ["data.revoked", "data.reinstated"])
def test_data_that_is_revoked_between_the_look_and_the_act_stops_the_promotion(world, kind):
    ledger, registry = world
    moved = ledger.append(kind, "episode:e1", {"what": "episode:e1", "revocation": 1})
    with pytest.raises(Conflict, match="episode:e1 was revoked or reinstated meanwhile"):
        go(ledger, registry, 2, revision=moved.seq - 1)
    assert champion(ledger) == 1
    go(ledger, registry, 2, revision=moved.seq)
    assert champion(ledger) == 2


@pytest.mark.parametrize("verdict", ["FAIL", "INCONCLUSIVE"])
def test_only_a_pass_promotes(world, verdict):
    ledger, registry = world
    add_decision(ledger, 2, 1, verdict)
    with pytest.raises(Refused, match=f"said {verdict} to agent/2"):
        go(ledger, registry, 2)


def test_a_decision_must_be_about_these_very_agents(world):
    ledger, registry = world
    other = add_decision(ledger, 2, 1, champion={"version": 1, "digest": "0" * 64})
    with pytest.raises(Refused, match="not about agent/1 as it is registered"):
        go(ledger, registry, 2, decision=other)
    with pytest.raises(Refused, match="not about agent/3"):
        go(ledger, registry, 3, decision=decision_for(ledger, 2))
    with pytest.raises(NotFound, match="no decision"):
        go(ledger, registry, 2, decision="f" * 64, signature=b"none")
    with pytest.raises(NotFound, match="agent/9"):
        go(ledger, registry, 9, decision=decision_for(ledger, 2))


def test_what_is_not_in_the_registry_is_not_promoted(world):
    ledger, registry = world
    registry.add(2, "0" * 64)
    with pytest.raises(NotFound, match="not in the registry"):
        go(ledger, registry, 2)
    assert ledger.entries("promotion.intent", "agent/2") == []


def test_a_decision_promotes_once(world):
    ledger, registry = world
    go(ledger, registry, 2)
    with pytest.raises(Conflict, match="champion already"):
        go(ledger, registry, 2)
    rollback(ledger, registry, expected_champion=2, reason="slow", by="kim")
    with pytest.raises(Conflict, match="a decision promotes once"):
        go(ledger, registry, 2)


def test_an_approval_is_asked_for_and_cannot_overrule_the_gate(world):
    ledger, registry = world
    decision = add_decision(ledger, 2, 1, approval="required")
    with pytest.raises(Refused, match="asks for an approval"):
        go(ledger, registry, 2)
    yes(ledger, decision)
    go(ledger, registry, 2)
    failed = add_decision(ledger, 3, 2, "FAIL", approval="required")
    with pytest.raises(Refused, match="cannot overrule"):
        yes(ledger, failed)


def test_rollback_walks_back_along_the_line_of_champions(world):
    ledger, registry = world
    go(ledger, registry, 2)
    add_decision(ledger, 3, 2)
    go(ledger, registry, 3, expected=2)
    assert standing(ledger).champions == (1, 2, 3)
    entry = rollback(ledger, registry, expected_champion=3, reason="worse on sums", by="kim")
    assert (entry.kind, entry.payload["reason"]) == ("rollback.committed", "worse on sums")
    assert registry.aliases() == {"champion": 2, "previous": 1, "candidate": 3}
    rollback(ledger, registry, expected_champion=2, reason="again", by="kim")
    assert registry.aliases() == {"champion": 1, "candidate": 3}
    with pytest.raises(NotFound, match="earlier champions: none"):
        rollback(ledger, registry, expected_champion=1, reason="no more", by="kim")


def test_an_agent_may_come_back_into_office_and_the_line_keeps_both_terms(world):
    ledger, registry = world
    go(ledger, registry, 2)
    add_decision(ledger, 1, 2)
    go(ledger, registry, 1, expected=2)
    add_decision(ledger, 3, 1, "PASS", note="second term")
    go(ledger, registry, 3)
    assert standing(ledger).champions == (1, 2, 1, 3)
    rollback(ledger, registry, expected_champion=3, reason="bad", by="kim")
    assert standing(ledger).champions == (1, 2, 1)
    with pytest.raises(NotFound, match="no such champion"):
        rollback(ledger, registry, expected_champion=1, reason="it is me", by="kim", to=1)
    rollback(ledger, registry, expected_champion=1, reason="bad too", by="kim")
    assert registry.aliases()["champion"] == 2


def test_rollback_can_skip_and_checks_what_it_expects(world):
    ledger, registry = world
    go(ledger, registry, 2)
    add_decision(ledger, 3, 2)
    go(ledger, registry, 3, expected=2)
    with pytest.raises(Conflict, match="champion is agent/3, not agent/2"):
        rollback(ledger, registry, expected_champion=2, reason="stale", by="kim", to=1)
    with pytest.raises(NotFound, match="earlier champions: agent/1, agent/2"):
        rollback(ledger, registry, expected_champion=3, reason="never", by="kim", to=7)
    rollback(ledger, registry, expected_champion=3, reason="both bad", by="kim", to=1)
    assert standing(ledger).champions == (1,)


@pytest.mark.parametrize("alias", ["champion", "previous"])
def test_reconcile_restores_a_deleted_or_moved_alias_and_says_so(world, alias):
    ledger, registry = world
    go(ledger, registry, 2)
    right = registry.aliases()[alias]
    registry.delete_alias(alias)
    (repair,) = reconcile(ledger, registry).repairs
    assert (repair.alias, repair.found, repair.wrote) == (alias, None, right)
    registry.set_alias(alias, 3)
    (repair,) = reconcile(ledger, registry).repairs
    assert (repair.found, repair.wrote) == (3, right)
    assert registry.aliases()[alias] == right


def test_a_champion_gone_from_the_registry_is_told_and_rolled_back(world):
    ledger, registry = world
    go(ledger, registry, 2)
    registry.remove(2)
    registry.delete_alias("champion")
    with pytest.raises(NotFound, match="gone from the registry; roll back to agent/1"):
        reconcile(ledger, registry)
    rollback(ledger, registry, expected_champion=2, reason="its files are gone", by="kim")
    assert registry.aliases()["champion"] == 1


def test_a_registry_that_forgets_is_reported(world):
    ledger, registry = world

    class Forgetful(FileAliases):
        def set_alias(self, alias, version):
            pass

    with pytest.raises(Unavailable, match="do not stay"):
        go(ledger, Forgetful(registry.root), 2)
    reconcile(ledger, registry)  # the intent stands: the change happens once the registry works
    assert registry.aliases()["champion"] == champion(ledger) == 2


# --- races and crashes


class Boundary:
    """Counts the steps that change something, and acts on one of them: before it is done, or after."""

    def __init__(self, act, at):
        self.act, self.at, self.step = act, at, 0

    def wrap(self, thing, names):
        for name in names:
            setattr(thing, name, self._around(getattr(thing, name)))
        return thing

    def _around(self, call):
        def wrapped(*args, **kwargs):
            self._pass()
            result = call(*args, **kwargs)
            self._pass()
            return result

        return wrapped

    def _pass(self):
        self.step += 1
        if self.step == self.at:
            self.act()


def kill_me():
    os.kill(os.getpid(), signal.SIGKILL)


def run_killed(root, work, at):
    """Run `work` in a process that is killed at boundary `at`; say whether it was."""

    def body():
        boundary = Boundary(kill_me, at)
        ledger = boundary.wrap(open_ledger(root), ["append"])
        registry = boundary.wrap(FileAliases(root), ["set_alias", "delete_alias"])
        work(ledger, registry)
        os._exit(0)

    process = fork.Process(target=body)
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL


def agree(ledger, registry):
    """Ledger and registry say the same, nothing is open, and every intent was closed exactly once."""
    now = standing(ledger)
    assert now.intent is None
    assert registry.aliases() == {name: v for name, v in now.aliases().items() if v is not None}
    for word in ("promotion", "rollback"):
        intents = [e.seq for e in ledger.entries(f"{word}.intent")]
        closed = [e.payload["intent_seq"] for e in ledger.entries(f"{word}.committed")]
        assert sorted(closed) == sorted(intents)
    ledger.verify_chain()


def every_boundary(make_world, work):
    at = 0
    while True:
        at += 1
        ledger, registry = make_world(at)
        killed = run_killed(registry.root, work, at)
        reconcile(ledger, registry)
        agree(ledger, registry)
        yield killed, ledger, registry
        if not killed:
            return


def make(tmp_path, at):
    root = tmp_path / str(at)
    root.mkdir()
    ledger, registry = open_ledger(root), FileAliases(root)
    add_agent(ledger, registry, 1)
    crown(ledger, registry, 1, by="kim")
    for version in (2, 3):
        add_agent(ledger, registry, version)
        add_decision(ledger, version, 1)
    return ledger, registry


def test_a_promotion_killed_at_any_boundary_is_all_or_nothing(tmp_path):
    winners = []
    for _, ledger, _ in every_boundary(lambda at: make(tmp_path, at), lambda led, reg: go(led, reg, 2)):
        winners.append(champion(ledger))
    assert winners == [1] + [2] * (
        len(winners) - 1
    )  # before the intent nothing happened, after it everything did
    assert len(winners) >= 9


def test_a_rollback_killed_at_any_boundary_is_all_or_nothing(tmp_path):
    def with_two(at):
        ledger, registry = make(tmp_path, at)
        go(ledger, registry, 2)
        return ledger, registry

    def back(ledger, registry):
        rollback(ledger, registry, expected_champion=2, reason="bad", by="kim")

    winners = [champion(ledger) for _, ledger, _ in every_boundary(with_two, back)]
    assert winners == [2] + [1] * (len(winners) - 1)


def test_a_reconcile_killed_at_any_boundary_is_repeated(tmp_path):
    def half_done(at):
        ledger, registry = make(tmp_path, at)
        assert run_killed(registry.root, lambda led, reg: go(led, reg, 2), 2)
        return ledger, registry

    assert {champion(ledger) for _, ledger, _ in every_boundary(half_done, reconcile)} == {2}


def test_an_open_intent_blocks_others_until_it_is_reconciled(tmp_path):
    ledger, registry = make(tmp_path, 0)
    assert run_killed(registry.root, lambda led, reg: go(led, reg, 2), 2)
    with pytest.raises(
        Conflict, match=r"promotion of agent/2 over agent/1 by kim \(ledger entry \d+\) is under way"
    ):
        go(ledger, registry, 3)
    (finished,) = reconcile(ledger, registry).finished
    assert finished.kind == "promotion.committed"
    with pytest.raises(Conflict, match="the champion is agent/2"):
        go(ledger, registry, 3)


def test_an_intent_whose_version_vanished_is_dropped(tmp_path):
    ledger, registry = make(tmp_path, 0)
    assert run_killed(registry.root, lambda led, reg: go(led, reg, 2), 2)
    registry.remove(2)
    (dropped,) = reconcile(ledger, registry).finished
    assert dropped.kind == "promotion.dropped"
    assert champion(ledger) == registry.aliases()["champion"] == 1
    go(ledger, registry, 3)
    assert champion(ledger) == 3


def test_a_writer_that_slept_through_everything_does_no_harm(tmp_path):
    """A pauses before it sets its alias, others finish for it and promote on, then A wakes up."""
    ledger, registry = make(tmp_path, 0)
    overtaken = []

    class Slow(FileAliases):
        def set_alias(self, alias, version):
            if not overtaken:
                overtaken.append(True)
                reconcile(ledger, FileAliases(self.root))
                add_decision(ledger, 3, 2)
                go(ledger, FileAliases(self.root), 3, expected=2)
            super().set_alias(alias, version)

    assert go(ledger, Slow(registry.root), 2).payload["to"] == 2
    assert registry.aliases()["champion"] == champion(ledger) == 3
    agree(ledger, registry)


def race(root, version, gate, answers):
    gate.wait()
    try:
        go(open_ledger(root), FileAliases(root), version)
        answers.put((version, "won"))
    except ForebayError as error:
        answers.put((version, f"{type(error).__name__}: {error}"))


@pytest.mark.parametrize("round_", range(10))
def test_of_two_promotions_at_once_exactly_one_wins(tmp_path, round_):
    ledger, registry = make(tmp_path, 0)
    gate, answers = fork.Barrier(2), fork.Queue()
    racers = [fork.Process(target=race, args=(registry.root, version, gate, answers)) for version in (2, 3)]
    for racer in racers:
        racer.start()
    said = dict(answers.get(timeout=30) for _ in racers)
    for racer in racers:
        racer.join()
    (winner,) = [version for version, text in said.items() if text == "won"]
    (loser,) = [text for version, text in said.items() if version != winner]
    assert loser.startswith("Conflict")
    assert f"agent/{winner} over agent/1 by kim" in loser
    assert champion(ledger) == winner
    agree(ledger, registry)


def test_promotions_killed_at_random_moments(tmp_path):
    """Three racing writers, killed whenever; after each round a reconcile makes everything agree."""
    chance = random.Random(0)
    for at in range(8):
        ledger, registry = make(tmp_path, at)
        gate, answers = fork.Barrier(2), fork.Queue()
        racers = [
            fork.Process(target=race, args=(registry.root, version, gate, answers)) for version in (2, 3)
        ]
        for racer in racers:
            racer.start()
        time.sleep(chance.uniform(0.0, 0.08))
        for racer in racers:
            os.kill(racer.pid, signal.SIGKILL)
            racer.join()
        reconcile(ledger, registry)
        agree(ledger, registry)
        assert champion(ledger) in (1, 2, 3)
