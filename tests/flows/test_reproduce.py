"""A chain of three trained agents, made again bit for bit from a fresh clone and DVC's remote, and nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from flows.context import Context
from flows.reproduce import reproduce
from flows.revoke import erase, revoke
from tasks.core.digest import canonical_json
from tasks.core.errors import Corrupt, NotFound, Refused, UsageError
from tasks.core.ledger import Ledger
from tasks.core.workspace import Workspace
from tasks.lineage.recipe import chain_of, read_recipe, require_recorded
from tasks.lineage.verify import verify
from tasks.replay import git_pointer
from tests.flows.conftest import forebay, lay_workspace, loads
from tests.flows.test_revoke import generation, opened, used


def git(root: Path, *words: str) -> None:
    who = ["-c", "user.name=ada", "-c", "user.email=ada@localhost"]
    subprocess.run(["git", "-C", str(root), *who, *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder with `ws`, three trained generations, the last with fresh groups, and its remote beside it, `remote`."""
    folder = tmp_path_factory.mktemp("made")
    root = lay_workspace(folder / "ws", tiny_base).workspace.root
    remote = f"replay.remote={folder / 'remote'}"
    for agent, more in ((1, ()), (2, ()), (3, ("training.mixture.schedule=constant",))):
        assert generation(opened(root, remote, *more), agent) == agent + 1
    finished = Context.open(root).ledger.last("run.finished")
    assert finished is not None
    assert finished.payload["outputs"]["fresh"]
    git(root, "add", "params.yaml", "policy.yaml", "keys.yaml")
    git(root, "commit", "-qm", "settings")
    return folder


@pytest.fixture
def clone(made: Path, tmp_path: Path) -> Path:
    subprocess.run(["git", "clone", "-q", str(made / "ws"), str(tmp_path / "clone")], check=True)
    return tmp_path / "clone"


@pytest.mark.slow
def test_a_chain_of_three_is_reproduced_from_a_clone_and_the_remote_alone(
    made: Path, clone: Path, tmp_path: Path
):
    digests = {
        e.subject: e.payload["digest"] for e in Context.open(made / "ws").ledger.entries("agent.registered")
    }
    assert not (clone / ".forebay").exists()
    away = made / "away"
    (made / "ws").rename(away)
    try:
        into = tmp_path / "again"
        report = loads(forebay(clone, "reproduce", "agent/4", "--into", str(into), "--json"))
    finally:
        away.rename(made / "ws")
    assert [(a["agent"], a["verdict"]) for a in report["agents"]] == [
        (f"agent/{n}", "identical") for n in (1, 2, 3, 4)
    ]
    assert {a["agent"]: a["reproduced"] for a in report["agents"]} == digests
    assert {a["signed_by"] for a in report["agents"]} == {"service"}
    recorded = Ledger(Workspace(into).ledger_url).entries("agent.reproduced")
    assert [e.subject for e in recorded] == ["agent/1", "agent/2", "agent/3", "agent/4"]


def test_in_the_workspace_kept_weights_are_the_start_and_the_ledger_has_the_result(made: Path):
    context = Context.open(made / "ws")
    report = reproduce(made / "ws", "agent/3")
    assert [a["agent"] for a in report["agents"]] == ["agent/3"]
    assert report["verdict"] == "identical"
    last = context.ledger.last("agent.reproduced", "agent/3")
    assert last is not None
    assert last.payload["verdict"] == "identical"
    assert last.payload["seconds"] > 0


def test_a_recipe_that_was_changed_is_refused(made: Path, clone: Path):
    git(clone, "fetch", "-q", "origin", "forebay/data:forebay/data")
    recipe = read_recipe(clone, "agent/2")
    assert len(chain_of(clone, "agent/4")) == 4
    del recipe["signed_by"]
    path = clone / "data" / "recipes" / "agent-00002.json"
    path.parent.mkdir(parents=True)
    for change, says in (
        ({"run": {**recipe["run"], "seed": 5}}, "does not follow from its inputs"),
        ({"left_out": ["g"]}, "left out are others"),
        ({"agent": {**recipe["agent"], "digest": "0" * 64}}, "does not follow from its files"),
    ):
        path.write_text(json.dumps({**recipe, **change}))
        git_pointer.commit(clone, [path], "tampered", "2026-01-01T00:00:00+00:00")
        with pytest.raises(Corrupt, match=says):
            reproduce(clone, "agent/4")
    path.write_text(json.dumps(recipe))  # another spelling of the same: only the signature tells
    git_pointer.commit(clone, [path], "tampered", "2026-01-01T00:00:00+00:00")
    with pytest.raises(Corrupt, match="of another one"):
        reproduce(clone, "agent/2")


def test_a_recipe_that_is_no_recipe_is_refused_in_a_sentence(made: Path, clone: Path):
    git(clone, "fetch", "-q", "origin", "forebay/data:forebay/data")
    whole = read_recipe(clone, "agent/2")
    del whole["signed_by"]
    path = clone / "data" / "recipes" / "agent-00002.json"
    path.parent.mkdir(parents=True)
    run, result = whole["run"], whole["result"]
    for data in (
        b"{", b"\xff", b"[]", b"null", b"[" * 100_000,
        *(
            json.dumps({**whole, **odd}).encode()
            for odd in (
                {"run": "none"}, {"agent": []}, {"run": {**run, "device": "/dev/null"}},
                {"result": {**result, "metrics": {"loss": "low"}}},
                {"dataset": {**whole["dataset"], "remote": 5}}, {"dataset": {**whole["dataset"], "git_commit": None}},
                {"dataset": {**whole["dataset"], "shards": [1]}}, {"dataset": None},
            )
        ),
    ):  # fmt: skip
        path.write_bytes(data)
        git_pointer.commit(clone, [path], "odd", "2026-01-01T00:00:00+00:00")
        with pytest.raises(Corrupt, match="agent/2"):
            reproduce(clone, "agent/2")
    (clone / "data" / "recipes" / "revoked.json").write_text("[1]")
    git_pointer.commit(clone, [clone / "data/recipes/revoked.json"], "odd", "2026-01-01T00:00:00+00:00")
    with pytest.raises(Corrupt, match=r"revoked\.json"):
        reproduce(clone, "agent/1")


def forge(root: Path, worktree: Path) -> None:
    """Change what no digest covers of agent/2's recipe, which nobody signs any more."""
    git(root, "worktree", "add", "-q", str(worktree), "forebay/data")
    recipes = worktree / "data" / "recipes"
    recipe = json.loads((recipes / "agent-00002.json").read_text())
    recipe["result"]["metrics"]["loss"] = 9.0
    (recipes / "agent-00002.json").write_bytes(canonical_json(recipe) + b"\n")
    for number in (1, 2):
        (recipes / f"agent-0000{number}.dsse.json").unlink()
    git(worktree, "add", "-A")
    git(worktree, "commit", "-qm", "forged")
    git(root, "worktree", "remove", "--force", str(worktree))


def test_what_no_digest_covers_is_held_to_signature_and_ledger(made: Path, clone: Path, tmp_path: Path):
    shutil.copytree(made / "ws", tmp_path / "ws")
    git(clone, "fetch", "-q", "origin", "forebay/data:forebay/data")
    for root in (tmp_path / "ws", clone):
        forge(root, tmp_path / "worktree")
        with pytest.raises(Refused, match="is not signed, though"):
            reproduce(root, "agent/2")
    with pytest.raises(Corrupt, match="is not what the ledger says: its result is another"):
        reproduce(tmp_path / "ws", "agent/2", unsigned=True)
    ledger = Context.open(tmp_path / "ws").ledger
    assert ledger.last("agent.reproduced", "agent/2") is None
    other = read_recipe(made / "ws", "agent/3")
    require_recorded(ledger, other)
    with pytest.raises(
        Corrupt, match="its agent is another"
    ):  # under another number it is its own recipe still
        require_recorded(ledger, {**other, "agent": {**other["agent"], "version": 2}})
    with pytest.raises(Corrupt, match="its dataset is another"):
        require_recorded(ledger, {**other, "dataset": {**other["dataset"], "remote": "/elsewhere"}})
    # Agent/1's recipe is what the ledger says, so the workspace has signed it again; a clone cannot.
    assert reproduce(tmp_path / "ws", "agent/1")["agents"][0]["signed_by"] == "service"
    with pytest.raises(Refused, match=r"--unsigned goes by it"):
        reproduce(clone, "agent/1")
    (found,) = loads(forebay(clone, "reproduce", "agent/1", "--unsigned", "--json"))["agents"]
    assert (found["verdict"], found["signed_by"]) == ("identical", "")
    assert found["says"].endswith("no trusted key signed its recipe")


def test_bad_requests_say_what_to_do(made: Path, clone: Path, tmp_path: Path):
    with pytest.raises(NotFound, match="there are: agent/1, agent/2"):
        reproduce(clone, "agent/9")
    with pytest.raises(UsageError, match="by number"):
        reproduce(clone, "agent@champion")
    with pytest.raises(NotFound, match="neither in a workspace nor"):
        reproduce(tmp_path, "agent/2")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    with pytest.raises(Refused, match="is not empty"):
        reproduce(made / "ws", "agent/2", into=full)
    with pytest.raises(UsageError, match="cannot be a folder"):
        reproduce(made / "ws", "agent/2", into=full / "file")


def test_revoked_and_erased_data_is_not_learnt_from_once_more(made: Path, tmp_path: Path):
    shutil.copytree(made, tmp_path / "made")
    root = tmp_path / "made" / "ws"
    context = opened(root, f"replay.remote={tmp_path / 'made' / 'remote'}")
    subprocess.run(["git", "clone", "-q", str(root), str(tmp_path / "clone")], check=True)
    group = used(context, 3)[0]
    revoke(context, f"group:{group}", "asked to be forgotten")
    for agent in ("agent/3", "agent/4"):
        with pytest.raises(Refused, match="learn from that once more"):
            reproduce(root, agent)
    erase(context, f"group:{group}", "")
    sealed = context.ledger.entries("dataset.sealed")
    gone = {s["path"] for s in sealed[-2].payload["shards"]} - {
        s["path"] for s in sealed[-1].payload["shards"]
    }
    for ref in ("agent/4", f"dataset:{sealed[-1].subject}"):
        report = verify(context.ledger, context.workspace, ref)
        assert (report.ok, report.problems, report.unreachable) == (True, (), ())
        assert {file.path for file in report.erased} >= gone != set()
    assert "erased on purpose" in forebay(root, "verify", "agent/4").stdout.replace("\n", " ")
    (new,) = sealed[-1].payload["replaces"]
    written = next(s for s in sealed[-1].payload["shards"] if s not in sealed[-2].payload["shards"])
    assert new["sha256"] != written["sha256"]
    (root / written["path"]).write_bytes(b"others")
    report = verify(context.ledger, context.workspace, f"dataset:{sealed[-1].subject}")
    assert [problem.path for problem in report.problems] == [written["path"]]
    git(tmp_path / "clone", "fetch", "-q")
    with pytest.raises(Refused, match=r"erased on purpose \(group:"):
        reproduce(tmp_path / "clone", "agent/3")
