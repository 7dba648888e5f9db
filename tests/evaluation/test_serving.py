"""The serving probe on a real small model: what it finds, and that no bad agent raises or stays behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.core.digest import digest_json
from tasks.evaluation.serving import Serving, _serve, measure, serving_evidence
from tasks.promotion.evidence.item import FileRef
from tasks.promotion.evidence.serving import serving_evidence as weigh
from tasks.promotion.policy import Policy
from tests.tiny import make_tiny_model

PROMPTS = ["gcd of 4, 6:", "1 + 1 ="]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory) -> Serving:
    """Measured where a folder named `tasks` must not stand in for ours."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "tasks").mkdir()
    (elsewhere / "tasks" / "__init__.py").write_text("raise SystemExit('the wrong tasks')")
    with contextlib.chdir(elsewhere):
        return measure(tiny, PROMPTS, max_new_tokens=5, repeats=3, threads=1)


def test_what_it_measures_is_there_and_plausible(served):
    assert served.ok
    assert served.repeated
    assert served.fault == ""
    assert len(served.seconds) == len(served.cpu_seconds) == 3
    assert all(len(row) == 2 for row in served.seconds)
    assert all(1 <= n <= 5 for n in served.tokens)
    assert 0 < served.load_seconds < 60
    assert 0 < served.answer_seconds(0.5) <= served.answer_seconds(0.95) < 60
    assert served.token_seconds(0.5) < served.answer_seconds(0.95)
    assert 100 < served.memory_mib < 4000  # an interpreter with PyTorch
    assert served.gpu_mib == 0


def test_the_answers_are_the_model_s_own_greedy_ones(tiny, served):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    ids = []
    for prompt in PROMPTS:
        given = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        whole = model.generate(
            **given, max_new_tokens=5, do_sample=False, eos_token_id=tokenizer.all_special_ids
        )
        ids.append(whole[0, given["input_ids"].shape[1] :].tolist())
    assert served.answers == digest_json(ids)
    assert served.tokens == tuple(map(len, ids))


def test_evidence_is_plain_json_and_reads_back(served):
    plain = json.loads(json.dumps(serving_evidence(served, Serving("gone", "agent"), PROMPTS, device="cpu")))
    assert plain["schema"] == "forebay.serving/1"
    back = Serving.from_json(plain["candidate"])
    assert back.answers == served.answers
    assert back.cost() == pytest.approx(served.cost(), rel=1e-2)
    assert Serving.from_json(plain["champion"]).problem == "gone"


def test_cost_is_that_of_the_best_pass_of_each_prompt():
    served = Serving(seconds=((1.0, 2.0), (4.0, 1.0)), cpu_seconds=((0.5, 1.0), (0.25, 2.0)), tokens=(2, 3))
    assert served.cost() == pytest.approx((0.25 + 1.0) / 5)
    assert Serving(**{**asdict(served), "gpu_mib": 9.0}).cost() == pytest.approx((1.0 + 1.0) / 5)
    assert served.answer_seconds(1.0) == 4.0
    assert served.token_seconds(1.0) == 2.0
    work = {"work_seconds": ((3.0, 4.0), (5.0, 2.0))}
    brief, long = (Serving(**{**asdict(served), **work, "tokens": n}) for n in ((1, 1), (8, 8)))
    assert brief.cost() == long.cost() == 5.0
    old = {name: value for name, value in asdict(served).items() if name != "work_seconds"}
    assert Serving.from_json(old).cost() == served.cost()


def test_saying_less_makes_an_agent_no_dearer(tiny, tmp_path, served):
    """The same weights, with its own first token to the first prompt made special: it stops after one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "brief"
    shutil.copytree(tiny, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = tokenizer(PROMPTS[0], return_tensors="pt", add_special_tokens=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    first = int(model(**given).logits[0, -1].argmax())
    tokenizer.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(first)]})
    tokenizer.save_pretrained(folder)
    found = measure(folder, PROMPTS[:1], max_new_tokens=32, repeats=3, threads=1)
    assert found.tokens == (1,)
    assert len(found.work_seconds) == 3
    assert found.cost() > 3 * found.answer_seconds(0.5)  # of 32 tokens, whatever was said


def test_an_agent_that_cannot_be_loaded_is_a_result_and_a_pickle_is_never_loaded(tmp_path, tiny):
    folder = tmp_path / "pickle"
    shutil.copytree(tiny, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = measure(folder, PROMPTS)
    assert (found.ok, found.fault) == (False, "agent")
    assert "cannot be read" in found.problem


def test_a_gpu_that_is_not_there_is_the_machine_s_fault_and_no_verdict(tiny, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = measure(tiny, PROMPTS, device="cuda")
    assert (found.ok, found.fault) == (False, "machine")
    assert "sees no GPU" in found.problem
    source = FileRef("serving/x.json", "0" * 64)
    item = weigh(serving_evidence(found, found, PROMPTS, device="cuda"), source, Policy())
    assert (item.verdict, item.counts) == ("INCONCLUSIVE", True)


def test_weights_that_are_no_numbers_are_the_agent_s_fault(tmp_path, tiny):
    folder = tmp_path / "nan"
    shutil.copytree(tiny, folder)
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["model.norm.weight"].fill_(torch.nan)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    found = measure(folder, PROMPTS)
    assert (found.ok, found.fault) == (False, "agent")
    assert "not numbers" in found.problem


def test_the_time_limit_kills_everything_it_started(tiny):
    before, begun = _children(), time.monotonic()
    found = measure(tiny, PROMPTS, timeout_s=0.3)
    assert time.monotonic() - begun < 10
    assert (found.ok, found.fault) == (False, "machine")
    assert "0.3 s" in found.problem
    assert _children() <= before


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", "machine"),
        ("CUDA error: device-side assert triggered", "agent"),
        ("size mismatch for lm_head.weight", "agent"),
    ],
)
def test_a_gpu_that_fails_is_not_the_agent_s_fault(tiny, monkeypatch, said, fault):
    def broken(*_):
        raise RuntimeError(said)

    monkeypatch.setattr("models.causal_lm.load_policy", broken)
    request = {"folder": str(tiny), "prompts": PROMPTS, "device": "cpu", "dtype": "float32"}
    found = _serve(request | {"max_new_tokens": 2, "repeats": 1, "threads": None})
    assert (found.ok, found.fault) == (False, fault)
    assert said in found.problem


def test_nothing_to_ask_is_a_mistake_of_the_caller(tiny):
    with pytest.raises(ValueError, match="one prompt"):
        measure(tiny, [])


def _children() -> set[int]:
    return {child.pid for child in psutil.Process(os.getpid()).children(recursive=True)}
