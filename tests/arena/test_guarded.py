from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tasks.arena.calculator import Calculator
from tasks.arena.environment import Environment, Expert, Listed, Step, cut, get, verifier_digest
from tasks.arena.guarded import Guarded, Limits, StepFault
from tasks.arena.largest import Largest
from tasks.core.errors import UsageError
from tests.arena.faulty import FAULTS, FLOOD, Faulty
from tests.leaderboard import doors

QUICK = Limits(seconds=0.5, memory=200 << 20)


@pytest.fixture(autouse=True)
def nothing_stays_behind() -> Iterator[None]:
    children = set(psutil.Process().children(recursive=True))
    descriptors = len(os.listdir("/proc/self/fd"))
    yield
    assert set(psutil.Process().children(recursive=True)) <= children
    assert len(os.listdir("/proc/self/fd")) == descriptors


SLOW = pytest.param("reasoning_gym/chain_sum", marks=pytest.mark.slow)  # its library takes seconds to import


@pytest.mark.parametrize("name", ["calculator", "largest", SLOW])
def test_a_healthy_environment_is_the_same_with_a_guard(name: str) -> None:
    env = get(name)
    with Guarded(env, Limits(seconds=3), workers=2) as guarded:
        as_environment: Environment = guarded
        assert verifier_digest(as_environment) == verifier_digest(env)
        for attribute in ("name", "version", "licence", "max_turns", "max_new_tokens"):
            assert getattr(guarded, attribute) == getattr(env, attribute)
        tasks = guarded.tasks("train", 10, seed=1)
        assert tasks == env.tasks("train", 10, seed=1)
        assert guarded.constant_baseline(tasks) == env.constant_baseline(tasks)
        turns = [(task, ["calc(1 + 2)", str(task.payload["answer"])][-env.max_turns :]) for task in tasks]
        assert guarded.steps(turns) == [env.step(*turn) for turn in turns]
        assert repr(guarded.step(*turns[0])) == repr(env.step(*turns[0]))
        assert guarded.steps([]) == []
        assert guarded.restarts == 0


def test_choices_expert_and_baselines_are_those_of_the_environment() -> None:
    env = doors.sleepy()
    with Guarded(env, QUICK) as guarded, Guarded(Largest()) as another:
        assert isinstance(guarded, Listed)
        assert isinstance(guarded, Expert)
        assert not isinstance(another, Listed | Expert)
        task, *tasks = guarded.tasks("train", 2, 0)
        assert guarded.choices(task) == env.choices(task)
        assert guarded.expert(task, []) == env.expert(task, [])
        with pytest.raises(UsageError, match="waits at this door already"):  # the environment's own word
            guarded.expert(task, ["wait"])
        with pytest.raises(StepFault, match=r"constant_baseline\(\) of .*:sleepy took more than 0.5 s"):
            guarded.constant_baseline(tasks)
        with pytest.raises(StepFault, match=r"expert\(\) of .*:sleepy failed: TypeError"):
            guarded.expert(task)  # type: ignore[call-arg]
        assert guarded.choices(task) == env.choices(
            task
        )  # by the process that took the place of the one that hung
        with pytest.raises(UsageError, match="at least one task"):
            guarded.random_baseline([], 0)
    with Guarded(doors.plain(), QUICK) as guarded:
        tasks = guarded.tasks("train", 20, 0)
        assert guarded.constant_baseline(tasks) == doors.plain().constant_baseline(tasks)
        assert guarded.random_baseline(tasks, 3) == doors.plain().random_baseline(tasks, 3)
    with pytest.raises(UsageError, match="is closed"):
        guarded.choices(task)


WHAT = {
    "exit": "ended its process (exit status 3)",
    "kill": "ended its process (signal 9)",
    "exception": "RuntimeError: the tool broke",
    "SystemExit": "SystemExit: 0",
    "hang": "took more than 0.5 s",
    "busy loop": "took more than 0.5 s",
    "memory": "MemoryError",
    "NaN": "the reward is nan",
    "out of range": "the reward 1.5 is not in [0.0, 1.0]",
    "NaN component": "the component 'correct' is nan",
    "None": "of type NoneType, not Step",
    "text reward": "the reward is of type str, not float",
    "bytes": "the observation is of type bytes, not str",
    "surrogate": "surrogates not allowed",
    "unpicklable": "of type function, not float",
    "huge components": "bytes",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_said_and_the_next_step_works(fault: str) -> None:
    env = Faulty({fault: 0.5})
    (task,) = env.tasks("train", 1, 0)
    kinds = {env.fault_of(task, str(i)): str(i) for i in range(20)}
    with Guarded(env, QUICK) as guarded:
        with pytest.raises(StepFault) as caught:
            guarded.step(task, [kinds[fault]])
        assert WHAT[fault] in str(caught.value)
        assert "A step of faulty" in str(caught.value)
        assert guarded.step(task, [kinds["healthy"]]).reward == 1.0
        assert guarded.restarts == (fault in ("exit", "kill", "hang", "busy loop", "memory"))


def test_faults_in_a_batch_cost_their_own_turns_only_and_hang_side_by_side() -> None:
    env = Faulty({"hang": 0.2, "exit": 0.2, "exception": 0.2})
    turns = [(task, ["a"]) for task in env.tasks("train", 20, 0)]
    faults = [env.fault_of(task, "a") for task, _ in turns]
    assert faults.count("hang") >= 3
    with Guarded(env, QUICK, workers=4) as guarded:
        started = time.monotonic()
        answers = guarded.steps(turns)
        seconds = time.monotonic() - started
        assert guarded.restarts == faults.count("hang") + faults.count("exit")
    assert [isinstance(answer, StepFault) for answer in answers] == [fault != "healthy" for fault in faults]
    assert seconds < 0.5 * faults.count("hang")


def test_a_long_observation_is_cut_and_always_alike() -> None:
    env = Faulty({FLOOD: 1.0})
    (task,) = env.tasks("train", 1, 0)
    with Guarded(env, Limits(observation=100), workers=2) as guarded:
        first, second = guarded.steps([(task, ["a"])] * 2)
        assert first == second
        assert isinstance(first, Step)
        assert len(first.observation) == 100
        assert first.observation.startswith("flood flood")
        assert first.observation.endswith("flood end:")
        assert f"[{len(env.step(task, ['a']).observation)} characters, cut]" in first.observation


def test_cutting_keeps_both_ends() -> None:
    assert cut("abc", 3) == "abc"
    assert cut("a" * 30 + "b" * 30, 31) == "aaaaaa[60 characters, cut]bbbbb"
    assert cut("a" * 40, 5) == "[40 characters, cut]"


def test_a_worker_killed_while_idle_costs_nothing() -> None:
    env = Largest()
    (task,) = env.tasks("train", 1, 0)
    with Guarded(env) as guarded:
        for _ in range(3):
            os.kill(guarded._workers[0].pid, signal.SIGKILL)
            time.sleep(0.1)
            assert guarded.step(task, [str(task.payload["answer"])]).reward == 1.0
        assert guarded.restarts == 3


def test_a_killed_server_is_started_again() -> None:
    env = Faulty({"exit": 0.5})
    turns = [(task, ["a"]) for task in env.tasks("train", 20, 0)]
    with Guarded(env, workers=3) as guarded:
        guarded._server.kill()
        answers = guarded.steps(turns)
        assert [isinstance(answer, StepFault) for answer in answers] == [
            env.fault_of(task, "a") == "exit" for task, _ in turns
        ]


@pytest.mark.parametrize("fault", ["hang", "busy loop", "none"])
def test_workers_end_when_the_parent_is_killed(fault: str, tmp_path: Path) -> None:
    script = (
        "from tasks.arena.guarded import Guarded\n"
        "from tests.arena.faulty import Faulty\n"
        "import pathlib, sys, time\n"
        f"env = Faulty({{{fault!r}: 1.0}} if {fault!r} != 'none' else {{}})\n"
        "guarded = Guarded(env, workers=2)\n"
        "pathlib.Path(sys.argv[1]).write_text('up')\n"
        "guarded.steps([(task, ['a']) for task in env.tasks('train', 2, 0)])\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "up")])
    try:
        end = time.monotonic() + 30
        while not (tmp_path / "up").exists() and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.3)
        processes = psutil.Process(parent.pid).children(recursive=True)
    finally:
        parent.kill()
        parent.wait()
    assert len(processes) == 3  # the server and two workers
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert not alive


def test_an_interrupt_closes_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> list[object]:
        raise KeyboardInterrupt

    guarded = Guarded(Calculator())
    (task,) = guarded.tasks("train", 1, 0)
    monkeypatch.setattr("tasks.arena.guarded.wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        guarded.step(task, ["calc(1 + 1)"])
    with pytest.raises(UsageError, match="closed"):
        guarded.step(task, ["calc(1 + 1)"])


class Local(Largest):
    def __init__(self) -> None:
        self.judge = lambda: 0


def test_what_cannot_be_guarded_is_refused() -> None:
    with pytest.raises(UsageError, match="largest cannot be sent"):
        Guarded(Local())
    with pytest.raises(UsageError, match="at least one worker"):
        Guarded(Largest(), workers=0)
    guarded = Guarded(Largest())
    (task,) = guarded.tasks("train", 1, 0)
    guarded.close()
    guarded.close()
    with pytest.raises(UsageError, match="closed"):
        guarded.step(task, ["1"])


def test_an_environment_that_only_the_parent_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(sys)("made_up_module")
    monkeypatch.setitem(sys.modules, "made_up_module", module)
    kind = type("Made", (Largest,), {"__module__": "made_up_module"})
    module.Made = kind  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="importable from a module"):
        Guarded(kind())


def test_a_task_that_cannot_be_sent_costs_its_turn() -> None:
    env = Largest()
    task, other = env.tasks("train", 2, 0)
    bad = dataclasses.replace(task, payload={"answer": lambda: 0})
    with Guarded(env) as guarded:
        answers: Sequence[Step | Exception] = guarded.steps([(bad, ["1"]), (other, ["1"])])
    assert isinstance(answers[0], StepFault)
    assert isinstance(answers[1], Step)
