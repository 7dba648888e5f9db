from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tasks.core.errors import Refused
from tasks.rollout.engine import GrowingLayer, Noise, invert, log_distribution, start, uniform
from tests.tiny import make_tiny_model

STOP = frozenset({3})  # the newline of the tiny tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("engine") / "tiny")


@pytest.fixture(scope="module")
def model(tiny: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)


def noise(*key: object) -> Noise:
    return (uniform(*key, i) for i in itertools.count())


def plain_logprobs(model: PreTrainedModel, ids: list[int], temperature: float) -> torch.Tensor:
    """[len(ids), V]: of what follows each token, by one forward pass over the sequence alone."""
    with torch.no_grad():
        return log_distribution(model(torch.tensor([ids])).logits[0], temperature)


PROMPTS = {
    "common prefix": [[5, 6, 7, 8, 9], [5, 6, 7, 4], [5, 6, 7, 8, 10, 11, 12]],
    "no common prefix": [[5, 6, 7], [9], [8, 8]],
    "one is the prefix of another": [[5, 6], [5, 6, 7]],
    "equal": [[5, 6, 7], [5, 6, 7]],
    "one": [[5]],
}


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize(
    ("attention", "dtype", "tolerance"), [("sdpa", torch.float64, 1e-10), ("eager", torch.float32, 1e-5)]
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_several_turns_give_the_log_probabilities_of_plain_forward_passes(
    tiny: Path,
    prompts: list[list[int]],
    attention: str,
    dtype: torch.dtype,
    tolerance: float,
    temperature: float,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype, attn_implementation=attention)
    copies = 3
    rows = start(model, prompts, copies)
    sequences = [list(prompt) for prompt in prompts for _ in range(copies)]
    streams = [noise("turns", row) for row in range(len(sequences))]
    written: list[list[tuple[int, float]]] = [
        [] for _ in sequences
    ]  # (position in the sequence, log-probability)
    for turn in range(3):
        # Half of the vocabulary stops, so rows end their actions at different times and holes arise.
        actions = rows.act(streams, temperature, frozenset(range(3, 60)), max_new_tokens=4, last=turn == 2)
        chunks = []
        for row, action in enumerate(actions):
            written[row] += [(len(sequences[row]) + i, logprob) for i, logprob in enumerate(action.logprobs)]
            observation = [20 + row % 5] * (1 + (row + turn) % 4)
            sequences[row] += action.ids + observation
            chunks.append(action.ids[-1:] + observation)
        if turn < 2:
            rows.feed(chunks)
    assert {len(action.ids) for action in actions} != {1}
    for sequence, tokens in zip(sequences, written, strict=True):
        expected = plain_logprobs(model, sequence, temperature)
        for position, logprob in tokens:
            assert logprob == pytest.approx(float(expected[position - 1, sequence[position]]), abs=tolerance)


def test_float32_is_exact_to_its_rounding(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    prompts = PROMPTS["common prefix"]
    actions = start(model, prompts, 4).act([noise(row) for row in range(12)], 1.0, STOP, max_new_tokens=12)
    for row, action in enumerate(actions):
        expected = plain_logprobs(model, prompts[row // 4] + action.ids, 1.0)
        at = torch.arange(len(action.ids)) + len(prompts[row // 4]) - 1
        found = expected[at, torch.tensor(action.ids)]
        torch.testing.assert_close(torch.tensor(action.logprobs), found, atol=1e-5, rtol=0)


def test_tokens_do_not_depend_on_what_else_is_in_the_batch(model: PreTrainedModel) -> None:
    prompts = PROMPTS["common prefix"]
    together = start(model, prompts, 2).act([noise(row) for row in range(6)], 1.0, STOP, max_new_tokens=10)
    for row in range(6):
        (alone,) = start(model, [prompts[row // 2]], 1).act([noise(row)], 1.0, STOP, max_new_tokens=10)
        assert alone.ids == together[row].ids
        assert alone.logprobs == pytest.approx(together[row].logprobs, abs=1e-10)


def test_dropping_rows_changes_nothing_for_the_others(model: PreTrainedModel) -> None:
    def play(keep: list[int] | None) -> list[list[int]]:
        rows = start(model, PROMPTS["common prefix"], 2)
        first = rows.act([noise(row) for row in range(6)], 1.0, STOP, max_new_tokens=5)
        if keep is not None:
            rows.keep(keep)
        keep = keep or list(range(6))
        rows.feed([[*first[row].ids[-1:], 9, 9] for row in keep])
        return [
            action.ids for action in rows.act([noise("b", row) for row in keep], 1.0, STOP, max_new_tokens=5)
        ]

    everything = play(None)
    assert play([4, 1]) == [everything[4], everything[1]]


def test_an_action_ends_with_the_first_stopping_token(model: PreTrainedModel) -> None:
    stop = frozenset(range(3, 40))
    rows = start(model, PROMPTS["equal"], 20)
    actions = rows.act([noise(row) for row in range(40)], 1.0, stop, max_new_tokens=3)
    for action in actions:
        assert not stop & set(action.ids[:-1])
        assert action.ids[-1] in stop or len(action.ids) == 3
    assert {len(action.ids) for action in actions} == {1, 2, 3}


def test_greedy_takes_the_most_probable_token(model: PreTrainedModel) -> None:
    (action,) = start(model, [[5, 6, 7]], 1).act(None, 1.0, STOP, max_new_tokens=6)
    sequence = [5, 6, 7]
    for token in action.ids:
        assert token == int(plain_logprobs(model, sequence, 1.0)[-1].argmax())
        sequence.append(token)


def test_inverting_the_distribution_draws_from_it() -> None:
    logits = torch.linspace(-2, 3, 700, dtype=torch.float64).roll(
        123
    )  # more than two blocks, not a whole number
    logprobs = log_distribution(logits[None], 1.0)
    n = 20_000
    drawn = invert(logprobs.expand(n, -1), [(i + 0.5) / n for i in range(n)])
    # Evenly spaced numbers: every token comes up as often as its probability says, to within one.
    counts = torch.bincount(drawn, minlength=700)
    assert torch.all((counts - n * logprobs[0].exp()).abs() <= 1)
    assert torch.equal(drawn, drawn.sort().values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_tokens_are_never_drawn(dtype: torch.dtype) -> None:
    logits = torch.full((1, 1000), -torch.inf, dtype=dtype)
    logits[0, [300, 301, 600]] = torch.tensor([0.0, 1.0, -30.0], dtype=dtype)
    edges = [0.0, 1e-300, 0.5, 1 - 2**-53]
    drawn = invert(log_distribution(logits, 1.0).expand(4, -1), edges)
    assert set(drawn.tolist()) <= {300, 301, 600}
    assert int(drawn[0]) == 300


def test_uniform_numbers_are_uniform_and_belong_to_their_key() -> None:
    numbers = torch.tensor([uniform(0, "task", 3, i) for i in range(4000)], dtype=torch.float64)
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    assert torch.all((torch.histc(numbers, 10, 0, 1) - 400).abs() < 100)
    assert uniform(1, 23) != uniform(12, 3)
    assert uniform(0, "a", 1) == 0.2783205628624571  # stays the same in every version: replay depends on it


def test_the_growing_cache_layer_holds_what_a_concatenation_would() -> None:
    layer = GrowingLayer()
    generator = torch.Generator().manual_seed(0)
    parts: Iterator[torch.Tensor] = (torch.randn(2, 3, n, 4, generator=generator) for n in (5, 1, 40, 1, 1))
    seen = torch.empty(2, 3, 0, 4)
    for part in parts:
        seen = torch.cat([seen, part], dim=2)
        keys, values = layer.update(part, -part)
        assert torch.equal(keys, seen)
        assert torch.equal(values, -seen)
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([3, 0]))
    keys, _ = layer.update(torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1, 4))
    assert torch.equal(keys[:, :, :-1], seen[[1, 0]])
    assert layer.get_seq_length() == seen.shape[2] + 1


def test_a_model_that_has_diverged_is_refused(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(Refused, match="not numbers"):
        start(model, [[5, 6]], 2).act([noise(0), noise(1)], 1.0, STOP, max_new_tokens=2)
