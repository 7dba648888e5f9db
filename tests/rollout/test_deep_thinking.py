"""The ratio that is kept with an episode, against its definition computed from plain forward passes in float64."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from models.deep_thinking import Lens, deep, jensen_shannon
from models.packing import Sample
from tasks.arena.calculator import Calculator
from tasks.arena.environment import get
from tasks.core.settings import DeepThinking
from tasks.replay.passes import passes
from tasks.replay.schema import DEEP_THINKING, Episode
from tasks.rollout.deep_thinking import certainties, lens_of, measured
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


def played(model: PreTrainedModel, name: str) -> list[Episode]:
    env = get(name)
    identity = BehaviourIdentity("agent/1", "a" * 64, "b" * 64, "c" * 64)
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    tasks = env.tasks("train", 1, seed=1)
    (group,) = rollout(
        model, tokenizer, env, tasks, group_size=6, temperature=1.0, seed=7, batch_rows=8, identity=identity
    )
    return group


def by_definition(
    model: PreTrainedModel,
    episode: Episode,
    threshold: float,
    first_deep: int,
    *,
    base: float = 2.0,
    normed: bool = True,
) -> float:
    """Share of the tokens that the policy wrote whose first settled layer, from 1, is in the deep regime."""
    deep = [
        one for sample in passes(episode) for one in _deep(model, sample, threshold, first_deep, base, normed)
    ]
    return sum(deep) / len(deep)


def _deep(
    model: PreTrainedModel, sample: Sample, threshold: float, first_deep: int, base: float, normed: bool
) -> list[bool]:
    """Divergences to `base`; inner layers after the final norm or, without `normed`, as they are."""
    with torch.no_grad():
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        states = model(ids, output_hidden_states=True).hidden_states
        layers = [model.lm_head(model.model.norm(h) if normed else h).softmax(-1) for h in states[1:-1]]
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
            divergence = sum(torch.special.xlogy(one, one / middle).sum() / 2 for one in (p, q))
            divergence = divergence / math.log(base)
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


def test_unit_and_norm_are_settings() -> None:
    """(.9, .1) against (.1, .9): 0.531004 bit is above the threshold of 0.5, 0.368064 nat is not."""
    far = [torch.tensor(p, dtype=torch.float64).log() for p in ((0.9, 0.1), (0.1, 0.9))]
    for unit, want, late in (("bits", 0.531004, True), ("nats", 0.368064, False)):
        lens = lens_of(DeepThinking(unit=unit, rho=1))
        divergence = float(jensen_shannon(*far, lens.unit))
        assert divergence == pytest.approx(want, abs=1e-6)
        assert bool(deep(torch.tensor([divergence, 0.0]), lens)) is late
    assert lens_of(DeepThinking()) == Lens()
    assert lens_of(DeepThinking(norm="raw/normed")).norm == "raw/normed"
    for wrong in ({"unit": "bit"}, {"norm": "normed"}, {"threshold": 1.1}):
        with pytest.raises(ValidationError):
            DeepThinking(**wrong)


def test_unit_and_norm_change_the_ratio_as_their_definitions_do(
    model: PreTrainedModel, group: list[Episode]
) -> None:
    found = set()
    for unit, norm in (("bits", "normed/normed"), ("nats", "normed/normed"), ("bits", "raw/normed")):
        read = {"base": 2.0 if unit == "bits" else math.e, "normed": norm == "normed/normed"}
        several = []
        for threshold in (0.02, 0.05, 0.1, 0.3):
            settings = DeepThinking(threshold=threshold, rho=0.5, unit=unit, norm=norm)
            rated = measured(model, group, settings)
            ratios = [json.loads(one.reward_components)[DEEP_THINKING] for one in rated]
            assert ratios == pytest.approx([by_definition(model, one, threshold, 3, **read) for one in group])
            several += ratios
        found.add(tuple(several))
    assert len(found) == 3


@pytest.mark.parametrize("name", [None, "memory_1/feedback/number"])
def test_self_certainty_is_of_the_tokens_that_the_policy_wrote(
    model: PreTrainedModel, group: list[Episode], name: str | None
) -> None:
    episodes = group if name is None else played(model, name)
    want = []
    for episode in episodes:
        each = []
        for sample in passes(episode):
            with torch.no_grad():
                logits = model(torch.tensor([[*sample.prompt_ids, *sample.response_ids]])).logits[0]
            for at, mine in enumerate(sample.trained):
                if mine:
                    p = logits[len(sample.prompt_ids) + at - 1].double().softmax(-1)
                    each.append(-float((len(p) * p).log().mean()))  # KL(uniform, p)
        want.append(sum(each) / len(each))
    assert certainties(model, episodes) == pytest.approx(want, rel=1e-5)
    assert len(set(want)) > 1


def test_the_ratio_is_of_what_was_read(model: PreTrainedModel) -> None:
    """With a memory of one turn, of four."""
    group = played(model, "memory_1/feedback/number")
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
