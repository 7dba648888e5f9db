from __future__ import annotations

import random
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from models import attention, objectives, packing
from models.packing import MicroBatch, Sample, cost, pack, packed_logprobs, partition
from tests.tiny import make_tiny_model

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "initializer_range": 0.3,  # so that attention matters
}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "llama-untied": LlamaConfig(**SHAPE | {"tie_word_embeddings": False}),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
}


@pytest.fixture(autouse=True)
def _no_fallback():
    """A test that ends on the plain way by accident would prove nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="packed rows")
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), seed=3)


def _model(config, dtype: torch.dtype = torch.float64, **kwargs) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        config, dtype=dtype, **{"attn_implementation": "sdpa", **kwargs}
    ).eval()


def _samples(seed: int = 0, groups: int = 3, size: int = 4, vocabulary: int = 99) -> list[Sample]:
    """Groups that share a few-shot prefix; answers of two turns with an observation, some of them equal or
    nested."""
    rng = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [rng.randrange(3, vocabulary) for _ in range(n)]

    prefix, samples = ids(12), []
    for _ in range(groups):
        prompt = prefix + ids(rng.randrange(1, 9))
        answers = [ids(rng.randrange(1, 14)) for _ in range(size - 2)]
        answers += [answers[0], answers[0] + ids(2)]
        for answer in answers:
            trained = [rng.random() < 0.8 for _ in answer]
            trained[-1] = True
            samples.append(Sample(prompt, answer, trained, rng.choice([1.0, 0.7])))
    return samples


def _turns(episodes: int = 2, turns: int = 4) -> list[Sample]:
    """Each turn is a sample whose prompt is everything before it."""
    rng = random.Random(1)
    task = [rng.randrange(3, 99) for _ in range(10)]
    samples = []
    for _ in range(episodes):
        history = task
        for _ in range(turns):
            reply = [rng.randrange(3, 99) for _ in range(5)]
            samples.append(Sample(history, reply, [True] * 5))
            history = [*history, *reply, *(rng.randrange(3, 99) for _ in range(3))]
    return samples


def _padded(model, samples: list[Sample]) -> list[torch.Tensor]:
    """The plain way: one right-padded row a sample, log_softmax over all logits; [trained tokens, 2] log-probability
    and entropy of each sample."""
    rows = [[*s.prompt_ids, *s.response_ids] for s in samples]
    width = max(map(len, rows))
    ids = torch.tensor([row + [2] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logits = model(input_ids=ids, attention_mask=mask).logits
    found = []
    for row, s in enumerate(samples):
        places = torch.tensor([len(s.prompt_ids) + t for t, trained in enumerate(s.trained) if trained])
        logs = torch.log_softmax(
            logits[row, places - 1].to(torch.promote_types(logits.dtype, torch.float32)), -1
        )
        logs = torch.log_softmax(logs / s.temperature, dim=-1)
        chosen = logs.gather(1, ids[row, places][:, None])[:, 0]
        found.append(torch.stack([chosen, -(logs.exp() * logs).sum(-1)], dim=1))
    return found


def _packed(model, samples: list[Sample], batches: list[MicroBatch]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = [torch.empty(0)] * len(samples)
    for batch in batches:
        both = torch.stack(packed_logprobs(model, batch), dim=1)
        for place, number in enumerate(batch.samples):
            found[number] = both[batch.sequence == place]
    return found


def _gradients(model, found: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weights = torch.randn(len(found), 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    sum((w.to(x.dtype) * x).sum() for w, x in zip(weights, found, strict=True)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_equal_to_padded(model, samples, budget, *, atol, grad_atol, want_model=None):
    want, got = _padded(want_model or model, samples), _packed(model, samples, pack(samples, budget))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)
    ours, theirs = _gradients(model, got), _gradients(want_model or model, want)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=grad_atol, msg=name)


# Gradients are compared more loosely: the library's norms round theirs to float32 whatever the model's type.
@pytest.mark.parametrize("budget", [1, 60, 10_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_padded_forward_and_backward(family, budget):
    _assert_equal_to_padded(_model(FAMILIES[family]), _samples(), budget, atol=1e-12, grad_atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_padded_in_single_precision(family):
    model = _model(FAMILIES[family], torch.float32)
    _assert_equal_to_padded(model, _samples(), 60, atol=2e-5, grad_atol=1e-3)


def test_many_tiles_with_branches_within_them():
    rng = random.Random(0)
    trunk = [rng.randrange(3, 99) for _ in range(2 * attention.TILE + 5)]
    samples = []
    for cut in (3, attention.TILE, attention.TILE + 1, len(trunk)):
        for length in (1, 7, attention.TILE + 3):
            answer = [rng.randrange(3, 99) for _ in range(length)]
            samples.append(Sample(trunk[:cut], answer, [True] * length))
    _assert_equal_to_padded(_model(FAMILIES["llama"]), samples, 10_000, atol=1e-12, grad_atol=5e-5)


def test_turns_of_an_episode_are_one_path():
    samples = _turns(episodes=2, turns=4)
    (row,) = pack(samples, 1000)
    # 10 of the task, then per episode four replies of 5 and three observations of 3.
    assert len(row.input_ids) == 10 + 2 * (4 * 5 + 3 * 3)
    assert sum(len(s.prompt_ids) + len(s.response_ids) for s in samples) == 2 * (15 + 23 + 31 + 39)
    _assert_equal_to_padded(_model(FAMILIES["llama"]), samples, 1000, atol=1e-12, grad_atol=2e-5)


def test_activation_checkpointing_runs_the_same_attention_again():
    plain, saving = _model(FAMILIES["llama"]), _model(FAMILIES["llama"]).train()
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    _assert_equal_to_padded(saving, _samples(), 60, atol=1e-12, grad_atol=2e-5, want_model=plain)


def test_adapters_of_peft():
    from peft import LoraConfig, get_peft_model

    def adapted():
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return get_peft_model(_model(FAMILIES["llama"]), config).eval()

    torch.manual_seed(3)
    model = adapted()
    _assert_equal_to_padded(model, _samples(), 60, atol=1e-12, grad_atol=2e-5)
    assert all(".lora_" in name for name, p in model.named_parameters() if p.grad is not None)


def test_compiled_layers():
    config = LlamaConfig(**SHAPE | {"num_hidden_layers": 1})
    plain, model = _model(config), _model(config)
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, backend="aot_eager")
    _assert_equal_to_padded(model, _samples(), 60, atol=1e-12, grad_atol=2e-5, want_model=plain)


def test_autocast():
    model, samples = _model(FAMILIES["llama"], torch.float32), _samples()
    with torch.autocast("cpu", torch.bfloat16):
        got = _packed(model, samples, pack(samples, 60))
    for a, b in zip(got, _padded(model, samples), strict=True):
        assert a.dtype == torch.float32
        assert 0 < (a - b).abs().max() < 0.5
    gradients = _gradients(model, got)
    exact = _gradients(model, _padded(model, samples))
    a, b = (torch.cat([g.flatten() for g in x.values()]) for x in (gradients, exact))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99


def test_gradients_are_the_same_bits_every_time():
    model, samples = _model(FAMILIES["llama"], torch.float32), _samples(groups=6)
    first, second = (_gradients(model, _packed(model, samples, pack(samples, 200))) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_untied_embedding_has_a_dense_gradient():
    model = _model(FAMILIES["llama-untied"])
    gradients = _gradients(model, _packed(model, _samples(), pack(_samples(), 1000)))
    assert not any(g.is_sparse for g in gradients.values())


def test_other_calls_of_the_model_stay_as_they_were():
    samples, untouched = _samples(), _model(FAMILIES["llama"])
    model = _model(FAMILIES["llama"])
    _packed(model, samples, pack(samples, 60))
    for a, b in zip(_padded(model, samples), _padded(untouched, samples), strict=True):
        assert torch.equal(a, b)
    (row,) = pack(samples, 1000)
    hidden = [
        m.base_model(
            input_ids=row.input_ids[None],
            position_ids=row.position_ids[None],
            attention_mask=row.attention_mask(),
        ).last_hidden_state
        for m in (model, untouched)
    ]
    assert torch.equal(*hidden)
    prompt = torch.tensor([[5, 6, 7]])
    generated = [m.generate(prompt, max_new_tokens=5, do_sample=False) for m in (model, untouched)]
    assert torch.equal(*generated)


def test_a_row_without_samples_gives_nothing_and_can_go_backward():
    model = _model(FAMILIES["llama"])
    (row,) = pack([Sample((5,), (), ())], 1)
    for way in (packed_logprobs, packing._plain_way):
        logprobs, entropies = way(model, row)
        assert logprobs.shape == entropies.shape == (0,)
        model.zero_grad()
        (logprobs.sum() + entropies.sum()).backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


class _Skew(torch.nn.Module):
    """Adds a position-dependent shift after the decoder: what it does to a packed row is not what it does alone."""

    def forward(self, hidden):
        return hidden + 0.1 * torch.arange(hidden.shape[1])[None, :, None]


def _broken(kind: str) -> PreTrainedModel:
    if kind == "window":
        config = Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=0)
        return _model(config)
    if kind == "eager":
        return _model(FAMILIES["llama"], attn_implementation="eager")
    model = _model(FAMILIES["llama"])
    if kind == "positions":
        model.model.norm = torch.nn.Sequential(model.model.norm, _Skew())
    if kind == "bias":
        model.lm_head.bias = torch.nn.Parameter(torch.randn(99, dtype=torch.float64))
    return model


@pytest.mark.filterwarnings("default:packed rows")
@pytest.mark.parametrize("kind", ["window", "eager", "positions", "bias"])
def test_a_model_that_the_fast_way_gets_wrong_is_run_plainly(kind):
    model, samples = _broken(kind), _samples()
    with pytest.warns(UserWarning, match="packed rows of .* one by one"):
        _assert_equal_to_padded(model, samples, 60, atol=1e-12, grad_atol=5e-5)
    with warnings.catch_warnings():  # the verdict is remembered
        warnings.simplefilter("error")
        packed_logprobs(model, pack(samples, 60)[0])


@pytest.mark.filterwarnings("default:packed rows")
def test_a_wrong_attention_function_is_caught(monkeypatch):
    right = attention._tiled

    def wrong(query, key, value, scale, tree):
        last = tree.parts[-1]
        open_mask = attention.Tile(last.start, last.end, last.ranges, torch.zeros_like(last.mask))
        return right(query, key, value, scale, attention.Tiles((*tree.parts[:-1], open_mask)))

    monkeypatch.setattr(attention, "_tiled", wrong)
    with pytest.warns(UserWarning, match="off by up to .* nats"):
        _assert_equal_to_padded(_model(FAMILIES["llama"]), _samples(), 10_000, atol=1e-12, grad_atol=2e-5)


@pytest.mark.filterwarnings("default:packed rows")
def test_a_wrong_gradient_is_caught(monkeypatch):
    monkeypatch.setattr(attention, "_add", lambda *arguments: None)
    with pytest.warns(UserWarning, match="gradients are off by up to"):
        _assert_equal_to_padded(_model(FAMILIES["llama"]), _samples(), 10_000, atol=1e-12, grad_atol=2e-5)


@pytest.mark.filterwarnings("default:packed rows")
@pytest.mark.parametrize("right", [True, False])
def test_in_low_precision_rounding_and_errors_are_told_apart(monkeypatch, right):
    """Weights of the usual small size: who looks at whom then changes a log-probability by less than 0.25."""
    model = _model(FAMILIES["llama"], torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.02)
    if not right:
        real = attention.tiles
        everything = torch.full((1000,), 10_000)
        monkeypatch.setattr(attention, "tiles", lambda end: real(everything[: len(end)].clamp(max=len(end))))
        monkeypatch.setattr(packing, "_TILED", packing._tree_way(attention.tiles))
    row = pack(_samples(), 1000)[0]
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert packing.packs(model, row) == right
    assert right == (not seen)


def test_the_self_check_leaves_no_trace():
    model = _model(FAMILIES["llama"]).train()
    model.model.layers[0].mlp = torch.nn.Sequential(model.model.layers[0].mlp, torch.nn.Dropout(0.5))
    state = torch.random.get_rng_state()
    with torch.no_grad():
        packing._way(model, pack(_samples(), 100)[0])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_the_self_check_is_made_once_per_precision(monkeypatch):
    made = []
    real = packing._checked
    monkeypatch.setattr(packing, "_checked", lambda *arguments: made.append(1) or real(*arguments))
    model, row = _model(FAMILIES["llama"], torch.float32), pack(_samples(), 60)[0]
    for _ in range(2):
        packed_logprobs(model, row)
        with torch.autocast("cpu", torch.bfloat16):
            packed_logprobs(model, row)
    assert len(made) == 2


def test_shared_tokens_exist_once():
    shared = Sample([5, 6, 7], [8, 9], [True, True])
    other = Sample([5, 6, 7], [8, 10, 11], [True, True, True])
    (batch,) = pack([other, shared, shared], 100)
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 4, 5]
    assert batch.subtree_end.tolist() == [7, 7, 7, 7, 5, 7, 7]
    assert batch.samples == (1, 2, 0)
    assert batch.sequence.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert batch.targets.tolist() == [8, 9, 10, 11]
    assert batch.predictors.tolist() == [2, 3, 3, 5]
    assert batch.token.tolist() == [0, 1, 0, 1, 0, 2, 3]
    assert batch.index.tolist() == [3, 4, 5, 6, 0, 1, 2]
    mask = batch.attention_mask()[0, 0].int().tolist()
    assert mask[4] == [1, 1, 1, 1, 1, 0, 0]
    assert mask[6] == [1, 1, 1, 1, 0, 1, 1]


def test_two_temperatures_score_a_shared_token_twice():
    (batch,) = pack([Sample([5], [6, 7], [True, False], t) for t in (1.0, 0.5)], 100)
    assert batch.input_ids.tolist() == [5, 6, 7]
    assert batch.targets.tolist() == [6, 6]
    assert sorted(batch.temperatures[batch.token].tolist()) == [0.5, 1.0]


SAMPLES = st.lists(
    st.builds(
        lambda prompt, answer: Sample(prompt, [t for t, _ in answer], [b for _, b in answer]),
        st.lists(st.integers(0, 2), min_size=1, max_size=6),
        st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=6),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(SAMPLES, st.integers(1, 40))
def test_every_row_holds_its_samples_as_a_tree(samples, budget):
    rows = pack(samples, budget)
    assert sorted(n for row in rows for n in row.samples) == list(range(len(samples)))
    assert sorted(i for row in rows for i in row.index.tolist()) == list(
        range(sum(sum(s.trained) for s in samples))
    )
    starts = [0]
    for s in samples:
        starts.append(starts[-1] + sum(s.trained))
    for row in rows:
        assert len(row.input_ids) <= budget or row.sequences == 1
        paths = {(*samples[n].prompt_ids, *samples[n].response_ids) for n in row.samples}
        # As many nodes as there are distinct beginnings, and each node's ancestors spell its beginning.
        beginnings = {path[: i + 1] for path in paths for i in range(len(path))}
        mask = row.attention_mask()[0, 0]
        spelled = [tuple(row.input_ids[line].tolist()) for line in mask]
        assert len(spelled) == len(beginnings)
        assert set(spelled) == beginnings
        assert row.position_ids.tolist() == [len(b) - 1 for b in spelled]
        for place, number in enumerate(row.samples):
            s, mine = samples[number], row.sequence == place
            assert row.index[mine].tolist() == list(range(starts[number], starts[number + 1]))
            scored = row.token[mine]
            whole = (*s.prompt_ids, *s.response_ids)
            ends = [len(s.prompt_ids) + i for i, trained in enumerate(s.trained) if trained]
            assert [spelled[j] for j in row.predictors[scored].tolist()] == [whole[:i] for i in ends]
            assert row.targets[scored].tolist() == [whole[i] for i in ends]


def _fewest_rows(lengths: list[int], budget: int) -> int:
    """Of sequences without shared beginnings, kept in this order."""
    rows, size = 1, 0
    for length in lengths:
        rows, size = (rows + 1, length) if size and size + length > budget else (rows, size + length)
    return rows


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 80))
def test_rows_are_as_few_as_they_can_be(lengths, budget):
    samples = [Sample([number], [1] * (n - 1), [True] * (n - 1)) for number, n in enumerate(lengths)]
    assert len(pack(samples, budget)) == _fewest_rows(lengths, budget)


def test_rows_are_balanced():
    samples = [Sample([number], [1] * 99, [True] * 99) for number in range(12)]
    rows = pack(samples, 700)  # greedy would make 7 + 5
    assert [row.sequences for row in rows] == [6, 6]


def test_a_cut_falls_where_little_is_shared():
    left = [Sample([1] * 20, [n], [True]) for n in range(4)]
    right = [Sample([2] * 20, [n], [True]) for n in range(6)]
    rows = pack(left + right, 30)
    assert [row.sequences for row in rows] == [4, 6]


def test_order_of_samples_does_not_matter():
    samples = _samples(seed=2)
    a, b = pack(samples, 80), pack(samples[::-1], 80)
    for x, y in zip(a, b, strict=True):
        for field in ("input_ids", "predictors", "targets", "temperatures", "token", "sequence"):
            assert torch.equal(getattr(x, field), getattr(y, field))


def test_cost_counts_nodes_and_pairs():
    (row,) = pack([Sample([1, 2], [3], [True]), Sample([1, 2], [4, 5], [True, True])], 100)
    # Depths 0 1 2 2 3 see 1 2 3 3 4 tokens.
    assert cost(row) == pytest.approx(5 + 13 / packing.PAIRS_PER_TOKEN)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.1, 100), max_size=30), st.integers(1, 6))
def test_partition_is_balanced(costs, parts):
    shares = partition(costs, parts)
    assert len(shares) == parts
    assert sorted(n for share in shares for n in share) == list(range(len(costs)))
    heaviest = max(sum(costs[n] for n in share) for share in shares)
    # Graham 1966: at most the mean and one item more than the best.
    assert heaviest <= sum(costs) / parts + max(costs, default=0) + 1e-9


def test_partition_by_hand():
    assert partition([7, 6, 5, 4, 3, 2], 3) == [[0, 5], [1, 4], [2, 3]]
    assert partition([1.0, 2.0], 3) == [[1], [0], []]


def test_bad_samples_are_refused():
    with pytest.raises(ValueError, match="sample 0"):
        pack([Sample([], [1], [True])], 10)
    with pytest.raises(ValueError, match="unequal length"):
        pack([Sample([1], [1, 2], [True])], 10)


@pytest.mark.parametrize("aggregation", objectives.AGGREGATIONS)
@pytest.mark.parametrize("name", ["vespo", "grpo", "reinforce"])
def test_micro_batches_have_the_gradient_of_the_whole_batch(model_dir, name, aggregation):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    samples = _samples(seed=7)
    generator = torch.Generator().manual_seed(0)
    # Behaviour log-probabilities near the policy's own, so that no kernel vanishes.
    behaviour = torch.cat([found[:, 0].detach() + 0.05 for found in _padded(model, samples)])
    advantage = torch.randn(len(samples), generator=generator, dtype=torch.float64)
    advantages = advantage.repeat_interleave(torch.tensor([sum(s.trained) for s in samples]))
    counts = objectives.Counts(len(behaviour), len(samples))
    results = []
    for budget in (40, 10_000):
        model.zero_grad()
        total = 0.0
        for micro in pack(samples, budget):
            logprobs, _ = packed_logprobs(model, micro)
            batch = objectives.Batch(
                logprobs=logprobs,
                advantages=advantages[micro.index],
                sequence=micro.sequence,
                sequences=micro.sequences,
                behaviour_logprobs=behaviour[micro.index],
            )
            loss = objectives.aggregate(objectives.get(name).loss(batch), batch, aggregation, counts)
            loss.backward()
            total += float(loss.detach())
        results.append((total, torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-8)
