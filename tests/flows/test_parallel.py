"""Workers of a flow end with it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

import models
from flows import parallel
from flows.parallel import gathered, isolated
from tests.flows import jobs

CHILD = """
import multiprocessing, os, time
from flows.parallel import end_with_parent

def work(pipe):
    end_with_parent()
    end_with_parent()
    pipe.send(os.getpid())
    time.sleep(600)

if __name__ == "__main__":
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=work, args=(theirs,)).start()
    print(ours.recv(), flush=True)
    time.sleep(600)
"""


def test_a_worker_whose_flow_was_killed_ends(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(CHILD)
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    assert worker.is_running()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("work", "result"),
    [
        (jobs.refuses, {"error": "Not today."}),
        (jobs.breaks, {"error": "ZeroDivisionError: by nothing"}),
        (jobs.unsendable, {"error": "TypeError: cannot pickle '_thread.lock' object"}),
        (jobs.dies, {"error": "Its process ended with SIGKILL."}),
        (jobs.exits, {"error": "Its process ended with exit code 7."}),
    ],
)
def test_work_that_fails_comes_back_as_a_sentence(work, result):
    assert isolated(work) == result


def test_work_knows_the_environment_of_now(monkeypatch: pytest.MonkeyPatch):
    for value in ("one", "two"):
        monkeypatch.setenv("FOREBAY_TEST_VALUE", value)
        found = isolated(jobs.seen, "FOREBAY_TEST_VALUE")
        assert (found["value"], found["safe"]) == (value, os.environ.get("PYTHONSAFEPATH"))


def test_a_thread_of_the_work_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parallel, "_END_SECONDS", 0.5)
    began = time.monotonic()
    assert isolated(jobs.lingers) == {"done": True}
    assert time.monotonic() - began < 30


def test_how_each_of_many_ended_is_told():
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: isolated(jobs.dies), range(40)))
    assert found == [{"error": "Its process ended with SIGKILL."}] * 40


def test_packages_in_the_working_directory_are_not_taken_for_ours(tmp_path: Path):
    for name in ("models", "tasks", "flows"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    script = (
        "import sys; sys.path.remove('')\n"
        "from flows.parallel import isolated\n"
        "from tests.flows import jobs\n"
        "print(isolated(jobs.seen, 'x')['models'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == models.__file__, done.stderr


def test_an_interrupt_while_work_is_handed_out_ends_what_was_begun(tmp_path: Path):
    """And the next flow of the same process runs."""
    begun = tmp_path / "begun"

    def interrupted() -> None:
        deadline = time.monotonic() + 60
        while not begun.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        raise KeyboardInterrupt

    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        first = []
        handed = {
            "runs": lambda: first.append(pool.submit(isolated, jobs.sleeps, str(begun))),
            "waits": lambda: first.append(pool.submit(isolated, jobs.sleeps, str(begun))),
            "stops": interrupted,
        }
        with pytest.raises(KeyboardInterrupt):
            gathered(handed, lambda done, total, note: None, "jobs", str)
        assert first[0].result(timeout=30) == {"error": "Its process ended with SIGKILL."}
        assert first[1].result(timeout=30) == {"error": "It was not begun: the flow was interrupted."}
    assert time.monotonic() - began < 50
    assert gathered({}, lambda done, total, note: None, "jobs", str) == {}
    assert isolated(jobs.refuses) == {"error": "Not today."}
