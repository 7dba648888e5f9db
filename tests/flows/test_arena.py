"""The leaderboard by its commands, on a real environment and small."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import psutil
import pyarrow.parquet as pq
import pytest

from flows.cli.arena import _tell
from flows.cli.console import out
from flows.context import Context
from flows.leaderboard import Question, last_board, plans, require_same, results_of
from flows.revoke import erase, revoke
from flows.stability import stability
from models.causal_lm import load_policy, load_tokenizer
from tasks.arena.environment import get, tasks_digest
from tasks.core.digest import canonical_json, sha256_bytes, sha256_file
from tasks.core.errors import Conflict, Corrupt, NotFound, Refused, UsageError
from tasks.core.locks import file_lock
from tasks.leaderboard.causes import Contrast, Trouble, troubles
from tasks.leaderboard.cell import heldout_of, run_cell
from tasks.rollout.rollout import attempts
from tests.flows.conftest import ENVIRONMENT, environment, forebay, lay_workspace

ENV = "minigrid/BabyAI-GoToLocalS5N2"
ARENA = {
    "start": {"hidden": 32, "layers": 1, "heads": 2, "vocabulary": 400, "demonstrations": 64, "steps": 40},
    "recipe": {"steps": 3, "groups_per_step": 2, "group_size": 4, "first_groups": 8},
    "judging": {"tasks": 6, "samples": 2},
    "methods": {"mine": {"advantage": "gigpo", "clipping": {"objective": "vespo", "unit": "trajectory"}}},
}
ASKED = ("--methods", "grpo,mine", "--envs", ENV, "--seeds", "2", "--workers", "2", "--json")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Context, dict]:
    context = lay_workspace(tmp_path_factory.mktemp("arena") / "ws", tiny_base, arena=ARENA)
    done = forebay(context.workspace.root, "arena", "run", *ASKED, timeout=600)
    assert done.returncode == 0, done.stderr
    return context, json.loads(done.stdout)


@pytest.mark.slow
def test_every_cell_is_run_and_kept(compared):
    context, board = compared
    assert not board["found"]
    file = context.workspace.root / board["results"]["path"]
    assert sha256_file(file) == board["results"]["sha256"]
    results = json.loads(file.read_text())["results"]
    assert [(one["method"], one["seed"]) for one in results] == [
        ("grpo", 0),
        ("grpo", 1),
        ("mine", 0),
        ("mine", 1),
    ]
    for line in board["lines"]:
        runs = [
            one["after"]["figures"]["success"]["estimate"]
            for one in results
            if one["method"] == line["method"]
        ]
        assert line["figures"]["success"]["estimate"] == pytest.approx(sum(runs) / 2)
    assert {one["method"] for one in board["ranks"]} == {"grpo", "mine"}
    assert 0 <= board["floors"][ENV]["random"] <= 1
    page = (context.workspace.root / board["page"]).read_text()
    assert ENV in page
    assert "mine" in page
    assert "vespo unit trajectory" in page
    assert board["methods"]["mine"]["clipping"] == {
        "objective": "vespo", "options": {}, "unit": "trajectory", "sequence_mask": None
    }  # fmt: skip
    assert board["troubles"] == [asdict(one) | {"later": []} for one in troubles(results)]
    assert board["tasks_digest"] == {ENV: tasks_digest(ENV, heldout_of(get(ENV), 6))}
    assert {one["tasks_digest"] for one in results} == set(board["tasks_digest"].values())


@pytest.mark.slow
def test_a_cell_is_looked_at_as_a_run_is(compared):
    context, board = compared
    root = context.workspace.root
    asked = f"arena/mine/{ENV}/1"
    done = forebay(root, "stability", asked, "--json", "-o", "cell.html")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (cell,) = [one for one in results_of(context, board) if (one["method"], one["seed"]) == ("mine", 1)]
    assert (found["run"], found["steps"], found["stop_reason"]) == (cell["key"], 3, "finished")
    assert found["findings"] == []
    page = (root / "cell.html").read_text()
    assert f"stability of cell mine on {ENV} with seed 1, <code>{cell['key'][:12]}</code>" in page
    assert page.count("<figure>") > 5
    assert stability(context, f"cell:{cell['key'][:12]}") == found | {"page": None}
    assert stability(context, f"cell:{cell['key']}")["run"] == cell["key"]
    with pytest.raises(
        NotFound, match=rf"no cell arena/mine/{ENV}/7.*It has grpo, mine on {ENV}, with seeds 0 to 1"
    ):
        stability(context, f"arena/mine/{ENV}/7")
    with pytest.raises(NotFound, match=f"begins with nothing; those here begin with .*{cell['key'][:12]}"):
        stability(context, "cell:")
    assert forebay(root, "stability", "cell:zz").returncode == 3


@pytest.mark.slow
def test_a_comparison_that_is_older_than_its_parts_is_shown(compared):
    """What the ledger holds of one that told neither methods nor troubles nor tasks, and results without these."""
    context, board = compared
    old = [
        {key: value for key, value in one.items() if key != "tasks_digest"}
        for one in results_of(context, board)
    ]
    old[0]["findings"] = [{"driver": "format loss", "onset": 2}]
    data = canonical_json({"results": old})
    file = context.workspace.evidence / "arena" / f"{sha256_bytes(data)}.json"
    file.write_bytes(data)
    told = {
        key: value
        for key, value in board.items()
        if key not in ("methods", "troubles", "tasks_digest", "found")
    }
    told["results"] = {"path": context.workspace.relative(file), "sha256": sha256_bytes(data)}
    told["lines"] = [
        {
            **line,
            "figures": {name: value for name, value in line["figures"].items() if name != "valid_action"},
        }
        for line in board["lines"]
    ]
    with pytest.MonkeyPatch.context() as patched:
        entries = [SimpleNamespace(payload={"stage": "arena", "outputs": told})]
        patched.setattr(type(context.ledger), "entries", lambda *_: entries)
        shown = last_board(context)
        file.write_bytes(b"{}")
        with pytest.raises(Corrupt, match="is not the results that the ledger recorded"):
            last_board(context)
    assert (shown["methods"], shown["tasks_digest"]) == ({}, {})
    for line, before in zip(shown["lines"], board["lines"], strict=True):
        assert line["figures"]["valid_action"] == before["figures"]["valid_format"]
    assert [(one["method"], one["driver"], one["onset"]) for one in shown["troubles"]] == [
        ("grpo", "format loss", 2)
    ]


@pytest.mark.slow
def test_every_cell_has_a_run_in_mlflow(compared):
    context, board = compared
    results = json.loads((context.workspace.root / board["results"]["path"]).read_text())["results"]
    for one in results:
        tracked = context.registry._find_run("arena", one["key"])
        assert tracked is not None
        assert tracked.data.metrics["success/after"] == one["after"]["figures"]["success"]["estimate"]
        assert tracked.data.params["method"] == one["method"]


@pytest.mark.slow
def test_the_same_question_is_found_and_shown_again(compared):
    context, board = compared
    root = context.workspace.root
    again = forebay(root, "arena", "run", *ASKED)
    assert json.loads(again.stdout) == board | {"found": True}
    shown = forebay(root, "arena", "show")
    assert shown.returncode == 0
    for text in ("mean rank", "mine", "filtering", "held-out tasks", "No run collapsed", board["page"]):
        assert text in shown.stdout
    (context.workspace.root / board["page"]).unlink()
    made = json.loads(forebay(root, "arena", "run", *ASKED).stdout)  # from the cells that are there
    assert made == board
    assert last_board(context)["ranks"] == board["ranks"]


SMALL = {
    "start": {**ARENA["start"], "demonstrations": 8, "steps": 2},
    "recipe": {"steps": 2, "groups_per_step": 2, "group_size": 2, "first_groups": 1},
    "judging": {"tasks": 4, "samples": 2},
}
PLAIN, SHUT, SLEEPY = (f"tests.leaderboard.doors:{name}" for name in ("plain", "shut", "sleepy"))


@pytest.mark.slow
def test_a_cell_that_fails_costs_only_itself_and_is_tried_again(tmp_path: Path, tiny_base: Path):
    """A filter of which nothing is left, an environment that is not to be had, and one that hangs now and then."""
    context = lay_workspace(tmp_path / "ws", tiny_base, arena=SMALL, guard={"seconds": 1})
    root = context.workspace.root
    asked = ("--methods", "grpo,dapo", "--seeds", "1", "--workers", "2", "--envs", f"{PLAIN},{SHUT},{SLEEPY}")
    (root / "shut").touch()
    done = forebay(root, "arena", "run", *asked, "--json", timeout=400)
    assert done.returncode == 5, done.stderr
    board = json.loads(done.stdout)
    failed = {(one["env"], one["method"]): one for one in board["failures"]}
    assert {key for key in failed if key[0] == SHUT or key[1] == "grpo"} == {(SHUT, "grpo"), (SHUT, "dapo")}
    assert failed[SHUT, "grpo"]["error"] == "RuntimeError: The house is shut."
    assert "0 of 1 groups admitted" in failed[PLAIN, "dapo"]["error"]
    assert [one["method"] for one in board["ranks"]] == ["grpo"]
    assert board["unranked"] == ["dapo"]
    lines = {(line["env"], line["method"]) for line in board["lines"]}
    assert {(PLAIN, "grpo"), (SLEEPY, "grpo")} <= lines
    assert lines.isdisjoint(failed)
    # The one that hangs when one action is tried has no baselines, and everything else.
    assert set(board["floors"]) == {PLAIN, SLEEPY}
    assert "constant_baseline() of" in board["floors"][SLEEPY]["error"]
    assert board["floors"][PLAIN]["constant"] >= 0.25
    page = (root / board["page"]).read_text()
    assert "The house is shut." in page
    tracked = context.registry._find_run("arena", failed[SHUT, "grpo"]["key"])
    assert tracked is not None
    assert (tracked.info.status, tracked.data.tags["error"]) == ("FAILED", "RuntimeError: The house is shut.")
    shown = forebay(root, "arena", "show")
    assert shown.returncode == 0
    for text in (
        "not ranked",
        f"failed: grpo {SHUT} seed 0: RuntimeError: The house is shut.",
        "no baselines",
    ):
        assert text in shown.stdout

    kept = {path: path.stat().st_mtime_ns for path in root.glob(".forebay/arena/cells/*/result.json")}
    (root / "shut").unlink()
    again = forebay(root, "arena", "run", "--methods", "grpo", *asked[2:], "--json", timeout=400)
    assert again.returncode == 0, again.stderr
    whole = json.loads(again.stdout)
    assert (whole["failures"], whole["unranked"], len(whole["lines"])) == ([], [], 3)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    tracked = context.registry._find_run("arena", failed[SHUT, "grpo"]["key"])
    assert tracked is not None
    assert tracked.info.status == "FINISHED"


def prompts(root: Path) -> Counter[str]:
    """How many rows of each prompt the shards of the arena hold."""
    files = [
        *root.rglob("fresh/*.parquet"),
        *root.rglob("first.parquet"),
        *root.rglob("demonstrations.parquet"),
    ]
    return Counter(
        name
        for path in files
        for name in pq.read_table(path, columns=["prompt_sha256"])["prompt_sha256"].to_pylist()
    )


def test_a_revoked_prompt_is_not_asked_again_and_erasing_reaches_what_the_arena_sampled(context: Context):
    asked = Context.open(
        context.workspace.root, [f"arena={json.dumps(SMALL)}", "arena.recipe.first_groups=4"]
    )
    question, arena = Question((PLAIN,), ("grpo",), 1), context.workspace.state / "arena"
    (before,) = plans(asked, question)
    found = run_cell(before, arena)
    counts = prompts(arena)
    ((prompt, rows),) = counts.most_common(1)
    report = revoke(context, f"prompt:{prompt}", "a bad question")
    assert report["episodes"] == rows
    assert all(file["path"].startswith(".forebay/arena/") for file in report["files"])
    with pytest.raises(Conflict, match="revoked or reinstated while the arena ran"):
        require_same(asked, question, [before])
    (after,) = plans(asked, question)
    assert after.without == (prompt,)
    run_cell(after, arena)
    assert prompts(arena)[prompt] == rows  # no more of them than there were
    erased = erase(context, f"prompt:{prompt}", "")
    assert set(erased["files"]) == {file["path"] for file in report["files"]}
    assert prompts(arena)[prompt] == 0
    assert run_cell(before, arena) == found  # figures are no episodes
    assert erase(context, f"prompt:{prompt}", "")["entry"] == erased["entry"]


@pytest.mark.parametrize("what", ["licence:CC0-1.0", "source:rollout", "source:demonstration"])
def test_an_arena_asks_nothing_of_a_revoked_origin(context: Context, what: str):
    plans(context, Question((PLAIN,), ("grpo",), 1))
    revoke(context, what, "withdrawn")
    with pytest.raises(Refused, match=r"Nothing may be learnt from .*:plain"):
        plans(context, Question((PLAIN,), ("grpo",), 1))


@pytest.mark.parametrize(
    ("envs", "methods", "says"),
    [
        ((ENV,), ("grpoo",), "There is no method grpoo; did you mean grpo?"),
        (("minigrid/Nowhere",), ("grpo",), "nearest name"),
        ((ENV,), ("grpo", "grpo"), "The method grpo is named twice"),
        ((ENV,), (), "Name at least one method"),
        ((), ("grpo",), "Name at least one environment"),
        ((ENV,), ("odd",), "arena.methods.odd: advantage: value error, there is no advantage nothing"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anything_runs(context: Context, envs, methods, says):
    asked = Context.open(context.workspace.root, ["arena.methods.odd.advantage=nothing"])
    with pytest.raises(UsageError, match=re.escape(says)):
        plans(asked, Question(envs, methods, 1))


def test_bad_requests_have_their_exit_codes(context: Context):
    root = context.workspace.root
    done = forebay(root, "arena", "run", "--set", "arena.methods.grpo.advantage=gigpo")
    assert (done.returncode, "grpo is a method already" in done.stderr) == (2, True)
    assert forebay(root, "arena", "show").returncode == 3
    with pytest.raises(NotFound):
        last_board(context)


def test_cells_are_named_by_digits_and_one_that_goes_on_is_judged_so_far(context: Context):
    with pytest.raises(NotFound, match="Nothing was compared here yet"):
        stability(context, f"arena/grpo/{ENV}/0")
    with pytest.raises(NotFound, match="begins with ab; none is here"):
        stability(context, "cell:ab")
    cells = context.workspace.state / "arena" / "cells"
    for name in ("ab" * 8, "ac" * 8):
        (cells / name).mkdir(parents=True)
    with pytest.raises(UsageError, match="2 cells begin with a; give more digits"):
        stability(context, "cell:a")
    with pytest.raises(NotFound, match="Cell abababababab left no metrics here"):
        stability(context, "cell:ab")
    rows = [json.dumps({"step": step, "kl_k3": 0.1 if step < 4 else 0.4}) for step in range(1, 12)]
    (cells / ("ab" * 8) / "metrics.jsonl").write_text("\n".join(rows))
    found = stability(context, "cell:ab")
    assert (found["what"], found["steps"], found["stop_reason"]) == ("cell", 11, "not finished")
    assert [(one["driver"], one["onset"]) for one in found["findings"]] == [("policy drift", 4)]


def test_methods_are_listed_with_your_own(context: Context):
    done = forebay(
        context.workspace.root, "arena", "methods", "--json", "--set", "arena.methods.mine.advantage=gigpo"
    )
    found = json.loads(done.stdout)
    assert found["mine"]["advantage"] == "gigpo"
    assert found["sampo"]["filtering"] is True


def test_what_a_model_from_scratch_cannot_be_shown_is_said_at_once(context: Context):
    with pytest.raises(UsageError, match="largest has neither an expert nor a list of actions"):
        plans(context, Question(("largest",), ("grpo",), 1))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ("arena.methods=5", "arena.methods"),
        ("arena.start.heads=3", "must be a multiple of twice the heads"),
        ("arena.recipe.temperature=.inf", "finite"),
        ("arena.start.hidden=1000000000", "less than or equal to 4096"),
    ],
)
def test_settings_that_cannot_be_are_named(context: Context, changed: str, says: str):
    with pytest.raises(UsageError, match=says):
        Context.open(context.workspace.root, [changed])


def test_a_changed_environment_is_another_question(context: Context, monkeypatch: pytest.MonkeyPatch):
    question = Question((ENV,), ("grpo",), 1)
    (before,) = plans(context, question)
    monkeypatch.setattr("tasks.arena.environment.verifier_digest", lambda env: "another")
    (after,) = plans(context, question)
    assert before.key() != after.key()


@pytest.mark.slow
def test_a_language_model_starts_from_its_own_successes(context: Context):
    """The tiny model is right now and then; cloning what was right makes it right more often, before any method trains."""
    asked = Context.open(
        context.workspace.root,
        [
            "arena.start.policy=champion",
            "arena.start.successes=24",
            "arena.start.steps=40",
            "arena.start.learning_rate=0.003",
            "arena.recipe.steps=2",
            "arena.recipe.groups_per_step=2",
            "arena.recipe.first_groups=6",
            "arena.judging.tasks=40",
        ],
    )
    (plan,) = plans(asked, Question((ENVIRONMENT,), ("vespo",), 1))
    champion = context.agent("champion").payload
    assert plan.policy == str(context.workspace.root / champion["path"])
    found = run_cell(plan, context.workspace.state / "arena")
    env = get(ENVIRONMENT)
    bare = attempts(
        load_policy(Path(plan.policy)),
        load_tokenizer(Path(plan.policy)),
        env,
        heldout_of(env, 40),
        samples=4,
        temperature=1.0,
        seed=0,
        batch_rows=64,
    )
    before = sum(one.reward for group in bare for one in group) / 160
    assert found["before"]["figures"]["success"]["estimate"] > before + 0.05


@pytest.mark.slow
def test_a_cell_whose_process_is_killed_costs_only_itself(tmp_path: Path, tiny_base: Path):
    context = lay_workspace(tmp_path / "ws", tiny_base, arena=ARENA)
    root, asked = context.workspace.root, (*ASKED[:5], "1", "--workers", "1")
    plan, other = plans(context, Question((ENV,), ("grpo", "mine"), 1))
    run = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "arena", "run", *asked, "--json"],
        cwd=root, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    lock = root / ".forebay" / "arena" / "locks" / f"{plan.key()[:16]}.lock"
    deadline = time.monotonic() + 200
    while not (lock.exists() and lock.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(int(lock.read_text()), signal.SIGKILL)
    out, _ = run.communicate(timeout=200)
    assert run.returncode == 5
    board = json.loads(out)
    assert [(one["method"], one["error"]) for one in board["failures"]] == [
        ("grpo", "Its process ended with SIGKILL.")
    ]
    assert [line["method"] for line in board["lines"]] == ["mine"]
    again = forebay(root, "arena", "run", *asked, "--json", timeout=400)
    assert again.returncode == 0, again.stderr
    results = json.loads((root / json.loads(again.stdout)["results"]["path"]).read_text())["results"]
    undisturbed = run_cell(plan, tmp_path / "elsewhere")
    assert results[0]["after"] == undisturbed["after"]
    assert results[0]["curve"] == undisturbed["curve"]
    assert results[1]["key"] == other.key()


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_comparison_that_was_ended_leaves_nobody_behind_and_no_lock(
    tmp_path: Path, tiny_base: Path, sent: signal.Signals
):
    recipe = {**ARENA["recipe"], "steps": 200}
    root = lay_workspace(tmp_path / "ws", tiny_base, arena={**ARENA, "recipe": recipe}).workspace.root
    run = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "arena", "run", *ASKED[:-1]],
        cwd=root,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while (
        not (found := list(root.glob(".forebay/arena/cells/*/metrics.jsonl"))) and time.monotonic() < deadline
    ):
        time.sleep(0.2)
    assert found
    workers = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(sent)
    assert run.wait(timeout=30) != 0  # not when the cells are done
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    context = Context.open(root)
    (plan, *_) = plans(context, Question((ENV,), ("grpo",), 1))
    with file_lock(root / ".forebay" / "arena" / "locks" / f"{plan.key()[:16]}.lock", timeout=0):
        pass  # nobody holds the cell


def test_what_went_wrong_is_printed():
    trouble = Trouble(
        "e", "sapo", 1, "ab" * 32, "stale negatives", 12, (("policy drift", 14),), ("clipping",), "finished"
    )
    contrast = Contrast("clipping", "sapo", "grpo", ("sapo", "grpo"), (3, 1), 3)
    with out.capture() as printed:
        _tell([asdict(trouble)], [asdict(contrast)])
    told = printed.get()
    for text in (
        "1 run collapsed, none stopped by a guard.",
        "sapo e seed 1: stale negatives from update 12 on, then policy drift from 14, finished; `forebay stability cell:abababababab`",
        "stale negatives (clipping): ",
        "clipping alone tells sapo (3 of 3 runs went wrong) from grpo (1)",
    ):
        assert text in told
