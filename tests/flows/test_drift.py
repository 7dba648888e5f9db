"""What somebody does in MLflow by hand, and what becomes of it: the real registry under a real workspace."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from flows import retrain
from flows.champions import promote_agent, rollback_champion
from flows.context import Context
from flows.registry import reconcile_registry
from flows.rewards import register_untrained
from flows.status import status
from tasks.core.digest import digest_files, digest_tree
from tasks.core.errors import Corrupt, NotFound
from tasks.core.settings import JudgeModel, VerifierModel
from tasks.promotion.promote import champion, places
from tests.flows.conftest import ENVIRONMENT, forebay, lay_workspace, loads, register_rival
from tests.flows.test_bad_input import says
from tests.flows.test_keys import judge
from tests.promotion.support import mlflow_server


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """agent/2 is champion, agent/1 its predecessor."""
    context = lay_workspace(tmp_path_factory.mktemp("drift") / "ws", tiny_base)
    register_rival(context)
    judge(context)
    promote_agent(context, "agent/2", "test")
    return context.workspace.root


@pytest.fixture
def context(template: Path, tmp_path: Path) -> Context:
    """A copy; MLflow keeps absolute paths, so the copy's artifacts are those of the template."""
    return Context.open(Path(shutil.copytree(template, tmp_path / "ws")))


def rule(context: Context, word: str) -> Context:
    policy = yaml.safe_load(context.workspace.policy.read_text())
    context.workspace.policy.write_text(yaml.safe_dump({**policy, "registry": {"on_drift": word}}))
    return Context.open(context.workspace.root)


def found(result: dict) -> list[str]:
    return [drift["says"] for drift in result["drift"]]


def test_a_registry_nobody_touched_costs_a_look(context: Context):
    head = context.ledger.head()
    result = reconcile_registry(context)
    assert (result["drift"], result["did"], result["repairs"]) == ([], [], [])
    assert context.ledger.head() == head


def test_an_alias_moved_by_hand_is_recorded_and_put_back(context: Context):
    context.registry.set_alias("champion", 1)
    head = context.ledger.head()
    looked = loads(forebay(context.workspace.root, "reconcile", "--dry-run", "--json"))
    assert found(looked) == ["the alias champion (agent/2) was moved to agent/1"]
    assert (context.ledger.head(), context.registry.aliases()["champion"]) == (head, 1)
    assert "champion (agent/2) was moved to agent/1" in forebay(context.workspace.root, "reconcile").stdout
    assert context.registry.aliases() == {"champion": 2, "previous": 1}
    entry = context.ledger.last("registry.drift")
    assert entry.payload["policy"] == "restore"
    assert entry.payload["trace"]["changed"].startswith("20")
    assert "moved to agent/1" in status(context)["drift"]["found"][0]


def test_a_deleted_alias_comes_back(context: Context):
    context.registry.delete_alias("previous")
    assert found(reconcile_registry(context)) == ["the alias previous (agent/1) was deleted"]
    assert context.registry.aliases() == {"champion": 2, "previous": 1}


def test_a_deleted_champion_is_registered_again_under_another_number(context: Context):
    client = context.registry._client
    client.delete_model_version("agent", "2")
    assert "champion" not in context.registry.aliases()
    result = reconcile_registry(context)
    assert found(result) == ["agent/2 (version 2) was deleted"]
    assert result["did"] == ["agent/2 is registered again, now MLflow's version 3"]
    assert places(context.ledger) == {1: 1, 2: 3}
    assert context.registry.aliases() == {"champion": 3, "previous": 1}
    assert champion(context.ledger) == 2
    assert client.get_model_version("agent", "3").tags["forebay.agent"] == "agent/2"
    assert context.registry.digest(3) == context.agent("champion").payload["digest"]
    # The next agent takes the next number of both; promotions and rollbacks go by Forebay's numbers.
    assert rollback_champion(context, "drill")["to"] == 1
    assert context.registry.aliases() == {"champion": 1, "candidate": 3}
    assert reconcile_registry(context)["drift"] == []
    assert loads(forebay(context.workspace.root, "verify", "agent/2", "--json"))["ok"]


def test_a_registered_model_deleted_whole_comes_back_and_numbers_are_not_given_twice(context: Context):
    context.registry._client.delete_registered_model("agent")
    result = reconcile_registry(context)
    assert found(result) == ["the registered model `agent` was deleted with all its versions"]
    assert places(context.ledger) == {1: 1, 2: 2}
    assert context.registry.aliases() == {"champion": 2, "previous": 1}
    context.registry._client.delete_registered_model("agent")
    rival = context.workspace.models / "second"
    shutil.copytree(context.workspace.models / "rival", rival)
    (rival / "NOTICE.txt").write_text("another")
    base = context.agent("1").payload
    from flows.champions import register_agent

    common = {"parents": base["parents"], "source": {"name": "x"}, "metrics": {}, "origin": "trained"}
    marks = {"tokenizer": base["tokenizer_digest"], "template": base["template_digest"]}
    assert register_agent(context, rival, digest_tree(rival), **common, **marks) == 3  # MLflow said 1
    assert places(context.ledger)[3] == 1
    assert "agent/1 (version 1) was deleted" in found(reconcile_registry(context))
    assert context.registry.aliases() == {"champion": 3, "previous": 2, "candidate": 1}
    assert places(context.ledger) == {1: 2, 2: 3, 3: 1}


def test_a_changed_digest_tag_is_set_right_and_a_stranger_is_never_taken_for_the_agent(context: Context):
    context.registry.tag(2, {"forebay.digest": "0" * 64})
    result = reconcile_registry(context)
    assert found(result) == [f"the digest tag of agent/2 (version 2) was changed to {'0' * 64}"]
    assert context.registry.digest(2) == context.agent("champion").payload["digest"]
    # A stranger that carries the deleted champion's digest, and its logged model's name: it is left alone.
    client, stranger = context.registry._client, context.workspace.root / "stranger"
    (stranger / "model").mkdir(parents=True)
    (stranger / "model" / "config.json").write_text("{}")
    digest = context.agent("champion").payload["digest"]
    client.delete_model_version("agent", "2")
    model = context.agent("champion").payload["mlflow"]["model_id"]
    client.create_model_version("agent", stranger.as_uri(), tags={"forebay.digest": digest})
    named = context.workspace.root / model / "artifacts"
    shutil.copytree(stranger, named)
    client.create_model_version("agent", named.as_uri(), tags={"forebay.digest": digest})
    assert reconcile_registry(context)["did"] == ["agent/2 is registered again, now MLflow's version 5"]
    assert (context.registry.aliases()["champion"], context.registry.served(5)) == (5, digest)


def test_the_way_back_is_there_though_its_version_was_deleted(context: Context):
    context = rule(context, "report")
    context.registry._client.delete_model_version("agent", "1")
    assert rollback_champion(context, "drill")["to"] == 1
    assert (champion(context.ledger), context.registry.aliases()["champion"]) == (1, 3)


def test_what_keeps_the_canary_from_judging_keeps_nobody_from_training(
    context: Context, monkeypatch: pytest.MonkeyPatch
):
    def gone(_: Context) -> dict:
        raise NotFound("agent/1 is not in the registry")

    monkeypatch.setattr(retrain, "watch_canary", gone)
    retrain._canary(context)


def test_a_version_that_cannot_be_put_back_leaves_the_others_as_they_should_be(context: Context):
    spoil(context, "1")
    context.registry._client.delete_model_version("agent", "1")
    context.registry.delete_alias("champion")
    for _ in range(4):
        (line,) = reconcile_registry(context)["did"]
        assert line.startswith("agent/1 cannot be put back:")
        assert context.registry.aliases() == {"champion": 2}
    told = [[d["says"] for d in entry.payload["found"]] for entry in context.ledger.entries("registry.drift")]
    gone, alias = "agent/1 (version 1) was deleted", "the alias champion (agent/2) was deleted"
    assert told == [[gone, alias], [gone]]  # and no more while nothing changes


def test_the_same_drift_after_it_was_put_right_is_a_new_one(context: Context):
    for times in (1, 2):
        context.registry.set_alias("champion", 1)
        reconcile_registry(context)
        assert len(context.ledger.entries("registry.drift")) == times
    head = context.ledger.head()
    reconcile_registry(context)
    assert context.ledger.head() == head


def test_a_champion_that_cannot_be_put_back_is_recorded_once(context: Context):
    spoil(context, "2")
    context.registry._client.delete_model_version("agent", "2")
    for _ in range(2):
        with pytest.raises(Corrupt):
            reconcile_registry(context)
    assert len(context.ledger.entries("registry.drift")) == 1


def test_an_agent_whose_files_changed_is_not_adopted_and_the_alias_goes_back(context: Context):
    context = rule(context, "adopt")
    spoil(context, "1")
    context.registry.set_alias("champion", 1)
    (line,) = reconcile_registry(context)["did"]
    assert line.startswith("agent/1 is not adopted:")
    assert context.registry.aliases() == {"champion": 2, "previous": 1}


def test_a_registration_writes_the_candidate_and_no_other_alias(context: Context):
    rewards = context.registry.for_office("reward")
    register_untrained(context, VerifierModel(name=ENVIRONMENT))
    rewards.set_alias("champion", 1)  # somebody's; reconciling records it first
    register_untrained(context, JudgeModel(model="m"))
    assert rewards.aliases() == {"champion": 1, "candidate": 2}


def spoil(context: Context, agent: str) -> None:
    folder = context.workspace.root / context.agent(agent).payload["path"]
    config = folder / "generation_config.json"
    config.write_bytes(config.read_bytes() + b"\n")


def test_nothing_is_registered_again_from_files_that_changed(context: Context):
    context.registry._client.delete_model_version("agent", "2")
    (context.workspace.root / context.agent("2").payload["path"] / "NOTICE.txt").write_text("changed")
    says(
        forebay(context.workspace.root, "reconcile"), 6, "NOTICE.txt is not what agent/2 was registered with"
    )
    assert places(context.ledger) == {1: 1, 2: 2}
    assert context.ledger.last("registry.drift") is not None


def test_by_the_policy_a_known_agent_is_adopted_and_a_stranger_is_not(context: Context):
    context = rule(context, "adopt")
    context.registry.set_alias("champion", 1)
    result = reconcile_registry(context)
    assert result["did"] == ["agent/1 is adopted as champion (was agent/2)"]
    entry = context.ledger.last("promotion.committed")
    assert (entry.payload["to"], entry.payload["decision"]) == (1, None)
    assert entry.payload["reason"].startswith("adopted from the registry")
    assert entry.payload["policy_digest"] == context.policy.digest()
    assert context.registry.aliases() == {"champion": 1, "previous": 2}
    assert loads(forebay(context.workspace.root, "verify", "--json"))["ok"]
    client = context.registry._client
    client.create_model_version("agent", (context.workspace.root / "nowhere").as_uri())
    context.registry.set_alias("champion", 3)
    result = reconcile_registry(context)
    assert found(result) == [
        "the alias champion (agent/1) was moved to version 3, which Forebay does not know"
    ]
    assert (champion(context.ledger), context.registry.aliases()["champion"]) == (1, 1)


def test_by_the_policy_drift_is_only_reported_and_once(context: Context):
    context = rule(context, "report")
    context.registry.set_alias("champion", 1)
    for _ in range(2):
        done = forebay(context.workspace.root, "reconcile")
        assert "Nothing was changed; the policy is registry.on_drift: report." in done.stdout
    assert context.registry.aliases()["champion"] == 1
    assert len(context.ledger.entries("registry.drift")) == 1
    context.registry.set_alias("champion", 2)  # by hand, and wrong again
    reconcile_registry(context)
    context.registry.set_alias("champion", 1)
    reconcile_registry(context)
    assert len(context.ledger.entries("registry.drift")) == 2


def test_a_change_that_was_cut_short_is_no_drift(context: Context):
    payload = {"to": 1, "from": 2, "decision": None, "reason": "", "by": "kim"}
    context.ledger.append("rollback.intent", "agent/1", payload)
    result = reconcile_registry(context)
    assert result["drift"] == []
    assert [change["kind"] for change in result["finished"]] == ["rollback.committed"]
    assert digest_files(context.agent("champion").payload["files"]) == context.agent("1").payload["digest"]


@pytest.mark.server
def test_a_deleted_version_comes_back_through_a_server_that_keeps_the_files(tmp_path: Path, tiny_base: Path):
    """What the server serves is downloaded and hashed; a file that was changed there is written anew."""
    with mlflow_server(tmp_path) as uri:
        context = lay_workspace(tmp_path / "ws", tiny_base, stores={"mlflow": uri})
        registry, agent = context.registry, context.agent("1").payload
        assert registry.served(1) == agent["digest"]
        assert registry.versions()[1].model == agent["mlflow"]["model_id"]
        registry._client.delete_model_version("agent", "1")
        (kept,) = (tmp_path / "kept").rglob("model/config.json")
        kept.write_text("{}")
        result = reconcile_registry(context)
        assert result["did"] == ["agent/1 is registered again, now MLflow's version 2"]
        restored = context.ledger.last("agent.restored").payload["mlflow"]
        assert restored["model_id"] == agent["mlflow"]["model_id"]
        assert registry.served(2) == agent["digest"]
        assert registry.aliases() == {"champion": 2}
        # A file that nobody registered cannot be taken away through the server: a new logged model takes its place.
        registry._client.delete_model_version("agent", "2")
        (kept.parent / "extra.json").write_text("{}")
        assert registry.served(2) is None
        reconcile_registry(context)
        again = context.ledger.last("agent.restored").payload["mlflow"]
        assert again["model_id"] != agent["mlflow"]["model_id"]
        assert registry.served(again["version"]) == agent["digest"]
        assert reconcile_registry(context)["drift"] == []
