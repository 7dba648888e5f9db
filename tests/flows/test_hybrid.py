"""A training run that mixes in fresh groups, through the stages of a real cycle."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from flows.context import Context
from flows.cycle import Cycle, open_cycle, run_stage
from flows.revoke import revoke
from flows.training import read_curve
from tasks.core.digest import sha256_file
from tasks.core.errors import UsageError
from tasks.lineage.page.gather import gather
from tasks.lineage.standards.material import gather as material
from tasks.lineage.verify import verify
from tasks.rollout.fresh import shares
from tests.flows.conftest import lay_workspace

MIXED = ("training.mixture.schedule=constant", "training.mixture.fresh=0.25", "training.steps=4")


def _train(context: Context) -> dict:
    cycle = open_cycle(context)
    assert isinstance(cycle, Cycle)
    for stage in ("collect", "seal", "validate", "reward", "train", "register"):
        found = run_stage(context, cycle, stage)
        if stage == "train":
            trained = found
    return trained


def test_fresh_groups_are_real_episodes_named_in_the_record_and_verified(tmp_path: Path, tiny_base: Path):
    root = lay_workspace(tmp_path / "ws", tiny_base).workspace.root
    context = Context.open(root, MIXED)
    trained = _train(context)
    assert len(trained["fresh"]) == 4
    spans = [tuple(map(int, Path(shard["path"]).stem.split("-")[1:])) for shard in trained["fresh"]]
    # A quarter of eight groups, and for each that was refused one more later.
    assert spans[0] == (0, 1)
    assert [first for first, _ in spans[1:]] == [last + 1 for _, last in spans[:-1]]
    learnt = sum(row["fresh_groups"] for row in read_curve(context, trained["key"]))
    assert learnt == sum(_mixed(root / shard["path"]) for shard in trained["fresh"])
    assert spans[-1][1] + 1 >= 8 >= learnt - 1
    for step, (shard, (first, last)) in enumerate(zip(trained["fresh"], spans, strict=True)):
        path = root / shard["path"]
        assert sha256_file(path) == shard["sha256"]
        table = pq.read_table(path)
        assert table.num_rows == (last - first + 1) * 8
        assert set(table["behaviour_version"].to_pylist()) == {f"agent/1+{step}"}
    assert verify(context.ledger, context.workspace, "agent@candidate").ok

    group = pq.read_table(root / trained["fresh"][0]["path"])["group_id"][0].as_py()
    revoke(context, f"group:{group}", "asked to be forgotten")
    (flag,) = gather(context.ledger, context.workspace, "agent@candidate", time="2026-01-01T00:00:00").open
    assert f"agent/2 trained on group {group}, revoked by group:{group}" in flag.says
    (told,) = material(context.ledger, context.workspace, "agent@candidate").open_flags()
    assert told in flag.says

    victim = root / trained["fresh"][2]["path"]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    report = verify(context.ledger, context.workspace, "agent@candidate")
    assert [problem.path for problem in report.problems] == [trained["fresh"][2]["path"]]
    assert report.problems[0].owner.startswith("run ")


def _mixed(path: Path) -> int:
    """Groups whose answers earned different rewards: only those are admitted."""
    table = pq.read_table(path, columns=["group_id", "reward"]).to_pandas()
    return int((table.groupby("group_id").reward.nunique() > 1).sum())


def test_several_processes_do_not_sample(tmp_path: Path, tiny_base: Path):
    root = lay_workspace(tmp_path / "ws", tiny_base).workspace.root
    with pytest.raises(UsageError, match=r"compute\.processes=1"):
        _train(Context.open(root, (*MIXED, "compute.processes=2")))


def test_environments_are_dealt_in_proportion_and_evenly():
    weights = {"a": 4, "b": 2, "c": 1}
    assert shares(weights, 0, 7) == weights
    assert shares(weights, 21, 28) == weights
    assert sum(shares(weights, 3, 8).values()) == 5
    pieces = [shares(weights, start, start + 1) for start in range(7)]
    assert [name for piece in pieces for name in piece] == ["a", "b", "a", "c", "a", "b", "a"]
