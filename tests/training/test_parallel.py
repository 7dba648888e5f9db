from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from models.causal_lm import load_policy
from models.packing import pack, packed_logprobs
from tasks.core.errors import Corrupt, Unavailable
from tasks.training import parallel, worker
from tasks.training.parallel import World, rows_of
from tasks.training.settings import TrainingSettings
from tasks.training.trainer import train
from tasks.training.worker import train_in_processes
from tests.tiny import make_tiny_model
from tests.training import processes
from tests.training.replay import make_episodes, write_shards

ALONE = World(torch.device("cpu"))
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    make_tiny_model(path / "model", seed=1, hidden_size=32, heads=2, kv_heads=1)
    return path


def _close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(want)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-8, atol=1e-10)


def _same(got: list[dict[str, float]], want: list[dict[str, float]]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, rel=1e-8, abs=1e-10)


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(folder):
    """In float64: Adam divides by the root of squared gradients, so that rounding in float32 soon shows."""
    subprocess.run(
        parallel.torchrun(2, "tests.training.processes", str(folder)),
        check=True,
        timeout=200,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    untrained = load_policy(folder / "model", dtype="float64").get_parameter(UP)
    for lora in (False, True):
        two = torch.load(folder / f"lora-{lora}.pt")
        assert two["size"] == 2
        one = processes.whole_run(folder / "model", ALONE, lora=lora)
        _same(two["metrics"], one["metrics"])
        for got, want in zip(two["saved"], one["saved"], strict=True):
            _close(got, want)
        assert all((".lora_" in name) == lora for name in one["saved"][0])
        _close(two["export"], one["export"])
        for scores in (*two["references"], one["references"][1]):
            torch.testing.assert_close(scores, one["references"][0], rtol=0, atol=1e-12)
        assert not torch.allclose(one["export"][UP], untrained, atol=1e-4)
        # Saved by two processes, continued by two and by one.
        for again in (two["again"], processes.resumed(folder / "model", ALONE, two["saved"], lora=lora)):
            _same(again["metrics"], one["metrics"][processes.SAVED_AT :])
            _close(again["export"], one["export"])


def test_rows_are_shared_out_and_padded_to_the_same_number():
    samples = processes.episodes().samples
    rows = pack(samples, 30)
    shares = [rows_of(samples, 30, World(torch.device("cpu"), rank, 4)) for rank in range(4)]
    assert {len(share) for share in shares} == {-(-len(rows) // 4)}
    assert len(rows) % 4  # some are idle
    found = [row.samples for share in shares for row in share if row.samples]
    assert sorted(found) == sorted(row.samples for row in rows)
    (alone,) = [rows_of(samples, 10_000, ALONE)]
    assert [len(row.samples) for row in alone] == [len(samples)]


def test_an_idle_row_has_a_gradient_of_zero(folder):
    model = load_policy(folder / "model")
    idle = rows_of(processes.episodes().samples, 10_000, World(torch.device("cpu"), 1, 2))
    assert [row.samples for row in idle] == [()]
    logprobs, entropies = packed_logprobs(model, idle[0])
    assert logprobs.shape == entropies.shape == (0,)
    logprobs.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_scores_come_in_the_order_of_the_samples(folder, budget):
    samples = processes.episodes().samples
    scorer = parallel.split(load_policy(folder / "model", dtype="float64"), ALONE)
    logprobs, entropies = parallel.score(scorer, samples, budget, None, ALONE)
    assert not logprobs.requires_grad
    want = []
    for sample in samples:
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        with torch.no_grad():
            logs = scorer.model(input_ids=ids).logits[0].log_softmax(-1)
        places = [len(sample.prompt_ids) + n for n, t in enumerate(sample.trained) if t]
        want += [(logs[p - 1, ids[0, p]], -(logs[p - 1].exp() * logs[p - 1]).sum()) for p in places]
    torch.testing.assert_close(logprobs, torch.stack([a for a, _ in want]), rtol=0, atol=1e-12)
    torch.testing.assert_close(entropies, torch.stack([b for _, b in want]), rtol=0, atol=1e-12)


def _gradients(folder: Path, **settings: bool) -> list[torch.Tensor]:
    model = load_policy(folder / "model")
    parallel.prepare(model, **{"activation_checkpointing": False, "compile": False} | settings)
    for row in pack(processes.episodes().samples, 40):
        logprobs, entropies = packed_logprobs(model, row)
        (logprobs.sum() + 0.1 * entropies.sum()).backward()
    return [parameter.grad for parameter in model.parameters()]


def test_activation_checkpointing_leaves_the_gradient_bit_for_bit(folder, monkeypatch):
    plain = _gradients(folder)
    again = _gradients(folder, activation_checkpointing=True)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
    model = load_policy(folder / "model")
    parallel.prepare(model, activation_checkpointing=True, compile=False)
    (row,) = pack(processes.episodes().samples, 10_000)
    logprobs, _ = packed_logprobs(model, row)
    modes = []
    whole = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: (modes.append(self.training), whole(self, x))[1])
    logprobs.sum().backward()
    # Both layers ran again, with nothing within in training mode, where models have dropout.
    assert modes == [False, False]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs a C++ compiler")
def test_compiled_layers_have_the_same_gradient(folder):
    plain = _gradients(folder)
    before = counters["stats"]["unique_graphs"]
    compiled = _gradients(folder, activation_checkpointing=True, compile=True)
    assert counters["stats"]["unique_graphs"] > before
    for a, b in zip(compiled, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_without_a_compiler_the_layers_run_as_they_are(folder, monkeypatch):
    def none() -> str:
        raise InvalidCxxCompiler

    plain = _gradients(folder)
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.warns(UserWarning, match="install g\\+\\+ or set CXX"):
        same = _gradients(folder, compile=True)
    assert all(torch.equal(a, b) for a, b in zip(same, plain, strict=True))


def test_a_process_that_nobody_started_with_others_is_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert parallel.join("cpu") == ALONE
    assert ALONE.main
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parallel.join("auto") == ALONE
    with pytest.raises(Unavailable, match="sees no GPU"):
        parallel.join("cuda")


@pytest.mark.slow
def test_a_run_of_two_processes_is_started_followed_and_checked(tmp_path, tiny):
    job = {
        "run_dir": tmp_path / "run",
        "init_dir": tiny,
        "shards": write_shards(tmp_path / "data", make_episodes(tiny, groups=3)),
        "shard_root": tmp_path / "data",
        "settings": TrainingSettings(
            steps=3, groups_per_step=2, learning_rate=1e-3, token_budget=40, checkpoint_every=1
        ),
        "seed": 0,
        "device": "cpu",
        "dtype": "float32",
    }
    alone, seen = [], []
    want = train(**job | {"run_dir": tmp_path / "alone"}, on_metrics=lambda step, m: alone.append(m))
    got = train_in_processes(2, **job, on_metrics=lambda step, m: seen.append((step, m)))
    assert [step for step, _ in seen] == [1, 2, 3]
    for (_, a), b in zip(seen, alone, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["tokens_packed"] == b["tokens_packed"]
    assert got.steps == 3
    assert got.groups_consumed == want.groups_consumed
    one, two = (load_policy(result.export_dir) for result in (want, got))
    for a, b in zip(two.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


def test_a_process_tells_its_error_in_a_line(tmp_path, capfd):
    job = tmp_path / "job.json"
    job.write_text(
        json.dumps(
            {
                "run_dir": str(tmp_path / "run"),
                "init_dir": str(tmp_path / "nothing"),
                "shards": [],
                "shard_root": str(tmp_path),
                "settings": {},
                "seed": 0,
                "device": "cpu",
                "dtype": "float32",
            }
        )
    )
    with pytest.raises(SystemExit, match="2"):
        worker.main(job)
    told = json.loads(capfd.readouterr().out)
    assert told["error"] == "UsageError"
    assert "nothing cannot be read" in told["message"]


def test_errors_and_updates_are_passed_on():
    lines = [{"step": 1, "metrics": {"loss": float("nan")}}, {"error": "Corrupt", "message": "It is bad."}]
    code = "print('a library says hello')\n" + "".join(
        f"print({json.dumps(json.dumps(one))})\n" for one in lines
    )
    seen: list[int] = []
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as running:
        failure = worker._follow(running, lambda step, metrics: seen.append(step))
    assert seen == [1]
    assert isinstance(failure, Corrupt)
    assert str(failure) == "It is bad."


@pytest.mark.slow
def test_a_model_that_cannot_be_packed_is_refused_by_several_processes(tmp_path, tiny):
    """Run sequence by sequence, the processes would wait for one another for ever."""
    known = AutoConfig.from_pretrained(tiny).to_dict()
    shape = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = Qwen2Config(
        **{name: known[name] for name in (*shape, "num_key_value_heads", "tie_word_embeddings")},
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=0,
    )
    shutil.copytree(tiny, tmp_path / "model")
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    with pytest.raises(
        Unavailable, match=r"cannot be split over several processes; set compute\.processes=1"
    ):
        train_in_processes(
            2,
            run_dir=tmp_path / "run",
            init_dir=tmp_path / "model",
            shards=write_shards(tmp_path / "data", make_episodes(tiny, groups=3)),
            shard_root=tmp_path / "data",
            settings=TrainingSettings(steps=1, groups_per_step=3, token_budget=40),
            seed=0,
            device="cpu",
            dtype="float32",
        )
