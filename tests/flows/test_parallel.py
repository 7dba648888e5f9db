"""Workers of a flow end with it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil

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
