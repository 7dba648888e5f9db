"""The deep-thinking ratio against worked numbers, a float64 reference in NumPy, and real small Llamas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from models import deep_thinking
from models.causal_lm import ModelError
from models.deep_thinking import (
    Lens,
    baseline_scores,
    deep,
    deep_regime,
    deep_thinking_ratio,
    deep_tokens,
    divergences,
    jensen_shannon,
    log_probs,
    mean_log_prob,
    negative_entropy,
    negative_perplexity,
    running_minimum,
    self_certainty,
    settling_depth,
)
from tests.tiny import make_tiny_model

D = torch.float64
LAYERS = 6
PROMPT = [20, 7, 31, 8]
RESPONSES = [[11, 50, 3, 44, 9], [60], [12, 13, 14]]
FIGURE_3 = torch.tensor([0.96, 0.93, 0.85, 0.86, 0.82, 0.78, 0.76, 0.36, 0.08, 0], dtype=D)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> LlamaForCausalLM:
    """Six layers with weights large enough that its layers disagree, and a final norm that is not all ones."""
    path = make_tiny_model(tmp_path_factory.mktemp("llama"), layers=LAYERS)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layers" in name and weight.dim() == 2:
                weight.mul_(6)
        model.get_input_embeddings().weight.mul_(24)
        norm = model.model.norm.weight
        norm.copy_(torch.rand(norm.shape, generator=generator) + 0.5)
    return model


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=D).log()


def onehot(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=D).index_fill(0, torch.tensor([0]), 1).log()


# --------------------------------------------------------------------------------------------- worked numbers


@pytest.mark.parametrize(
    ("left", "right", "bits", "nats"),
    [
        (logs(1, 0), logs(0, 1), 1.0, 0.693147),
        (logs(0.5, 0.5), logs(1, 0), 0.311278, 0.215762),
        (logs(0.9, 0.1), logs(0.1, 0.9), 0.531004, 0.368064),
        (logs(0.7, 0.2, 0.1), logs(0.1, 0.2, 0.7), 0.365148, 0.365148 * math.log(2)),
        (logs(*[0.25] * 4), onehot(4), 0.548795, 0.548795 * math.log(2)),
        (logs(*[1 / 49152] * 49152), onehot(49152), 0.999827, 0.999827 * math.log(2)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_worked_divergences(left, right, bits, nats, dtype):
    left, right = left.to(dtype), right.to(dtype)
    for a, b in ((left, right), (right, left)):
        assert float(jensen_shannon(a, b)) == pytest.approx(bits, abs=1e-6)
        assert float(jensen_shannon(a, b, "nats")) == pytest.approx(nats, abs=1e-6)


def test_a_distribution_does_not_differ_from_itself():
    same = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0)).mul(5).log_softmax(-1)
    assert jensen_shannon(same, same).max() < 1e-6
    assert jensen_shannon(same.double(), same.double()).max() < 1e-12
    assert (jensen_shannon(same, same) >= 0).all()


def test_a_threshold_in_nats_is_another_one():
    apart = [jensen_shannon(logs(0.9, 0.1), logs(0.1, 0.9), unit) for unit in ("bits", "nats")]
    assert apart[0] > 0.5 > apart[1]


@pytest.mark.parametrize(("threshold", "depth"), [(0.5, 8), (0.25, 9), (0.75, 8), (0.8, 6), (0.9, 3)])
def test_worked_settling_depth_of_figure_3(threshold, depth):
    assert settling_depth(FIGURE_3, threshold) == depth


def test_worked_depths_and_ratios():
    assert deep(FIGURE_3, Lens(rho=0.8))
    back_again = torch.tensor([0.9, 0.4, 0.6, 0.2, 0], dtype=D)
    assert running_minimum(back_again).tolist() == [0.9, 0.4, 0.4, 0.2, 0]
    assert settling_depth(back_again, 0.5) == 2
    assert settling_depth(back_again, 0.3) == 4
    assert settling_depth(back_again, 0.4) == 2  # at most, not less
    depths = torch.tensor([8, 3, 10, 7])
    settled = (torch.arange(1, 11) < depths[:, None]).double()
    found = [deep_thinking_ratio(deep(settled, Lens(rho=rho))) for rho in (0.7, 0.8, 0.9, 1.0)]
    assert found == [0.75, 0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    ("layers", "regimes"),
    [
        (10, (8, 9, 9, 10)),
        (16, (13, 14, 15, 16)),
        (24, (20, 21, 22, 23)),
        (28, (23, 24, 26, 27)),
        (30, (24, 26, 27, 29)),
        (32, (26, 28, 29, 31)),
        (36, (29, 31, 33, 35)),
        (48, (39, 41, 44, 46)),
        (80, (64, 68, 72, 76)),
    ],
)
def test_worked_deep_regimes(layers, regimes):
    assert tuple(deep_regime(layers, rho) for rho in (0.8, 0.85, 0.9, 0.95)) == regimes


def test_the_regime_of_a_decimal_is_exact_where_floats_are_not():
    assert deep_regime(100, 0.55) == 55 != math.ceil(0.55 * 100)
    assert deep_regime(25, 0.28) == 7 != math.ceil(0.28 * 25)
    assert deep_regime(10, 1e-9) == 1


def test_worked_baselines():
    assert self_certainty(logs(0.7, 0.2, 0.1)[None]) == pytest.approx(0.324287, abs=1e-6)
    assert self_certainty(logs(*[1 / 3] * 3)[None]) == pytest.approx(0, abs=1e-12)
    assert self_certainty(onehot(3)[None]) == math.inf
    assert mean_log_prob(logs(0.7, 1 / 3)) == pytest.approx(-0.727644, abs=1e-6)
    assert negative_perplexity(logs(0.7, 1 / 3)) == pytest.approx(-2.070197, abs=1e-6)
    assert negative_perplexity(logs(0.0)) == -math.inf
    assert negative_entropy(torch.stack([logs(0.5, 0.5), logs(1, 0)])) == pytest.approx(-math.log(2) / 2)
    found = baseline_scores(torch.stack([logs(0.7, 0.2, 0.1), logs(1 / 3, 1 / 3, 1 / 3)]), [0, 2])
    assert found["length"] == 2 == -found["reverse_length"]
    assert found["mean_log_prob"] == pytest.approx(-0.727644, abs=1e-6)
    assert found["negative_perplexity"] == pytest.approx(-2.070197, abs=1e-6)
    assert found["self_certainty"] == pytest.approx(0.324287 / 2, abs=1e-6)


# -------------------------------------------------------------------------------------------------- properties


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(2, 60), scale=st.floats(0, 50))
def test_divergences_do_not_depend_on_shift_order_or_side(seed, size, scale):
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(2, 3, size, generator=generator, dtype=D) * scale
    found = jensen_shannon(left.log_softmax(-1), right.log_softmax(-1))
    assert (found >= 0).all()
    assert (found <= 1).all()
    assert torch.allclose(found, jensen_shannon(right.log_softmax(-1), left.log_softmax(-1)), atol=1e-12)
    order = torch.randperm(size, generator=generator)
    moved = jensen_shannon((left + 7)[:, order].log_softmax(-1), (right - 3)[:, order].log_softmax(-1))
    assert torch.allclose(found, moved, atol=1e-10)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), layers=st.integers(1, 40), rho=st.floats(0, 1), g=st.floats(0, 1.2))
def test_a_token_is_deep_if_no_layer_below_the_regime_has_settled(seed, layers, rho, g):
    found = torch.rand(20, layers, generator=torch.Generator().manual_seed(seed), dtype=D)
    found[:, -1] = 0
    lens = Lens(threshold=g, rho=rho)
    shortcut = (found[:, : max(deep_regime(layers, rho) - 1, 0)] > g).all(-1)
    by_definition = [
        min(depth for depth in range(1, layers + 1) if min(row[:depth]) <= g) >= deep_regime(layers, rho)
        for row in found.tolist()
    ]
    assert deep(found, lens).tolist() == shortcut.tolist() == by_definition


def test_the_ratio_falls_with_threshold_and_rho_between_its_extremes():
    found = torch.rand(200, 12, generator=torch.Generator().manual_seed(0), dtype=D)
    found[:, -1] = 0

    def ratio(**changed: float) -> float:
        return deep_thinking_ratio(deep(found, Lens(**changed)))

    by_threshold = [ratio(threshold=g, rho=0.3) for g in np.linspace(0, 1, 21)]
    by_rho = [ratio(rho=rho) for rho in np.linspace(0, 1, 21).round(2)]
    assert by_threshold == sorted(by_threshold, reverse=True)
    assert by_rho == sorted(by_rho, reverse=True)
    assert ratio(rho=0) == 1
    assert ratio(threshold=1) == 0
    assert (settling_depth(found, 0) == 12).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"unit": "bit"},
        {"norm": "normed/raw"},
        {"threshold": -0.1},
        {"threshold": math.nan},
        {"rho": 1.1},
        {"rho": math.nan},
    ],
)
def test_a_lens_refuses_what_has_no_meaning(wrong):
    with pytest.raises(ValueError, match="lens"):
        Lens(**wrong)


def test_no_tokens_have_no_ratio():
    with pytest.raises(ValueError, match="without tokens"):
        deep_thinking_ratio(torch.zeros(0, dtype=torch.bool))


# --------------------------------------------------------------------------------------------------- the model


def reference(model: LlamaForCausalLM, response: list[int], norm: str = "normed/normed") -> np.ndarray:
    """[T, L] bits in float64 NumPy, from what the blocks themselves give: no cache, no batch, no final hidden state."""
    found: list[np.ndarray] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: found.append(out[0].double().numpy()))
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(torch.tensor([PROMPT + response]))
    for hook in hooks:
        hook.remove()
    weight, unembedding = (
        w.detach().double().numpy() for w in (model.model.norm.weight, model.lm_head.weight)
    )
    inner, last = norm.split("/")

    def probabilities(states: np.ndarray, how: str) -> np.ndarray:
        if how == "normed":
            states = (
                states / np.sqrt((states**2).mean(-1, keepdims=True) + model.config.rms_norm_eps) * weight
            )
        scores = states @ unembedding.T
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        return scores / scores.sum(-1, keepdims=True)

    def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return np.where(p > 0, p * np.log2(np.where(p > 0, p, 1) / np.where(q > 0, q, 1)), 0).sum(-1)

    states = [block.reshape(-1, block.shape[-1])[len(PROMPT) - 1 : -1] for block in found]
    final = probabilities(states[-1], last)
    columns = []
    for block in states[:-1]:
        p = probabilities(block, inner)
        middle = (p + final) / 2
        columns.append((kl(p, middle) + kl(final, middle)) / 2)
    return np.stack([*columns, np.zeros(len(response))], axis=1)


@pytest.mark.parametrize("norm", ["normed/normed", "raw/normed", "raw/raw"])
def test_divergences_equal_the_reference(llama, norm):
    found = divergences(llama, PROMPT, RESPONSES, Lens(norm=norm))
    for response, one in zip(RESPONSES, found, strict=True):
        assert one.shape == (len(response), LAYERS)
        np.testing.assert_allclose(one.numpy(), reference(llama, response, norm), atol=1e-5)
    nats = divergences(llama, PROMPT, RESPONSES, Lens(norm=norm, unit="nats"))
    assert torch.allclose(torch.cat(nats), torch.cat(found) * math.log(2), atol=1e-6)


def test_the_layers_of_the_test_model_disagree(llama):
    apart = torch.cat(divergences(llama, PROMPT, RESPONSES, Lens()))
    depths = settling_depth(apart, 0.5)
    assert len(depths.unique()) > 1  # otherwise the tests around it say little


@pytest.mark.parametrize("rho", [0, 0.2, 0.5, 0.85, 1])
@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.9])
def test_leaving_early_changes_nothing(llama, rho, threshold, monkeypatch):
    lens = Lens(threshold=threshold, rho=rho)
    whole = [deep(one, lens).tolist() for one in divergences(llama, PROMPT, RESPONSES, lens)]
    assert [one.tolist() for one in deep_tokens(llama, PROMPT, RESPONSES, lens)] == whole
    monkeypatch.setattr(deep_thinking, "CHUNK_BYTES", 2 * 4 * llama.config.vocab_size)  # two tokens at a time
    assert [one.tolist() for one in deep_tokens(llama, PROMPT, RESPONSES, lens)] == whole


def test_early_exit_reads_only_undecided_tokens(llama):
    read: list[int] = []
    hook = llama.lm_head.register_forward_hook(lambda _, given, __: read.append(given[0].shape[0]))
    deep_tokens(llama, PROMPT, RESPONSES, Lens(threshold=2.0))
    settled = read.copy()
    read.clear()
    divergences(llama, PROMPT, RESPONSES, Lens())
    hook.remove()
    tokens = sum(map(len, RESPONSES))
    assert settled.count(tokens) == 2  # the last layer, and the first one that is looked at
    assert read.count(tokens) == LAYERS


def test_the_lens_of_the_last_layer_is_the_model(llama):
    for response, found in zip(RESPONSES, log_probs(llama, PROMPT, RESPONSES), strict=True):
        with torch.no_grad():
            logits = llama(torch.tensor([PROMPT + response])).logits[0, len(PROMPT) - 1 : -1]
        assert torch.allclose(found, logits.log_softmax(-1), atol=1e-5)


def test_generation_step_by_step_sees_the_same(llama):
    cache, columns = DynamicCache(config=llama.config), []
    response = RESPONSES[0]
    with torch.no_grad():
        llama(torch.tensor([PROMPT[:-1]]), past_key_values=cache)
        for token in [PROMPT[-1], *response[:-1]]:
            output = llama(torch.tensor([[token]]), past_key_values=cache, output_hidden_states=True)
            last = output.logits[0, -1].log_softmax(-1)
            inner = [
                llama.lm_head(llama.model.norm(h[0, -1])).log_softmax(-1) for h in output.hidden_states[1:-1]
            ]
            columns.append([float(jensen_shannon(one, last)) for one in inner] + [0.0])
    replayed = divergences(llama, PROMPT, [response], Lens())[0]
    np.testing.assert_allclose(replayed.numpy(), columns, atol=1e-4)


def test_a_response_does_not_depend_on_its_batch_or_on_what_follows(llama):
    together = divergences(llama, PROMPT, RESPONSES, Lens())
    for response, one in zip(RESPONSES, together, strict=True):
        assert torch.allclose(divergences(llama, PROMPT, [response], Lens())[0], one, atol=1e-5)
    prefix = divergences(llama, PROMPT, [RESPONSES[0][:2]], Lens())[0]
    assert torch.allclose(prefix, together[0][:2], atol=1e-5)


def test_a_prompt_of_one_token_is_enough(llama):
    whole = divergences(llama, PROMPT[:1], [PROMPT[1:] + RESPONSES[0]], Lens())[0]
    assert torch.allclose(whole[3:], divergences(llama, PROMPT, RESPONSES[:1], Lens())[0], atol=1e-5)


def test_blocks_that_do_nothing_leave_every_token_settled_at_once(tmp_path):
    path = make_tiny_model(tmp_path / "identity", layers=LAYERS)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        for block in model.model.layers[1:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    found = torch.cat(divergences(model, PROMPT, RESPONSES, Lens()))
    assert found.max() < 1e-5
    assert (settling_depth(found, 0.5) == 1).all()
    assert not torch.cat(deep_tokens(model, PROMPT, RESPONSES, Lens())).any()


def test_bfloat16_moves_only_tokens_near_the_threshold(llama):
    lens = Lens()
    exact = torch.cat(divergences(llama, PROMPT, RESPONSES, lens))
    rounded = torch.cat(divergences(_copy(llama).to(torch.bfloat16), PROMPT, RESPONSES, lens))
    assert (exact - rounded).abs().max() < 0.1
    changed = deep(exact, lens) != deep(rounded, lens)
    below = exact[:, : deep_regime(LAYERS, lens.rho) - 1].min(-1).values
    assert ((below[changed] - lens.threshold).abs() < 0.1).all()


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=64)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SMALL, intermediate_size=64)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, intermediate_size=64, num_key_value_heads=2)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_decoders_have_a_final_norm_of_another_name(family):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    response = RESPONSES[0]
    found = divergences(model, PROMPT, [response], Lens())[0]
    assert found.shape == (len(response), 3)
    assert (found[:, :-1] > 0).all()
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + response])).logits[0, len(PROMPT) - 1 : -1]
    assert torch.allclose(next(log_probs(model, PROMPT, [response])), logits.log_softmax(-1), atol=1e-5)


def test_a_model_that_the_lens_would_misread_is_refused(llama):
    torch.manual_seed(0)
    config = Gemma2Config(
        **SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.1
    )
    with pytest.raises(ModelError, match="cap or a scale"):
        deep_tokens(Gemma2ForCausalLM(config).eval(), PROMPT, RESPONSES, Lens())
    apart = _copy(llama)
    apart.get_decoder = lambda: torch.nn.Sequential(torch.nn.Linear(1, 1))
    with pytest.raises(ModelError, match="no final norm"):
        deep_tokens(apart, PROMPT, RESPONSES, Lens())
    without = _copy(llama)
    without.lm_head = None
    with pytest.raises(ModelError, match="no unembedding"):
        deep_tokens(without, PROMPT, RESPONSES, Lens())


def test_weights_that_are_not_numbers_are_told(llama):
    for part in (lambda model: model.model.norm, lambda model: model.lm_head):
        broken = _copy(llama)
        with torch.no_grad():
            part(broken).weight[0] = math.nan
        with pytest.raises(ModelError, match="not numbers"):
            deep_tokens(broken, PROMPT, RESPONSES, Lens())


@pytest.mark.parametrize(("prompt", "responses"), [([], [[1]]), ([1], []), ([1], [[2], []])])
def test_nothing_to_read_is_told(llama, prompt, responses):
    with pytest.raises(ValueError, match="at least one token"):
        divergences(llama, prompt, responses, Lens())


def _copy(model: LlamaForCausalLM) -> LlamaForCausalLM:
    copy = LlamaForCausalLM(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return copy
