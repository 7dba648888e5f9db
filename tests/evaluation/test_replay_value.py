"""Evidence from rows of the replay, scored by a real small Llama."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from models.causal_lm import load_policy
from tasks.core.digest import sha256_bytes
from tasks.core.errors import Refused
from tasks.evaluation.off_policy import Rule
from tasks.evaluation.replay_value import difference_on_replay, log_ratios, logged, usable, value_on_replay
from tasks.replay.schema import Episode, arrow_schema
from tests.tiny import make_tiny_model
from tests.training.replay import make_episodes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", seed=1)


@pytest.fixture(scope="module")
def policy(tiny):
    return load_policy(tiny)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The same Llama with weights moved a little."""
    model = load_policy(make_tiny_model(tmp_path_factory.mktemp("other") / "model", seed=1))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def rows(tiny) -> list[Episode]:
    """Twelve prompts of four episodes. The observation in third place answers turn 0; what follows is turn 1."""
    return [
        replace(
            episode,
            turn_ids=[0 if i <= 2 else 1 for i in range(len(episode.response_ids))],
            prompt_sha256=sha256_bytes(episode.group_id.encode()),
        )
        for episode in make_episodes(tiny, groups=12)
    ]


def table(episodes: list[Episode]) -> pa.Table:
    return pa.Table.from_pylist([asdict(one) for one in episodes], arrow_schema())


def test_the_policy_that_wrote_the_log_has_ratios_of_zero(policy, rows):
    episodes = usable(table(rows), rows[0].tokenizer_digest)
    ratios = log_ratios(policy, episodes)
    assert ratios.shape == (48, 2)
    assert np.abs(ratios).max() < 1e-5
    mean = float(np.mean([one.reward for one in rows]))
    found = value_on_replay(episodes, policy, Rule())
    assert found.estimate == pytest.approx(mean, abs=1e-5)
    assert (found.n, found.prompts) == (48, 12)
    assert found.overlap[0].ess_share == pytest.approx(1, abs=1e-6)


def test_rounding_is_no_difference(policy, rows, tiny):
    """The same weights in float64: ratios differ by rounding alone, and so surely that any interval would exclude 0."""
    precise = load_policy(tiny, dtype="float64")
    episodes = usable(table(rows), rows[0].tokenizer_digest)
    for looks in ("any time", "once"):
        found = difference_on_replay(episodes, precise, policy, Rule(looks=looks))
        assert 0 < abs(found.estimate) < 1e-5
        assert found.verdict == "INCONCLUSIVE"


def test_ratios_are_those_of_plain_forward_passes_turn_by_turn(policy, other, rows):
    episodes = [replace(rows[0], temperature=0.7), *rows[1:8]]
    found = log_ratios(other, episodes, token_budget=40)
    for number, one in enumerate(episodes):
        ids = torch.tensor([[*one.prompt_ids, *one.response_ids]])
        with torch.no_grad():
            logs = (other(ids).logits[0] / one.temperature).log_softmax(-1)
        expected = [0.0, 0.0]
        for place, (token, mine) in enumerate(zip(one.response_ids, one.loss_mask, strict=True)):
            if mine:
                logprob = float(logs[len(one.prompt_ids) + place - 1, token])
                expected[one.turn_ids[place]] += logprob - one.behaviour_logprobs[place]
        assert found[number].tolist() == pytest.approx(expected, abs=1e-4)
        assert max(map(abs, expected)) > 1e-3


def test_ratios_are_of_what_was_read(other, rows):
    """A memory of one turn: the third turn was not written from the first."""
    three = [
        replace(
            one,
            turn_ids=[0, 0, 0, 1, *[2] * (len(one.response_ids) - 4)],
            reward_components='{"memory_turns": 1}',
        )
        for one in rows[:6]
    ]
    found = log_ratios(other, three)
    for number, one in enumerate(three):
        expected, place = [0.0, 0.0, 0.0], 0
        for place, (token, turn, mine) in enumerate(
            zip(one.response_ids, one.turn_ids, one.loss_mask, strict=True)
        ):
            before = zip(one.response_ids[:place], one.turn_ids[:place], strict=True)
            read = [i for i, t in before if t >= turn - 1]
            with torch.no_grad():
                logs = other(torch.tensor([[*one.prompt_ids, *read]])).logits[0, -1].log_softmax(-1)
            if mine:
                expected[turn] += float(logs[token]) - one.behaviour_logprobs[place]
        assert found[number].tolist() == pytest.approx(expected, abs=1e-4)
    whole = log_ratios(other, [replace(one, reward_components="{}") for one in three])
    assert np.abs(found[:, :2] - whole[:, :2]).max() < 1e-5
    assert np.abs(found[:, 2] - whole[:, 2]).max() > 1e-3


def test_the_difference_has_the_sign_of_who_comes_first(policy, other, rows):
    episodes = usable(table(rows), rows[0].tokenizer_digest)
    forth = difference_on_replay(episodes, other, policy, Rule())
    back = difference_on_replay(episodes, policy, other, Rule())
    assert forth.estimate == pytest.approx(-back.estimate, abs=1e-9)
    alone = [value_on_replay(episodes, model, Rule()).estimate for model in (other, policy)]
    assert forth.estimate == pytest.approx(alone[0] - alone[1], abs=1e-9)
    assert forth.estimate != 0


def test_the_reward_is_earned_in_the_last_turn_that_was_written(rows):
    log = logged(rows[:4])
    assert log.turns.tolist() == [2, 2, 2, 2]
    assert log.rewards.tolist() == [[0.0, one.reward] for one in rows[:4]]
    silent = replace(rows[0], loss_mask=[False] * len(rows[0].loss_mask))
    assert logged([silent]).turns.tolist() == [1]


def test_failed_episodes_and_known_prompts_are_passed_over(rows):
    failed = [replace(rows[0], finish_reason="error"), *rows[1:]]
    known = {rows[4].prompt_sha256}
    kept = usable(table(failed), rows[0].tokenizer_digest, without=known)
    assert {one.episode_id for one in kept} == {
        one.episode_id for one in rows[1:] if one.prompt_sha256 not in known
    }
    assert len(kept) == 43


def test_prompts_stand_in_the_order_of_their_digests(rows):
    kept = usable(table(rows[::-1]), rows[0].tokenizer_digest)
    assert [one.prompt_sha256 for one in kept] == sorted(one.prompt_sha256 for one in rows)
    assert kept == usable(table(rows), rows[0].tokenizer_digest)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokenizer_digest": "f" * 64}, "1 of 48 episodes were made with another tokenizer"),
        ({"logprob_source": "missing"}, "lack the log-probabilities"),
        ({"temperature": 0.0}, "are greedy"),
        ({"top_p": 0.9}, "top_p below 1"),
    ],
)
def test_episodes_without_comparable_probabilities_are_refused(rows, change, sentence):
    bad = [replace(rows[0], **change), *rows[1:]]
    with pytest.raises(Refused, match=sentence):
        usable(table(bad), rows[0].tokenizer_digest)


def test_no_episodes_are_refused(policy):
    with pytest.raises(ValueError, match="at least one episode"):
        value_on_replay([], policy, Rule())
