from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from models import objectives
from models.packing import MicroBatch, Sample, pack, packed_logprobs
from tests.tiny import make_tiny_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), seed=3)


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
            behaviour = [-rng.random() * 3 if t else 0.0 for t in trained]
            samples.append(
                Sample(prompt, answer, trained, behaviour, rng.uniform(-1, 1), rng.choice([1.0, 0.7]))
            )
    return samples


def _padded(model, samples: list[Sample]) -> list[torch.Tensor]:
    """The plain way: one right-padded row a sample, log_softmax over all logits; trained tokens of each
    sample."""
    rows = [[*s.prompt_ids, *s.response_ids] for s in samples]
    width = max(map(len, rows))
    ids = torch.tensor([row + [2] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logits = model(input_ids=ids, attention_mask=mask).logits
    found = []
    for row, s in enumerate(samples):
        logs = torch.log_softmax(logits[row] / s.temperature, dim=-1)
        start = len(s.prompt_ids)
        found.append(
            torch.stack(
                [logs[start + t - 1, token] for t, token in enumerate(s.response_ids) if s.trained[t]]
            )
        )
    return found


def _packed(model, samples: list[Sample], batches: list[MicroBatch]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = [torch.empty(0)] * len(samples)
    for batch in batches:
        logprobs, _ = packed_logprobs(model, batch)
        for place, number in enumerate(batch.samples):
            found[number] = logprobs[batch.sequence == place]
    return found


@pytest.mark.parametrize("budget", [1, 60, 10_000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_equals_padded_forward_and_backward(model_dir, dtype, tolerance, budget):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    samples = _samples()
    want, got = _padded(model, samples), _packed(model, samples, pack(samples, budget))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    grads = []
    for found in (got, want):
        model.zero_grad()
        sum((s.advantage * logs).sum() for s, logs in zip(samples, found, strict=True)).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name in grads[0]:
        # Looser: the library's norms round their gradients to float32 whatever the model's type, before
        # they are summed.
        torch.testing.assert_close(
            grads[0][name], grads[1][name], rtol=1e-4, atol=2e-5 if dtype == torch.float32 else 2e-6
        )


def test_shared_tokens_exist_once():
    shared = Sample([5, 6, 7], [8, 9], [True, True], [-1.0, -1.0], 1.0)
    other = Sample([5, 6, 7], [8, 10, 11], [True, True, True], [-1.0] * 3, -1.0)
    (batch,) = pack([other, shared, shared], 100)
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 4, 5]
    assert batch.samples == (1, 2, 0)
    assert batch.sequence.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert batch.targets.tolist() == [8, 9, 10, 11]
    assert batch.predictors.tolist() == [2, 3, 3, 5]
    assert batch.token.tolist() == [0, 1, 0, 1, 0, 2, 3]
    mask = batch.attention_mask()[0, 0].int().tolist()
    assert mask[4] == [1, 1, 1, 1, 1, 0, 0]
    assert mask[6] == [1, 1, 1, 1, 0, 1, 1]


def test_budget_is_kept_and_no_sample_is_split_or_lost():
    samples = _samples(seed=5, groups=6)
    for budget in (30, 50, 90, 1000):
        batches = pack(samples, budget)
        assert sorted(n for b in batches for n in b.samples) == list(range(len(samples)))
        for batch in batches:
            assert len(batch.input_ids) <= budget or batch.sequences == 1
            for place, number in enumerate(batch.samples):
                assert int((batch.sequence == place).sum()) == sum(samples[number].trained)


def test_order_of_samples_does_not_matter():
    samples = _samples(seed=2)
    a, b = pack(samples, 80), pack(samples[::-1], 80)
    assert [x.input_ids.tolist() for x in a] == [x.input_ids.tolist() for x in b]


def test_bad_samples_are_refused():
    with pytest.raises(ValueError, match="sample 0"):
        pack([Sample([], [1], [True], [-1.0], 1.0)], 10)
    with pytest.raises(ValueError, match="unequal length"):
        pack([Sample([1], [1, 2], [True], [-1.0, 0.0], 1.0)], 10)


@pytest.mark.parametrize("aggregation", objectives.AGGREGATIONS)
@pytest.mark.parametrize("name", ["vespo", "grpo", "reinforce"])
def test_micro_batches_have_the_gradient_of_the_whole_batch(model_dir, name, aggregation):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    samples = _samples(seed=7)
    # Behaviour log-probabilities near the policy's own, so that no kernel vanishes.
    for i, logs in enumerate(_padded(model, samples)):
        near = iter((logs.detach() + 0.05).tolist())
        s = samples[i]
        samples[i] = Sample(
            s.prompt_ids,
            s.response_ids,
            s.trained,
            [next(near) if t else 0.0 for t in s.trained],
            s.advantage,
            s.temperature,
        )
    counts = objectives.Counts(sum(sum(s.trained) for s in samples), len(samples))
    results = []
    for budget in (40, 10_000):
        model.zero_grad()
        total = 0.0
        for micro in pack(samples, budget):
            logprobs, _ = packed_logprobs(model, micro)
            batch = objectives.Batch(
                logprobs, micro.behaviour_logprobs, micro.advantages, micro.sequence, micro.sequences
            )
            loss = objectives.aggregate(objectives.get(name).loss(batch), batch, aggregation, counts)
            loss.backward()
            total += float(loss.detach())
        results.append((total, torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-8)
