"""The small laboratory of the behaviour benchmarks, and how they read their curves."""

from __future__ import annotations

import io
import json
import operator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import diversity, hybrid, lab, staleness
from models.packing import Sample, pack, packed_logprobs
from tasks.training.settings import Mixture


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
    for name, method in (staleness.METHODS | staleness.MASKED).items():
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


class Sampled:
    """Groups of four answers with the rewards asked for, in turn; counts them."""

    def __init__(self, *signals: bool) -> None:
        _, _, self._episodes = episodes_of("sorting")
        self.signals, self.counts = list(signals), []

    def __call__(self, groups: int) -> list[lab.Episodes]:
        self.counts.append(groups)
        taught, self.signals = self.signals[:groups], self.signals[groups:]
        taught += [True] * (groups - len(taught))
        rewards = [torch.tensor([1.0, 0.0, 1.0, float(teaches)]) for teaches in taught]
        return [
            replace(self._episodes[:4], rewards=row if teaches else torch.ones(4))
            for row, teaches in zip(rewards, taught, strict=True)
        ]


def curriculum_of(
    sampled: Sampled, sealed: int, schedule: Mixture, steps: int, size: int
) -> hybrid.Curriculum:
    arm = hybrid.Arm(sealed * lab.GROUP, schedule)
    return hybrid.Curriculum(arm, sampled, steps=steps, seed=0, groups_per_step=size)


def test_hybrid_asks_for_fresh_groups_as_the_product_does() -> None:
    # The numbers are those of the run in tests/training/test_rounds.py.
    sampled = Sampled()
    curriculum = curriculum_of(sampled, 6, Mixture(schedule="linear", fresh=1.0, fresh_end=0.0), 6, 4)
    replayed = [curriculum.lesson(step)[1] for step in range(6)]
    assert sampled.counts == [6, 4, 3, 3, 1, 1]
    assert replayed == [0, 1, 1, 3, 3, 4]


def test_hybrid_replays_sealed_groups_alone_and_once_an_epoch() -> None:
    sampled = Sampled(True, False, True, True, True)  # four of the five sealed groups teach
    curriculum = curriculum_of(sampled, 5, Mixture(schedule="constant", fresh=0.5), 4, 4)
    drawn = []
    for step in range(4):
        groups, replayed = curriculum.lesson(step)
        assert (len(groups), replayed) == (4, 2)
        drawn += [id(group) for group in groups[:replayed]]
        assert not {id(group) for group in groups[replayed:]} & set(drawn)
    assert len(set(drawn[:4])) == 4
    assert sorted(drawn[4:]) == sorted(drawn[:4])


def test_hybrid_replaces_refused_fresh_groups_and_asks_again() -> None:
    sampled = Sampled(*[True] * 4, False, True)
    curriculum = curriculum_of(sampled, 4, Mixture(schedule="constant", fresh=0.5), 3, 4)
    assert [curriculum.lesson(step)[1] for step in range(3)] == [3, 1, 2]
    assert sampled.counts == [4, 2, 3, 2]


def test_hybrid_is_steered_by_the_effective_sample_size_of_replay() -> None:
    sampled = Sampled()
    curriculum = curriculum_of(sampled, 8, Mixture(schedule="ess", fresh=0.0, target_ess=0.5), 4, 8)
    for step, ess in enumerate((0.1, 0.1, 0.1, 0.1)):
        curriculum.lesson(step)
        curriculum.learnt(ess)
    assert sampled.counts == [8, 1, 1, 3]  # shares 0, 0.1, 0.2, 0.3 of 8


@pytest.mark.parametrize(
    ("arm", "samples"), [("on-policy", [0, 128, 256]), ("256 + a quarter", [256, 288, 320])]
)
def test_hybrid_counts_sealed_and_fresh_episodes(
    arm: str, samples: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = lab.sample

    def sample(*words: Any) -> lab.Episodes:
        made = whole(*words)  # an untrained policy is never right
        return replace(made, rewards=(torch.arange(len(made)) % 2).float())

    monkeypatch.setattr(lab, "sample", sample)
    found = hybrid.cell({"arm": arm, "seed": 0, "updates": 4, "every": 2})
    assert found["samples"] == samples
    assert [share for share, _ in found["trace"]] == [1.0 if arm == "on-policy" else 0.25] * 2


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


def test_finished_cells_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = operator.itemgetter("gives")
    cells = {"a": {"gives": {"x": 1}}, "b": {"gives": {"x": 2}}}
    made = lab.run("test", work, {"a": cells["a"]}, workers=1, fresh=False)["a"]
    path = tmp_path / "test" / "a.json"
    path.write_text(json.dumps({**made, "x": "kept"}))
    found = lab.run("test", work, cells, workers=1, fresh=False)
    assert (found["a"]["x"], found["b"]["x"]) == ("kept", 2)
    assert json.loads((tmp_path / "test" / "b.json").read_text()) == found["b"]
    # Other code makes other numbers.
    monkeypatch.setattr(lab, "code", lambda: {"benchmarks/lab.py": "edited"})
    assert lab.run("test", work, {"a": cells["a"]}, workers=1, fresh=False)["a"]["x"] == 1


def test_code_is_every_loaded_file_of_the_repository() -> None:
    made_by = lab.code()
    wanted = {"benchmarks/lab.py", "benchmarks/staleness.py", "models/objectives/weighted.py"}
    assert wanted <= set(made_by)
    assert not [name for name in made_by if name.startswith((".venv", "tests"))]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ('"""What."""\nRATE = 3e-4  # high\n\ndef cell():\n    """It."""\n    return RATE\n', True),
        ("RATE = 3e-4\ndef cell():\n    return RATE\ndef show():\n    print(RATE)\n", True),
        ("RATE = 6e-4\ndef cell():\n    return RATE\n", False),
        ("RATE = 3e-4\ndef cell():\n    return 2 * RATE\n", False),
    ],
)
def test_a_cell_is_made_by_statements_that_decide_it(tmp_path: Path, text: str, same: bool) -> None:
    path = tmp_path / "benchmarks" / "some.py"
    path.parent.mkdir()
    path.write_text("RATE = 3e-4\ndef cell():\n    return RATE\n")
    before = lab._digest(path)
    path.write_text(text)
    assert (lab._digest(path) == before) is same


def test_committed_figures_have_what_their_scripts_print() -> None:
    for script in (staleness, hybrid, diversity):
        name = script.__name__.rpartition(".")[2]
        summary = json.loads((lab.BASELINES / f"{name}.json").read_text())
        console = Console(file=io.StringIO(), width=300)
        script.show(summary["rows"], console)
        assert console.file.getvalue().count("│") > 50
        assert len(summary["seeds"]) >= 3
    summary = json.loads((lab.BASELINES / "staleness.json").read_text())
    assert "benchmarks/staleness.py" in summary["code"]
    main = {(row["method"], row["n"]) for row in summary["rows"] if row["rate"] == "main"}
    methods = set(staleness.METHODS) - {staleness.ON_POLICY}
    assert {(method, n) for method in methods for n in staleness.STALENESS} <= main


def test_differences_are_paired_by_seed() -> None:
    found = lab.difference([1.1, 2.1, 3.2], [1.0, 2.0, 3.0])
    assert found["mean"] == pytest.approx(0.4 / 3)
    assert found["half"] == pytest.approx(4.302653 * 0.1 / 3, rel=1e-6)
    assert found["p"] == pytest.approx(0.0572, abs=1e-4)
    assert lab.mark(found, 1) == "+0.133±0.143"
    assert lab.mark({"mean": -0.1, "half": 0.05, "p": 0.01}, 10) == "-0.100±0.050*"
    assert lab.mark({"mean": -0.1, "half": 0.05, "p": 0.001}, 10) == "-0.100±0.050**"
    rows = [
        {"rate": "main", "method": method, "n": n, "finals": finals}
        for method, n, finals in (
            ("vespo", 1, [0.5, 0.7]),
            ("vespo", 64, [0.4, 0.8]),
            ("grpo", 1, [0.5, 0.7]),
            ("grpo", 64, [0.1, 0.2]),
        )
    ]
    staleness.compare(rows)
    assert rows[1]["from_on_policy"]["mean"] == pytest.approx(0.0)
    assert rows[3]["from_on_policy"]["mean"] == pytest.approx(-0.45)
    assert rows[3]["vespo_from_it"]["mean"] == pytest.approx(0.45)
    assert "from_on_policy" not in rows[0]


def test_masked_answers_push_nothing() -> None:
    policy, _, episodes = episodes_of("countdown")
    away = replace(episodes, behaviour=episodes.behaviour + staleness.MASK * 1.1 * episodes.mask)
    bad = -torch.ones(len(episodes))
    still = lab.make_policy(3)
    optimizer = torch.optim.SGD(still.parameters(), lr=1.0)
    report = lab.update(still, optimizer, away, bad, staleness.MASKED["tis, masked"])
    assert report["gradient_norm"] == 0
    assert lab.update(policy, optimizer, away, bad, staleness.METHODS["tis"])["gradient_norm"] > 0


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
    assert hybrid.median([30, None, 20], [40, 50, 40]) == "30 [20, >50]"
    assert hybrid.median([None, None, 60], [40, 50, 60]) == ">40 [60, >50]"


def test_interval_is_students() -> None:
    assert lab.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.302653 / 3**0.5, rel=1e-6))
    assert np.isnan(lab.interval([1.0])[1])
