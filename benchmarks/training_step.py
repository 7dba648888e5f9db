"""CPU seconds and memory of one policy update's gradient, next to TRL's GRPOTrainer on the same batch.

    python -m benchmarks.training_step [--model NAME] [--batch NAME] [--steps N] [--threads N] [--device cuda]
                                       [--json PATH] [--save]

Every variant is a process of its own with the same random weights, the same replay and VESPO with the same behaviour
log-probabilities, which come from a perturbed snapshot of the weights. Loss and gradient norm must agree to 1e-4
before a time is believed. Times are CPU seconds (all threads) of forward and backward, best of the steps after a
warm-up, so that a busy machine disturbs them little. Memory is the peak resident size over the loaded model, less the
gradients; the optimizer has no state. Versions of TRL other than the installed one are put into benchmarks/out/peers.

`limit` is the share of the arithmetic limit: the FLOPs of the model on the distinct tokens of the batch over the
speed of a large matrix product measured in the same process, divided by the time. For `trl-*` it is taken with the
same FLOPs, so that shares compare. The CUDA mode takes wall seconds and the allocator's peak, and needs a free GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from benchmarks.machine import describe
from models import objectives
from models.memory import keep_freed_memory
from models.packing import MicroBatch, Sample, pack, packed_logprobs

HERE = Path(__file__).parent
OUT = HERE / "out"
BASELINE = HERE / "baselines" / "training_step.json"
PEERS = ("1.16.0", "1.13.0")
VARIANTS = ("forebay", *(f"trl-{version}" for version in PEERS))
TOKEN_BUDGET = 1024  # of a packed row
TOLERANCE = 1e-4
ALLOWANCE = 40.0  # seconds of wall time after which a slow variant stops short of --steps (never below two)
TARGET_SPREAD = 0.7  # standard deviation of the sequences' log W: an ESS of about 0.6

MODELS: dict[str, Callable[[], Any]] = {
    "smollm2-135m": lambda: LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    ),
    "qwen3-small": lambda: Qwen3Config(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    ),
    "qwen2-1.5b": lambda: Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
    ),
}


@dataclass(frozen=True, slots=True)
class Replay:
    """A batch of B stored samples."""

    prompts: list[list[int]]
    responses: list[list[int]]
    advantages: list[float]
    behaviour: list[list[float]]

    @property
    def samples(self) -> list[Sample]:
        return [Sample(p, r, [True] * len(r)) for p, r in zip(self.prompts, self.responses, strict=True)]

    @property
    def padded_tokens(self) -> int:
        return len(self.prompts) * (max(map(len, self.prompts)) + max(map(len, self.responses)))


def _ids(generator: torch.Generator, vocabulary: int, length: int) -> list[int]:
    return torch.randint(vocabulary, (length,), generator=generator).tolist()


def _grouped(prompt: int, group: int, answer: int) -> Callable[[torch.Generator, int], list[Any]]:
    def make(g: torch.Generator, vocabulary: int) -> list[Any]:
        shared = _ids(g, vocabulary, prompt)
        return [(shared, _ids(g, vocabulary, answer)) for _ in range(group)]

    return make


def _ragged(size: int, prompt: int, answer: int) -> Callable[[torch.Generator, int], list[Any]]:
    def make(g: torch.Generator, vocabulary: int) -> list[Any]:
        def length(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (1,), generator=g))

        return [
            (
                _ids(g, vocabulary, length(prompt // 4, prompt)),
                _ids(g, vocabulary, length(answer // 8, answer)),
            )
            for _ in range(size)
        ]

    return make


def _uniform(size: int, prompt: int, answer: int) -> Callable[[torch.Generator, int], list[Any]]:
    return lambda g, vocabulary: [
        (_ids(g, vocabulary, prompt), _ids(g, vocabulary, answer)) for _ in range(size)
    ]


def _turns(episodes: int, turns: int, prompt: int, answer: int, observation: int) -> Callable[..., list[Any]]:
    def make(g: torch.Generator, vocabulary: int) -> list[Any]:
        shared, pairs = _ids(g, vocabulary, prompt), []
        for _ in range(episodes):
            history = shared
            for _ in range(turns):
                reply = _ids(g, vocabulary, answer)
                pairs.append((history, reply))
                history = [*history, *reply, *_ids(g, vocabulary, observation)]
        return pairs

    return make


BATCHES: dict[str, Callable[[torch.Generator, int], list[Any]]] = {
    "grouped-long": _grouped(prompt=256, group=8, answer=32),
    "grouped-short": _grouped(prompt=64, group=8, answer=16),
    "ragged": _ragged(size=8, prompt=128, answer=384),
    "uniform": _uniform(size=8, prompt=128, answer=384),
    "multi-turn": _turns(episodes=4, turns=4, prompt=64, answer=32, observation=16),
}


class Meter:
    """Times steps and watches memory; decides when there are enough steps."""

    def __init__(self, device: torch.device, gradient_bytes: int, steps: int) -> None:
        self.seconds: list[float] = []
        self.results: list[tuple[float, float]] = []
        self._device, self._gradient_bytes, self._steps = device, gradient_bytes, steps
        self._base = self._peak = 0
        self._began = 0.0
        self._watching = threading.Event()

    def ready(self) -> None:
        """Everything before this call counts as the loaded model."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._base = self._peak = self._memory()
        self._began = time.perf_counter()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        self._watching.set()
        watcher = threading.Thread(target=self._watch, daemon=True)
        watcher.start()
        start = self.clock()
        yield
        self.seconds.append(self.clock() - start)
        self._watching.clear()
        watcher.join()

    def result(self, loss: Tensor | float, norm: Tensor | float) -> None:
        self.results.append((float(loss), float(norm)))

    @property
    def enough(self) -> bool:
        late = time.perf_counter() - self._began > ALLOWANCE and len(self.seconds) >= 2
        return late or len(self.seconds) > self._steps

    @property
    def peak(self) -> int:
        """Bytes over the loaded model and its gradients."""
        peak = torch.cuda.max_memory_allocated() if self._device.type == "cuda" else self._peak
        return peak - self._base - self._gradient_bytes

    def _memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated()
        return psutil.Process().memory_info().rss

    def clock(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def _watch(self) -> None:
        while self._watching.is_set():
            self._peak = max(self._peak, self._memory())
            time.sleep(0.01)


def forebay(model: PreTrainedModel, replay: Replay, meter: Meter) -> None:
    """The gradient of one update as `tasks.training.update.accumulate_gradients` makes it."""
    keep_freed_memory()  # as the trainer does
    samples, device = replay.samples, model.device
    lengths = torch.tensor([len(r) for r in replay.responses])
    advantages = torch.tensor(replay.advantages).repeat_interleave(lengths).to(device)
    behaviour = torch.tensor([b for row in replay.behaviour for b in row], device=device)
    whole = objectives.Counts(int(lengths.sum()), len(samples))
    objective = objectives.get("vespo")
    meter.ready()
    while not meter.enough:
        model.zero_grad(set_to_none=True)
        loss = 0.0
        with meter.step():
            for row in pack(samples, TOKEN_BUDGET):
                micro = row.to(device)
                logprobs, entropies = _packed(model, micro)
                batch = objectives.Batch(
                    logprobs=logprobs,
                    advantages=advantages[micro.index],
                    sequence=micro.sequence,
                    sequences=micro.sequences,
                    behaviour_logprobs=behaviour[micro.index],
                    entropies=entropies,
                )
                part = objectives.aggregate(objective.loss(batch), batch, "token-mean", whole)
                part.backward()  # type: ignore[no-untyped-call]
                loss += float(part.detach())
        meter.result(loss, gradient_norm(model))


def _packed(model: PreTrainedModel, micro: MicroBatch) -> tuple[Tensor, Tensor]:
    with torch.autocast(micro.input_ids.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        return packed_logprobs(model, micro)


def build(name: str, device: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        MODELS[name](), dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.to(device).train()  # type: ignore[arg-type]


def make_replay(model: PreTrainedModel, batch: str) -> tuple[Replay, float]:
    """Random tokens and advantages; behaviour log-probabilities of weights with noise, scaled to a useful effective
    sample size, which is returned too."""
    generator = torch.Generator().manual_seed(1)
    pairs = BATCHES[batch](generator, model.config.vocab_size)
    prompts, responses = [p for p, _ in pairs], [r for _, r in pairs]
    advantages = torch.randn(len(pairs), generator=generator).tolist()
    own = _plain_logprobs(model, prompts, responses)
    probe = 0.003
    spread = float(_log_ratios(own, _noisy_logprobs(model, probe, prompts, responses)).std())
    # The spread is nearly linear in the noise.
    behaviour = _noisy_logprobs(model, probe * TARGET_SPREAD / spread, prompts, responses)
    w = _log_ratios(own, behaviour).exp()
    ess = float(w.sum() ** 2 / (len(w) * (w * w).sum()))
    return Replay(prompts, responses, advantages, behaviour), ess


def _log_ratios(own: list[list[float]], behaviour: list[list[float]]) -> Tensor:
    return torch.tensor([sum(a) - sum(b) for a, b in zip(own, behaviour, strict=True)], dtype=torch.float64)


def _noisy_logprobs(model: PreTrainedModel, scale: float, *texts: list[list[int]]) -> list[list[float]]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator).to(p.device)
            p.add_(noise, alpha=scale * float(p.abs().mean()))
    found = _plain_logprobs(model, *texts)
    model.load_state_dict(state)
    return found


@torch.no_grad()
def _plain_logprobs(
    model: PreTrainedModel, prompts: list[list[int]], responses: list[list[int]]
) -> list[list[float]]:
    found = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([prompt + response], device=model.device)
        logits = model(input_ids=ids, logits_to_keep=len(response) + 1).logits[0, :-1].float()
        logs = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])
        found.append(logs[:, 0].tolist())
    return found


def model_flops(config: Any, rows: Sequence[MicroBatch]) -> float:
    """FLOPs of forward and backward on packed rows: linear layers, head on the scored positions, attention over
    ancestors."""
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    hidden, layers = config.hidden_size, config.num_hidden_layers
    per_token = layers * hidden * (2 * (heads + kv) * head_dim + 3 * config.intermediate_size)
    tokens = sum(len(row.input_ids) for row in rows)
    scored = sum(len(row.targets) for row in rows)
    pairs = sum(int(row.position_ids.sum()) + len(row.position_ids) for row in rows)
    head = config.vocab_size * hidden
    return 6.0 * (per_token * tokens + head * scored) + 12.0 * layers * heads * head_dim * pairs


def gradient_norm(model: torch.nn.Module) -> float:
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def product_rate(device: torch.device, meter: Meter) -> float:
    """FLOPs per clock second (all threads' seconds on the CPU) of a large matrix product."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1536, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    rates = []
    for _ in range(5):
        start = meter.clock()
        for _ in range(4):
            a @ b
        rates.append(4 * 2 * n**3 / (meter.clock() - start))
    return max(rates)


def child(arguments: argparse.Namespace) -> None:
    """Run one variant and print its figures; the variant `replay` writes the batch instead."""
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    model = build(arguments.model, arguments.device)
    path = OUT / f"replay-{arguments.model}-{arguments.batch}.json"
    if arguments.variant == "replay":
        replay, ess = make_replay(model, arguments.batch)
        rows = pack(replay.samples, TOKEN_BUDGET)
        OUT.mkdir(exist_ok=True)
        path.write_text(json.dumps(asdict(replay)))
        figures = {
            "tokens": sum(map(len, replay.prompts)) + sum(map(len, replay.responses)),
            "tokens_trained": sum(map(len, replay.responses)),
            "tokens_padded": replay.padded_tokens,
            "tokens_packed": sum(len(row.input_ids) for row in rows),
            "ess": ess,
            "flops": model_flops(model.config, rows),
        }
    else:
        replay = Replay(**json.loads(path.read_text()))
        gradients = sum(p.numel() * p.element_size() for p in model.parameters())
        meter = Meter(device, gradients, arguments.steps)
        rate = product_rate(device, meter)
        if arguments.variant == "forebay":
            forebay(model, replay, meter)
        else:
            from benchmarks.peers import trl_step

            assert arguments.variant == f"trl-{metadata.version('trl')}", metadata.version("trl")
            trl_step.run(model, replay, meter)
        loss, norm = meter.results[-1]
        figures = {
            "seconds": min(meter.seconds[1:]),
            "steps": len(meter.seconds) - 1,
            "peak_mib": meter.peak / 2**20,
            "loss": loss,
            "grad_norm": norm,
            "rate_gflops": rate / 1e9,
        }
    print("FIGURES " + json.dumps(figures))


def run_child(variant: str, model: str, batch: str, arguments: argparse.Namespace) -> dict[str, float]:
    """One process. The idle threads of OpenMP sleep, as spinning would count as CPU time."""
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(arguments.threads)}
    version = variant.removeprefix("trl-")
    if version != variant and version != metadata.version("trl"):
        folder = OUT / "peers" / variant
        install(version, folder)
        environment["PYTHONPATH"] = str(folder)
    command = [sys.executable, "-m", "benchmarks.training_step", "--variant", variant, "--model", model]
    command += ["--batch", batch, "--steps", str(arguments.steps), "--threads", str(arguments.threads)]
    command += ["--device", arguments.device]
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if done.returncode or not lines:
        raise SystemExit(
            f"{variant} failed on {model} {batch}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    figures: dict[str, float] = json.loads(lines[-1].removeprefix("FIGURES "))
    return figures


def install(version: str, folder: Path) -> None:
    """A version of TRL beside the installed one, with the installed one's dependencies."""
    if not (folder / f"trl-{version}.dist-info").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, f"trl=={version}"], check=True)


def compare(model: str, batch: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of all variants on one batch.

    Raises:
        SystemExit: loss or gradient norm differ by more than the tolerance.
    """
    started = time.perf_counter()
    facts = run_child("replay", model, batch, arguments)
    found: dict[str, Any] = {}
    for variant in arguments.variants:
        say(f"{model} {batch} {variant} ...")
        found[variant] = run_child(variant, model, batch, arguments)
    first = next(iter(found.values()))
    tolerance = TOLERANCE if arguments.device == "cpu" else 0.05  # bfloat16 there
    for variant, figures in found.items():
        for name in ("loss", "grad_norm"):
            if not math.isclose(figures[name], first[name], rel_tol=tolerance, abs_tol=1e-9):
                raise SystemExit(
                    f"{model} {batch}: {name} of {variant} is {figures[name]}, not {first[name]}"
                )
        figures["tokens_per_second"] = facts["tokens"] / figures["seconds"]
        figures["limit"] = facts["flops"] / (figures["rate_gflops"] * 1e9) / figures["seconds"]
    say("")
    return {"model": model, "batch": batch, **facts, "variants": found, "took": time.perf_counter() - started}


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        f"{'model':14}{'batch':15}{'padded/packed':>14}{'ESS':>6}  "
        f"{'variant':12}{'seconds':>9}{'(steps)':>8}{'tokens/s':>10}{'peak MiB':>10}{'limit':>7}{'faster':>8}{'memory':>8}"
    ]
    for result in results:
        variants = result["variants"]
        peers = [v for name, v in variants.items() if name != "forebay"]
        for name, v in variants.items():
            line = f"{result['model']:14}{result['batch']:15}"
            line += (
                f"{result['tokens_padded'] / result['tokens_packed']:14.2f}{result['ess']:6.2f}  {name:12}"
            )
            line += f"{v['seconds']:9.2f}{v['steps']:8d}{v['tokens_per_second']:10.0f}{v['peak_mib']:10.0f}{v['limit']:7.0%}"
            if name == "forebay" and peers:
                line += f"{min(p['seconds'] for p in peers) / v['seconds']:7.2f}x"
                line += f"{v['peak_mib'] / min(p['peak_mib'] for p in peers):8.2f}"
            lines.append(line)
    return "\n".join(lines)


def say(text: str) -> None:
    """The progress line, on a terminal rewritten in place."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), action="append", default=None)
    parser.add_argument("--batch", choices=list(BATCHES), action="append", default=None)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=5, help="measured steps after the warm-up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--save", action="store_true", help=f"write {BASELINE.relative_to(HERE.parent)}")
    parser.add_argument("--variant", choices=["replay", *VARIANTS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    default = ["qwen2-1.5b"] if arguments.device == "cuda" else ["smollm2-135m", "qwen3-small"]
    if arguments.variant:
        arguments.model, arguments.batch = arguments.model[0], arguments.batch[0]
        child(arguments)
        return
    results = [
        compare(model, batch, arguments)
        for model in arguments.model or default
        for batch in arguments.batch or list(BATCHES)
    ]
    print(f"{describe()}, {arguments.threads} threads")
    print(table(results))
    report = {"machine": describe(), "threads": arguments.threads, "results": results}
    for path in [arguments.json] * bool(arguments.json) + [BASELINE] * arguments.save:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
