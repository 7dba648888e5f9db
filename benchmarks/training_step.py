"""CPU seconds and memory of one policy update's gradient, next to TRL's GRPOTrainer on the same batch.

    python -m benchmarks.training_step [--model NAME] [--batch NAME] [--steps N] [--threads N] [--device cuda]
                                       [--token-budget N] [--json PATH] [--save]

Every variant is a process of its own with the same random weights, the same replay and VESPO with the same behaviour
log-probabilities, which come from a perturbed snapshot of the weights. Loss and gradient norm must agree to 1e-4
before a time is believed.

`forebay` is the product's own update, `tasks.training.update.accumulate_gradients`: forward, backward, clipping and
the numbers that it reports, in packed rows of at most the token budget. Of TRL forward, backward and clipping are
timed. It is run as it ships, but for activation checkpointing, which it has on and is off on both sides: `trl-*` with
the whole batch as one micro-batch, its default for this size; `trl-* micro` adds up the gradients of micro-batches of
as many padded sequences as the same token budget holds and the batch can be divided by, and is left out where that is
the whole batch. The product's trainer lets the C library keep freed memory (`models.memory`), TRL does not;
MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ in the environment would give its process the same allocator.
Versions of TRL other than the installed one are put into benchmarks/out/peers.

Times are CPU seconds (all threads), so that a busy machine disturbs them little. Every variant takes --steps steps, of
which the first warms it up, and the best counts. Forebay is run before its peers and again after them, and the slower
run counts: neither a second try nor a change of the machine's load between them can flatter it. Memory is the peak
resident size over the loaded model, less the gradients; the optimizer has no state.

`faster` is the best time of all of TRL's variants over ours. `memory` is our peak over the smallest of all of theirs,
`/whole` over the smallest of those that run the whole batch at once. `limit` is the share of the arithmetic limit: the
FLOPs of the model on the distinct tokens of the batch over the speed of a large matrix product measured in the same
process, divided by the time. For `trl-*` it is taken with the same FLOPs, so that shares compare.

The CUDA mode has batches for rows of some 8,000 tokens, takes wall seconds and the allocator's peak, and needs a free
GPU. `mfu` is `limit` with the card's published bfloat16 rate in place of the measured one, where that is known.
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

from models.machine import describe
from models.memory import keep_freed_memory
from models.packing import MicroBatch, Sample, pack
from tasks.training.fields import token_advantages
from tasks.training.parallel import World, split
from tasks.training.settings import TrainingSettings
from tasks.training.shards import Episodes
from tasks.training.update import accumulate_gradients

HERE = Path(__file__).parent
OUT = HERE / "out"
BASELINE = HERE / "baselines" / "training_step.json"
PEERS = ("1.16.0", "1.13.0")
MICRO = " micro"  # ends the names of variants that accumulate
OURS = ("forebay", "forebay again")
VARIANTS = (OURS[0], *(f"trl-{version}{how}" for version in PEERS for how in ("", MICRO)), OURS[1])
RATIOS = ("faster", "memory", "/whole")
STEPS = 3  # of every variant, the first to warm up
TOKEN_BUDGETS = {"cpu": 1024, "cuda": 8192}
TOLERANCES = {"cpu": 1e-4, "cuda": 0.05}  # bfloat16 there
CARDS = {  # dense bfloat16 FLOPs a second, by PyTorch's name of the card
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
}
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
    "tiny": lambda: Qwen3Config(  # for tests of this file
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        tie_word_embeddings=True,
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
    """A batch of B stored samples, all of one group."""

    prompts: list[list[int]]
    responses: list[list[int]]
    rewards: list[float]
    behaviour: list[list[float]]

    @property
    def samples(self) -> tuple[Sample, ...]:
        pairs = zip(self.prompts, self.responses, strict=True)
        return tuple(Sample(prompt, response, [True] * len(response)) for prompt, response in pairs)

    @property
    def episodes(self) -> Episodes:
        logprobs = torch.tensor([b for row in self.behaviour for b in row])
        nothing = (0,) * len(self.rewards)
        return Episodes(
            samples=self.samples,
            rewards=tuple(self.rewards),
            groups=nothing,
            lags=nothing,
            turns=torch.zeros(len(logprobs), dtype=torch.int64),
            behaviour_logprobs=logprobs,
            group_ids=("group",),
            texts=("",) * len(self.rewards),
        )

    @property
    def advantages(self) -> list[float]:
        """Of the samples, as the product computes them."""
        of_tokens = token_advantages(self.episodes, TrainingSettings())
        lengths = torch.tensor([len(response) for response in self.responses])
        return of_tokens[lengths.cumsum(0) - 1].tolist()

    @property
    def width(self) -> int:
        """Tokens of a padded sequence."""
        return max(map(len, self.prompts)) + max(map(len, self.responses))

    def per_micro_batch(self, token_budget: int) -> int:
        """Padded sequences that the budget holds, a divisor of B, as TRL drops what is left over; one at least."""
        size, most = len(self.prompts), max(1, token_budget // self.width)
        return max(n for n in range(1, size + 1) if n <= most and size % n == 0)


Maker = Callable[[torch.Generator, int], list[Any]]
"""From a generator and the size of the vocabulary: (prompt, response) of every sample."""


def _ids(generator: torch.Generator, vocabulary: int, length: int) -> list[int]:
    return torch.randint(vocabulary, (length,), generator=generator).tolist()


def _grouped(prompt: int, group: int, answer: int, groups: int = 1) -> Maker:
    def make(g: torch.Generator, vocabulary: int) -> list[Any]:
        prompts = [_ids(g, vocabulary, prompt) for _ in range(groups)]
        return [(shared, _ids(g, vocabulary, answer)) for shared in prompts for _ in range(group)]

    return make


def _ragged(size: int, prompt: int, answer: int) -> Maker:
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


def _uniform(size: int, prompt: int, answer: int) -> Maker:
    return lambda g, vocabulary: [
        (_ids(g, vocabulary, prompt), _ids(g, vocabulary, answer)) for _ in range(size)
    ]


def _turns(episodes: int, turns: int, prompt: int, answer: int, observation: int) -> Maker:
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


BATCHES: dict[str, dict[str, Maker]] = {
    "cpu": {
        "grouped-long": _grouped(prompt=256, group=8, answer=32),
        "grouped-short": _grouped(prompt=64, group=8, answer=16),
        "ragged": _ragged(size=8, prompt=128, answer=384),
        "uniform": _uniform(size=8, prompt=128, answer=384),
        "multi-turn": _turns(episodes=4, turns=4, prompt=64, answer=32, observation=16),
    },
    "cuda": {  # one row of 8,192 tokens, but for ragged, which has four of 7,500
        "grouped-long": _grouped(prompt=2048, group=16, answer=384),
        "grouped-short": _grouped(prompt=256, group=16, answer=112, groups=4),
        "ragged": _ragged(size=24, prompt=512, answer=1536),
        "uniform": _uniform(size=8, prompt=256, answer=768),
        "multi-turn": _turns(episodes=8, turns=4, prompt=512, answer=192, observation=64),
    },
}


class Meter:
    """Clocks the parts of steps, watches memory meanwhile, and says when there are enough steps."""

    def __init__(self, device: torch.device, gradient_bytes: int, steps: int) -> None:
        self.seconds: list[float] = []
        self.results: list[tuple[float, float]] = []
        self._device, self._gradient_bytes, self._steps = device, gradient_bytes, steps
        self._base = self._peak = 0
        self._spent = 0.0
        self._watching = threading.Event()

    def ready(self) -> None:
        """Everything before this call counts as the loaded model."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._base = self._peak = self._memory()

    @contextlib.contextmanager
    def part(self) -> Iterator[None]:
        """What counts as work of the present step."""
        self._watching.set()
        watcher = threading.Thread(target=self._watch, daemon=True)
        watcher.start()
        start = self.clock()
        yield
        self._spent += self.clock() - start
        self._watching.clear()
        watcher.join()

    def finish(self, loss: float, norm: float) -> None:
        """The step is over and has these results."""
        self.seconds.append(self._spent)
        self.results.append((loss, norm))
        self._spent = 0.0

    @property
    def enough(self) -> bool:
        return len(self.seconds) >= self._steps

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


def forebay(model: PreTrainedModel, replay: Replay, meter: Meter, token_budget: int) -> None:
    """Steps of the trainer up to the optimizer until the meter has enough."""
    world = World(model.device)
    autocast = torch.bfloat16 if world.device.type == "cuda" else None
    if world.device.type == "cpu":
        keep_freed_memory()
    settings = TrainingSettings(objective="vespo", token_budget=token_budget)
    scorer, episodes = split(model, world), replay.episodes
    meter.ready()
    while not meter.enough:
        with meter.part():
            metrics = accumulate_gradients(scorer, episodes, settings, autocast, world).metrics
        meter.finish(metrics["loss"], metrics["grad_norm"])


def build(name: str, device: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        MODELS[name](), dtype=torch.float32, attn_implementation="sdpa"
    )
    return model.to(device).train()  # type: ignore[arg-type]


def make_replay(model: PreTrainedModel, make: Maker) -> tuple[Replay, float]:
    """Random tokens and rewards; behaviour log-probabilities of weights with noise, scaled to a useful effective
    sample size, which is returned too."""
    generator = torch.Generator().manual_seed(1)
    pairs = make(generator, model.config.vocab_size)
    prompts, responses = [p for p, _ in pairs], [r for _, r in pairs]
    rewards = torch.randn(len(pairs), generator=generator).tolist()
    own = _plain_logprobs(model, prompts, responses)
    probe = 0.003
    spread = float(_log_ratios(own, _noisy_logprobs(model, probe, prompts, responses)).std())
    # The spread is nearly linear in the noise.
    behaviour = _noisy_logprobs(model, probe * TARGET_SPREAD / spread, prompts, responses)
    w = _log_ratios(own, behaviour).exp()
    ess = float(w.sum() ** 2 / (len(w) * (w * w).sum()))
    return Replay(prompts, responses, rewards, behaviour), ess


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


def write_replay(model: PreTrainedModel, arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Make the batch; its facts."""
    replay, ess = make_replay(model, BATCHES[arguments.device][arguments.batch])
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(replay)))
    tokens = sum(map(len, replay.prompts)) + sum(map(len, replay.responses))
    return {
        "samples": len(replay.prompts),
        "samples_micro": replay.per_micro_batch(arguments.token_budget),
        "tokens": tokens,
        "tokens_trained": sum(map(len, replay.responses)),
        "tokens_padded": len(replay.prompts) * replay.width,
        "tokens_packed": sum(len(row.input_ids) for row in pack(replay.samples, arguments.token_budget)),
        "ess": ess,
        "flops": model_flops(model.config, pack(replay.samples, tokens)),  # in one row: nothing twice
    }


def measure(model: PreTrainedModel, arguments: argparse.Namespace, path: Path) -> dict[str, Any]:
    """The figures of a variant."""
    replay, device = Replay(**json.loads(path.read_text())), model.device
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    meter = Meter(device, gradients, arguments.steps)
    rate = product_rate(device, meter)
    if arguments.variant in OURS:
        forebay(model, replay, meter, arguments.token_budget)
    else:
        from benchmarks.peers import trl_step

        version, micro = version_of(arguments.variant), arguments.variant.endswith(MICRO)
        assert version == metadata.version("trl"), metadata.version("trl")
        size = replay.per_micro_batch(arguments.token_budget) if micro else len(replay.prompts)
        trl_step.run(model, replay, meter, size)
    loss, norm = meter.results[-1]
    return {
        "seconds": min(meter.seconds),
        "steps": len(meter.seconds),
        "peak_mib": meter.peak / 2**20,
        "loss": loss,
        "grad_norm": norm,
        "rate_gflops": rate / 1e9,
    }


def version_of(variant: str) -> str:
    """TRL's version in the name of one of its variants."""
    return variant.removesuffix(MICRO).removeprefix("trl-")


def child(arguments: argparse.Namespace) -> None:
    """Run one variant and print its figures; the variant `replay` writes the batch instead."""
    torch.set_num_threads(arguments.threads)
    model = build(arguments.model, arguments.device)
    path = OUT / f"replay-{arguments.model}-{arguments.batch}-{arguments.device}.json"
    if arguments.variant == "replay":
        figures = write_replay(model, arguments, path)
    else:
        try:
            figures = measure(model, arguments, path)
        except torch.OutOfMemoryError:  # of the GPU
            figures = {"failed": "out of memory"}
    print("FIGURES " + json.dumps(figures))


def run_child(variant: str, model: str, batch: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One process. The idle threads of OpenMP sleep, as spinning would count as CPU time."""
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(arguments.threads)}
    version = version_of(variant)
    if version in PEERS and version != metadata.version("trl"):
        folder = OUT / "peers" / f"trl-{version}"
        install(version, folder)
        environment["PYTHONPATH"] = str(folder)
    command = [sys.executable, "-m", "benchmarks.training_step", "--variant", variant, "--model", model]
    command += ["--batch", batch, "--device", arguments.device, "--token-budget", str(arguments.token_budget)]
    command += ["--steps", str(arguments.steps), "--threads", str(arguments.threads)]
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if done.returncode or not lines:
        raise SystemExit(
            f"{variant} failed on {model} {batch}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    figures: dict[str, Any] = json.loads(lines[-1].removeprefix("FIGURES "))
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
        if variant.endswith(MICRO) and facts["samples_micro"] == facts["samples"]:
            continue
        say(f"{model} {batch} {variant} ...")
        found[variant] = run_child(variant, model, batch, arguments)
    say("")
    ran = {variant: figures for variant, figures in found.items() if "failed" not in figures}
    first = next(iter(ran.values()))
    peak = CARDS.get(torch.cuda.get_device_name()) if arguments.device == "cuda" else None
    for variant, figures in ran.items():
        # The loss is a sum of terms of log V that cancel, since advantages do: their rounding does not shrink with it.
        term = math.log(MODELS[model]().vocab_size)
        for name, size in (("loss", term / 10), ("grad_norm", 0.0)):
            tolerance = TOLERANCES[arguments.device]
            if not math.isclose(figures[name], first[name], rel_tol=tolerance, abs_tol=tolerance * size):
                raise SystemExit(
                    f"{model} {batch}: {name} of {variant} is {figures[name]}, not {first[name]}"
                )
        figures["tokens_per_second"] = facts["tokens"] / figures["seconds"]
        figures["limit"] = facts["flops"] / (figures["rate_gflops"] * 1e9) / figures["seconds"]
        figures["mfu"] = facts["flops"] / peak / figures["seconds"] if peak else None
    return {
        "model": model,
        "batch": batch,
        "machine": describe(),
        "threads": arguments.threads,
        "token_budget": arguments.token_budget,
        **facts,
        "variants": found,
        "ratios": ratios(ran),
        "took": time.perf_counter() - started,
    }


def ratios(variants: dict[str, Any]) -> dict[str, float]:
    """`RATIOS` of the variants that ran; none where one of their sides did not."""
    ours = [figures for name, figures in variants.items() if name in OURS]
    theirs = [figures for name, figures in variants.items() if name not in OURS]
    whole = [figures for name, figures in variants.items() if name.endswith(PEERS)]

    def over(peers: list[dict[str, Any]], figure: str) -> float:
        """Our worst over their best."""
        return max(v[figure] for v in ours) / min(v[figure] for v in peers)

    found = {}
    if ours and theirs:
        found = {"faster": 1 / over(theirs, "seconds"), "memory": over(theirs, "peak_mib")}
    if ours and whole:
        found["/whole"] = over(whole, "peak_mib")
    return found


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        f"{'model':14}{'batch':15}{'padded/packed':>14}{'ESS':>6}  {'variant':18}{'seconds':>9}{'tokens/s':>10}"
        f"{'peak MiB':>10}{'limit':>7}{'mfu':>6}{'faster':>8}{'memory':>8}{'/whole':>8}"
    ]
    for result in results:
        for name, v in result["variants"].items():
            line = f"{result['model']:14}{result['batch']:15}"
            line += (
                f"{result['tokens_padded'] / result['tokens_packed']:14.2f}{result['ess']:6.2f}  {name:18}"
            )
            if "failed" in v:
                line += f"  {v['failed']}"
            else:
                line += (
                    f"{v['seconds']:9.2f}{v['tokens_per_second']:10.0f}{v['peak_mib']:10.0f}{v['limit']:7.0%}"
                )
                line += f"{v['mfu']:6.0%}" if v["mfu"] else " " * 6
            if name == OURS[0]:
                line += "".join(f"{result['ratios'].get(ratio, math.nan):8.2f}" for ratio in RATIOS)
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
    parser.add_argument("--batch", choices=list(BATCHES["cpu"]), action="append", default=None)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=STEPS, help="of every variant; the best counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--token-budget", type=int, help=f"of a row; by default {TOKEN_BUDGETS}")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--save", action="store_true", help=f"into {BASELINE.relative_to(HERE.parent)}")
    parser.add_argument("--variant", choices=["replay", *VARIANTS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.token_budget = arguments.token_budget or TOKEN_BUDGETS[arguments.device]
    default = ["qwen2-1.5b"] if arguments.device == "cuda" else ["smollm2-135m", "qwen3-small"]
    if arguments.variant:
        arguments.model, arguments.batch = arguments.model[0], arguments.batch[0]
        child(arguments)
        return
    results = [
        compare(model, batch, arguments)
        for model in arguments.model or default
        for batch in arguments.batch or list(BATCHES["cpu"])
    ]
    print(f"{describe()}, {arguments.threads} threads, {arguments.steps} steps")
    print(table(results))
    if arguments.json:
        write(arguments.json, results)
    if arguments.save:
        write(BASELINE, merged(results))


def merged(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The baseline's results, those of the same model and batch replaced by the new ones."""
    old = json.loads(BASELINE.read_text())["results"] if BASELINE.exists() else []
    return list({(result["model"], result["batch"]): result for result in [*old, *results]}.values())


def write(path: Path, results: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
