from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tasks.arena.calculator import PREFIX, Calculator
from tasks.arena.environment import Split, Step, Task, get, verifier_digest
from tasks.arena.guarded import Guarded
from tasks.arena.largest import Largest
from tasks.arena.memory import Memory
from tasks.core.errors import UsageError
from tasks.replay.schema import INVALID_TURNS, MEMORY_TURNS, Episode, arrow_schema
from tasks.rollout.rollout import BehaviourIdentity, evaluate, recompute_logprobs, rollout, stop_tokens
from tests.tiny import make_tiny_model, teach

IDENTITY = BehaviourIdentity("agent/1", "a" * 64, "b" * 64, "c" * 64)
TIME = "2026-01-01T00:00:00+00:00"


class Short(Calculator):
    """The calculator for a character-level model: no examples in the prompt, room for longer actions."""

    max_new_tokens = 20

    def tasks(self, split: Split, n: int, seed: int) -> list[Task]:
        return [
            dataclasses.replace(t, prompt=t.prompt.removeprefix(PREFIX))
            for t in super().tasks(split, n, seed)
        ]


ENV = Short()
TASKS = ENV.tasks("train", 5, seed=1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that was taught the form of an episode, so that it writes calls that run, and others."""
    path = make_tiny_model(tmp_path_factory.mktemp("rollout") / "tiny")
    facts = [
        (t.prompt, t.payload["a"], t.payload["operator"], t.payload["b"], t.payload["answer"]) for t in TASKS
    ]
    return teach(
        path, [f"{p} calc({a} {o} {b})\nresult: {r}\nanswer: {r}\n" for p, a, o, b, r in facts], steps=80
    )


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def model(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)


def play(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> list[list[Episode]]:
    settings = {
        "group_size": 4,
        "temperature": 1.0,
        "seed": 7,
        "batch_rows": 8,
        "identity": IDENTITY,
        "created_at": TIME,
    } | changes
    env, tasks = settings.pop("env", ENV), settings.pop("tasks", TASKS)
    return list(rollout(model, tokenizer, env, tasks, **settings))


@pytest.fixture(scope="module")
def groups(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[list[Episode]]:
    return play(model, tokenizer)


def test_one_group_a_task_in_order(groups: list[list[Episode]]) -> None:
    assert [group[0].task_id for group in groups] == [task.id for task in TASKS]
    for group in groups:
        assert [episode.sample_index for episode in group] == [0, 1, 2, 3]
        assert len({episode.group_id for episode in group}) == 1
        assert len({tuple(episode.prompt_ids) for episode in group}) == 1
    assert len({episode.episode_id for group in groups for episode in group}) == 20
    assert len({group[0].group_id for group in groups}) == 5


def test_samples_and_tasks_have_noise_of_their_own(groups: list[list[Episode]]) -> None:
    texts = [episode.response_text for group in groups for episode in group]
    assert len(set(texts)) > 15


def test_the_columns_of_an_episode_fit_together(
    groups: list[list[Episode]], tokenizer: PreTrainedTokenizerBase
) -> None:
    for episode, task in (
        (episode, task) for group, task in zip(groups, TASKS, strict=True) for episode in group
    ):
        n = len(episode.response_ids)
        assert n == len(episode.loss_mask) == len(episode.turn_ids) == len(episode.behaviour_logprobs)
        assert tokenizer.decode(episode.prompt_ids) == task.prompt
        assert tokenizer.decode(episode.response_ids) == episode.response_text
        assert all(
            (logprob == 0) == (not mine)
            for logprob, mine in zip(episode.behaviour_logprobs, episode.loss_mask, strict=True)
        )
        assert all(logprob <= 0 and math.isfinite(logprob) for logprob in episode.behaviour_logprobs)
        assert episode.turn_ids == sorted(episode.turn_ids)
        assert set(episode.turn_ids) == {0, 1}
        assert episode.reward_digest == verifier_digest(ENV)
        assert episode.behaviour_digest == IDENTITY.digest
        observation = [i for i, mine in zip(episode.response_ids, episode.loss_mask, strict=True) if not mine]
        text = tokenizer.decode(observation)
        assert text.lstrip("\n").startswith("result: ")
        assert text.endswith("\nanswer:")


def test_scoring_the_text_again_gives_the_same_reward(
    groups: list[list[Episode]], tokenizer: PreTrainedTokenizerBase
) -> None:
    for group, task in zip(groups, TASKS, strict=True):
        for episode in group:
            turns: list[list[int]] = [[], []]
            for token, turn, mine in zip(
                episode.response_ids, episode.turn_ids, episode.loss_mask, strict=True
            ):
                if mine:
                    turns[turn].append(token)
            actions = [tokenizer.decode(ids, skip_special_tokens=True).partition("\n")[0] for ids in turns]
            step = ENV.step(task, actions)
            assert step.reward == episode.reward
            found = json.loads(episode.reward_components)
            broken = [turn for turn in (0, 1) if not ENV.step(task, actions[: turn + 1]).valid]
            assert found.pop(INVALID_TURNS, []) == broken
            assert found == step.components


def test_the_tool_really_runs(groups: list[list[Episode]]) -> None:
    called = [e for group in groups for e in group if json.loads(e.reward_components)["valid_call"]]
    assert called
    for episode in called:
        call, result, _ = episode.response_text.split("\n")[:3]
        assert int(result.removeprefix("result: ")) == eval(call.strip().removeprefix("calc"))


def test_an_action_that_is_cut_gets_its_line_break_with_the_observation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    class Narrow(Short):
        max_new_tokens = 2

    episodes = [e for group in play(model, tokenizer, env=Narrow(), batch_rows=100) for e in group]
    cut = [e for e in episodes if "\n" not in tokenizer.decode(e.response_ids[:2]) and e.loss_mask[1]]
    assert cut
    for episode in cut:
        assert tokenizer.decode(episode.response_ids[2:], skip_special_tokens=True).startswith(
            "\nresult: error\n"
        )
    assert "length" in {e.finish_reason for e in episodes}


def test_the_same_call_gives_the_same_bytes(
    directory: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    single = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert play(single, tokenizer) == play(single, tokenizer)
    assert play(single, tokenizer, seed=8) != play(single, tokenizer)


def test_a_resumed_collection_gives_the_missing_groups_byte_for_byte(
    directory: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    single = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    whole = play(single, tokenizer)
    done = {TASKS[i].id for i in (0, 1, 3)}  # a whole batch, and half of the next
    assert play(single, tokenizer, done=done) == [whole[2], whole[4]]
    assert play(single, tokenizer, done={task.id for task in TASKS}) == []


@pytest.mark.parametrize("batch_rows", [1, 4, 20, 1000])
def test_in_float64_the_batching_does_not_matter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, groups: list[list[Episode]], batch_rows: int
) -> None:
    for group, other in zip(groups, play(model, tokenizer, batch_rows=batch_rows), strict=True):
        for a, b in zip(group, other, strict=True):
            assert dataclasses.replace(a, behaviour_logprobs=[]) == dataclasses.replace(
                b, behaviour_logprobs=[]
            )
            assert a.behaviour_logprobs == pytest.approx(b.behaviour_logprobs, abs=1e-10)


def test_recomputed_log_probabilities_are_those_of_the_engine(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    episodes = [episode for group in play(model, tokenizer, temperature=0.7) for episode in group]
    bare = [
        dataclasses.replace(e, behaviour_logprobs=[0.0] * len(e.response_ids), logprob_source="missing")
        for e in episodes
    ]
    for batch_tokens in (1, 900, 10**6):
        for before, after in zip(episodes, recompute_logprobs(model, bare, batch_tokens), strict=True):
            assert after.logprob_source == "recomputed"
            assert after.behaviour_logprobs == pytest.approx(before.behaviour_logprobs, abs=1e-10)
    assert recompute_logprobs(model, []) == []


def test_episodes_survive_arrow(groups: list[list[Episode]]) -> None:
    rows = [dataclasses.asdict(episode) for group in groups for episode in group]
    back = pa.Table.from_pylist(rows, schema=arrow_schema()).to_pylist()
    for row, again in zip(rows, back, strict=True):
        assert again.pop("behaviour_logprobs") == pytest.approx(row.pop("behaviour_logprobs"), rel=1e-6)
        assert again == row


class Faulty(Largest):
    """Raises, or gives a reward that is no number, for every other answer."""

    max_new_tokens = 4

    def __init__(self, reward: float | None) -> None:
        self.reward = reward

    def step(self, task: Task, actions: Sequence[str]) -> Step:
        if sum(map(ord, actions[0])) % 2:
            return Step("", done=True, reward=1.0)
        if self.reward is None:
            raise RuntimeError("the tool broke")
        return Step("", done=True, reward=self.reward)


@pytest.mark.parametrize("reward", [None, math.nan, math.inf])
def test_an_environment_that_fails_costs_one_episode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reward: float | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    env = Faulty(reward)
    episodes = [
        e for g in play(model, tokenizer, env=env, tasks=env.tasks("train", 4, 0), batch_rows=8) for e in g
    ]
    assert len(episodes) == 16
    failed = [e for e in episodes if e.finish_reason == "error"]
    assert 0 < len(failed) < 16
    assert {e.reward for e in failed} == {0.0}
    assert {e.reward_components for e in failed} == {'{"error":1.0}'}
    assert {e.reward for e in episodes if e not in failed} == {1.0}
    assert env.name in caplog.text


def test_turns_that_broke_the_format_are_kept(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    class Strict(Largest):
        max_turns = 3
        max_new_tokens = 2

        def step(self, task: Task, actions: Sequence[str]) -> Step:
            return Step(
                "seen ",
                done=len(actions) == 3,
                components={"n": 1.0},
                valid=sum(map(ord, actions[-1])) % 2 == 0,
            )

    env = Strict()
    tasks = env.tasks("train", 2, 0)
    seen = set()
    for episode in (e for g in play(model, tokenizer, env=env, tasks=tasks) for e in g):
        written = [
            _written(
                tokenizer,
                [
                    i
                    for i, t, m in zip(episode.response_ids, episode.turn_ids, episode.loss_mask, strict=True)
                    if m and t == turn
                ],
            )
            for turn in range(3)
        ]
        broken = [turn for turn, text in enumerate(written) if sum(map(ord, text)) % 2]
        components = json.loads(episode.reward_components)
        assert components == {"n": 1.0} | ({INVALID_TURNS: broken} if broken else {})
        seen.add(len(broken))
    assert len(seen) > 1
    outcomes = evaluate(model, tokenizer, env, tasks, 8)
    assert all(0 <= o.invalid_turns <= 3 for o in outcomes)


def _written(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).partition("\n")[0]


def test_an_environment_that_never_ends_is_cut_at_its_turns(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    class Endless(Largest):
        max_turns = 3
        max_new_tokens = 2

        def step(self, task: Task, actions: Sequence[str]) -> Step:
            return Step(f"again {len(actions)}:", done=False)

    env = Endless()
    (group,) = play(model, tokenizer, env=env, tasks=env.tasks("train", 1, 0))
    for episode in group:
        assert (episode.finish_reason, episode.reward) == ("turns", 0.0)
        assert set(episode.turn_ids) == {0, 1, 2}
        assert episode.loss_mask[-1]  # no observation after the last turn


class Echo(Largest):
    """Five turns; the observation tells what was written, cut."""

    max_turns = 5
    max_new_tokens = 6

    def step(self, task: Task, actions: Sequence[str]) -> Step:
        return Step(
            f"{len(actions)} {actions[-1][:4]} =",
            done=len(actions) == 5 or sum(map(ord, actions[-1])) % 5 == 0,
        )


ECHO = Echo()
ECHO_TASKS = ECHO.tasks("train", 3, 0)


def by_definition(model: PreTrainedModel, episode: Episode, memory: int) -> list[float]:
    """The log-probability of every token the policy wrote, given the prompt and what belongs to the turns before."""
    found = []
    columns = list(zip(episode.response_ids, episode.turn_ids, episode.loss_mask, strict=True))
    for place, (token, turn, mine) in enumerate(columns):
        read = [i for i, t, _ in columns[:place] if t >= turn - memory]
        with torch.no_grad():
            logits = model(torch.tensor([[*episode.prompt_ids, *read]])).logits[0, -1]
        found.append(float(logits.log_softmax(-1)[token]) if mine else 0.0)
    return found


@pytest.mark.parametrize("memory", [1, 2])
def test_with_a_memory_only_the_newest_turns_are_read(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, memory: int
) -> None:
    env = Memory(ECHO, memory)
    groups = play(model, tokenizer, env=env, tasks=env.tasks("train", 3, 0))
    episodes = [episode for group in groups for episode in group]
    assert max(max(e.turn_ids) for e in episodes) == 4
    assert len({max(e.turn_ids) for e in episodes}) > 1  # some end early
    for episode in episodes:
        assert episode.behaviour_logprobs == pytest.approx(by_definition(model, episode, memory), abs=1e-9)
        assert json.loads(episode.reward_components)[MEMORY_TURNS] == memory
        assert tokenizer.decode(episode.response_ids) == episode.response_text
    wrong = [by_definition(model, e, 9) for e in episodes if max(e.turn_ids) > memory]
    right = [e.behaviour_logprobs for e in episodes if max(e.turn_ids) > memory]
    assert wrong != [pytest.approx(one, abs=1e-6) for one in right]
    for batch_tokens in (1, 4096):
        again = recompute_logprobs(model, episodes, batch_tokens)
        for before, after in zip(episodes, again, strict=True):
            assert after.behaviour_logprobs == pytest.approx(before.behaviour_logprobs, abs=1e-9)


def test_a_memory_of_all_turns_changes_nothing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    env = Memory(ECHO, 4)
    whole = play(model, tokenizer, env=ECHO, tasks=ECHO_TASKS)
    remembered = play(model, tokenizer, env=env, tasks=env.tasks("train", 3, 0))
    names = {task.id: other.id for task, other in zip(ECHO_TASKS, env.tasks("train", 3, 0), strict=True)}
    assert [names[e.task_id] for group in whole for e in group] == [e.task_id for g in remembered for e in g]
    # The noise of a token is of its task's id, so what is the same is the greedy text.
    greedy = evaluate(model, tokenizer, ECHO, ECHO_TASKS, batch_rows=8)
    assert [
        o.response_text for o in evaluate(model, tokenizer, env, env.tasks("train", 3, 0), batch_rows=8)
    ] == [o.response_text for o in greedy]
    short = Memory(ECHO, 1)
    assert [
        o.response_text for o in evaluate(model, tokenizer, short, short.tasks("train", 3, 0), batch_rows=8)
    ] != [o.response_text for o in greedy]


def test_evaluation_is_greedy_and_in_the_order_of_the_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    tasks = ENV.tasks("heldout", 7, seed=2)
    outcomes = evaluate(model, tokenizer, ENV, tasks, batch_rows=3)
    assert [outcome.task_id for outcome in outcomes] == [task.id for task in tasks]
    assert outcomes == evaluate(model, tokenizer, ENV, tasks, batch_rows=100)
    for outcome in outcomes:
        assert outcome.turns == 2
        assert outcome.reward == outcome.components["correct"]
        assert 0 < outcome.tokens < len(tokenizer(outcome.response_text)["input_ids"])
    with torch.no_grad():
        first = model(torch.tensor([tokenizer(tasks[0].prompt)["input_ids"]])).logits[0, -1].argmax()
    assert outcomes[0].response_text.startswith(tokenizer.decode([int(first)]))


def test_bad_settings_are_refused(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UsageError, match="temperature must be above 0"):
        play(model, tokenizer, temperature=0.0)
    with pytest.raises(UsageError, match="at least one episode"):
        play(model, tokenizer, group_size=0)


def test_stopping_tokens_are_line_breaks_and_specials(tokenizer: PreTrainedTokenizerBase) -> None:
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert stop_tokens(tokenizer) == {*newline, *tokenizer.all_special_ids}


@pytest.mark.parametrize("name", ["largest", "reasoning_gym/chain_sum"])
def test_other_environments_run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    env = get(name)
    episodes = [e for g in play(model, tokenizer, env=env, tasks=env.tasks("train", 2, 0)) for e in g]
    assert {e.env for e in episodes} == {name}
    assert {e.finish_reason for e in episodes} <= {"done", "length"}


class Nonsense(Largest):
    """Answers with something that no episode can be made of."""

    max_new_tokens = 2
    max_turns = 2

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def step(self, task: Task, actions: Sequence[str]) -> Step:
        return self.answer  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "answer",
    [
        None,
        Step(b"seen", done=False),  # type: ignore[arg-type]
        Step("\ud800", done=False),
        Step("", done=True, reward="1"),  # type: ignore[arg-type]
        Step("", done=True, components={"correct": math.nan}),
        Step("", done=True, components={"correct": "yes"}),  # type: ignore[dict-item]
        Step("", done=True, components=None),  # type: ignore[arg-type]
        Step("", done=True, components={"memory_turns": 2.0}),  # a name of ours
    ],
)
def test_an_answer_that_is_no_step_costs_one_episode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answer: Any
) -> None:
    env = Nonsense(answer)
    (group,) = play(model, tokenizer, env=env, tasks=env.tasks("train", 1, 0))
    assert {(e.finish_reason, e.reward) for e in group} == {("error", 0.0)}


def test_a_guard_changes_no_byte_of_an_episode(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    single = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    env = get("calculator")
    tasks = env.tasks("train", 3, 0)
    with Guarded(env, workers=2) as guarded:
        assert play(single, tokenizer, env=guarded, tasks=tasks) == play(
            single, tokenizer, env=env, tasks=tasks
        )
        assert evaluate(single, tokenizer, guarded, tasks, 2) == evaluate(single, tokenizer, env, tasks, 2)
