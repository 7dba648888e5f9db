"""Train once more, in a process of its own: `python -P again.py JOB.json` with the code to use on PYTHONPATH.

This file is run by its path, so that it can drive the code of another commit: it asks of that code only `train`,
its settings and, where a run sampled fresh groups, the source of them. It prints one line of JSON an update, and a
last one with the result or the error.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any


def main(path: Path) -> int:
    """Do the job in the file `path`: what `flows.reproduce` had written there. Return the exit code."""
    job = json.loads(path.read_text())
    import torch

    from tasks.core.errors import ForebayError

    torch.set_num_threads(job["threads"])
    try:
        _say({"result": _train(job)})
    except ForebayError as error:
        _say({"error": str(error), "kind": type(error).__name__})
        return error.exit_code
    return 0


def _train(job: dict[str, Any]) -> dict[str, Any]:
    from tasks.core.errors import Refused
    from tasks.core.stages import code_digest
    from tasks.training.settings import TrainingSettings
    from tasks.training.shards import ShardRef
    from tasks.training.trainer import train
    from tasks.training.worker import train_in_processes

    settings = TrainingSettings(**job["settings"])
    if code_digest() != job["code"]:
        raise Refused(f"This code has the digest {code_digest()[:12]}…, not {job['code'][:12]}….")
    if settings.outside_code() != job["outside_code"]:
        raise Refused("The functions of your own that the settings name are not those of that time.")
    root = Path(job["root"])
    run: Any = train
    if settings.mixture.schedule != "replay":
        from flows.context import Context
        from flows.hybrid import fresh_source

        context = Context.open(root)
        more = [job["without_prompts"]] if job["without_prompts"] else []
        run = partial(train, fresh=fresh_source(context, job["init"], job["key"], job["started"], *more))
    elif job["processes"] > 1:
        run = partial(train_in_processes, job["processes"])
    left_out = {"left_out": job["left_out"]} if job["left_out"] else {}
    made = run(
        run_dir=root / ".forebay" / "runs" / job["key"][:16],
        init_dir=root / job["init"]["path"],
        shards=[ShardRef(shard["path"], shard["sha256"]) for shard in job["shards"]],
        shard_root=root,
        settings=settings,
        seed=job["seed"],
        device=job["device"],
        dtype=job["dtype"],
        oldest_behaviour=job["oldest_behaviour"],
        cache=root / ".forebay" / "decoded",
        on_metrics=lambda step, values: _say({"step": step, "metrics": values}),
        **left_out,
    )
    return {
        "path": str(made.export_dir.relative_to(root)),
        "files": dict(made.files),
        "digest": made.digest,
        "metrics": dict(made.metrics),
        "steps": made.steps,
        "stop_reason": made.stop_reason,
    }


def _say(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
