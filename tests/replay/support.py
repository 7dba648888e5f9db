"""Episodes and workspaces for the replay tests."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tasks.core.settings import Replay
from tasks.core.workspace import Workspace
from tasks.replay.schema import Episode
from tasks.replay.segments import SegmentWriter, open_folder

SETTINGS = Replay(dataset="main", shard_rows=16)
TOKENIZER, TEMPLATE = "a1" * 32, "b2" * 32


def episode(group: str, index: int, **changes: Any) -> Episode:
    noise = random.Random(f"{group}/{index}")
    n = 6 + noise.randrange(6)
    mask = [True] * n
    mask[3] = False  # an observation
    values: dict[str, Any] = {
        "episode_id": f"{group}-{index}",
        "group_id": group,
        "sample_index": index,
        "task_id": f"task/{group}",
        "env": "calculator",
        "env_version": "1",
        "split": "train",
        "seed": 7,
        "prompt_ids": [5, 6, 7],
        "response_ids": [noise.randrange(100) for _ in range(n)],
        "loss_mask": mask,
        "turn_ids": [0] * 4 + [1] * (n - 4),
        "behaviour_logprobs": [-noise.random() if sampled else 0.0 for sampled in mask],
        "logprob_source": "engine",
        "behaviour_version": "agent/1",
        "behaviour_digest": "c3" * 32,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": 16,
        "tokenizer_digest": TOKENIZER,
        "template_digest": TEMPLATE,
        "reward": float(index % 2),
        "reward_components": '{"correct":1}',
        "reward_digest": "d4" * 32,
        "finish_reason": "done",
        "prompt_sha256": (group.encode().hex() + "0" * 64)[:64],
        "response_text": f"answer {index} ümläut\n",
        "source": "rollout",
        "licence": "MIT",
        "created_at": "2026-01-01T00:00:00+00:00",
    }
    return Episode(**{**values, **changes})


def group(name: str, size: int = 4, **changes: Any) -> list[Episode]:
    return [episode(name, index, **changes) for index in range(size)]


def groups(prefix: str, count: int, size: int = 4) -> list[list[Episode]]:
    return [group(f"{prefix}{number}", size) for number in range(count)]


def make_workspace(root: Path) -> Workspace:
    root.mkdir(parents=True)
    subprocess.run(["git", "init", "--quiet", "--initial-branch=main", str(root)], check=True)
    return Workspace(root)


def append(
    workspace: Workspace, episodes: Iterable[Sequence[Episode]], writer: str = "w", name: str = "main"
) -> None:
    with SegmentWriter(open_folder(workspace, name), writer) as segment:
        for members in episodes:
            segment.append(members)


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; return its wait status (a signal number if it was killed)."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return status
