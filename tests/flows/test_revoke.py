"""Data is revoked in a chain of generations: later runs leave it out, who learnt from it is flagged, bytes can go."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL

import pyarrow.parquet as pq
import pytest

from flows.champions import rollback_champion
from flows.context import Context
from flows.experience import (
    collect_into_segment,
    import_experience,
    seal_dataset,
    unsealed_rows,
    validate_dataset,
)
from flows.leaderboard import Question, plans, require_same
from flows.registry import settle
from flows.revoke import erase, listing, reinstate, revoke
from flows.reward_office import rollback_reward
from flows.rewards import episodes, heldout, import_preferences, read_set, replay_set, reward, train_reward
from flows.scoring import require_unflagged
from flows.service import watch_canary
from flows.status import status
from flows.training import register_trained, train_agent
from tasks.arena.environment import get
from tasks.core.digest import sha256_bytes, sha256_file
from tasks.core.errors import Conflict, NotFound, Refused, UsageError
from tasks.lineage.flagged import left_out, open_flags, read_learnt
from tasks.lineage.rows import consumed
from tasks.promotion.promote import champion
from tasks.replay.seal import find, restore
from tests.flows.conftest import ENVIRONMENT, forebay, lay_workspace, loads
from tests.flows.test_service import LATER
from tests.flows.test_service import rows as service_rows

SMALL = (
    f"collect.environments.{ENVIRONMENT}=8",
    "training.steps=2",
    "training.groups_per_step=3",
    "training.checkpoint_every=1",
)


def opened(root: Path, *more: str) -> Context:
    return Context.open(root, [*SMALL, *more])


def generation(context: Context, agent: int) -> int:
    """Let an agent make experience and train its successor from it on all that is sealed; return the version."""
    collect_into_segment(context, f"agent/{agent}")
    dataset = seal_dataset(context, announce=False)
    run = train_agent(context, dataset, agent)
    return register_trained(context, run, dataset, agent)["version"]


def newest(context: Context) -> dict:
    entry = context.ledger.last("dataset.sealed")
    assert entry is not None
    return dict(entry.payload)


def used(context: Context, agent: int) -> list[str]:
    run = context.agent(str(agent)).payload["parents"]["run"]
    entry = context.ledger.last("run.finished", run)
    assert entry is not None
    return learnt(context, entry.payload["outputs"])


def learnt(context: Context, outputs: dict) -> list[str]:
    return consumed(context.workspace, outputs)


def rows(context: Context, *columns: str) -> list[dict]:
    return [
        row
        for shard in newest(context)["shards"]
        for row in pq.read_table(context.workspace.root / shard["path"], columns=list(columns)).to_pylist()
    ]


@pytest.fixture(scope="module")
def _chain(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """agent/1 (base, champion) -> agent/2 -> agent/3; main/v1 sampled by agent/1, main/v2 by agent/2 as well."""
    root = lay_workspace(tmp_path_factory.mktemp("chain") / "ws", tiny_base).workspace.root
    context = opened(root)
    assert generation(context, 1) == 2
    assert generation(context, 2) == 3
    return root


@pytest.fixture
def chain(_chain: Path, tmp_path: Path) -> Context:
    root = tmp_path / "ws"
    shutil.copytree(_chain, root)
    return opened(root)


def episode_of(context: Context, group: str) -> str:
    return next(r["episode_id"] for r in rows(context, "episode_id", "group_id") if r["group_id"] == group)


def test_a_revoked_episode_is_in_no_later_run_and_its_descendants_are_flagged(chain: Context):
    group = used(chain, 2)[0]
    episode = episode_of(chain, group)
    before = train_agent(chain, newest(chain), 3)
    report = revoke(chain, f"episode:{episode}", "asked to be forgotten")
    assert report["episodes"] == 1
    assert [d["ref"] for d in report["descendants"]] == ["agent/3", "agent/2"]
    assert report["descendants"][1]["why"] == f"trained on group {group}, revoked by episode:{episode}"
    assert report["descendants"][0]["why"] == "started from agent/2"
    again = train_agent(chain, newest(chain), 3)
    assert again["key"] != before["key"]
    assert group not in learnt(chain, again)
    assert group not in {row.group_id for row in episodes(chain, newest(chain))}
    assert validate_dataset(chain)["verdict"] == "PASS"
    assert [f["ref"] for f in status(chain)["flags"]] == ["agent/3", "agent/2"]
    assert revoke(chain, f"episode:{episode}", "again")["new"] is False


def test_an_agent_that_did_not_use_the_group_is_not_flagged(chain: Context):
    table = {row["group_id"] for row in rows(chain, "group_id")}
    unused = sorted(table - set(used(chain, 2)) - set(used(chain, 3)))
    assert unused
    report = revoke(chain, f"group:{unused[0]}", "a test")
    assert report["descendants"] == []
    assert report["plan"] == []


def test_training_from_an_unflagged_agent_leaves_out_what_flagged_agents_sampled(chain: Context):
    group = used(chain, 2)[0]
    revoke(chain, f"group:{group}", "a test")
    root, table = newest(chain)["root"], rows(chain, "group_id", "behaviour_version")
    theirs = {row["group_id"] for row in table if row["behaviour_version"] == "agent/2"}
    clean, flagged = (
        left_out(chain.ledger, chain.workspace, root, chain.agent(str(v)).payload["digest"]) for v in (1, 3)
    )
    assert set(clean) == theirs | {group}
    assert set(flagged) == {group}
    run = train_agent(chain, newest(chain), 1)
    version = register_trained(chain, run, newest(chain), 1)["version"]
    assert f"agent/{version}" not in {flag.ref for flag in open_flags(chain.ledger, chain.workspace)}


def test_a_run_stops_when_its_data_is_revoked_while_it_trains(
    chain: Context, monkeypatch: pytest.MonkeyPatch
):
    from flows import training

    append, told = training._append_curve, []

    def curve(run_dir: Path, step: int, values: dict) -> None:
        append(run_dir, step, values)
        if not told:  # another process revokes between two updates
            told.append(revoke(opened(chain.workspace.root), f"group:{used(chain, 3)[0]}", "now"))

    monkeypatch.setattr(training, "_append_curve", curve)
    changed = opened(chain.workspace.root, "training.learning_rate=0.0001")
    with pytest.raises(Conflict, match="revoked or reinstated while it trained"):
        train_agent(changed, newest(chain), 3)
    assert chain.ledger.last("run.failed") is not None
    assert len(chain.ledger.entries("run.finished")) == 2
    monkeypatch.undo()
    assert used(chain, 3)[0] not in learnt(chain, train_agent(changed, newest(chain), 3))


def test_what_is_revoked_by_source_or_prompt_does_not_come_in_again(chain: Context, tmp_path: Path):
    chat = tmp_path / "chats.jsonl"
    line = {"messages": [{"role": "user", "content": "gcd of 4, 6:"}, {"role": "assistant", "content": " 2"}]}
    chat.write_text("".join(json.dumps({**line, "reward": r}) + "\n" for r in (1.0, 0.0)))
    how = {"written_by": "them", "recompute": False, "licence": "CC-BY-4.0", "feedback": "reward"}
    assert import_experience(chain, str(chat), "chat", source="forum", **how)["episodes"] == 2
    report = revoke(chain, "source:forum", "licence withdrawn")
    assert report["episodes"] == 2
    assert "segments" in report["files"][0]["path"]
    again = import_experience(chain, str(chat), "chat", source="forum", **how)
    assert again["episodes"] == 0
    assert sum(again["revoked"].values()) == 1
    assert "source:forum is revoked" in again["errors"][-1]
    prompt = rows(chain, "prompt_sha256")[0]["prompt_sha256"]
    revoke(chain, f"prompt:{prompt}", "a bad question")
    assert prompt not in {row.prompt_sha256 for row in episodes(chain, newest(chain))}


def test_a_dry_run_writes_nothing_and_bad_requests_say_what_to_do(chain: Context):
    head, group = chain.ledger.head(), used(chain, 2)[0]
    assert revoke(chain, f"group:{group}", "", dry_run=True)["descendants"][-1]["ref"] == "agent/2"
    for what, error in (
        ("episode:nobody", NotFound),
        ("dataset:main/v9", NotFound),
        ("something", UsageError),
        ("episode:", UsageError),
        (f"group:{group}", UsageError),  # no reason
    ):
        with pytest.raises(error):
            revoke(chain, what, "" if what.startswith("group") else "why")
    with pytest.raises(NotFound):
        reinstate(chain, f"group:{group}", "why")
    with pytest.raises(NotFound):
        erase(chain, f"group:{group}", "why")
    assert chain.ledger.head() == head


def test_reinstating_takes_the_flags_away_and_finds_the_old_run(chain: Context):
    group = used(chain, 2)[0]
    before = train_agent(chain, newest(chain), 3)
    revoke(chain, f"group:{group}", "a mistake")
    with pytest.raises(Refused, match=f"trained on group {group}"):
        require_unflagged(chain, "agent/2")
    reinstate(chain, f"group:{group}", "it was a mistake")
    assert listing(chain) == {"revoked": [], "descendants": [], "plan": []}
    require_unflagged(chain, "agent/2")
    assert train_agent(chain, newest(chain), 3)["key"] == before["key"]
    with pytest.raises(NotFound, match="not revoked"):
        reinstate(chain, f"group:{group}", "twice")


def test_erasing_takes_the_bytes_everywhere_and_leaves_the_rest_to_train_on(chain: Context):
    group = used(chain, 2)[0]
    old = next(s for s in newest(chain)["shards"] if group_in(chain, s["path"], group))
    parts = {row["group_id"] for row in rows(chain, "group_id")}
    assert copies_of(chain, old["sha256"]) >= 3  # workspace, cache, remote
    revoke(chain, f"group:{group}", "asked to be forgotten")
    report = erase(chain, f"group:{group}", "")
    assert copies_of(chain, old["sha256"]) == 0
    assert not list((chain.workspace.state / "decoded").glob(f"{old['sha256']}*"))
    assert report["versions"] == ["main/v3"]
    sealed = newest(chain)
    assert sealed["replaces"][0]["sha256"] == old["sha256"]
    assert {row["group_id"] for row in rows(chain, "group_id")} == parts - {group}
    assert validate_dataset(chain)["verdict"] == "PASS"
    run = train_agent(chain, sealed, 3)
    assert group not in learnt(chain, run)
    version = chain.ledger.last("dataset.sealed", "main/v2")
    assert version is not None
    with pytest.raises(Refused, match="erased on purpose"):
        train_agent(chain, version.payload, 3)
    with pytest.raises(Refused, match="cannot be reinstated"):
        reinstate(chain, f"group:{group}", "why")
    erased = chain.ledger.last("data.erased")
    assert erased is not None
    assert {"path": old["path"], "sha256": old["sha256"]} in erased.payload["files"]
    assert erase(chain, f"group:{group}", "")["entry"] == erased.seq  # again: nothing new
    assert chain.ledger.verify_chain()
    collect_into_segment(chain, "agent/3")  # life goes on
    assert seal_dataset(chain, announce=False)["version"] == 4


def group_in(context: Context, path: str, group: str) -> bool:
    return group in pq.read_table(context.workspace.root / path, columns=["group_id"])["group_id"].to_pylist()


def copies_of(context: Context, sha256: str) -> int:
    """Files with exactly these bytes anywhere under the workspace."""
    files = (path for path in context.workspace.root.rglob("*") if path.is_file())
    return sum(sha256_file(path) == sha256 for path in files)


def test_the_command_line_shows_and_schedules(chain: Context):
    root, group = chain.workspace.root, used(chain, 2)[0]
    said = forebay(root, "revoke", f"group:{group}", "--dry-run")
    assert "would leave all later sampling" in said.stdout, said.stderr
    report = loads(forebay(root, "revoke", f"group:{group}", "--reason", "a test", "--json"))
    assert report["entry"] == chain.ledger.last("data.revoked").seq
    shown = forebay(root, "revoke", "--list")
    assert f"group:{group}" in shown.stdout
    assert "agent/3" in shown.stdout
    assert "agent/3" in forebay(root, "status").stdout


KILLS = ("track_anew", "push", "_record", "erase")


@pytest.mark.slow
def test_an_erasure_that_is_killed_anywhere_is_finished_by_the_next_one(chain: Context):
    """Killed with SIGKILL before old shards leave the pointer, before the push, before the new version is in the
    ledger, and before cache and remote are emptied."""
    from tasks.replay import dvc_store, seal

    groups = sorted(set(used(chain, 2)) | set(used(chain, 3)))
    assert len(groups) >= len(KILLS)
    for point, group in zip(KILLS, groups, strict=False):
        old = next(s for s in newest(chain)["shards"] if group_in(chain, s["path"], group))
        revoke(chain, f"group:{group}", "asked to be forgotten")
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            setattr(
                seal if point == "_record" else dvc_store, point, lambda *_: os.kill(os.getpid(), SIGKILL)
            )
            with suppress(BaseException):
                erase(opened(chain.workspace.root), f"group:{group}", "")
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -SIGKILL, point
        assert chain.ledger.last("data.erased", f"group:{group}") is None
        report = erase(opened(chain.workspace.root), f"group:{group}", "")
        assert copies_of(chain, old["sha256"]) == 0, point
        assert len(report["versions"]) == 1
        left = {row["group_id"] for row in rows(chain, "group_id")}
        assert group not in left
        assert left
        shutil.rmtree(chain.workspace.replay / "main" / "shards")  # what is left can be fetched again
        restore(chain.workspace, find(chain.ledger, "main").manifest)
    assert len(chain.ledger.entries("data.erased")) == len(KILLS)
    assert len([e for e in chain.ledger.entries("dataset.sealed") if "erasing" in e.payload]) == len(KILLS)
    assert validate_dataset(chain)["verdict"] == "PASS"


def test_erasing_all_of_a_dataset_leaves_an_empty_version(chain: Context):
    shards = newest(chain)["shards"]
    revoke(chain, "dataset:main", "the customer left")
    report = erase(chain, "dataset:main", "")
    assert newest(chain)["rows"] == 0
    assert [copies_of(chain, shard["sha256"]) for shard in shards] == [0] * len(shards)
    assert set(report["files"]) >= {shard["path"] for shard in shards}
    collect_into_segment(chain, "agent/3")
    assert seal_dataset(chain, announce=False)["rows"] > 0


def test_waiting_rows_and_sets_of_preferences_are_erased_too(chain: Context):
    made = replay_set(chain, newest(chain))
    quoted = read_set(chain, made)[0].chosen_id
    collect_into_segment(chain, "agent/3")
    waiting = next(iter(unsealed_rows(chain, "main")))
    for episode in (quoted, waiting["episode_id"]):
        revoke(chain, f"episode:{episode}", "asked to be forgotten")
        assert erase(chain, f"episode:{episode}", "")["files"]
    assert not (chain.workspace.root / made["path"]).exists()
    assert waiting["group_id"] not in {row["group_id"] for row in unsealed_rows(chain, "main")}
    assert seal_dataset(chain, announce=False)["new_rows"] > 0
    files = (path for path in chain.workspace.root.rglob("*.jsonl") if path.is_file())
    assert not any(waiting["response_text"] and quoted in path.read_text() for path in files)


def test_after_an_erasure_the_gate_still_knows_what_was_trained_on_and_flags_stay(chain: Context):
    from flows.evidence import estimate_on_replay, trained_prompts

    group = used(chain, 2)[0]
    prompts = trained_prompts(chain, 3)
    revoke(chain, f"group:{group}", "asked to be forgotten")
    flags = [(flag.ref, flag.why) for flag in open_flags(chain.ledger, chain.workspace)]
    other = next(g for g in used(chain, 3) if g not in used(chain, 2))
    revoke(chain, f"group:{other}", "asked too")
    erase(chain, f"group:{group}", "")
    erase(chain, f"group:{other}", "")
    assert trained_prompts(chain, 3) == prompts
    assert estimate_on_replay(chain, 3, 1, "main")["path"]  # an evaluation of the retrain plan
    assert estimate_on_replay(chain, 3, 1, "main/v1")["path"]  # erased: it says so
    assert [(flag.ref, flag.why) for flag in open_flags(chain.ledger, chain.workspace)] == flags


def test_agents_that_learnt_from_what_a_flagged_one_sampled_stay_flagged_when_its_shard_is_rewritten(
    chain: Context,
):
    """agent/2 is flagged; another agent, from agent/1, learnt from groups that agent/2 sampled."""
    table = rows(chain, "group_id", "behaviour_version")
    theirs = {row["group_id"] for row in table if row["behaviour_version"] == "agent/2"}
    run = train_agent(opened(chain.workspace.root, "seed=3"), newest(chain), 1)
    version = register_trained(chain, run, newest(chain), 1)["version"]
    taught = theirs & set(learnt(chain, run))
    assert taught
    bad = min(set(used(chain, 2)) - set(learnt(chain, run)))
    revoke(chain, f"group:{bad}", "a test")
    assert f"agent/{version}" in {flag.ref for flag in open_flags(chain.ledger, chain.workspace)}
    spare = sorted(theirs - set(learnt(chain, run)) - set(used(chain, 3)))[0]
    revoke(chain, f"group:{spare}", "a test")
    erase(chain, f"group:{spare}", "")  # its shard, with the groups that taught, is written anew
    assert f"agent/{version}" in {flag.ref for flag in open_flags(chain.ledger, chain.workspace)}
    with pytest.raises(Refused, match="sampled"):
        require_unflagged(chain, f"agent/{version}")


def test_a_missing_shard_is_brought_back_before_anybody_says_who_learnt_from_it(chain: Context):
    revoke(chain, f"group:{used(chain, 2)[0]}", "a test")
    root, init = newest(chain)["root"], chain.agent("1").payload["digest"]
    flags, out = (
        open_flags(chain.ledger, chain.workspace),
        left_out(chain.ledger, chain.workspace, root, init),
    )
    assert len(out) > 1
    shutil.rmtree(chain.workspace.replay / "main" / "shards")
    assert left_out(chain.ledger, chain.workspace, root, init) == out
    assert open_flags(chain.ledger, chain.workspace) == flags
    assert (chain.workspace.replay / "main" / "shards").is_dir()


def test_erasing_a_dataset_takes_only_the_version_that_was_revoked(chain: Context):
    old = {row["group_id"] for row in rows(chain, "group_id")}
    report = revoke(chain, "dataset:main", "the customer left")
    assert report["revoked"] == "dataset:main/v2"
    collect_into_segment(chain, "agent/3")
    seal_dataset(chain, announce=False)
    new = {row["group_id"] for row in rows(chain, "group_id")} - old
    assert new
    erase(chain, "dataset:main", "")
    assert {row["group_id"] for row in rows(chain, "group_id")} == new


def test_what_is_sealed_while_it_is_erased_is_erased_too(chain: Context, monkeypatch: pytest.MonkeyPatch):
    """A seal takes the segment between the intent and its execution, and pushes the bytes."""
    from flows import revoke as office

    collect_into_segment(chain, "agent/3")
    waiting = next(iter(unsealed_rows(chain, "main")))
    group = waiting["group_id"]
    revoke(chain, f"group:{group}", "asked to be forgotten")
    carry_out, sealed = office._carry_out, []

    def seal_first(*given):
        if not sealed:
            sealed.append(seal_dataset(chain, announce=False))
        return carry_out(*given)

    monkeypatch.setattr(office, "_carry_out", seal_first)
    report = erase(chain, f"group:{group}", "")
    assert report["versions"] == ["main/v4"]
    assert group not in {row["group_id"] for row in rows(chain, "group_id")}
    shard = sealed[0]["shards"][-1]
    assert copies_of(chain, shard["sha256"]) == 0
    assert listing(chain)["revoked"][0]["erased"]


def test_erasing_leaves_sets_that_quote_other_revocations_alone(chain: Context):
    made = replay_set(chain, newest(chain))
    pairs = read_set(chain, made)
    quoted = {name for pair in pairs for name in (pair.chosen_id, pair.rejected_id)}
    table = rows(chain, "episode_id", "group_id")
    groups = {row["group_id"] for row in table if row["episode_id"] in quoted}
    unquoted = next(row["group_id"] for row in table if row["group_id"] not in groups)
    # One episode of a quoted group that no pair quotes itself, and a group that is not quoted at all.
    loose = next(
        row["episode_id"] for row in table if row["group_id"] in groups and row["episode_id"] not in quoted
    )
    revoke(chain, f"episode:{pairs[0].chosen_id}", "a test, not erased")
    revoke(chain, f"group:{unquoted}", "a test")
    erase(chain, f"group:{unquoted}", "")
    assert (chain.workspace.root / made["path"]).exists()
    revoke(chain, f"episode:{loose}", "asked to be forgotten")
    erase(chain, f"episode:{loose}", "")
    assert not (chain.workspace.root / made["path"]).exists()


MIXED = (
    "training.mixture.schedule=constant",
    "training.mixture.fresh=0.5",
    "training.groups_per_step=4",
    "collect.environments.largest=8",
)


def test_no_arena_starts_from_an_agent_that_learnt_from_revoked_data(chain: Context):
    question = Question((ENVIRONMENT,), ("vespo",), 1)
    flagged = opened(chain.workspace.root, "arena.start.policy=agent/3")
    (before,) = plans(flagged, question)
    revoke(chain, f"group:{used(chain, 2)[0]}", "a test")
    with pytest.raises(Refused, match=r"agent/3 started from agent/2, and every policy of the arena"):
        plans(flagged, question)
    with pytest.raises(Refused, match=r"agent/3 started from agent/2"):
        require_same(flagged, question, [before])  # also at the end of one that began before
    (clean,) = plans(opened(chain.workspace.root, "arena.start.policy=agent/1"), question)
    assert clean.without == ()


@pytest.fixture
def licensed(chain: Context, monkeypatch: pytest.MonkeyPatch) -> Context:
    """Tasks of `largest` have a licence of their own, and half of what a run learns is sampled fresh."""
    kind = type(get("largest"))
    monkeypatch.setattr(kind, "licence", property(lambda self: "CC-BY-NC-4.0"))
    return opened(chain.workspace.root, *MIXED)


def fresh(context: Context, run: dict) -> set[str]:
    return {
        row["env"]
        for shard in run["fresh"]
        for row in pq.read_table(context.workspace.root / shard["path"], columns=["env"]).to_pylist()
    }


def test_a_run_does_not_ask_environments_of_a_revoked_licence(licensed: Context):
    before = train_agent(licensed, newest(licensed), 1)
    assert "largest" in fresh(licensed, before)
    report = revoke(licensed, "licence:CC-BY-NC-4.0", "withdrawn")
    assert report["episodes"] > 0  # of the run's own shards
    run = train_agent(licensed, newest(licensed), 1)
    assert run["key"] != before["key"]
    assert fresh(licensed, run) == {ENVIRONMENT}
    collected = collect_into_segment(licensed, "agent/1", round=9)
    assert set(collected["environments"]) == {ENVIRONMENT}
    revoke(licensed, "source:rollout", "nothing that was sampled here")
    with pytest.raises(Refused, match="revoked by its source or licence"):
        train_agent(licensed, newest(licensed), 1)


def test_a_mixed_run_stops_when_a_licence_is_revoked_and_what_it_sampled_can_be_erased(
    licensed: Context, monkeypatch: pytest.MonkeyPatch
):
    from flows import training

    append, told = training._append_curve, []

    def curve(run_dir: Path, step: int, values: dict) -> None:
        append(run_dir, step, values)
        if not told:
            told.append(revoke(opened(licensed.workspace.root), "licence:CC-BY-NC-4.0", "now"))

    monkeypatch.setattr(training, "_append_curve", curve)
    with pytest.raises(Conflict, match="revoked or reinstated while it trained"):
        train_agent(licensed, newest(licensed), 1)
    left = sorted(licensed.workspace.runs.glob("*/fresh/*.parquet"))
    assert left
    episode = pq.read_table(left[0], columns=["episode_id"])["episode_id"][0].as_py()
    revoke(licensed, f"episode:{episode}", "asked to be forgotten")
    assert licensed.workspace.relative(left[0]) in erase(licensed, f"episode:{episode}", "")["files"]
    assert not left[0].exists()


def trained_reward(context: Context, preferences: dict, agent: str) -> str:
    made = train_reward(context, preferences, agent)
    return f"reward/{made['version']}"


def test_a_reward_model_trained_anew_is_clean_and_its_flag_outlives_the_set(chain: Context):
    more = opened(chain.workspace.root, f"collect.environments.{ENVIRONMENT}=60")
    collect_into_segment(more, "agent/1", round=5)
    made = replay_set(chain, seal_dataset(chain, announce=False))
    before = trained_reward(chain, made, "agent/1")
    entry = reward(chain, before).payload
    learnt = read_learnt(chain.workspace, entry["learnt"])
    assert 0 < len(learnt) < made["pairs"]  # not those that were held out
    revoke(chain, f"episode:{learnt[0]['chosen_id']}", "asked to be forgotten")
    group = used(chain, 2)[0]
    revoke(chain, f"group:{group}", "flags agent/2 and agent/3")
    assert before in flagged_now(chain)
    again = trained_reward(chain, made, "agent/1")
    assert again != before
    assert again not in flagged_now(chain)
    authors = {
        row["episode_id"]: row["behaviour_version"] for row in rows(chain, "episode_id", "behaviour_version")
    }
    taught = read_learnt(chain.workspace, reward(chain, again).payload["learnt"])
    assert {authors[pair["chosen_id"]] for pair in taught} == {"agent/1"}
    erase(chain, f"episode:{learnt[0]['chosen_id']}", "")
    assert not (chain.workspace.root / made["path"]).exists()
    assert before in flagged_now(chain)
    assert again not in flagged_now(chain)
    assert heldout(chain, entry)  # of what is left
    for new, old in ((before, None), (again, before)):
        crown(chain, new, old)
    with pytest.raises(Refused, match=f"{before} learnt from a pair of episode"):
        rollback_reward(chain, "a test")
    assert rollback_reward(chain, "a test", flagged=True)["flag"].startswith("learnt from a pair")


def flagged_now(context: Context) -> set[str]:
    return {flag.ref for flag in open_flags(context.ledger, context.workspace)}


def test_an_import_of_preferences_drops_what_is_revoked_and_says_so(chain: Context, tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"{i}?", "chosen": f"y{i}", "rejected": f"n{i}"} for i in range(4)]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    how = {"name": "pairs", "licence": "MIT", "slice": "chat"}
    report = revoke(chain, "source:forum", "not yet here, and not wanted")
    assert (report["episodes"], report["files"]) == (0, [])
    revoke(chain, f"prompt:{sha256_bytes(b'2?')}", "a bad question")
    with pytest.raises(Refused, match="source:forum is revoked"):
        import_preferences(chain, file, source="forum", **how)
    made = import_preferences(chain, file, source="elsewhere", **how)
    assert (made["pairs"], made["dropped"]["revoked"]) == (3, 1)
    assert "is revoked" in made["errors"][-1]
    again = revoke(chain, "source:elsewhere", "known by preferences only")
    assert again["files"][0]["path"] == made["path"]
    assert erase(chain, "source:elsewhere", "")["files"] == [made["path"]]
    assert not (chain.workspace.root / made["path"]).exists()


def crown(context: Context, new: str, old: str | None) -> None:
    """Put an agent or a reward model in office as the ledger records it; no gate is asked."""
    to, former = (name and int(name.partition("/")[2]) for name in (new, old))
    payload = {"to": to, "from": former, "decision": None, "reason": "", "by": "ada"}
    entry = context.ledger.append("promotion.intent", new, payload)
    context.ledger.append("promotion.committed", new, {**payload, "intent_seq": entry.seq})


@pytest.fixture
def crowned(chain: Context) -> Context:
    """agent/3 in office, after agent/2, which learnt from a group that is revoked."""
    crown(chain, "agent/2", "agent/1")
    crown(chain, "agent/3", "agent/2")
    settle(chain)
    revoke(chain, f"group:{used(chain, 2)[0]}", "asked to be forgotten")
    return chain


def test_nobody_is_rolled_back_unasked_onto_what_learnt_from_revoked_data(crowned: Context):
    root = crowned.workspace.root
    done = forebay(root, "rollback", "--json")
    assert done.returncode == Refused.exit_code
    assert "agent/2 trained on group" in json.loads(done.stdout)["error"]
    assert champion(crowned.ledger) == 3
    done = forebay(root, "rollback", "--flagged")
    assert done.returncode == 0, done.stderr
    assert "It is flagged: it trained on group" in done.stdout
    assert champion(crowned.ledger) == 2
    entry = crowned.ledger.last("rollback.committed")
    assert entry is not None
    assert entry.payload["flag"].startswith("trained on group")
    assert "flag" not in rollback_champion(crowned, "on to agent/1, which is clean")


def test_the_canary_goes_back_onto_a_flagged_agent_and_says_so(crowned: Context):
    service_rows(crowned, "champion", [0.0] * 60, LATER)
    service_rows(crowned, "previous", [1.0] * 60, LATER)
    found = watch_canary(crowned)
    assert found["rolled_back"]["to"] == 2
    assert found["rolled_back"]["flag"].startswith("trained on group")
    assert "agent/2, which is back, is flagged" in found["says"]


@pytest.mark.slow
def test_a_seal_that_was_killed_after_its_push_leaves_no_erased_bytes_and_loses_no_rows(chain: Context):
    from tasks.replay import seal

    collect_into_segment(chain, "agent/3")
    waiting = {row["group_id"] for row in unsealed_rows(chain, "main")}
    gone, sealed = min(waiting), used(chain, 2)[0]
    child = os.fork()
    if child == 0:
        seal._record = lambda *_: os.kill(os.getpid(), SIGKILL)  # type: ignore[assignment]
        with suppress(BaseException):
            seal_dataset(opened(chain.workspace.root), announce=False)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -SIGKILL
    (stray,) = (chain.workspace.replay / "main" / "shards").glob("v00003-*.parquet")
    pushed = sha256_file(stray)
    assert copies_of(chain, pushed) >= 3  # workspace, cache, remote
    for group in (gone, sealed):  # of the second, main/v3 becomes what is left of main/v2
        revoke(chain, f"group:{group}", "asked to be forgotten")
        erase(chain, f"group:{group}", "")
        assert copies_of(chain, pushed) == 0
    assert newest(chain)["version"] == 3
    again = seal_dataset(chain, announce=False)
    assert again["version"] == 4
    left = {row["group_id"] for row in rows(chain, "group_id")}
    assert waiting - {gone} <= left
    assert not left & {gone, sealed}
    shutil.rmtree(chain.workspace.replay / "main" / "shards")  # what is left can be fetched again
    restore(chain.workspace, find(chain.ledger, "main").manifest)
