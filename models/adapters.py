"""LoRA: train a few numbers beside frozen weights, and export plain weights again.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685, section 4.1): a linear layer W [O, I]
becomes W + (alpha / rank) B A with A [rank, I] and B [O, rank], of which only A and B are trained. A starts at random
and B at 0, so an adapter that was just attached changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_NAME = "default"  # of the adapter, within the library


def attach(
    model: PreTrainedModel, rank: int, alpha: float, targets: Sequence[str], seed: int
) -> PreTrainedModel:
    """Freeze `model` and put an adapter (library peft) beside its linear layers, in place.

    Args:
        rank: >= 1.
        targets: last parts of the names of the layers, such as "q_proj".
        seed: of A; torch's own generators stay as they are.

    Returns:
        The same model in evaluation mode; its parameters that require gradients are the adapter's.

    Raises:
        ValueError: no layer has such a name, or one that has is the token embedding or the language-model head, whose
            weights are read directly.
    """
    from peft import LoraConfig, inject_adapter_in_model

    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}  # type: ignore[no-untyped-call]
    hit = [
        name
        for name, module in model.named_modules()
        if id(module) in ends and name.split(".")[-1] in targets
    ]
    if hit:
        raise ValueError(
            f"LoRA cannot be put beside {hit[0]}, the model's embedding or head; name inner layers"
        )
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    return model.eval()  # type: ignore[no-untyped-call]


@contextmanager
def without(model: nn.Module) -> Iterator[None]:
    """In this context the model computes what it did before `attach`; one without an adapter is left alone.

    The adapter's factor is 0 there. Nothing about its parameters changes, so that sharded ones may be used.
    """
    layers = _adapted(model).values()
    for layer in layers:
        layer.set_scale(_NAME, 0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(_NAME, 1)


def merged(model: nn.Module, read: Callable[[Tensor], Tensor] = Tensor.detach) -> dict[str, Tensor]:
    """Weights of the plain model that computes the same, by the names they had before `attach`.

    Args:
        read: gives the values of a parameter or buffer; what gathers the parts of a sharded one goes here.

    Returns:
        Every saved parameter and buffer, tied ones once, in its original type; W + (alpha / rank) B A where an
        adapter is. `model` is left as it is.
    """
    layers = _adapted(model)
    parameters = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    found: dict[str, Tensor] = {}
    for name, tensor in (parameters | buffers).items():
        if ".lora_" in name:
            continue
        path, _, kind = name.rpartition(".")
        path = path.removesuffix(".base_layer")
        value = read(tensor)
        if path in layers and kind == "weight":
            value = _with_delta(value, layers[path], read)
        found[f"{path}.{kind}" if path else kind] = value
    return found


def _adapted(model: nn.Module) -> dict[str, Any]:
    """The layers with an adapter, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def _with_delta(weight: Tensor, layer: Any, read: Callable[[Tensor], Tensor]) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = (read(pair[_NAME].weight).to(weight.device, wide) for pair in (layer.lora_A, layer.lora_B))
    delta = (b @ a) * layer.scaling[_NAME]
    # GPT-2 stores its weights transposed.
    return (weight.to(wide) + (delta.T if layer.fan_in_fan_out else delta)).to(weight.dtype)
