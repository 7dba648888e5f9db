"""Deep-Thinking Ratio (arXiv 2602.13517v1): the share of a response's tokens that a model settles on late.

The unembedding turns the residual stream after every block into a next-token distribution (a logit lens). A token is
settled at the first layer whose distribution is near the last one's by the Jensen-Shannon divergence, and deep where
that layer is in the deep regime. The ratio (DTR) is the share of deep tokens. Beside it stand the scores that it is
compared with: length, log-probability, perplexity, entropy and self-certainty.

Layers count from 1 to L, the number of blocks; the embedding is no layer. Token t is predicted one position before
its own, so the first token of a response is judged by the stream at the last token of its prompt. Distributions are
those of temperature 1, whatever the temperature of sampling was.

The paper leaves the base of the logarithm and the norm before the unembedding open. A threshold of 0.75 leaves deep
tokens in its figure 4, but no divergence in nats exceeds ln 2 = 0.693: it must count in bits. With the model's final
norm on every layer the last distribution is the model's own; `Lens.norm` has the other readings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from models.causal_lm import ModelError

Unit = Literal["bits", "nats"]
Norm = Literal["raw/raw", "raw/normed", "normed/normed"]

# Logits that exist at one time, of one layer: a few hundred tokens, so that a product reads the head's weight once for many.
CHUNK_BYTES = 64 * 2**20
_NO_MASS = (
    -1e3
)  # a log-probability whose exponential is 0 in float32 and float64; -inf times 0 would be no number


@dataclass(frozen=True, slots=True)
class Lens:
    """How layers are read and when a token counts as deep; the paper's values by default.

    Attributes:
        unit: of divergences and threshold.
        norm: what the unembedding reads of the inner layers and of the last one: the residual stream as it is (raw) or
            after the model's final norm (normed). Only "normed/normed" compares with what the model really predicts and
            reads all layers alike.
        threshold: g; a layer has settled where its divergence is at most g.
        rho: the deep regime are the layers from ceil(rho L) on; in [0, 1].

    Raises:
        ValueError: a value outside these.
    """

    unit: Unit = "bits"
    norm: Norm = "normed/normed"
    threshold: float = 0.5
    rho: float = 0.85

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit) or self.norm not in get_args(Norm):
            raise ValueError(
                f"A lens counts in {' or '.join(get_args(Unit))} and reads {', '.join(get_args(Norm))}; "
                f"not {self.unit!r} and {self.norm!r}."
            )
        if not (0 <= self.threshold < math.inf and 0 <= self.rho <= 1):
            raise ValueError(
                f"A lens needs a threshold of at least 0 and rho in [0, 1]; not {self.threshold} and {self.rho}."
            )


# ------------------------------------------------------------------------------------ from divergences to the ratio


def jensen_shannon(left: Tensor, right: Tensor, unit: Unit = "bits") -> Tensor:
    """Jensen-Shannon divergence (equation 2) of distributions given as log-probabilities [..., V], in float32 or wider.

    Returns:
        [...], within [0, 1] bit or [0, ln 2] nats; symmetric.
    """
    wide = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    left, right = left.to(wide), right.to(wide)
    p, q = left.exp(), right.exp()
    # H((p + q) / 2) - H(p) / 2 - H(q) / 2, token by token: no term is negative, so little cancels.
    terms = torch.special.entr((p + q) / 2)
    terms += (p * left.clamp(min=_NO_MASS) + q * right.clamp(min=_NO_MASS)) / 2
    nats = terms.sum(-1).clamp(0, math.log(2))
    return nats / math.log(2) if unit == "bits" else nats


def running_minimum(divergences: Tensor) -> Tensor:
    """Least divergence up to each layer (equation 3), [..., L]."""
    return divergences.cummin(-1).values


def settling_depth(divergences: Tensor, threshold: float) -> Tensor:
    """First layer, from 1, whose divergence is at most `threshold` (equation 4).

    Args:
        divergences: [..., L]; the last layer's is 0, so that there is such a layer.

    Returns:
        [...] int64 in 1..L.
    """
    return (running_minimum(divergences) > threshold).sum(-1) + 1


def deep_regime(layers: int, rho: float) -> int:
    """First layer of the deep regime (equation 5), ceil(rho L), of the decimal number that `rho` is written as.

    The product of floats is sometimes just above a whole number: 0.55 of 100 layers would be 56.
    """
    return math.ceil(Fraction(str(rho)) * layers)


def deep(divergences: Tensor, lens: Lens) -> Tensor:
    """Whether tokens settle in the deep regime: [..., L] in the unit of `lens` to [...] bool."""
    return settling_depth(divergences, lens.threshold) >= deep_regime(divergences.shape[-1], lens.rho)


def deep_thinking_ratio(tokens: Tensor) -> float:
    """DTR (equation 6) of a response or of a prefix: the share of deep ones among [T] bool.

    Raises:
        ValueError: there are no tokens.
    """
    if not len(tokens):
        raise ValueError("A response without tokens has no deep-thinking ratio.")
    return float(tokens.double().mean())


# ----------------------------------------------------------------------------------------------- through a model


@torch.no_grad()
def divergences(
    model: PreTrainedModel, prompt: Sequence[int], responses: Sequence[Sequence[int]], lens: Lens
) -> list[Tensor]:
    """Divergence of every layer from the last one at each token of each response, for plots.

    Every layer is unembedded, which costs several times the model's own forward pass; see `deep_tokens`.

    Args:
        model: a decoder in evaluation mode.
        prompt: token ids, at least one.
        responses: token ids of each response to the prompt, at least one each.

    Returns:
        For each response [T, L] float32 in the unit of `lens`; the last column is 0.

    Raises:
        ValueError: an empty prompt or response.
        ModelError: a model whose layers cannot be read this way, or whose logits are not numbers.
    """
    stream = _stream(model, prompt, responses)
    found = torch.zeros(stream.tokens, stream.layers, device=model.device)
    for rows, last in _last_layer(stream, lens):
        for layer in range(1, stream.layers):
            found[rows, layer - 1] = _divergence(stream, layer, rows, last, lens)
    return _by_response(found, responses)


@torch.no_grad()
def deep_tokens(
    model: PreTrainedModel, prompt: Sequence[int], responses: Sequence[Sequence[int]], lens: Lens
) -> list[Tensor]:
    """Which tokens of each response are deep, without the layers that do not decide it.

    A token is deep if no layer below the deep regime is within the threshold. The layer just below settles most of
    the tokens that are not deep, so layers are looked at from there downwards, each for the tokens still undecided.

    Returns:
        For each response [T] bool; a prefix's are the first of them, and `deep_thinking_ratio` is their share.

    Raises:
        ValueError, ModelError: as `divergences`, whose arguments these are.
    """
    stream = _stream(model, prompt, responses)
    found = torch.zeros(stream.tokens, dtype=torch.bool, device=model.device)
    for rows, last in _last_layer(stream, lens):
        open_ = rows
        for layer in range(deep_regime(stream.layers, lens.rho) - 1, 0, -1):
            far = _divergence(stream, layer, open_, last, lens) > lens.threshold
            open_, last = open_[far], last[far]
            if not len(open_):
                break
        found[open_] = True
    return _by_response(found, responses)


@torch.no_grad()
def log_probs(
    model: PreTrainedModel, prompt: Sequence[int], responses: Sequence[Sequence[int]]
) -> Iterator[Tensor]:
    """The model's next-token log-probabilities [T, V] float32 at the tokens of each response, one after another.

    Raises:
        ValueError, ModelError: as `divergences`, whose arguments these are.
    """
    stream = _stream(model, prompt, responses)
    for states in _by_response(stream.final, responses):
        yield stream.read(states)


def _by_response(found: Tensor, responses: Sequence[Sequence[int]]) -> list[Tensor]:
    return list(torch.split(found, [len(response) for response in responses]))


@dataclass(frozen=True)
class _Stream:
    """The residual stream at the positions that predict N tokens, and how it is read.

    Attributes:
        blocks: L tensors [N, D], after each block.
        final: [N, D], the last of them after the final norm.
        norm, head: the model's final norm and unembedding.
    """

    blocks: Sequence[Tensor]
    final: Tensor
    norm: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]

    @property
    def layers(self) -> int:
        return len(self.blocks)

    @property
    def tokens(self) -> int:
        return len(self.final)

    def read(self, states: Tensor) -> Tensor:
        """Log-probabilities [rows, V] in float32 from [rows, D] in the head's precision."""
        return torch.log_softmax(self.head(states).float(), dim=-1)


def _last_layer(stream: _Stream, lens: Lens) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of a chunk of tokens, and their log-probabilities [rows, V] by the last layer."""
    states = stream.blocks[-1] if lens.norm == "raw/raw" else stream.final
    width = stream.head(states[:1]).shape[-1]
    step = max(1, CHUNK_BYTES // (4 * width))
    for rows in torch.split(torch.arange(stream.tokens, device=states.device), step):
        yield rows, stream.read(states[rows])


def _divergence(stream: _Stream, layer: int, rows: Tensor, last: Tensor, lens: Lens) -> Tensor:
    """[rows] divergence of an inner layer, counted from 1, from the last one."""
    states = stream.blocks[layer - 1][rows]
    if lens.norm == "normed/normed":
        states = stream.norm(states)
    return jensen_shannon(stream.read(states), last, lens.unit)


def _stream(model: PreTrainedModel, prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> _Stream:
    """Run the prompt once and the responses as a batch after it.

    The library's last hidden state is normed already and its others are not. So that neither is assumed, the final
    norm is caught in the act: it is the part of the decoder whose output is the last hidden state, and what it was
    given is the residual stream after the last block.
    """
    if not len(prompt) or not responses or not all(map(len, responses)):
        raise ValueError("The lens needs a prompt and responses of at least one token each.")
    name, head = type(model).__name__, model.get_output_embeddings()  # type: ignore[no-untyped-call]
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    if head is None or not isinstance(decoder, nn.Module):
        raise ModelError(
            f"{name} has no unembedding or no decoder, so its layers cannot be read; use a decoder."
        )
    output, calls = _run(model, decoder, prompt, responses)
    last = output.hidden_states[-1]
    if last.isnan().any() or output.logits.isnan().any():
        raise ModelError("The model's logits are not numbers: its weights are damaged or have diverged.")
    norms = [call for call in calls if torch.equal(call[2], last)]
    if not norms:
        raise ModelError(
            f"{name} has no final norm whose output is its last hidden state, so its layers cannot be read; "
            "use a model of the Llama family or one built like it."
        )
    norm, before, _ = norms[-1]
    logits, plain = output.logits[:, -1].float(), head(last[:, -1]).float()
    if (logits - plain).abs().max() > 1e-2 * logits.abs().max():
        raise ModelError(
            f"{name} changes its logits after the unembedding (a cap or a scale), which the lens does not do; "
            "use a model of the Llama family or one built like it."
        )
    lengths = torch.tensor([len(response) for response in responses], device=last.device)
    kept = torch.arange(last.shape[1], device=last.device) < lengths[:, None]
    blocks = [*output.hidden_states[1:-1], before]
    return _Stream([states[kept] for states in blocks], last[kept], norm, head)


def _run(
    model: PreTrainedModel, decoder: nn.Module, prompt: Sequence[int], responses: Sequence[Sequence[int]]
) -> tuple[Any, list[tuple[nn.Module, Tensor, Tensor]]]:
    """The model's output at the positions that predict the responses; calls of the decoder's parts meanwhile."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(part: nn.Module, given: tuple[Any, ...], found: Any) -> None:
        if given and isinstance(given[0], Tensor) and isinstance(found, Tensor):
            calls.append((part, given[0], found))

    count, width = len(responses), max(map(len, responses))
    fed = [[prompt[-1], *response[:-1]] for response in responses]
    ids = torch.tensor([row + [0] * (width - len(row)) for row in fed], device=model.device)
    cache = DynamicCache(config=model.config)
    if len(prompt) > 1:
        model(
            input_ids=torch.tensor([list(prompt[:-1])], device=model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_repeat_interleave(count)
    hooks = [part.register_forward_hook(note) for part in decoder.children()]
    try:
        # What stands after a response's end is seen by nothing before it, so it needs no mask.
        output = model(
            input_ids=ids, past_key_values=cache, use_cache=True, output_hidden_states=True, logits_to_keep=1
        )
    finally:
        for hook in hooks:
            hook.remove()
    return output, calls


# ---------------------------------------------------------------------------- the scores it is compared with
# One number for a response, larger where it is predicted to be better. Longer or shorter responses are predicted
# to be better by T and -T.


def mean_log_prob(chosen: Tensor) -> float:
    """Mean log-probability (nats) of a response's tokens, from [T]."""
    return float(chosen.double().mean())


def negative_perplexity(chosen: Tensor) -> float:
    """-exp(-mean log-probability), from [T] log-probabilities (nats) of a response's tokens."""
    return -float(torch.exp(-chosen.double().mean()))


def negative_entropy(logs: Tensor) -> float:
    """Mean over tokens of -H(p) in nats, from log-probabilities [T, V]."""
    return float((logs.exp() * logs.clamp(min=_NO_MASS)).sum(-1).double().mean())


def self_certainty(logs: Tensor) -> float:
    """Mean over tokens of KL(uniform, p) in nats, from log-probabilities [T, V]; 0 for a uniform distribution.

    Infinite where a token has no probability.
    """
    return float(-logs.mean(-1).double().mean() - math.log(logs.shape[-1]))


def baseline_scores(logs: Tensor, ids: Sequence[int]) -> dict[str, float]:
    """All scores of a response by name (section 3 of the paper).

    Args:
        logs: [T, V] log-probabilities at its tokens, see `log_probs`.
        ids: its T token ids.
    """
    chosen = logs.gather(1, torch.tensor([list(ids)], device=logs.device).T)[:, 0]
    return {
        "length": float(len(ids)),
        "reverse_length": -float(len(ids)),
        "mean_log_prob": mean_log_prob(chosen),
        "negative_perplexity": negative_perplexity(chosen),
        "negative_entropy": negative_entropy(logs),
        "self_certainty": self_certainty(logs),
    }
