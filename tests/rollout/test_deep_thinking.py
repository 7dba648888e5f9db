"""The ratio that is kept with an episode, against its definition computed from plain forward passes in float64."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from models.packing import Sample
from tasks.arena.calculator import Calculator
from tasks.arena.environment import get
from tasks.core.settings import DeepThinking
from tasks.replay.passes import passes
from tasks.replay.schema import DEEP_THINKING, Episode
from tasks.rollout.deep_thinking import measured
from tasks.rollout.rollout import BehaviourIdentity, rollout
from tests.tiny import make_tiny_model

LAYERS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """Weights large enough that the layers disagree."""
    path = make_tiny_model(tmp_path_factory.mktemp("deep") / "tiny", layers=LAYERS)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layers" in name and weight.dim() == 2:
                weight.mul_(6)
        model.get_input_embeddings().weight.mul_(24)
    return model.eval()


@pytest.fixture(scope="module")
def group(model: PreTrainedModel) -> list[Episode]:
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    env = Calculator()
    (task,) = env.tasks("train", 1, seed=1)
    short = replace(task, prompt=task.prompt.rpartition("\n\n")[2])
    identity = BehaviourIdentity("agent/1", "a" * 64, "b" * 64, "c" * 64)
    (found,) = rollout(
        model, tokenizer, env, [short], group_size=4, temperature=1.0, seed=7, batch_rows=8, identity=identity
    )
    return found


def by_definition(model: PreTrainedModel, episode: Episode, threshold: float, first_deep: int) -> float:
    """Share of the tokens that the policy wrote whose first settled layer, from 1, is in the deep regime."""
    deep = [one for sample in passes(episode) for one in _deep(model, sample, threshold, first_deep)]
    return sum(deep) / len(deep)


def _deep(model: PreTrainedModel, sample: Sample, threshold: float, first_deep: int) -> list[bool]:
    with torch.no_grad():
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        states = model(ids, output_hidden_states=True).hidden_states
        layers = [model.lm_head(model.model.norm(h)).softmax(-1) for h in states[1:-1]]
        layers.append(model.lm_head(states[-1]).softmax(-1))  # normed already
    deep = []
    for at, mine in enumerate(sample.trained):
        if not mine:
            continue
        place = len(sample.prompt_ids) + at - 1
        last = layers[-1][0, place]
        for layer, values in enumerate(layers, start=1):
            p, q = values[0, place], last
            middle = (p + q) / 2
            divergence = sum(torch.special.xlogy(one, one / middle).sum() / 2 for one in (p, q)) / torch.log(
                torch.tensor(2.0)
            )
            if divergence <= threshold:
                deep.append(layer >= first_deep)
                break
    return deep


@pytest.mark.parametrize(("threshold", "rho", "first_deep"), [(0.5, 0.85, 6), (0.3, 0.5, 3), (0.05, 0.6, 4)])
def test_the_ratio_of_an_episode_is_that_of_its_definition(
    model: PreTrainedModel, group: list[Episode], threshold: float, rho: float, first_deep: int
) -> None:
    found = measured(model, group, DeepThinking(threshold=threshold, rho=rho))
    ratios = [json.loads(one.reward_components)[DEEP_THINKING] for one in found]
    assert ratios == pytest.approx([by_definition(model, one, threshold, first_deep) for one in group])
    assert len(set(ratios)) > 1
    assert not all(all(one.loss_mask) for one in group)  # observations do not count


def test_the_ratio_is_of_what_was_read(model: PreTrainedModel) -> None:
    """With a memory of one turn, of four."""
    env = get("memory_1/feedback/number")
    identity = BehaviourIdentity("agent/1", "a" * 64, "b" * 64, "c" * 64)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    tasks = env.tasks("train", 1, seed=1)
    (group,) = rollout(
        model, tokenizer, env, tasks, group_size=6, temperature=1.0, seed=7, batch_rows=8, identity=identity
    )
    assert max(turn for one in group for turn in one.turn_ids) == 3
    differ = 0
    for threshold in (0.05, 0.1, 0.2, 0.4):
        found = measured(model, group, DeepThinking(threshold=threshold, rho=0.6))
        ratios = [json.loads(one.reward_components)[DEEP_THINKING] for one in found]
        assert ratios == pytest.approx([by_definition(model, one, threshold, 4) for one in group])
        whole = [replace(one, reward_components="{}") for one in group]
        differ += ratios != pytest.approx([by_definition(model, one, threshold, 4) for one in whole])
    assert differ


def test_nothing_else_of_an_episode_changes(model: PreTrainedModel, group: list[Episode]) -> None:
    found = measured(model, group, DeepThinking())
    for before, after in zip(group, found, strict=True):
        components = json.loads(after.reward_components)
        assert 0 <= components.pop(DEEP_THINKING) <= 1
        assert components == json.loads(before.reward_components)
        assert replace(after, reward_components=before.reward_components) == before
    assert measured(model, group, None) == group
