"""One update over one or many processes: who takes part, how the model is split, how its state is put together.

Many processes are started by torchrun and joined by accelerate, which knows devices and back ends. The model is
split by PyTorch's FSDP2 (`fully_shard`): accelerate's own plugin for it is for GPUs only, on a CPU it falls back to
copies of the whole model without a word.

With one process everything here does nothing, so that the trainer has one path. The state of a run has one form as
well, whole tensors by the names of the parameters, so a run may go on with another number of processes.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from models import adapters
from models.packing import MicroBatch, Sample, cost, pack, packed_logprobs, packs, partition
from tasks.core.errors import Unavailable

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class World:
    """The processes that work on one update, seen from one of them."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Sum of `values` over the processes, the same bits in each; changes `values` in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Return when every process is here."""
        if self.size > 1:
            dist.barrier()


def join(device: str) -> World:
    """The world of this process: that of torchrun, or itself alone.

    Args:
        device: "cpu", "cuda" or "auto" (a GPU if there is one). Processes take one GPU each.

    Raises:
        Unavailable: a GPU was asked for and PyTorch sees none.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise Unavailable(
            "compute.device is cuda, but PyTorch sees no GPU on this machine; set it to cpu or auto."
        )
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World(torch.device(kind))
    from accelerate import PartialState

    state = PartialState(cpu=kind == "cpu")
    return World(state.device, state.process_index, state.num_processes)


def torchrun(processes: int, module: str, *arguments: str) -> list[str]:
    """The command that runs `python -m module arguments` in so many processes of this machine, on a free port."""
    run = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    return [sys.executable, *run, "-m", module, *arguments]


class Scorer(nn.Module):
    """A model whose forward pass scores a packed row: (log-probabilities [N], entropies [N]).

    It is the root of a split model because the head's weights are used outside the head's own forward pass: while
    the root runs, they are whole.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, row: MicroBatch) -> tuple[Tensor, Tensor]:
        """See `models.packing.packed_logprobs`.

        Raises:
            Unavailable: the model is split, and its rows cannot be run whole. Sequence by sequence, processes whose
                rows have unequal numbers of them would wait for one another for ever.
        """
        if isinstance(self, FSDPModule) and not packs(self.model, row):
            raise Unavailable(
                f"{type(self.model).__name__} cannot be trained in packed rows (the warning above says why), and "
                "without them it cannot be split over several processes; set compute.processes=1."
            )
        return packed_logprobs(self.model, row)


def split(model: PreTrainedModel, world: World) -> Scorer:
    """Make `model`, the same in every process, the scorer that the processes train together.

    Every process keeps one part of each parameter and gathers a layer while it runs. Gradients are summed over the
    processes, each of which has the loss of its own rows. Build the optimizer afterwards.
    """
    scorer = Scorer(model)
    if world.size == 1:
        return scorer
    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in (*_layers(model), scorer):
        part: Any = fully_shard(module, mesh=mesh)
        # A sum, not a mean; gloo has no other reduction.
        part.set_force_sum_reduction_for_comms(True)
        part.set_gradient_divide_factor(1.0)
    return scorer


def prepare(model: PreTrainedModel, *, activation_checkpointing: bool, compile: bool) -> None:
    """Trade time for memory (activations of a layer are computed again in the backward pass) and memory for time (the
    code of a layer is compiled), in place. Call it after `split`.

    Without a compiler (C++ on a CPU, Triton on a GPU) a warning says so and the layers run as they are.
    """
    missing = _missing_compiler(model.device) if compile else None
    if missing:
        warnings.warn(f"training.compile: {missing}; the layers run uncompiled.", stacklevel=2)
    for layer in _layers(model):
        if compile and not missing:
            layer.forward = torch.compile(layer.forward, dynamic=True)
        if activation_checkpointing:
            # Around the compiled code, which may break where the compiler gives up. The library's own switch would be
            # within, and heeds it in training mode alone, where models have dropout.
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def rows_of(samples: Sequence[Sample], token_budget: int, world: World) -> list[MicroBatch]:
    """This process's rows of `samples`, balanced by their cost.

    All processes get as many rows, since all must run the model together; idle rows have no samples.
    """
    rows = pack(samples, token_budget)
    shares = partition([cost(row) for row in rows], world.size)
    mine = [rows[number] for number in shares[world.rank]]
    idle = replace(pack([Sample((0,), (), ())], 1)[0], samples=())
    return mine + [idle] * (max(map(len, shares)) - len(mine))


def gather_weights(model: nn.Module, world: World) -> dict[str, Tensor]:
    """Trained parameters by name, whole and on the CPU in the main process; empty in the others. All must call.

    They may be the parameters' own memory: use them before the next update.
    """
    return _whole({name: p for name, p in model.named_parameters() if p.requires_grad}, world)


def gather_moments(model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> dict[str, Tensor]:
    """AdamW's moments as "<parameter>/exp_avg" and "<parameter>/exp_avg_sq"; see `gather_weights`.

    A parameter that never had a gradient has none.
    """
    return _whole(
        {
            f"{name}/{key}": optimizer.state[parameter][key]
            for name, parameter in model.named_parameters()
            if parameter in optimizer.state
            for key in MOMENTS
        },
        world,
    )


def gather_export(model: nn.Module, world: World) -> dict[str, Tensor]:
    """Plain weights to export (`models.adapters.merged`), whole and on the CPU in the main process; empty in the
    others. All must call."""
    found = adapters.merged(model, _read)
    return {name: value.cpu() for name, value in found.items()} if world.main else {}


def load_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    step: int,
) -> None:
    """Put what `gather_weights` and `gather_moments` gave back, after `step` updates; in every process.

    Raises:
        KeyError: a trained parameter is not among the weights.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        with torch.no_grad():
            parameter.copy_(_like(parameter, weights[name]))
        if f"{name}/{MOMENTS[0]}" in moments:
            values = {key: _like(parameter, moments[f"{name}/{key}"]) for key in MOMENTS}
            count = torch.tensor(float(step), device=parameter.device)
            optimizer.state[parameter] = {"step": count, **values}


def score(
    scorer: Scorer,
    samples: Sequence[Sample],
    token_budget: int,
    autocast: torch.dtype | None,
    world: World,
) -> tuple[Tensor, Tensor]:
    """(Log-probabilities [N], entropies [N]) of all trained tokens of `samples`, in their order, without gradients.

    Every process has all of them in the end; all must call.
    """
    tokens = sum(sum(sample.trained) for sample in samples)
    found = torch.zeros(2, tokens, device=world.device, dtype=wide(scorer))
    with torch.no_grad(), torch.autocast(world.device.type, dtype=autocast, enabled=autocast is not None):
        for row in rows_of(samples, token_budget, world):
            here = row.to(world.device)
            found[:, here.index] = torch.stack(scorer(here))
    if isinstance(scorer, FSDPModule):
        scorer.reshard()  # else the next pass would take the root's weights for the newest
    logprobs, entropies = world.total(found)
    return logprobs, entropies


def wide(model: nn.Module) -> torch.dtype:
    """The type that log-probabilities of `model` come in: its own, float32 at least."""
    return torch.promote_types(next(model.parameters()).dtype, torch.float32)


def clip(parameters: Sequence[nn.Parameter], largest: float) -> float:
    """Scale the gradients to an L2 norm of at most `largest` over all processes; returns the norm before."""
    norm = nn.utils.clip_grad_norm_(parameters, largest)
    return float(_read(norm))


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _read(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value`, whole in every process, where and as `parameter` is."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _whole(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        value = _read(tensor)
        if world.main:
            found[name] = value.cpu()
    return found


def _missing_compiler(device: torch.device) -> str | None:
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "Triton is not installed"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler on this machine (install g++ or set CXX)"
    return None
