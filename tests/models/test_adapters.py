from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from models import adapters
from models.packing import Sample, pack, packed_logprobs
from tests.tiny import make_tiny_model

RANK, ALPHA = 3, 6.0
TARGETS = ("q_proj", "v_proj", "down_proj")
SAMPLES = [
    Sample([5, 6, 7], [8, 9, 10, 11], [True, True, False, True]),
    Sample([5, 6, 7], [8, 20, 21], [True, True, True], 0.7),
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), seed=2)


def _load(model_dir) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64).eval()


def _logprobs(model: PreTrainedModel) -> torch.Tensor:
    (row,) = pack(SAMPLES, 1000)
    return packed_logprobs(model, row)[0]


def _moved(model: PreTrainedModel) -> PreTrainedModel:
    """With B away from 0, as after some updates."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_a_new_adapter_changes_nothing_and_alone_is_trained(model_dir):
    before = _logprobs(_load(model_dir))
    state = torch.random.get_rng_state()
    model = adapters.attach(_load(model_dir), RANK, ALPHA, TARGETS, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(_logprobs(model), before)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * len(TARGETS)  # A and B, two layers
    assert all(".lora_" in name for name in trained)
    assert not model.training


def test_the_seed_decides_a(model_dir):
    def a(seed: int) -> torch.Tensor:
        model = adapters.attach(_load(model_dir), RANK, ALPHA, TARGETS, seed=seed)
        return model.model.layers[1].self_attn.q_proj.lora_A["default"].weight.detach()

    torch.manual_seed(11)
    first = a(3)
    torch.manual_seed(12)
    assert torch.equal(a(3), first)
    assert not torch.equal(a(4), first)
    assert first.std() > 0


def test_gradients_are_those_of_the_chain_rule(model_dir):
    model = _moved(adapters.attach(_load(model_dir), RANK, ALPHA, TARGETS, seed=3))
    _logprobs(model).sum().backward()
    dense = _load(model_dir)
    dense.load_state_dict(adapters.merged(model), strict=False)
    _logprobs(dense).sum().backward()
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        g = dense.get_parameter(f"{name}.weight").grad
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        # W + s B A: dL/dA = s B^T G, dL/dB = s G A^T.
        torch.testing.assert_close(a.grad, ALPHA / RANK * b.detach().T @ g, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(b.grad, ALPHA / RANK * g @ a.detach().T, rtol=1e-10, atol=1e-13)
        assert a.grad.norm() > 0
        assert module.base_layer.weight.grad is None


def test_merged_weights_compute_what_the_wrapped_model_does(model_dir):
    plain = _load(model_dir)
    names = [name for name, _ in plain.named_parameters()]
    model = _moved(adapters.attach(plain, RANK, ALPHA, TARGETS, seed=3))
    want = _logprobs(model)
    weights = adapters.merged(model)
    assert list(weights) == names  # plain names, tied head once
    dense = _load(model_dir)
    assert not torch.allclose(_logprobs(dense), want)
    dense.load_state_dict(weights, strict=False)
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    torch.testing.assert_close(_logprobs(dense), want, rtol=1e-12, atol=1e-12)
    assert torch.equal(_logprobs(model), want)  # the model itself is as it was


def test_merging_keeps_the_type_and_a_plain_model_is_merged_as_it_is(model_dir):
    low = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    assert {k: v.data_ptr() for k, v in adapters.merged(low).items()} == {
        k: v.data_ptr() for k, v in low.named_parameters()
    }
    weights = adapters.merged(adapters.attach(low, RANK, ALPHA, TARGETS, seed=3))
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_merging_transposed_weights_and_biases():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config).double().eval()
    names = {name for name, _ in model.named_parameters()}
    ids = torch.tensor([[3, 4, 5, 6]])
    _moved(adapters.attach(model, RANK, ALPHA, ["c_attn"], seed=1))
    weights = adapters.merged(model)
    assert set(weights) == names
    plain = GPT2LMHeadModel(config).double().eval()
    plain.load_state_dict(weights, strict=False)
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-12, atol=1e-12)


def test_without_is_the_model_before(model_dir):
    before = _logprobs(_load(model_dir))
    model = _moved(adapters.attach(_load(model_dir), RANK, ALPHA, TARGETS, seed=3))
    moved = _logprobs(model)
    with adapters.without(model):
        assert torch.equal(_logprobs(model), before)
    assert torch.equal(_logprobs(model), moved)
    assert not torch.equal(moved, before)
    plain = _load(model_dir)
    with adapters.without(plain):
        assert torch.equal(_logprobs(plain), before)


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "embed_tokens"]])
def test_the_ends_are_refused(model_dir, targets):
    with pytest.raises(ValueError, match="embedding or head"):
        adapters.attach(_load(model_dir), RANK, ALPHA, targets, seed=0)


def test_unknown_layers_are_refused(model_dir):
    with pytest.raises(ValueError, match="nowhere"):
        adapters.attach(_load(model_dir), RANK, ALPHA, ["nowhere"], seed=0)
