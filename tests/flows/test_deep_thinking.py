"""The deep-thinking ratio through the flows: measured in a collection, paid for in training, and looked at."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from flows.context import Context
from flows.cycle import Cycle, open_cycle, run_stage
from flows.experience import collect_into_segment, unsealed_rows
from flows.settings import Settings
from flows.training import read_curve
from tasks.core.errors import NotFound, UsageError
from tasks.replay.schema import DEEP_THINKING
from tests.flows.conftest import ENVIRONMENT, forebay, lay_workspace


def with_settings(context: Context, **changes: object) -> Context:
    values = context.settings.model_dump(mode="json")
    for name, value in changes.items():
        section, _, key = name.partition("__")
        values[section][key] = value
    return dataclasses.replace(context, settings=Settings.model_validate(values))


def test_a_collection_keeps_the_ratios_and_everything_else_stays(context: Context) -> None:
    plain = with_settings(context, collect__environments={ENVIRONMENT: 2})
    collect_into_segment(plain)
    before = list(unsealed_rows(plain, "main"))
    rated = with_settings(plain, collect__deep_thinking={}, replay__dataset="rated")
    collect_into_segment(rated, round=0)
    after = list(unsealed_rows(rated, "rated"))
    assert len(before) == len(after) == 16
    for one, other in zip(before, after, strict=True):
        components = json.loads(other.pop("reward_components"))
        assert 0 <= components.pop(DEEP_THINKING) <= 1
        assert components == json.loads(one.pop("reward_components"))
        assert {**one, "created_at": ""} == {**other, "created_at": ""}


@pytest.mark.slow
def test_a_run_pays_for_the_ratio_of_replayed_and_of_fresh_answers(tmp_path: Path, tiny_base: Path) -> None:
    context = lay_workspace(
        tmp_path / "ws",
        tiny_base,
        collect={
            "environments": {ENVIRONMENT: 24},
            "group_size": 8,
            "deep_thinking": {"threshold": 0.3, "rho": 0.5},
        },
        training={
            "steps": 2,
            "groups_per_step": 4,
            "mixture": {"schedule": "constant", "fresh": 0.5},
            "deep_thinking": {"coefficient": 0.2},
            "guards": {"max_kl": 9, "min_ess": 0},
        },
    )
    cycle = open_cycle(context)
    assert isinstance(cycle, Cycle)
    for stage in ("collect", "seal", "validate", "reward", "train"):
        trained = run_stage(context, cycle, stage)
    curve = read_curve(context, trained["key"])
    assert len(curve) == 2
    assert sum(update["fresh_groups"] for update in curve) > 0
    assert all(0 <= update["deep_thinking_ratio"] <= 1 for update in curve)


def test_the_command_compares_right_and_wrong_answers(context: Context) -> None:
    folder = context.workspace.root
    words = ("evaluate", "dtr", "agent/1", "--on", ENVIRONMENT, "--tasks", "4", "--samples", "4")
    told = forebay(folder, *words, "--json")
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert (found["agent"], found["answers"], found["threshold"], found["rho"]) == ("agent/1", 16, 0.5, 0.85)
    assert (found["unit"], found["norm"]) == ("bits", "normed/normed")
    assert 0 <= found["ratio"]["low"] <= found["ratio"]["estimate"] <= found["ratio"]["high"] <= 1
    again = json.loads(
        forebay(folder, *words, "--json", "--set", "collect.deep_thinking={threshold: 1, unit: nats}").stdout
    )
    assert (again["threshold"], again["unit"], again["norm"]) == (1, "nats", "normed/normed")
    assert again["ratio"]["estimate"] == 0  # every layer is within 1 nat
    for name in ("accuracy", "length", "certainty", "auroc_certainty"):
        assert again[name] == found[name]
    assert found["length"]["estimate"] >= 1
    assert found["certainty"]["estimate"] > 0
    shown = forebay(folder, *words).stdout
    assert "threshold 0.5 bits" in shown
    assert "AUROC of being shorter" in shown
    assert "self-certainty, nats" in shown


def test_bad_requests(context: Context) -> None:
    from flows.deep_thinking import evaluate_dtr

    with pytest.raises(NotFound):
        evaluate_dtr(context, "agent/9", ENVIRONMENT, 2, 2)
    with pytest.raises(UsageError, match="no environment"):
        evaluate_dtr(context, "champion", "reasoning_gym/gdc", 2, 2)
    with pytest.raises(UsageError, match="at least one task"):
        evaluate_dtr(context, "champion", ENVIRONMENT, 0, 2)


def test_think_at_n_is_compared_with_its_rivals_on_the_same_answers(context: Context) -> None:
    folder = context.workspace.root
    words = (
        "evaluate",
        "think",
        "agent/1",
        "--on",
        ENVIRONMENT,
        "--tasks",
        "4",
        "--samples",
        "6",
        "--prefix",
        "1",
    )
    told = forebay(folder, *words, "--json")
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    rows = {row["method"]: row for row in found["methods"]}
    assert (found["tasks"], found["samples"], found["prefix"]) == (4, 6, 1)
    assert rows["Think@n"]["tokens"] <= rows["Cons@n"]["tokens"]
    assert rows["Cons@n/2"]["tokens"] < rows["Cons@n"]["tokens"]
    plain = json.loads(
        forebay(folder, "evaluate", "dtr", *words[2:6], "4", "--samples", "6", "--json").stdout
    )
    assert rows["Mean@n"]["accuracy"]["estimate"] == plain["accuracy"]["estimate"]  # the same answers
    whole = json.loads(forebay(folder, *words, "--eta", "1", "--json").stdout)
    all_vote = {row["method"]: row for row in whole["methods"]}
    assert all_vote["Think@n"]["tokens"] == rows["Cons@n"]["tokens"]
    shown = forebay(folder, *words).stdout
    for text in ("Self-Certainty@n", "less random votes", "no longer than the prefix of 1 tokens"):
        assert text in shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--on", "calculator"), "calculator has up to 2 turns"),
        (("--eta", "0"), "above 0 and at most 1"),
        (("--prefix", "0"), "--prefix"),
    ],
)
def test_think_at_n_says_what_it_cannot_do(context: Context, words: tuple[str, ...], says: str) -> None:
    done = forebay(context.workspace.root, "evaluate", "think", *words)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
