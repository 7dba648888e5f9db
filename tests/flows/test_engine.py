"""A collection whose answers a server generates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.context import Context
from flows.experience import collect_into_segment, unsealed_rows
from models.causal_lm import load_policy
from tasks.core.errors import Refused
from tasks.core.settings import EngineServer
from tasks.replay.schema import Episode
from tasks.rollout.rollout import recompute_logprobs
from tests.flows.conftest import lay_workspace
from tests.rollout.vllm import Vllm
from tests.served import Server


@pytest.fixture
def served(tmp_path: Path, tiny_base: Path) -> Iterator[tuple[Context, Vllm, Server]]:
    context = lay_workspace(tmp_path / "ws", tiny_base)
    agent = context.agent("champion").payload
    vllm = Vllm(load_policy(context.weights(agent)), agent["digest"])
    server = Server(vllm)
    collect = context.settings.collect.model_copy(
        update={"engine": EngineServer(url=server.url, parallel=4), "environments": {"reasoning_gym/gcd": 3}}
    )
    settings = context.settings.model_copy(update={"collect": collect})
    yield dataclasses.replace(context, settings=settings), vllm, server
    server.close()


def test_a_collection_comes_from_the_server(served: tuple[Context, Vllm, Server]) -> None:
    context, vllm, _ = served
    outputs = collect_into_segment(context)
    assert (outputs["groups"], outputs["episodes"]) == (3, 24)
    rows = list(unsealed_rows(context, context.settings.replay.dataset))
    names = {field.name for field in dataclasses.fields(Episode)}
    episodes = [Episode(**{key: value for key, value in row.items() if key in names}) for row in rows]
    assert {episode.logprob_source for episode in episodes} == {"engine"}
    for before, after in zip(episodes, recompute_logprobs(vllm.model, episodes), strict=True):
        assert after.behaviour_logprobs == pytest.approx(before.behaviour_logprobs, abs=1e-4)


def test_a_server_with_another_agent_is_refused_before_anything_is_collected(
    served: tuple[Context, Vllm, Server],
) -> None:
    context, vllm, _ = served
    vllm.name = "the champion of last week"
    with pytest.raises(Refused, match="serves the champion of last week"):
        collect_into_segment(context)
    assert list(unsealed_rows(context, context.settings.replay.dataset)) == []
