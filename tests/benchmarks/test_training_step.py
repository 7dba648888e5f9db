"""The benchmark of the training step: what it runs, what it believes, what it prints and what it keeps."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import training_step
from benchmarks.training_step import BATCHES, MICRO, PEERS, TOKEN_BUDGETS, VARIANTS, Replay
from models.packing import Sample, pack

FACTS = {
    "samples": 8,
    "samples_micro": 2,
    "tokens": 1000,
    "tokens_padded": 2000,
    "tokens_packed": 500,
    "ess": 0.5,
    "flops": 1e12,
}


def words(**changed: Any) -> argparse.Namespace:
    values = {"device": "cpu", "threads": 1, "steps": 2, "token_budget": 64, "variants": list(VARIANTS)}
    return argparse.Namespace(**values | changed)


def figures(seconds: float, peak_mib: float, loss: float = 0.3) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "steps": 3,
        "peak_mib": peak_mib,
        "loss": loss,
        "grad_norm": 2.0,
        "rate_gflops": 1000.0,
    }


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Stand-ins for the figures of the processes, by variant; a test may change them."""
    found = {
        "replay": dict(FACTS),
        "forebay": figures(1.0, 110.0),
        "trl-1.16.0": figures(5.0, 500.0),
        "trl-1.16.0 micro": figures(4.4, 250.0),
        "trl-1.13.0": figures(4.5, 400.0),
        "trl-1.13.0 micro": figures(4.8, 200.0),
        "forebay again": figures(1.1, 100.0),
    }
    monkeypatch.setattr(training_step, "run_child", lambda variant, *_: found[variant])
    return found


def test_one_of_each_trl_as_it_ships_and_one_of_each_in_micro_batches() -> None:
    for version in PEERS:
        assert {f"trl-{version}", f"trl-{version}{MICRO}"} < set(VARIANTS)
    assert [VARIANTS[0], VARIANTS[-1]] == ["forebay", "forebay again"]
    assert [training_step.version_of(f"trl-1.13.0{how}") for how in ("", MICRO)] == ["1.13.0", "1.13.0"]


@pytest.mark.parametrize(
    ("size", "width", "budget", "expected"),
    [
        (8, 288, 1024, 2),
        (8, 80, 1024, 8),
        (8, 512, 1024, 2),
        (16, 240, 1024, 4),
        (9, 100, 700, 3),
        (4, 99, 10, 1),
    ],
)
def test_a_micro_batch_fits_the_budget_and_divides_the_batch(
    size: int, width: int, budget: int, expected: int
) -> None:
    replay = Replay([[1] * (width - 1)] * size, [[2]] * size, [0.0] * size, [[-1.0]] * size)
    assert replay.per_micro_batch(budget) == expected


def test_episodes_say_what_the_replay_says() -> None:
    replay = Replay([[1, 2], [1, 2]], [[3], [4, 5, 6]], [0.0, 1.0], [[-0.5], [-1.0, -2.0, -3.0]])
    episodes = replay.episodes
    assert episodes.behaviour_logprobs is not None
    assert episodes.behaviour_logprobs.tolist() == [-0.5, -1.0, -2.0, -3.0]
    assert [len(sample.response_ids) for sample in episodes.samples] == [1, 3]
    assert replay.advantages == pytest.approx([-(0.5**0.5), 0.5**0.5], rel=1e-5)


@pytest.mark.parametrize("name", list(BATCHES["cuda"]))
def test_on_a_gpu_rows_hold_about_eight_thousand_tokens(name: str) -> None:
    pairs = BATCHES["cuda"][name](torch.Generator().manual_seed(1), 151936)
    rows = pack([Sample(p, r, [True] * len(r)) for p, r in pairs], TOKEN_BUDGETS["cuda"])
    sizes = [len(row.input_ids) for row in rows]
    assert sum(sizes) / len(sizes) > 0.9 * TOKEN_BUDGETS["cuda"]
    assert len(rows) == 1 or name == "ragged"


def test_the_slower_run_of_ours_is_held_against_the_best_of_theirs(
    children: dict[str, dict[str, Any]],
) -> None:
    result = training_step.compare("tiny", "ragged", words())
    assert list(result["variants"]) == list(VARIANTS)
    assert result["ratios"] == pytest.approx({"faster": 4.0, "memory": 110 / 200, "/whole": 110 / 400})
    printed = training_step.table([result]).splitlines()
    assert printed[0].split()[-5:] == ["limit", "mfu", "faster", "memory", "/whole"]
    assert printed[1].split()[-4:] == ["100%", "4.00", "0.55", "0.28"]  # 1e12 FLOPs at 1e12 a second in 1 s
    assert len(printed) == 1 + len(VARIANTS)


def test_micro_batches_that_are_the_whole_batch_are_left_out(children: dict[str, dict[str, Any]]) -> None:
    children["replay"]["samples_micro"] = FACTS["samples"]
    result = training_step.compare("tiny", "ragged", words())
    assert not [name for name in result["variants"] if name.endswith(MICRO)]
    assert result["ratios"]["memory"] == result["ratios"]["/whole"]


def test_times_of_unequal_losses_are_not_believed(children: dict[str, dict[str, Any]]) -> None:
    children["trl-1.13.0 micro"]["loss"] *= 1.001
    with pytest.raises(SystemExit, match=r"loss of trl-1\.13\.0 micro"):
        training_step.compare("tiny", "ragged", words())


def test_a_card_that_is_known_has_a_utilisation_and_one_too_small_says_so(
    children: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    for version in PEERS:
        children[f"trl-{version}"] = {"failed": "out of memory"}
    result = training_step.compare("tiny", "ragged", words(device="cuda"))
    assert result["variants"]["forebay again"]["mfu"] == pytest.approx(1e12 / 989e12 / 1.1)
    assert result["ratios"] == pytest.approx({"faster": 4.0, "memory": 110 / 200})
    printed = training_step.table([result])
    assert printed.count("out of memory") == len(PEERS)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card of its own")
    result = training_step.compare("tiny", "ragged", words(device="cuda"))
    assert result["variants"]["forebay"]["mfu"] is None


def test_the_baseline_keeps_what_was_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_step, "BASELINE", tmp_path / "baselines" / "step.json")

    def result(model: str, batch: str, machine: str) -> dict[str, Any]:
        return {"model": model, "batch": batch, "machine": machine}

    first = [result("a", "ragged", "old"), result("b", "ragged", "old")]
    training_step.write(training_step.BASELINE, training_step.merged(first))
    training_step.write(training_step.BASELINE, training_step.merged([result("a", "ragged", "new")]))
    kept = json.loads(training_step.BASELINE.read_text())["results"]
    assert kept == [result("a", "ragged", "new"), result("b", "ragged", "old")]


@pytest.mark.slow
def test_the_product_and_trl_agree_on_a_tiny_model() -> None:
    trl = pytest.importorskip("trl", reason="the peer of this comparison is not installed")
    peer = f"trl-{trl.__version__}"
    variants = ["forebay", peer, peer + MICRO]
    result = training_step.compare("tiny", "grouped-short", words(variants=variants, token_budget=256))
    assert result["samples_micro"] == 2  # of 80 tokens
    assert list(result["variants"]) == variants
    for figures in result["variants"].values():
        assert figures["loss"] == pytest.approx(result["variants"]["forebay"]["loss"], rel=1e-4)
        assert figures["grad_norm"] > 0
        assert figures["steps"] == 2
        assert figures["seconds"] > 0
        assert figures["limit"] > 0
    assert set(result["ratios"]) == set(training_step.RATIOS)
    assert training_step.table([result]).splitlines()[1].split()[:2] == ["tiny", "grouped-short"]
