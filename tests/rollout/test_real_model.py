"""The engine and the prompts on the product's default model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.causal_lm import load_policy, load_tokenizer
from tasks.arena.calculator import PREFIX, Calculator
from tasks.rollout.rollout import BehaviourIdentity, evaluate, recompute_logprobs, rollout, stop_tokens

pytestmark = pytest.mark.slow
IDENTITY = BehaviourIdentity("agent/1", "a" * 64, "b" * 64, "c" * 64)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(smollm2)


@pytest.fixture(scope="module")
def model(smollm2: Path) -> PreTrainedModel:
    return load_policy(smollm2)


def test_an_episode_has_the_tokens_that_its_text_has_in_the_examples(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def pieces() -> Iterator[str]:
        for example in PREFIX.strip("\n").split("\n\n"):
            question, call, result, answer = example.split("\n")
            yield f"{question}\ncall:"
            yield call.removeprefix("call:") + "\n"
            yield f"{result}\nanswer:"
            yield answer.removeprefix("answer:") + "\n"

    for part in range(0, 12, 4):
        example = list(pieces())[part : part + 4]
        assert [token for piece in example for token in encode(piece)] == encode("".join(example))
    assert encode("\n")[0] in stop_tokens(tokenizer)
    assert [tokenizer.decode([token]) for token in encode(" 7")] == [" ", "7"]


def test_rollouts_are_exact_and_have_something_to_learn(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    env = Calculator()
    groups = list(
        rollout(
            model,
            tokenizer,
            env,
            env.tasks("train", 6, seed=1),
            group_size=8,
            temperature=1.0,
            seed=0,
            batch_rows=48,
            identity=IDENTITY,
        )
    )
    episodes = [episode for group in groups for episode in group]
    some = episodes[::4]  # of every group; reading all again takes as long as sampling them
    for before, after in zip(some, recompute_logprobs(model, some), strict=True):
        assert after.behaviour_logprobs == pytest.approx(before.behaviour_logprobs, abs=1e-3)
    assert 0.1 < sum(episode.reward for episode in episodes) / len(episodes) < 0.8
    assert sum(len({episode.reward for episode in group}) > 1 for group in groups) >= 3


def test_the_base_model_is_above_the_baselines_and_below_perfection(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    env = Calculator()
    tasks = env.tasks("heldout", 40, seed=2)
    score = sum(outcome.reward for outcome in evaluate(model, tokenizer, env, tasks, batch_rows=40)) / 40
    assert max(env.constant_baseline(tasks)[1], env.random_baseline(tasks, seed=0)) < score < 0.95
