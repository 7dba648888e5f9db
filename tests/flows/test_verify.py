"""`forebay verify` in a real workspace: the DVC remote, MLflow's artifact store, exit codes, and what is read again."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from flows.champions import verify_ref
from flows.context import Context
from flows.experience import collect_into_segment, seal_dataset
from flows.judging import check_integrity
from tasks.core.digest import digest_tree, sha256_file
from tests.flows.conftest import ENVIRONMENT, forebay, lay_workspace
from tests.tiny import make_tiny_model

REF = "dataset:main"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """agent/1 and a dataset that it was sampled into: sealed and pushed."""
    base = make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    context = lay_workspace(tmp_path_factory.mktemp("verify") / "ws", base)
    few = Context.open(context.workspace.root, [f"collect.environments={{{ENVIRONMENT}: 2}}"])
    collect_into_segment(few)
    seal_dataset(few, announce=False)
    return context.workspace.root


@pytest.fixture
def context(template: Path, tmp_path: Path) -> Context:
    """A copy; MLflow's store names the template's folder, so its artifacts are those of the template."""
    return Context.open(Path(shutil.copytree(template, tmp_path / "ws", symlinks=True)))


def shard(context: Context) -> Path:
    return next((context.workspace.replay / "main" / "shards").glob("*.parquet"))


def flip(path: Path, *, keep_time: bool = False) -> None:
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # a hard link: the other names keep the bytes
    path.write_bytes(data)
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def stored(context: Context) -> Path:
    """The shard's object in the DVC remote."""
    wanted = sha256_file(shard(context))
    remote = (path for path in (context.workspace.remote / "files").rglob("*") if path.is_file())
    return next(path for path in remote if sha256_file(path) == wanted)


def report(context: Context, *sources: str, full: bool = True) -> dict:
    return verify_ref(context, REF, full=full, sources=sources)  # type: ignore[arg-type]


def test_shards_are_read_from_the_remote_and_nothing_is_brought_into_the_workspace(context: Context):
    shard(context).unlink()
    cache = context.workspace.root / ".dvc" / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    before = digest_tree(context.workspace.replay)
    assert [p["problem"] for p in report(context)["problems"]] == ["missing"]
    found = report(context, "remote")
    assert found["ok"], found
    assert found["bytes"] > stored_size(context)
    assert digest_tree(context.workspace.replay) == before
    assert not cache.exists() or not [p for p in cache.rglob("*") if p.is_file()]


def stored_size(context: Context) -> int:
    return max(
        path.stat().st_size for path in (context.workspace.remote / "files").rglob("*") if path.is_file()
    )


def test_a_shard_that_the_remote_lost_or_changed_is_named(context: Context):
    name, place = context.workspace.relative(shard(context)), stored(context)
    place.chmod(0o644)
    flip(place)
    assert report(context)["ok"]  # the workspace has the right one
    assert [(p["problem"], p["path"], p["owner"]) for p in report(context, "remote")["problems"]] == [
        ("changed", name, "dataset main/v1")
    ]
    place.unlink()
    assert [(p["problem"], p["path"]) for p in report(context, "remote")["problems"]] == [("missing", name)]


@pytest.mark.parametrize("act", ["changed", "missing"])
def test_a_listing_of_the_remote_that_was_changed_or_lost_is_named_itself(context: Context, act: str):
    (listing,) = (context.workspace.remote / "files").rglob("*.dir")
    listing.chmod(0o644)
    flip(listing) if act == "changed" else listing.unlink()
    found = report(context, "remote")
    (problem,) = found["problems"]
    assert (problem["problem"], problem["owner"]) == (act, "listing of dataset main/v1")
    assert [away["path"] for away in found["unreachable"]] == [context.workspace.relative(shard(context))]


def test_a_remote_that_is_away_is_unreachable_and_not_missing(context: Context):
    context.workspace.remote.rename(context.workspace.state / "elsewhere")
    found = report(context, "remote")
    assert (found["ok"], len(found["problems"])) == (False, 0)
    (away,) = found["unreachable"]
    assert (away["path"], away["owner"]) == (context.workspace.relative(shard(context)), "dataset main/v1")
    assert "is not there" in away["reason"]
    done = forebay(context.workspace.root, "verify", REF, "--source", "remote")
    assert done.returncode == 7, done.stdout + done.stderr
    assert "not verified: 1 unreachable" in done.stdout
    flip(shard(context).parents[1] / "manifests" / "v00001.json")
    done = forebay(context.workspace.root, "verify", REF, "--source", "remote", "--json")
    assert done.returncode == 6  # a difference weighs more
    said = json.loads(done.stdout)
    assert [len(said["by_problem"][word]) for word in ("changed", "missing")] == [1, 0]
    assert len(said["unreachable"]) == 1


def weights(context: Context, template: Path) -> tuple[str, Path]:
    """The path of an agent's weights in the workspace, and where MLflow has them."""
    found = next((template / ".forebay" / "mlartifacts").rglob("model/model.safetensors"))
    return f"{context.agent('1').payload['path']}/model.safetensors", found


def test_agents_are_read_as_mlflow_serves_them(context: Context, template: Path):
    name, served = weights(context, template)
    flip(context.workspace.root / name)
    assert [(p["problem"], p["path"]) for p in report(context)["problems"]] == [("changed", name)]
    assert report(context, "mlflow")["ok"]
    kept = served.read_bytes()
    try:
        flip(served)
        (problem,) = report(context, "mlflow")["problems"]
        assert (problem["problem"], problem["path"], problem["owner"]) == ("changed", name, "agent/1")
        served.unlink()
        (problem,) = report(context, "mlflow", "remote")["problems"]
        assert (problem["problem"], problem["path"]) == ("missing", name)
    finally:
        served.write_bytes(kept)


def test_an_mlflow_store_that_is_away_is_unreachable_and_not_made_anew(context: Context):
    (context.workspace.state / "mlflow.db").unlink()
    found = report(context, "mlflow")
    assert not found["problems"]
    assert {away["owner"] for away in found["unreachable"]} == {"agent/1"}
    assert not (context.workspace.state / "mlflow.db").exists()


def test_an_mlflow_server_that_does_not_answer_is_unreachable(context: Context):
    context = Context.open(context.workspace.root, ["stores.mlflow=http://127.0.0.1:9"])
    found = report(context, "mlflow")
    assert not found["problems"]
    assert "No MLflow server answers" in found["unreachable"][0]["reason"]


def test_the_command_reads_what_may_have_changed_and_all_with_full(context: Context):
    root = context.workspace.root
    time.sleep(2.1)  # what was written just now is not trusted to stay as it is
    first = json.loads(forebay(root, "verify", REF, "--json").stdout)
    again = json.loads(forebay(root, "verify", REF, "--json").stdout)
    assert (first["ok"], first["cached"], again["ok"], again["read"]) == (True, 0, True, 0)
    assert again["cached"] == first["read"]
    flip(shard(context), keep_time=True)
    done = forebay(root, "verify", REF)
    assert done.returncode == 6
    assert "1 changed" in done.stdout
    assert "unchanged ones not read (--full reads them)" in done.stdout
    full = json.loads(forebay(root, "verify", REF, "--full", "--json").stdout)
    assert (full["cached"], full["read"]) == (0, first["read"])


def test_the_gate_trusts_no_cache(context: Context):
    """A cache that somebody wrote hides a change from the command, and from nothing that acts."""
    name = f"{context.agent('1').payload['path']}/config.json"
    time.sleep(2.1)
    verify_ref(context, "agent/1")
    path, right = context.workspace.root / name, sha256_file(context.workspace.root / name)
    flip(path)
    lie(context, name, right)
    assert verify_ref(context, "agent/1")["ok"]
    assert check_integrity(context, 1, "0" * 64).verdict == "FAIL"
    assert not verify_ref(context, "agent/1", full=True)["ok"]


def lie(context: Context, name: str, sha256: str) -> None:
    import sqlite3

    stat = (context.workspace.root / name).stat()
    row = (name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev, sha256)
    with sqlite3.connect(context.workspace.digests) as cache:
        cache.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*row, 2**62))


def test_a_broken_ledger_in_one_sentence(context: Context):
    path = context.workspace.state / "ledger.db"
    path.write_bytes(path.read_bytes()[:1000])
    before = digest_tree(context.workspace.state)
    done = forebay(context.workspace.root, "verify", REF)
    assert done.returncode == 6
    assert "is cut off after 1,000 bytes" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert digest_tree(context.workspace.state) == before
