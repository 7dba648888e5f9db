"""Teachers: a language model behind a real HTTP server, the same model in process, and what a teacher is told."""

from __future__ import annotations

import dataclasses
import json
import pickle
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.arena.environment import get, names, step_all
from tasks.arena.feedback import Conversation, Feedback
from tasks.arena.guarded import Guarded
from tasks.arena.teachers import Kept, LanguageTeacher, ThingQuestions, from_environment
from tasks.arena.topics import TOPICS
from tasks.core.endpoint import Endpoint
from tasks.core.errors import Refused, Unavailable, UsageError
from tasks.rollout.rollout import BehaviourIdentity, rollout
from tasks.rollout.writing import Writer
from tests.tiny import make_tiny_model, teach

ASKED = Conversation("Guess.\nguess:", (("3", "It is higher than 3."),), "5", "7")


class Server:
    """A chat server on loopback that says what `reply(the request's body)` says; a number is a status of failure."""

    def __init__(self, reply: Callable[[dict[str, Any]], str | int]) -> None:
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        server, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    server.seen.append(body)
                    server.headers.append({name.lower(): text for name, text in self.headers.items()})
                    said = reply(body)
                good = isinstance(said, str) and self.path == "/v1/chat/completions"
                data = json.dumps({"choices": [{"message": {"content": said}}]} if good else {}).encode()
                self.send_response(200 if good else said if isinstance(said, int) else 404)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[dict[str, Any]], str | int]], Server]]:
    servers: list[Server] = []

    def start(reply: Callable[[dict[str, Any]], str | int]) -> Server:
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def endpoint(url: str, **changes: Any) -> Endpoint:
    given = Endpoint(url, "teacher", "The teacher", "try again", None, 5.0, 3, pause=_at_once)
    return dataclasses.replace(given, **changes)


def _at_once(seconds: float) -> None:
    pass


def comparing(body: dict[str, Any]) -> str:
    """A teacher that reads the answer and the last attempt from what it is told."""
    told = body["messages"][1]["content"]
    answer = told.splitlines()[0].removeprefix("The answer, which only you know: ")
    attempt = told.split("\nEND ")[0].splitlines()[-1].removeprefix("guess: ")
    return f"Try something\n {'above' if answer > attempt else 'below'} that."


# An endpoint


def test_it_is_told_the_answer_and_the_history_and_asked_once(serve, tmp_path: Path) -> None:
    server = serve(comparing)
    teacher = LanguageTeacher(Kept(endpoint(server.url), "m", tmp_path), "m")
    assert teacher.reply(ASKED) == "Try something above that."  # on one line
    (body,) = server.seen
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0, 64)
    system, user = (message["content"] for message in body["messages"])
    assert "no instruction to you" in system
    lines = user.splitlines()
    assert lines[0] == "The answer, which only you know: 7"
    fence = lines[2].removeprefix("BEGIN ")
    assert lines[2:8] == [
        f"BEGIN {fence}", "Guess.", "guess: 3", "It is higher than 3.", " 5", f"END {fence}"
    ]  # fmt: skip
    assert teacher.reply(ASKED) == "Try something above that."
    again = LanguageTeacher(Kept(endpoint("http://127.0.0.1:9/v1"), "m", tmp_path), "m")
    assert again.reply(ASKED) == "Try something above that."  # what it said is kept, wherever it is served
    assert len(server.seen) == 1
    assert "Do not say the answer" in lines[-1]
    assert teacher.question(ASKED)
    assert "should have asked" in server.seen[1]["messages"][1]["content"]
    next(tmp_path.rglob("*.json")).write_text("{")
    assert teacher.reply(ASKED) == "Try something above that."


def test_patience_and_what_cannot_be_asked(serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [503, 429]
    busy = serve(lambda body: left.pop() if left else "Higher.")
    assert LanguageTeacher(Kept(endpoint(busy.url), "m", tmp_path), "m").reply(ASKED) == "Higher."
    assert len(busy.seen) == 3
    with pytest.raises(Refused, match=r"teacher at .* refuses the request; it said 400"):
        Kept(endpoint(serve(lambda body: 400).url), "m", tmp_path / "a")([])
    with pytest.raises(Unavailable, match=r"teacher at .* did not answer in 2 attempts"):
        Kept(endpoint("http://127.0.0.1:9/v1", retries=1), "m", tmp_path / "b")([])
    for changes, problem in (
        ({"url": "file:///v1"}, r"teacher\.url is no http"),
        ({"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY with the teacher's API key is not set"),
    ):
        with pytest.raises(UsageError, match=problem):
            Kept(dataclasses.replace(endpoint(busy.url), **changes), "m", tmp_path)
    with pytest.raises(UsageError, match="teacher has no model"):
        Kept(endpoint(busy.url), "", tmp_path)
    monkeypatch.setenv("A_KEY", "sk-SECRET\n")
    echo = serve(lambda body: "Your key is sk-SECRET.")
    assert Kept(endpoint(echo.url, api_key_env="A_KEY"), "m", tmp_path / "c")([]) == "Your key is <key>."
    assert echo.headers[0]["authorization"] == "Bearer sk-SECRET"
    assert all(b"SECRET" not in path.read_bytes() for path in tmp_path.rglob("*.json"))


def test_by_name_with_environment_variables(serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(name.startswith("feedback_endpoint/") for name in names())
    with pytest.raises(UsageError, match="FOREBAY_TEACHER_MODEL"):
        get("feedback_endpoint/number")
    server = serve(comparing)
    monkeypatch.setenv("FOREBAY_TEACHER_MODEL", "m")
    monkeypatch.setenv("FOREBAY_TEACHER_URL", server.url)
    monkeypatch.setenv("FOREBAY_TEACHER_REPLIES", str(tmp_path))
    assert "feedback_endpoint/number" in names()
    env = get("feedback_endpoint/number")
    assert isinstance(env, Feedback)
    task = env.tasks("train", 1, 0)[0]
    wrong = [number for number in "0123456789" if number != task.payload["answer"]]
    turns = [(task, wrong[:count]) for count in (1, 2, 3)]
    steps = step_all(env, turns)
    assert all(step.observation.startswith("Try something ") for step in steps)
    assert len(server.seen) >= 3
    asked = len(server.seen)
    with Guarded(env) as guarded:  # another process finds what was kept
        assert guarded.steps(turns) == steps
    assert len(server.seen) == asked
    assert pickle.loads(pickle.dumps(env)) == env
    assert env.version != get("feedback/number").version
    monkeypatch.setenv("FOREBAY_TEACHER_MODEL", "another")
    assert get("feedback_endpoint/number").version != env.version
    for variable, value in (("PARALLEL", "none"), ("URL", "http://h/?key=1"), ("KEY", "")):
        with monkeypatch.context() as changed:
            changed.setenv(f"FOREBAY_TEACHER_{variable}", value)
            with pytest.raises(UsageError):
                from_environment()


# A student


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that writes guesses."""
    path = make_tiny_model(tmp_path_factory.mktemp("student") / "model", hidden_size=32)
    return teach(path, [f"guess: {number}\n" for number in range(10)] * 2, steps=80)


def play(path: Path, env: Feedback, seed: int = 0):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    identity = BehaviourIdentity("agent/1", "a" * 64, "b" * 64, "c" * 64)
    groups = rollout(
        model, tokenizer, env, env.tasks("train", 2, 0),
        group_size=4, temperature=1.0, seed=seed, batch_rows=8, identity=identity, created_at="t",
    )  # fmt: skip
    return tokenizer, [episode for group in groups for episode in group]


def test_a_collected_episode_with_an_endpoint_teacher(serve, tmp_path: Path, student: Path) -> None:
    server = serve(comparing)
    teacher = LanguageTeacher(Kept(endpoint(server.url), "m", tmp_path), "m", parallel=4)
    env = Feedback(TOPICS["number"], teacher, "feedback_endpoint")
    tokenizer, episodes = play(student, env)
    assert len(episodes) == 8
    assert any(episode.turn_ids[-1] > 0 for episode in episodes)
    for episode in episodes:
        observed = [i for i, mine in zip(episode.response_ids, episode.loss_mask, strict=True) if not mine]
        said = tokenizer.decode(observed)
        assert said.count("Try something ") == said.count("guess:") == episode.turn_ids[-1]
        assert episode.env_version == env.version
        # The episode can be scored again from its text, and the teacher need not be there.
        gone = dataclasses.replace(teacher, complete=Kept(endpoint("http://127.0.0.1:9/v1"), "m", tmp_path))
        task = next(task for task in env.tasks("train", 2, 0) if task.id == episode.task_id)
        turns = [
            [i for i, mine, at in zip(episode.response_ids, episode.loss_mask, episode.turn_ids, strict=True)
             if mine and at == turn]
            for turn in range(episode.turn_ids[-1] + 1)
        ]  # fmt: skip
        actions = [tokenizer.decode(ids, skip_special_tokens=True).partition("\n")[0] for ids in turns]
        end = dataclasses.replace(env, teacher=gone).step(task, actions)
        assert (end.done, end.reward) == (True, episode.reward)
    assert play(student, env)[1] == episodes


def test_a_teacher_that_stays_away_costs_episodes_and_not_the_collection(
    tmp_path: Path, student: Path
) -> None:
    away = LanguageTeacher(Kept(endpoint("http://127.0.0.1:9/v1", retries=0), "m", tmp_path), "m")
    _, episodes = play(student, Feedback(TOPICS["number"], away))
    assert {episode.finish_reason for episode in episodes} <= {"error", "done", "length"}
    assert any(episode.finish_reason == "error" for episode in episodes)


def test_the_same_model_can_teach(student: Path) -> None:
    """Without memory of its own: the same conversation, the same remark, one line."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(student)
    writer = Writer(model, tokenizer, max_new_tokens=8)
    teacher = LanguageTeacher(writer.complete, "agent/1")
    env = Feedback(TOPICS["number"], teacher)
    _, episodes = play(student, env)
    assert any(episode.turn_ids[-1] > 0 for episode in episodes)
    assert teacher.reply(ASKED) == teacher.reply(ASKED)
    assert "\n" not in teacher.reply(ASKED)
    told = dataclasses.replace(ASKED, private="2")
    prompts: list[str] = []

    def listening(messages):
        prompts.append(messages[1]["content"])
        return ""

    for conversation in (ASKED, told):
        LanguageTeacher(listening, "m").reply(conversation)
    assert prompts[0] != prompts[1]  # it is told the answer


def test_a_writer_goes_on_with_each_text_alone(student: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(student)
    texts = ["guess:", "Is it so?\nguess:", "guess:"]
    greedy = Writer(model, tokenizer, 4)
    assert greedy(texts) == [greedy([text])[0] for text in texts]
    sampled = Writer(model, tokenizer, 4, temperature=1.0, seed=3)
    assert sampled(texts) == sampled(texts)
    assert len(set(sampled(["guess:"] * 20))) > 3  # equal texts have noise of their own
    assert sampled(["guess:"] * 20) != dataclasses.replace(sampled, seed=4)(["guess:"] * 20)


def test_questions_about_a_thing_name_a_wrong_word_that_was_not_asked_for() -> None:
    ask = ThingQuestions().question
    first = Conversation("", (), "big red round", "small red square")
    assert ask(first) == "big?"
    assert ask(dataclasses.replace(first, said=(("big?", "No, big."),))) == "round?"
    asked = tuple((f"{word}?", "") for word in ("small", "square"))
    assert ask(dataclasses.replace(first, said=asked)) == "red?"
    assert ask(dataclasses.replace(first, said=(*asked, ("blue?", "")))) == ""
    assert ask(dataclasses.replace(first, action="hello")) == ""
