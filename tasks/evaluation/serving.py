"""Does an agent serve: loaded by a process that knows nothing, does it answer, the same twice, and at what cost?

The process is a new interpreter in a session of its own. It shares no library state with the one that trained the
agent, reads safetensors alone, answers a few prompts greedily, one at a time, and is killed with all it started when
its time is over. An agent that does not load is a result and no error.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, Literal

import numpy as np

from tasks.core.digest import digest_json

_PROJECT = Path(__file__).resolve().parents[2]
_MIB = 2**20


@dataclass(frozen=True)
class Serving:
    """What serving an agent took; where it did not serve, `problem` says why in one sentence and the numbers are 0.

    Attributes:
        fault: whose the problem is: "agent" (it cannot be loaded, or its numbers are none) or "machine" (no GPU, time was
            over, something killed the process), which another try may mend; "" where there is none.
        load_seconds: for weights and tokenizer, imports left out.
        seconds: [passes][prompts] wall time of each answer, prompt included; the first answer of all is not counted.
        cpu_seconds: likewise, processor time of all threads: a busy machine stretches it far less.
        tokens: [prompts] that each answer has.
        work_seconds: [passes][prompts] of work for the prompt and a fixed number of new tokens, whatever is said: processor
            time on a CPU, wall time on a GPU, where the processor waits. Empty in files of before it was measured.
        memory_mib: the most resident memory of the process.
        gpu_mib: the most memory that tensors had on the GPU; 0 on a CPU.
        answers: digest of the token ids of the first pass.
        repeated: every pass gave the same token ids.
    """

    problem: str = ""
    fault: Literal["", "agent", "machine"] = ""
    load_seconds: float = 0.0
    seconds: tuple[tuple[float, ...], ...] = ()
    cpu_seconds: tuple[tuple[float, ...], ...] = ()
    tokens: tuple[int, ...] = ()
    memory_mib: float = 0.0
    gpu_mib: float = 0.0
    answers: str = ""
    repeated: bool = False
    work_seconds: tuple[tuple[float, ...], ...] = ()

    @property
    def ok(self) -> bool:
        """The agent loaded and answered every prompt, the same each time."""
        return not self.problem

    def answer_seconds(self, q: float) -> float:
        """The quantile `q` of the wall time of an answer."""
        return float(np.quantile(np.array(self.seconds), q)) if self.ok else 0.0

    def token_seconds(self, q: float) -> float:
        """The quantile `q`, over answers, of the wall time of one token."""
        return float(np.quantile(np.array(self.seconds) / np.array(self.tokens), q)) if self.ok else 0.0

    def cost(self) -> float:
        """Seconds of equal work, prompts and a fixed number of new tokens: an agent that says less is not dearer for it.

        By the best pass of each prompt: noise only ever adds to a time. From files without that, the work for a token.
        """
        if not self.ok:
            return 0.0
        if self.work_seconds:
            return float(np.array(self.work_seconds).min(axis=0).sum())
        passes = np.array(self.seconds if self.gpu_mib else self.cpu_seconds)
        return float(passes.min(axis=0).sum() / sum(self.tokens))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Serving:
        """Read what `asdict` and JSON made of one."""
        names = ("seconds", "cpu_seconds", "work_seconds")
        rows = {name: tuple(map(tuple, values.get(name, ()))) for name in names}
        return cls(**{**values, **rows, "tokens": tuple(values["tokens"])})


def measure(
    folder: Path,
    prompts: Sequence[str],
    *,
    device: str = "cpu",
    dtype: str = "float32",
    max_new_tokens: int = 8,
    repeats: int = 2,
    timeout_s: float = 300.0,
    threads: int | None = None,
) -> Serving:
    """Serve the agent in `folder` from a clean process; never raises for a bad agent.

    Args:
        prompts: texts, one at least; each is answered greedily up to a special token or `max_new_tokens`.
        repeats: how often all prompts are answered.
        timeout_s: for everything, imports included.
        threads: of PyTorch; None lets it choose.

    Raises:
        ValueError: there is no prompt, or no pass.
    """
    if not prompts or repeats < 1:
        raise ValueError("a serving probe needs at least one prompt and one pass")
    request = {
        "folder": str(folder), "prompts": list(prompts), "device": device, "dtype": dtype,
        "max_new_tokens": max_new_tokens, "repeats": repeats, "threads": threads,
    }  # fmt: skip
    # -P: a folder named `tasks` where the command was given must not stand in for ours.
    running = subprocess.Popen(
        [sys.executable, "-P", "-m", "tasks.evaluation.serving"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(_PROJECT), os.environ.get("PYTHONPATH")))),
            "HF_HUB_OFFLINE": "1",
        },
    )
    try:
        said, complaint = running.communicate(json.dumps(request), timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return Serving(f"it had not answered after {timeout_s:g} s", "machine")
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(running.pid, signal.SIGKILL)
        running.communicate()
    return _read(running.returncode, said, complaint)


def serving_evidence(
    candidate: Serving, champion: Serving, prompts: Sequence[str], **conditions: Any
) -> dict[str, Any]:
    """Return the evidence file's content; `conditions` are the device, the precision and whatever else was the same."""
    return {
        "schema": "forebay.serving/1",
        "conditions": conditions,
        "prompts": [digest_json(prompt) for prompt in prompts],
        "candidate": _plain(candidate),
        "champion": _plain(champion),
    }


def _plain(serving: Serving) -> dict[str, Any]:
    """Times to the microsecond: more digits are noise."""

    def rounded(value: Any) -> Any:
        if isinstance(value, tuple):
            return [rounded(item) for item in value]
        return round(value, 6) if isinstance(value, float) else value

    return {name: rounded(value) for name, value in asdict(serving).items()}


def _read(status: int, said: str, complaint: str) -> Serving:
    lines = said.strip().splitlines()
    try:
        return Serving.from_json(json.loads(lines[-1]))
    except (IndexError, ValueError, TypeError, KeyError):
        last = (complaint.strip().splitlines() or ["it said nothing"])[-1]
        if status < 0:
            return Serving(f"its process was ended by {signal.Signals(-status).name}", "machine")
        return Serving(f"its process ended with status {status}: {last[:300]}", _fault(last))


def _fault(complaint: str) -> Literal["agent", "machine"]:
    """Whose it is by what is said: a GPU or driver that fails is the machine's, an id outside a table the agent's."""
    machine = any(sign in complaint for sign in ("CUDA", "CUBLAS", "cuDNN", "NVIDIA"))
    return "machine" if machine and "device-side assert" not in complaint else "agent"


def _serve(request: dict[str, Any]) -> Serving:
    """The work of the clean process."""
    import torch

    from models.causal_lm import ModelError, load_policy, load_tokenizer
    from tasks.core.errors import ForebayError
    from tasks.rollout.engine import start

    if request["threads"]:
        torch.set_num_threads(request["threads"])
    folder, device = Path(request["folder"]), str(request["device"])
    if device.startswith("cuda") and not torch.cuda.is_available():
        return Serving(f"device {device} was asked for, but PyTorch sees no GPU", "machine")
    begun = perf_counter()
    try:
        model, tokenizer = load_policy(folder, device, request["dtype"]), load_tokenizer(folder)
        load_seconds = perf_counter() - begun
        stop = frozenset(tokenizer.all_special_ids)
        encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in request["prompts"]]

        def answer(ids: list[int], stop: frozenset[int]) -> tuple[float, float, list[int]]:
            wall, cpu = perf_counter(), process_time()
            (action,) = start(model, [ids], 1).act(None, 1.0, stop, request["max_new_tokens"], last=True)
            return perf_counter() - wall, process_time() - cpu, list(action.ids)

        answer(encoded[0], stop)  # what is made once, at the first answer of a process
        passes = [[answer(ids, stop) for ids in encoded] for _ in range(request["repeats"])]
        work = [[answer(ids, frozenset()) for ids in encoded] for _ in range(request["repeats"])]
    except (ModelError, ForebayError) as error:
        return Serving(str(error), "agent")
    except Exception as error:
        full = isinstance(error, torch.cuda.OutOfMemoryError | MemoryError)
        fault = "machine" if full else _fault(str(error))
        return Serving(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", fault)
    ids = [[found for _, _, found in one] for one in passes]
    repeated = all(one == ids[0] for one in ids)
    return Serving(
        problem="" if repeated else "it answered the same prompts differently the second time",
        fault="" if repeated else "agent",
        load_seconds=load_seconds,
        seconds=tuple(tuple(wall for wall, _, _ in one) for one in passes),
        cpu_seconds=tuple(tuple(cpu for _, cpu, _ in one) for one in passes),
        tokens=tuple(map(len, ids[0])),
        memory_mib=_peak_mib(),
        gpu_mib=torch.cuda.max_memory_allocated() / _MIB if device.startswith("cuda") else 0.0,
        answers=digest_json(ids[0]),
        repeated=repeated,
        work_seconds=tuple(
            tuple(wall if device.startswith("cuda") else cpu for wall, cpu, _ in one) for one in work
        ),
    )


def _peak_mib() -> float:
    """The high-water mark of this program's memory: that of `getrusage` may be its parent's from before the exec."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (_MIB if sys.platform == "darwin" else 1024)


def main() -> None:
    """Read a request from standard input, serve, and print what it took as the last line."""
    served = _serve(json.load(sys.stdin))
    print(json.dumps({field.name: getattr(served, field.name) for field in fields(served)}))


if __name__ == "__main__":
    main()
