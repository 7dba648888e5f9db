"""What is asked over HTTP, on a real server on loopback; the judge's and the engine's tests ask the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tasks.core.endpoint import Endpoint, Garbled
from tasks.core.errors import Refused, Unavailable
from tests.served import Reply, Server

Serve = Callable[[Callable[[int, str, dict[str, Any] | None], Reply]], Server]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[Server] = []

    def start(answer: Callable[[int, str, dict[str, Any] | None], Reply]) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def ask(url: str, path: str, body: dict[str, Any] | None, read: Callable[[Any], Any], **more: Any) -> Any:
    endpoint = Endpoint(url, "some.section", "The server", "try later", **{"retries": 2, **more})
    with endpoint.client(1) as client:
        return endpoint.ask(client, path, body, read)


def test_a_body_is_posted_and_without_one_it_is_asked_for(serve: Serve) -> None:
    server = serve(lambda number, path, body: (200, {}, [path, body]))
    assert ask(server.url, "things", None, list) == ["things", None]
    assert ask(f"{server.url}/", "things/all", {"n": 1}, list) == ["things/all", {"n": 1}]


def test_pauses_grow_and_a_server_may_name_its_own(serve: Serve) -> None:
    pauses: list[float] = []
    replies: list[Reply] = [
        (503, {}, {}),
        (429, {"retry-after": "9999"}, {}),
        (500, {}, {}),
        (200, {}, "well"),
    ]
    server = serve(lambda number, path, body: replies[number - 1])
    assert ask(server.url, "x", {}, str, retries=3, pause=pauses.append) == "well"
    assert 0.25 <= pauses[0] <= 0.5
    assert pauses[1] == 30.0  # the longest
    assert 1.0 <= pauses[2] <= 2.0


def test_what_cannot_be_read_is_asked_for_again(serve: Serve) -> None:
    def even(value: Any) -> int:
        if value % 2:
            raise Garbled(f"{value} is odd")
        return int(value)

    server = serve(lambda number, path, body: (200, {}, number))
    assert ask(server.url, "x", {}, even, pause=lambda seconds: None) == 2
    odd = serve(lambda number, path, body: (200, {}, 1))
    with pytest.raises(
        Unavailable, match=r"The server at .*/v1/x .* 3 attempts \(Garbled: 1 is odd\); try later"
    ):
        ask(odd.url, "x", {}, even, pause=lambda seconds: None)
    assert len(odd.seen) == 3
    nested = serve(lambda number, path, body: (200, {}, b"[" * 100_000))
    with pytest.raises(Unavailable, match="no JSON"):
        ask(nested.url, "x", {}, even, pause=lambda seconds: None)


def test_a_refusal_is_final_and_a_redirect_is_one(serve: Serve) -> None:
    for status in (400, 401, 404, 307):
        server = serve(lambda number, path, body, s=status: (s, {"location": "/elsewhere"}, {"why": "no"}))
        with pytest.raises(Refused, match=rf"refuses the request; it said {status}.*no"):
            ask(server.url, "x", {}, str)
        assert len(server.seen) == 1
