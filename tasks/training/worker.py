"""A training run over several processes of this machine: started here, joined by `tasks.training.parallel`.

`python -m tasks.training.worker JOB.json` is one of the processes; torchrun starts them. Shards and run folder must be
visible to all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tasks.core import errors
from tasks.core.errors import ForebayError, Unavailable
from tasks.training import parallel
from tasks.training.settings import TrainingSettings
from tasks.training.shards import ShardRef
from tasks.training.trainer import OnMetrics, TrainResult, train

_PATHS = ("run_dir", "init_dir", "shard_root", "cache")


def train_in_processes(
    processes: int, *, on_metrics: OnMetrics = lambda step, metrics: None, **job: Any
) -> TrainResult:
    """`train(on_metrics=on_metrics, **job)` by so many processes, which share the work of every update.

    Args:
        processes: on GPUs at most as many as there are.
        job: arguments of `train`, without `fresh`.

    Raises:
        ForebayError: what `train` raises.
        Unavailable: a process ended otherwise; the sentence names the log.
    """
    log = job["run_dir"] / "processes.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, torch.get_num_threads() // processes))  # torchrun's own choice is one
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(_plain(job)))
        command = parallel.torchrun(processes, "tasks.training.worker", str(path))
        with (
            log.open("w") as stderr,
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": threads},
            ) as running,
        ):
            try:
                failure = _follow(running, on_metrics)
            finally:
                running.terminate()  # torchrun ends its processes; nothing happens if it is done
    if failure is not None:
        raise failure
    if running.returncode:
        raise Unavailable(f"A training process ended with an error; {log} says which.")
    return train(**job)  # finished already: what the processes wrote is checked and returned


def main(path: Path) -> None:
    """Be one of the processes of the job in the file `path`; the main one prints a line of JSON an update."""
    job = json.loads(path.read_text())
    job |= {name: Path(job[name]) for name in _PATHS if job.get(name)}
    job["settings"] = TrainingSettings(**job["settings"])
    job["shards"] = [ShardRef(path, sha256) for path, sha256 in job["shards"]]
    try:
        train(**job, on_metrics=lambda step, metrics: _say({"step": step, "metrics": metrics}))
    except ForebayError as error:
        _say({"error": type(error).__name__, "message": str(error)})
        sys.exit(error.exit_code)


def _say(values: Mapping[str, Any]) -> None:
    # One write a line: all processes share the pipe, and two of them may fail at once.
    os.write(sys.stdout.fileno(), f"{json.dumps(values)}\n".encode())


def _follow(running: subprocess.Popen[str], on_metrics: OnMetrics) -> ForebayError | None:
    """Hand the updates on until the processes are done; the error that one of them told, if any."""
    failure = None
    assert running.stdout is not None
    for line in running.stdout:
        if not line.startswith("{"):
            continue  # a library's
        told = json.loads(line)
        if "error" in told:
            failure = failure or getattr(errors, told["error"])(told["message"])
        else:
            on_metrics(told["step"], told["metrics"])
    running.wait()
    return failure


def _plain(job: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in job.items()}
    plain["settings"] = job["settings"].model_dump(mode="json")
    plain["shards"] = [(shard.path, shard.sha256) for shard in job["shards"]]
    return plain


if __name__ == "__main__":
    main(Path(sys.argv[1]))
