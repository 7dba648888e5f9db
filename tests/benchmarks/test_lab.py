"""The small laboratory of the behaviour benchmarks, and how they read their curves."""

from __future__ import annotations

import json
import operator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import diversity, hybrid, lab, staleness
from models.packing import Sample, pack, packed_logprobs


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files in a folder of the test's own, and a warm-up of two steps."""
    whole = lab.task
    monkeypatch.setattr(lab, "OUT", tmp_path)
    monkeypatch.setattr(
        lab, "task", lambda name: replace(whole(name), warm_up_steps=2, held_out=whole(name).held_out[:8])
    )


def episodes_of(name: str) -> tuple[torch.nn.Module, lab.Task, lab.Episodes]:
    task, policy = lab.task(name), lab.make_policy(3)
    chosen = task.train(np.random.default_rng(0), 8)
    return policy, task, lab.sample(policy, task, chosen, 8, torch.Generator().manual_seed(0))


def test_countdown_answers_are_right() -> None:
    task = lab.task("countdown")
    for problem in task.held_out + tuple(task.train(np.random.default_rng(0), 50)):
        numbers, target = problem.prompt.rstrip(":").split("=")
        for text in problem.solutions:
            first, second = text.split(";")
            result = first.split("=")[1]
            for step in (first, second):
                written, claimed = step.split("=")
                assert eval(written) == int(claimed) >= 0
            parts = second.split("=")[0].replace("-", "+").split("+")
            parts.remove(result)
            used = first.split("=")[0].replace("-", "+").split("+") + parts
            assert sorted(used) == sorted(numbers)
            assert int(second.split("=")[1]) == int(target)
            assert len(text) < task.answer


@pytest.mark.parametrize("name", ["sorting", "countdown"])
def test_held_out_problems_are_never_drawn(name: str) -> None:
    task = lab.task(name)
    drawn = {one.prompt for one in task.train(np.random.default_rng(1), 3000)}
    assert not drawn & {one.prompt for one in task.held_out}
    assert {len(prompt) for prompt in drawn} == {task.prompt}


def test_sorting_is_sorting() -> None:
    for one in lab.task("sorting").train(np.random.default_rng(0), 20):
        assert one.solutions == ("".join(sorted(one.prompt[:-1])),)


def test_recorded_logprobs_are_those_of_the_forward_pass() -> None:
    policy, _, episodes = episodes_of("countdown")
    logprobs, entropies = lab.answer_logprobs(policy, episodes.prompts, episodes.answers)
    assert torch.allclose(logprobs[episodes.mask], episodes.behaviour[episodes.mask], atol=1e-5)
    assert not episodes.behaviour[~episodes.mask].any()
    assert bool((entropies >= 0).all())


def test_padded_forward_is_the_packed_one() -> None:
    policy, _, episodes = episodes_of("countdown")
    samples = []
    for prompt, answer, mask in zip(episodes.prompts, episodes.answers, episodes.mask, strict=True):
        written = answer[mask].tolist()
        samples.append(Sample(prompt.tolist(), written, [True] * len(written)))
    padded, entropies = (
        found[episodes.mask] for found in lab.answer_logprobs(policy, episodes.prompts, episodes.answers)
    )
    rows = pack(samples, 512)
    assert len(rows) > 1
    for row in rows:
        packed, spread = packed_logprobs(policy, row)
        assert torch.allclose(packed, padded[row.index], atol=1e-5)
        assert torch.allclose(spread, entropies[row.index], atol=1e-5)


def test_rewards_are_the_share_of_right_texts() -> None:
    task = lab.task("sorting")
    problem = lab.Problem("305927144860:", ("001234456789",))
    policy = lab.make_policy(0)
    episodes = lab.sample(policy, task, [problem], 4, torch.Generator().manual_seed(0))
    assert episodes.rewards.tolist() == [float(text in problem.solutions) for text in episodes.texts()]
    written = lab.encode(["001234456789"], task.answer)
    assert replace(episodes[:1], answers=written).texts() == ["001234456789"]


def test_on_policy_all_methods_have_one_gradient() -> None:
    policy, _, episodes = episodes_of("countdown")
    advantage = torch.randn(len(episodes), generator=torch.Generator().manual_seed(0))
    steps = {}
    for name, method in staleness.METHODS.items():
        own = lab.make_policy(3)
        optimizer = torch.optim.SGD(own.parameters(), lr=1.0)
        with torch.no_grad():
            behaviour, _ = lab.answer_logprobs(own, episodes.prompts, episodes.answers)
        exact = replace(episodes, behaviour=behaviour)
        lab.update(own, optimizer, exact, advantage, method, old=behaviour if method.proximal else None)
        steps[name] = torch.cat([p.detach().flatten() for p in own.parameters()])
    start = torch.cat([p.detach().flatten() for p in policy.parameters()])
    assert not torch.allclose(steps["reinforce"], start, atol=1e-3)
    for name, step in steps.items():
        assert torch.allclose(step, steps["reinforce"], atol=1e-6), name


def test_runs_are_deterministic_and_count_their_samples() -> None:
    settings = {
        "method": "decoupled_ppo",
        "n": 4,
        "seed": 0,
        "rate": 3e-4,
        "updates": 4,
        "every": 2,
    }
    first = staleness.cell(settings)
    assert first == staleness.cell(settings)
    assert len(first["curve"]) == 3
    assert len(first["trace"]) == 2

    mixed = hybrid.cell({"arm": "hybrid 1/4", "seed": 0, "updates": 4, "every": 2})
    assert mixed["samples"] == [0, 64 + 16, 64 + 3 * 16]  # the first update has nothing to replay
    replayed = hybrid.cell({"arm": "replay of 1024", "seed": 0, "updates": 2, "every": 2})
    assert replayed["samples"] == [1024, 1024]


def test_diversity_is_scored_in_groups_with_a_right_answer_alone() -> None:
    _, _, episodes = episodes_of("countdown")
    rewards = torch.zeros(len(episodes))
    rewards[9] = 1
    asked: list[str] = []

    def embed(texts: list[str]) -> torch.Tensor:
        asked.extend(texts)
        return torch.nn.functional.one_hot(torch.arange(len(texts)), len(texts)).float()

    found = diversity.scores(replace(episodes, rewards=rewards), embed)  # type: ignore[arg-type]
    assert asked == episodes.texts()[8:16]
    assert not found[:8].any()
    assert not found[16:].any()
    assert bool((found[8:16] >= 0.25).all())  # orthogonal embeddings are 1/2 apart, and that is half of d


def test_finished_cells_are_kept(tmp_path: Path) -> None:
    work = operator.itemgetter("gives")
    cells = {"a": {"gives": {"x": 1}}, "b": {"gives": {"x": 2}}}
    lab.run("test", work, {"a": cells["a"]}, workers=1, fresh=False)
    path = tmp_path / "test" / "a.json"
    path.write_text(json.dumps({"settings": cells["a"], "x": "kept"}))
    found = lab.run("test", work, cells, workers=1, fresh=False)
    assert (found["a"]["x"], found["b"]["x"]) == ("kept", 2)
    assert json.loads((tmp_path / "test" / "b.json").read_text()) == found["b"]


def test_measures_of_a_curve() -> None:
    rising = staleness.measures([0.1, 0.2, 0.3, 0.4, 0.5], 16)
    assert rising == {"final": pytest.approx(0.4), "drop": 0, "collapse": None, "harmed": False}
    falling = staleness.measures([0.4, 0.5, 0.6, 0.3, 0.0, 0.0, 0.3], 16)
    # running means: .5, .4667, .3, .1, .1 at updates 16, 32, 48, 64, 80
    assert falling == {
        "final": pytest.approx(0.1),
        "drop": pytest.approx(0.4),
        "collapse": 64,
        "harmed": True,
    }


def test_samples_needed() -> None:
    run = {"curve": [0.2, 0.6, 0.4, 0.7, 0.5], "samples": [0, 10, 20, 30, 40]}
    assert hybrid.needed(run, 0.4) == 10
    assert hybrid.needed(run, 0.55) == 30
    assert hybrid.needed(run, 0.61) is None
    assert hybrid.median([30, None, 20], 40) == "30 [20, >40]"


def test_interval_is_students() -> None:
    assert lab.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.302653 / 3**0.5, rel=1e-6))
    assert np.isnan(lab.interval([1.0])[1])
