"""`forebay evaluate attempts`: an agent's figures on tasks that it attempts several times."""

from __future__ import annotations

import json
import sys

import pytest

from flows.context import Context
from flows.parallel import task_runner
from tasks.arena.environment import get, tasks_digest
from tasks.core.digest import sha256_file
from tasks.core.errors import Unavailable
from tasks.core.stages import derive_seed
from tests.flows.conftest import ENVIRONMENT, forebay

ASKED = ("evaluate", "attempts", "agent/1", "--tasks", "12", "--samples", "3", "--json")


@pytest.mark.slow
def test_an_agents_figures_are_measured_kept_and_found_again(context: Context):
    root = context.workspace.root
    done = forebay(root, *ASKED)
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)
    assert (first["agent"], first["found"]) == ("agent/1", False)
    (one,) = first["slices"]
    assert (one["env"], one["tasks"], one["samples"]) == (ENVIRONMENT, 12, 3)
    seed = derive_seed(first["terms"]["seed"], ENVIRONMENT, "exam")
    assert one["tasks_digest"] == tasks_digest(ENVIRONMENT, get(ENVIRONMENT).tasks("heldout", 12, seed))
    figures = {name: figure["estimate"] for name, figure in one["figures"].items()}
    # The tiny model mostly answers 9 and sometimes 1, which is often right.
    assert 0 < figures["success"] < 1
    assert figures["success"] == pytest.approx(figures["pass@1"])
    assert figures["pass@1"] < figures["pass@2"] < figures["pass@3"] <= 1
    assert figures["turns"] == 1.0
    for figure in one["figures"].values():
        assert figure["low"] <= figure["estimate"] <= figure["high"]
    assert 0 < one["constant"] < 1
    assert 0 < one["random"] < 1
    evidence = root / first["evidence"]["path"]
    assert sha256_file(evidence) == first["evidence"]["sha256"]
    assert json.loads(evidence.read_text())["slices"] == first["slices"]

    assert json.loads(forebay(root, *ASKED).stdout) == {**first, "found": True}
    evidence.write_text("{}")  # somebody changed it: the figures are measured again, and are the same
    again = json.loads(forebay(root, *ASKED).stdout)
    assert not again["found"]
    assert again["slices"][0]["figures"] == one["figures"]
    shown = forebay(root, *ASKED[:-1])
    assert "pass@3" in shown.stdout
    assert "12 held-out tasks, 3 attempts each" in shown.stdout


def test_what_cannot_be_asked_is_said(context: Context):
    for words, code, says in (
        (("--envs", "nowhere"), 2, "nearest name"),
        (("--envs", f"{ENVIRONMENT},{ENVIRONMENT}"), 2, "each once"),
        (("--temperature", "0"), 2, "temperature above 0"),
    ):
        done = forebay(context.workspace.root, "evaluate", "attempts", *words)
        assert (done.returncode, says in done.stderr) == (code, True), done.stderr
    done = forebay(context.workspace.root, "evaluate", "attempts", "agent/9")
    assert (done.returncode, "There is no agent `agent/9`" in done.stderr) == (3, True)


@pytest.mark.slow
def test_an_environment_with_too_few_tasks_is_named(context: Context):
    asked = ("evaluate", "attempts", "--envs", "minigrid/Empty-Random-6x6", "--tasks", "60")
    done = forebay(context.workspace.root, *asked)
    assert done.returncode == 5
    assert "in its heldout split, but 60 were asked for" in done.stderr


@pytest.mark.slow
def test_on_ray_the_figures_are_the_same(context: Context):
    pytest.importorskip("prefect_ray")
    first = json.loads(forebay(context.workspace.root, *ASKED).stdout)
    evidence = context.workspace.root / first["evidence"]["path"]
    evidence.unlink()
    done = forebay(context.workspace.root, *ASKED, "--runner", "ray")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    assert not again["found"]
    assert again["slices"][0]["figures"] == first["slices"][0]["figures"]


def test_without_ray_the_user_hears_what_to_install(context: Context, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "prefect_ray", None)
    with pytest.raises(Unavailable, match=r"install forebay\[ray\]"):
        task_runner("ray", 1)
