"""The episode loop on a server that generates with the real tiny model and speaks the protocol of vLLM."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tasks.arena.calculator import Calculator
from tasks.arena.environment import Split, Task, get
from tasks.core.endpoint import Garbled
from tasks.core.errors import Refused, Unavailable, UsageError
from tasks.core.settings import Collect, EngineServer
from tasks.replay.schema import Episode
from tasks.rollout.engine import Action, Engine, Local, Noise, uniform
from tasks.rollout.remote import open_engine, read_action
from tasks.rollout.rollout import BehaviourIdentity, evaluate, recompute_logprobs, rollout
from tests.rollout.vllm import Vllm, noise_of
from tests.served import Reply, Server
from tests.tiny import make_tiny_model, teach

DIGEST = "a" * 64
IDENTITY = BehaviourIdentity("agent/1", DIGEST, "b" * 64, "c" * 64)


class Short(Calculator):
    """The calculator for a character-level model."""

    max_new_tokens = 20

    def tasks(self, split: Split, n: int, seed: int) -> list[Task]:
        return [
            dataclasses.replace(t, prompt=t.prompt.rpartition("\n\n")[2])
            for t in super().tasks(split, n, seed)
        ]


ENV = Short()
TASKS = ENV.tasks("train", 3, seed=1)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_tiny_model(tmp_path_factory.mktemp("remote") / "tiny")
    facts = [(t.prompt, t.payload) for t in TASKS]
    lines = [
        f"{prompt} calc({p['a']} {p['operator']} {p['b']})\nresult: {p['answer']}\nanswer: {p['answer']}\n"
        for prompt, p in facts
    ]
    return teach(path, lines, steps=80)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def model(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)


@pytest.fixture
def vllm(model: PreTrainedModel) -> Vllm:
    return Vllm(model, DIGEST)


@pytest.fixture
def server(vllm: Vllm) -> Iterator[Server]:
    server = Server(vllm)
    yield server
    server.close()


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.core.endpoint._pause", lambda attempt, asked: 0.0)


def settings(server: Server, temperature: float = 1.0, **changes: Any) -> Collect:
    engine = EngineServer.model_validate({"url": server.url, "retries": 2, "timeout_s": 20.0, **changes})
    return Collect(engine=engine, temperature=temperature)


def groups_of(
    engine: PreTrainedModel | Engine, tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[Episode]]:
    return rollout(
        engine,
        tokenizer,
        ENV,
        TASKS,
        group_size=4,
        temperature=1.0,
        seed=7,
        batch_rows=8,
        identity=IDENTITY,
        created_at="2026-01-01T00:00:00+00:00",
    )


def collect(engine: PreTrainedModel | Engine, tokenizer: PreTrainedTokenizerBase) -> list[Episode]:
    return [episode for group in groups_of(engine, tokenizer) for episode in group]


def test_without_a_server_the_model_here_generates(model, tokenizer) -> None:
    with open_engine(Collect(), model, tokenizer, DIGEST) as engine:
        assert isinstance(engine, Local)
        assert collect(engine, tokenizer) == collect(model, tokenizer)


def test_greedy_episodes_are_those_of_the_local_engine(server, model, tokenizer) -> None:
    with open_engine(settings(server), model, tokenizer, DIGEST) as engine:
        found = evaluate(engine, tokenizer, ENV, TASKS, batch_rows=3)
    assert found == evaluate(model, tokenizer, ENV, TASKS, batch_rows=3)
    assert {outcome.turns for outcome in found} == {2}


def test_with_a_memory_the_server_is_sent_what_is_read(server, vllm, model, tokenizer) -> None:
    env = get("memory_1/feedback/number")
    tasks = env.tasks("train", 3, seed=0)
    with open_engine(settings(server), model, tokenizer, DIGEST) as engine:
        found = evaluate(engine, tokenizer, env, tasks, batch_rows=3)
    assert found == evaluate(model, tokenizer, env, tasks, batch_rows=3)
    assert max(outcome.turns for outcome in found) == 4


def test_sampled_turns_are_those_of_the_local_engine_under_the_servers_noise(
    server, model, tokenizer
) -> None:
    stop = frozenset(range(3, 40))
    prompts = [[50, 51, 52], [60, 61]]

    def play(engine: Engine, noise: Callable[[int, int], Noise]) -> list[list[Action]]:
        rows = engine.start(prompts, 3)
        turns, kept = [], list(range(6))
        for turn in range(3):
            turns.append(rows.act([noise(turn, row) for row in kept], 0.7, stop, 6, last=turn == 2))
            if turn == 2:
                return turns
            on = [i for i in range(len(kept)) if (i + turn) % 4]
            rows.keep(on)
            rows.feed([[*turns[-1][i].ids[-1:], 70 + kept[i]] for i in on])
            kept = [kept[i] for i in on]
        raise AssertionError

    def first(turn: int, row: int) -> float:
        return uniform("row", turn, row)

    with open_engine(settings(server, 0.7), model, tokenizer, DIGEST) as engine:
        remote = play(engine, lambda turn, row: iter([first(turn, row)]))
    local = play(Local(model), lambda turn, row: noise_of(int(first(turn, row) * 2**53)))
    assert [[a.ids for a in turn] for turn in remote] == [[a.ids for a in turn] for turn in local]
    assert len({tuple(a.ids) for turn in remote for a in turn}) > 8
    for here, there in zip(itertools.chain(*local), itertools.chain(*remote), strict=True):
        assert here.logprobs == pytest.approx(there.logprobs, abs=1e-10)


def test_a_collection_repeats_and_its_log_probabilities_are_the_models(
    server, vllm, model, tokenizer
) -> None:
    with open_engine(settings(server), model, tokenizer, DIGEST) as engine:
        episodes = collect(engine, tokenizer)
        assert collect(engine, tokenizer) == episodes
    assert vllm.most > 1
    assert {episode.logprob_source for episode in episodes} == {"engine"}
    assert len({episode.response_text for episode in episodes}) > 6
    for before, after in zip(episodes, recompute_logprobs(model, episodes), strict=True):
        assert after.behaviour_logprobs == pytest.approx(before.behaviour_logprobs, abs=1e-10)
    with open_engine(settings(server, parallel=1), model, tokenizer, DIGEST) as engine:
        assert collect(engine, tokenizer) == episodes


@pytest.mark.parametrize("fault", [429, 500, 503, 0, b"<html>", b'{"choices": []}', "cut", "early", "nan"])
def test_a_server_that_stumbles_is_asked_again(server, vllm, model, tokenizer, no_pause, fault) -> None:
    with open_engine(settings(server), model, tokenizer, DIGEST) as engine:
        well = collect(engine, tokenizer)

    def spoil(number: int, reply: Reply) -> Reply:
        if number % 3:
            return reply
        if isinstance(fault, int):
            return fault, {}, {"error": "busy"}
        if isinstance(fault, bytes):
            return 200, {}, fault
        if "choices" not in reply[2]:
            return reply
        choice = dict(reply[2]["choices"][0])
        if fault == "cut":  # fewer bytes than announced
            return 200, {"content-length": "100000", "connection": "close"}, reply[2]
        if fault == "early":
            choice["token_ids"] = choice["token_ids"][:-1]
            choice["logprobs"] = {"token_logprobs": choice["logprobs"]["token_logprobs"][:-1]}
        else:
            choice["logprobs"] = {"token_logprobs": [float("nan")] * len(choice["token_ids"])}
        return 200, {}, {"choices": [choice]}

    vllm.spoil = spoil
    patience = settings(server, parallel=1, timeout_s=1.0 if fault == "cut" else 20.0)
    with open_engine(patience, model, tokenizer, DIGEST) as engine:
        assert collect(engine, tokenizer) == well


def test_a_server_that_hangs_is_given_up(server, vllm, model, tokenizer, no_pause) -> None:
    def hang(number: int, reply: Reply) -> Reply:
        time.sleep(1.0)
        return reply

    vllm.spoil = hang
    begun = time.monotonic()
    with (
        pytest.raises(Unavailable, match=r"engine at .*/models .*3 attempts \(ReadTimeout"),
        open_engine(settings(server, timeout_s=0.1), model, tokenizer, DIGEST),
    ):
        pass
    assert time.monotonic() - begun < 5


def test_a_server_that_dies_in_a_collection_costs_the_batch_only(
    server, vllm, model, tokenizer, no_pause
) -> None:
    groups: list[list[Episode]] = []
    with open_engine(settings(server), model, tokenizer, DIGEST) as engine:
        well = list(groups_of(engine, tokenizer))
        dead = len(server.seen) + 20  # requests: the first batch takes 16
        vllm.spoil = lambda number, reply: (503, {}, {}) if number > dead else reply
        with pytest.raises(Unavailable, match=r"503.*are kept, run the same command again"):
            groups.extend(groups_of(engine, tokenizer))
    assert groups == well[:2]


def test_nobody_listens(model, tokenizer, no_pause) -> None:
    nobody = Collect(engine=EngineServer(url="http://127.0.0.1:9/v1", retries=1))
    with pytest.raises(Unavailable, match="2 attempts"), open_engine(nobody, model, tokenizer, DIGEST):
        pass


def refused(server: Server, model, tokenizer, match: str, temperature: float = 1.0, **changes: Any) -> None:
    with (
        pytest.raises(Refused, match=match),
        open_engine(settings(server, temperature, **changes), model, tokenizer, DIGEST),
    ):
        pass


def test_another_name_than_the_agents_is_refused(server, vllm, model, tokenizer) -> None:
    vllm.name = "llama"
    refused(server, model, tokenizer, f"serves llama, not {DIGEST}.*--served-model-name {DIGEST}")
    with open_engine(settings(server, model="llama"), model, tokenizer, DIGEST) as engine:
        assert len(collect(engine, tokenizer)) == 12
    assert server.seen[-1][1]["model"] == "llama"


def test_other_weights_under_the_right_name_are_refused(server, vllm, tokenizer, model, tmp_path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    vllm.model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float64)
    refused(server, model, tokenizer, "nats a token on average.*other weights")


def test_the_rounding_of_another_engine_is_not_refused(server, vllm, tokenizer, model, directory) -> None:
    vllm.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    with open_engine(settings(server), model, tokenizer, DIGEST) as engine:
        episodes = collect(engine, tokenizer)
    pairs = zip(episodes, recompute_logprobs(model, episodes), strict=True)
    gaps = [
        abs(x - y) for a, b in pairs for x, y in zip(a.behaviour_logprobs, b.behaviour_logprobs, strict=True)
    ]
    assert max(gaps) > 0


def test_log_probabilities_of_another_temperature_are_refused(server, vllm, model, tokenizer) -> None:
    vllm.raw = True
    refused(server, model, tokenizer, "--logprobs-mode processed_logprobs", temperature=0.7)
    with open_engine(settings(server), model, tokenizer, DIGEST):
        pass  # at temperature 1 both are the same


def test_replies_without_token_ids_are_refused(server, vllm, model, tokenizer) -> None:
    def spoil(number: int, reply: Reply) -> Reply:
        if "choices" not in reply[2]:
            return reply
        told = {"tokens": ["a", "b"], "token_logprobs": [-1.0, -2.0]}
        return 200, {}, {"choices": [{"text": "ab", "logprobs": told}]}

    vllm.spoil = spoil
    refused(server, model, tokenizer, "option return_token_ids.*--return-tokens-as-token-ids")


def test_a_refusal_of_the_server_is_not_repeated(server, vllm, model, tokenizer) -> None:
    vllm.spoil = lambda number, reply: (401, {}, {"error": "no key"})
    refused(server, model, tokenizer, "401.*no key")
    assert len(server.seen) == 1


def test_the_key_goes_into_the_header_and_into_no_message(
    server, vllm, model, tokenizer, monkeypatch
) -> None:
    def attempt(**changes: Any) -> None:
        with open_engine(settings(server, **changes), model, tokenizer, DIGEST):
            pass

    with pytest.raises(UsageError, match="ENGINE_KEY with the engine's API key is not set"):
        attempt(api_key_env="ENGINE_KEY")
    monkeypatch.setenv("ENGINE_KEY", "sk-SECRET")
    vllm.spoil = lambda number, reply: (400, {}, {"error": f"bad key {os.environ['ENGINE_KEY']}"})
    with pytest.raises(Refused) as told:
        attempt(api_key_env="ENGINE_KEY")
    assert "SECRET" not in str(told.value)
    assert server.seen[0][0]["authorization"] == "Bearer sk-SECRET"
    with pytest.raises(UsageError, match=r"collect\.engine\.url"):
        attempt(url="http://me:pw@host/v1")


STOP = frozenset({3})


def said(ids: Any, logprobs: Any, **more: Any) -> dict[str, Any]:
    return {"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": logprobs}, **more}]}


def test_reading_an_action() -> None:
    assert read_action(said([5, 3], [-1, -0.5]), [9], STOP, 4, 10) == Action([5, 3], [-1.0, -0.5])
    assert read_action(said([5, 6], [-1.0, 1e-9]), [9], STOP, 2, 10) == Action([5, 6], [-1.0, 0.0])
    # What an older vLLM sends, and a server that does not stop where it was asked to.
    older = {"tokens": ["token_id:5", "token_id:3"], "token_logprobs": [-1.0, -2.0]}
    assert read_action({"choices": [{"logprobs": older}]}, [9], STOP, 4, 10) == Action([5, 3], [-1.0, -2.0])
    assert read_action(said([5, 3, 7, 8], [-1.0] * 4), [9], STOP, 4, 10) == Action([5, 3], [-1.0, -1.0])


@pytest.mark.parametrize(
    "reply",
    [
        None,
        [],
        {},
        {"choices": {}},
        {"choices": ["text"]},
        said([], []),
        said([5, 3], [-1.0]),
        said([5, 3], "no"),
        said({"5": 3}, [-1.0]),
        said([5, 10], [-1.0, -1.0]),
        said([5, -3], [-1.0, -1.0]),
        said([True, 3], [-1.0, -1.0]),
        said(["5", 3], [-1.0, -1.0]),
        said([5, 3], [-1.0, None]),
        said([5, 3], [float("-inf"), -1.0]),
        said([5], [-1.0]),
        said([5, 6, 7, 8, 9], [-1.0] * 5),
    ],
)
def test_a_reply_that_makes_no_sense_is_not_read(reply: Any) -> None:
    with pytest.raises(Garbled):
        read_action(reply, [9], STOP, 4, 10)


def test_a_prompt_that_was_changed_is_refused() -> None:
    with pytest.raises(Refused, match="prompt of 1 tokens where 2"):
        read_action(said([5, 3], [-1.0, -1.0], prompt_token_ids=[9]), [1, 9], STOP, 4, 10)
    assert read_action(said([3], [-1.0], prompt_token_ids=[1, 9]), [1, 9], STOP, 4, 10).ids == [3]
