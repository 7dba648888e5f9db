"""Keys where a user meets them: on the command line, in a workspace with a registered candidate."""

from __future__ import annotations

import json
import shutil
import sqlite3
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from flows.champions import promote_agent, rollback_champion, settle
from flows.context import Context
from flows.judging import record_decision
from flows.keys import ensure_service_key, init_keys, service_key
from tasks.core.digest import canonical_json, sha256_bytes
from tasks.core.errors import Corrupt, Refused
from tasks.core.heads import newest_seq
from tasks.core.ledger import GENESIS, _digest
from tasks.evaluation.paired import Agent, Baseline, pair_outcomes, write_outcomes
from tasks.promotion.gate import FileRef, Finding, Inputs, decide
from tasks.promotion.promote import champion
from tasks.replay.git_pointer import HEADS, set_aside
from tests.flows.conftest import forebay, lay_workspace, loads, register_rival
from tests.flows.test_bad_input import says
from tests.promotion.support import serving_file
from tests.promotion.test_gate import answers


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A workspace with the base as agent/1, champion, and another agent/2."""
    context = lay_workspace(tmp_path_factory.mktemp("keys") / "ws", tiny_base)
    register_rival(context)
    return context.workspace.root


@pytest.fixture
def context(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    monkeypatch.setenv("FOREBAY_KEYS", str(tmp_path / "mine"))
    return Context.open(Path(shutil.copytree(template, tmp_path / "ws")))


def judge(context: Context, approval: str = "none", right: int = 90) -> dict:
    """Let the real gate decide about agent/2 on outcomes that are made up."""
    agents = [Agent(v, context.agent(str(v)).payload["digest"]) for v in (2, 1)]
    paired = pair_outcomes(
        answers("sums", right, 120),
        answers("sums", 40, 120),
        (agents[0], agents[1]),
        {"sums": Baseline("0", 0.1)},
    )
    evidence = context.workspace.evidence
    path, sha256 = write_outcomes(evidence, paired)
    sound = Finding("PASS", agents[0].digest, sha256_bytes(b"sound"))
    outcomes = FileRef(path.relative_to(evidence).as_posix(), sha256)
    inputs = Inputs(outcomes, data=sound, integrity=sound, serving=serving_file(evidence))
    policy = context.policy.model_copy(update={"approval": approval})
    return record_decision(context, decide(evidence, inputs, policy))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_init_makes_a_service_key_without_a_question(context: Context):
    folder = context.workspace.keys
    assert mode(folder) == 0o700
    assert mode(folder / "service.key") == 0o600
    (key,) = loads(forebay(context.workspace.root, "keys", "list", "--json"))
    assert (key["name"], key["role"], key["id"]) == ("service", "service", service_key(context).id)
    assert ".forebay/" in (context.workspace.root / ".gitignore").read_text()
    assert "service" in context.workspace.trust.read_text()
    again = loads(forebay(context.workspace.root, "keys", "init", "--json"))
    assert (again["made"], again["trusted"], again["id"]) == (False, False, key["id"])


def test_an_approval_is_given_with_a_key_and_nothing_else(context: Context, tmp_path: Path):
    root = context.workspace.root
    judge(context, "required")
    says(forebay(root, "approve", "agent/2"), 3, "no approver's key", "forebay keys init --approver")
    made = loads(forebay(root, "keys", "init", "--approver", "--name", "kim", "--json"))
    assert mode(tmp_path / "mine" / "kim.key") == 0o600
    says(forebay(root, "promote", "agent/2"), 5, "asks for an approval", "forebay approve agent/2")
    says(forebay(root, "approve", "agent/2", "--key", "service"), 5, "`service`", "not approve and reject")
    given = loads(forebay(root, "approve", "agent/2", "--reason", "seen", "--json"))
    assert (given["by"], given["key"], given["reason"]) == ("kim", made["id"], "seen")
    loads(forebay(root, "promote", "agent/2", "--json"))
    assert champion(context.ledger) == 2
    report = loads(forebay(root, "verify", "agent@champion", "--json"))
    assert report["ok"]
    assert report["signatures"] == newest_and_heads(context) + 2  # the decision, the approval
    assert "signed by service" in forebay(root, "decision", "replay").stdout


def newest_and_heads(context: Context) -> int:
    last = context.ledger.last("promotion.committed")
    assert last is not None
    assert newest_seq(context.workspace.heads) == last.seq
    return len(list(context.workspace.heads.iterdir()))


def test_a_rejection_on_the_command_line_blocks_the_promotion(context: Context):
    root = context.workspace.root
    judge(context)
    init_keys(context, "kim", approver=True)
    done = forebay(root, "reject", "agent/2", "--reason", "answers too long")
    assert done.returncode == 0, done.stderr
    assert "agent/2 is rejected by kim" in done.stdout
    says(forebay(root, "promote", "agent/2"), 5, "rejected by `kim`", "answers too long")
    assert "rejected by kim" in forebay(root, "lineage", "show", "agent/2").stdout


def test_somebody_elses_public_key_is_taken_in_and_removed_again(context: Context, tmp_path: Path):
    root, mine = context.workspace.root, tmp_path / "mine"
    judge(context, "required")
    other = Context.open(Path(shutil.copytree(root, tmp_path / "hers")))
    init_keys(other, "lee", approver=True)
    says(forebay(root, "approve", "agent/2", "--key", "lee"), 5, "is not in keys.yaml", "forebay keys trust")
    says(forebay(root, "keys", "trust", str(mine / "lee.key")), 2, "holds a private key")
    says(forebay(root, "keys", "trust", str(mine / "lee.pub"), "--name", "service"), 4, "another key called")
    loads(forebay(root, "keys", "trust", str(mine / "lee.pub"), "--json"))
    loads(forebay(root, "approve", "agent/2", "--json"))
    loads(forebay(root, "keys", "remove", "lee", "--json"))
    says(forebay(root, "promote", "agent/2"), 5, "does not count", "`lee`", "was removed")
    assert champion(context.ledger) == 1


def test_a_key_file_that_others_can_read_signs_nothing(context: Context):
    root, key = context.workspace.root, context.workspace.keys / "service.key"
    judge(context)
    head = context.ledger.head()
    key.chmod(0o644)
    for words in (("promote", "agent/2"), ("retrain",)):
        says(forebay(root, *words), 5, "service.key can be read by others (mode 0644)", "chmod 600")
    assert context.ledger.head() == head


def test_a_cut_off_ledger_is_found_and_nothing_acts_on_it(context: Context):
    root = context.workspace.root
    judge(context)
    promote_agent(context, "agent/2", "test")
    with sqlite3.connect(context.workspace.state / "ledger.db") as raw:
        raw.execute("DELETE FROM ledger WHERE kind = 'promotion.committed' AND subject = 'agent/2'")
    done = forebay(root, "verify", "agent/2")
    assert done.returncode == 6
    assert "missing" in done.stdout
    assert "was cut off" in done.stdout
    says(forebay(root, "promote", "agent/2"), 6, "was cut off: `service` signed entry")
    with pytest.raises(Corrupt, match="was cut off"):
        rollback_champion(context, "test")


def test_a_ledger_cut_back_to_an_older_head_with_the_newer_ones_deleted_is_found(context: Context):
    """Every file that is left agrees; git's branch, and whoever it was pushed to, does not."""
    root = context.workspace.root
    judge(context)
    signed = newest_seq(context.workspace.heads)
    promote_agent(context, "agent/2", "test")
    with sqlite3.connect(context.workspace.state / "ledger.db") as raw:
        raw.execute("DELETE FROM ledger WHERE seq > ?", (signed,))
    for head in context.workspace.heads.iterdir():
        if int(head.stem) > signed:
            head.unlink()
    assert context.ledger.verify_chain() == signed
    assert champion(context.ledger) == 1
    done = forebay(root, "verify", "agent/2")
    assert done.returncode == 6
    assert "was cut off" in done.stdout
    says(forebay(root, "promote", "agent/2"), 6, "was cut off", "git's branch forebay/heads has kept it")
    git_pointer = ["git", "-C", str(root), "log", "--format=%s", "forebay/heads"]
    assert (
        "Heads of the ledger up to entry"
        in subprocess.run(git_pointer, capture_output=True, text=True).stdout
    )


def test_a_deleted_head_file_is_missed_and_stops_nobody(context: Context):
    judge(context)
    sorted(context.workspace.heads.iterdir())[-1].unlink()
    report = loads_any(forebay(context.workspace.root, "verify", "agent/2", "--json"))
    assert any("was deleted; git's branch forebay/heads" in p["owner"] for p in report["problems"])
    promote_agent(context, "agent/2", "test")
    assert champion(context.ledger) == 2


def loads_any(done: subprocess.CompletedProcess[str]) -> dict:
    return dict(json.loads(done.stdout))


def test_a_forged_decision_is_refused_by_promote_and_replay(context: Context):
    root = context.workspace.root
    payload = judge(context, "required")
    loose = decide_again(context, payload)
    context.ledger.append("decision.made", "agent/2", {**loose, "signature": payload["signature"]})
    says(forebay(root, "promote", "agent/2"), 6, "is about the decision")
    says(forebay(root, "decision", "replay"), 6, "is about the decision")
    context.ledger.append("decision.made", "agent/2", loose)
    says(forebay(root, "decision", "replay"), 5, "nobody signed it")
    says(forebay(root, "promote", "agent/2"), 5, "is not signed")


def decide_again(context: Context, payload: dict) -> dict:
    """The same evidence under a looser policy, recorded by somebody who has no key."""
    from tasks.promotion.gate import read_decision, write_decision

    strict = read_decision(context.workspace.root / payload["record"]["path"])
    loose = replace(strict, policy=context.policy)
    path = write_decision(context.workspace.evidence, loose)
    return loose.payload(context.workspace.relative(path))


def test_a_promotion_killed_before_its_head_was_signed_is_signed_by_the_next(context: Context):
    judge(context)
    entry = promote_agent(context, "agent/2", "test")
    head = context.workspace.heads / f"{entry['seq']:08d}.json"
    signed = head.read_bytes()
    head.unlink()
    settle(context)
    assert head.read_bytes() == signed


def unsign(context: Context) -> None:
    """Make the workspace one of a release without keys."""
    with sqlite3.connect(context.workspace.state / "ledger.db") as raw:
        raw.row_factory = sqlite3.Row
        rows = [dict(row) for row in raw.execute("SELECT * FROM ledger ORDER BY seq")]
        raw.execute("DELETE FROM ledger")
        prev = GENESIS
        for row in rows:
            payload = json.loads(row["payload"])
            payload.pop("signature", None)
            kind = row["kind"].replace(
                "key.trusted", "note"
            )  # entries name others by number, so none may vanish
            row |= {"kind": kind, "prev": prev, "payload": canonical_json(payload).decode()}
            row["digest"] = prev = _digest(row)
            raw.execute(
                "INSERT INTO ledger VALUES (:seq, :time, :kind, :subject, :payload, :prev, :digest)", row
            )
    context.workspace.trust.unlink()
    for folder in (context.workspace.keys, context.workspace.heads):
        shutil.rmtree(folder)
    set_aside(context.workspace.root, HEADS)


def test_a_workspace_of_an_earlier_release_adopts_keys_and_loses_nothing(context: Context):
    root = context.workspace.root
    judge(context)
    unsign(context)
    entries = len(context.ledger.entries())
    says(
        forebay(root, "promote", "agent/2"), 5, "no signing keys yet", "forebay keys init", "nothing recorded"
    )
    assert "unsigned: 1 entry; `forebay keys init`" in forebay(root, "verify", "agent/2").stdout
    assert "again, the same bytes; not signed" in forebay(root, "decision", "replay").stdout
    assert forebay(root, "keys", "init").returncode == 0
    assert len(context.ledger.entries()) == entries + 1
    assert "unsigned: 1 entry before this workspace had keys" in forebay(root, "verify", "agent/2").stdout
    says(forebay(root, "promote", "agent/2"), 5, "is not signed", "forebay decision replay agent/2 --sign")
    assert "signed by service" in forebay(root, "decision", "replay", "agent/2", "--sign").stdout
    loads(forebay(root, "promote", "agent/2", "--json"))
    report = loads(forebay(root, "verify", "agent/2", "--json"))
    assert (report["ok"], report["unsigned"]) == (True, [])


def test_lost_keys_are_not_replaced_in_silence(context: Context):
    context.workspace.trust.unlink()
    for act in (lambda: init_keys(context), lambda: service_key(context), lambda: judge(context)):
        with pytest.raises(Corrupt, match=r"keys\.yaml is gone"):
            act()
    ensure_service_key(context)
    assert not context.workspace.trust.exists()


def test_a_workspace_whose_private_key_is_elsewhere_says_so(context: Context):
    (context.workspace.keys / "service.key").unlink()
    with pytest.raises(Refused, match="No trusted service key has its private part"):
        judge(context)
    with pytest.raises(Exception, match="another key called `service`"):
        init_keys(context)
    init_keys(context, "second")
    assert service_key(context).name == "second"
    assert judge(context)["verdict"] == "PASS"
