"""The off-policy trainer: a plain loop from a pinned dataset version to an exported agent.

One update samples groups, packs their episodes into rows without repeating a token, adds up the gradients of
the rows and makes one AdamW step. A run is a function of (initial weights, shards, settings, seed): killed
and started again it continues from its last recovery checkpoint, and on a CPU the export has the same bytes
as without the interruption.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from models import objectives
from models.causal_lm import ModelError, load_policy, save_policy, tokenizer_digest
from tasks.core.digest import canonical_json, digest_files, digest_json, digest_tree, write_atomic
from tasks.core.errors import Conflict, Corrupt, Unavailable, UsageError
from tasks.core.locks import file_lock
from tasks.training import checkpoint
from tasks.training.checkpoint import Progress, whole_directory
from tasks.training.sampler import groups_of_step
from tasks.training.settings import Guards, TrainingSettings
from tasks.training.shards import Policy, Replay, Shard, read_replay
from tasks.training.update import Metrics, accumulate_gradients

OnMetrics = Callable[[int, Metrics], None]

FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished run. `files` are {relative path: SHA-256} under `export_dir`, `digest` stands for all of
    them.

    `stop_reason` is "finished", or the guard that ended the run: "not_finite", "ess_collapse", "kl_blow_up";
    then `steps` is that of the last good checkpoint, which is what was exported (0: the initial weights).
    `metrics` are those of the last update that was measured.
    """

    export_dir: Path
    files: dict[str, str]
    digest: str
    steps: int
    stop_reason: str
    groups_consumed: tuple[str, ...]
    metrics: Metrics


def train(
    *,
    run_dir: Path,
    init_dir: Path,
    shards: Sequence[Shard],
    shard_root: Path,
    settings: TrainingSettings,
    seed: int,
    device: str,
    dtype: str,
    oldest_behaviour: int = 0,
    on_metrics: OnMetrics = lambda step, metrics: None,
) -> TrainResult:
    """Train the agent in `init_dir` on replay and export it to `run_dir`/export.

    A run that is finished already is returned at once, after its files are checked; one that was killed goes
    on.

    Args:
        run_dir: belongs to this run alone: lock, recovery checkpoints, export, result.
        init_dir: Hugging Face directory with safetensors weights.
        shards: entries of a manifest (path under `shard_root`, SHA-256).
        device: "cpu", "cuda" or "auto" (a GPU if there is one).
        dtype: of the products in the forward and backward pass: "float32", "bfloat16" or "auto" (bfloat16 on
        a GPU).
            Weights and optimizer moments are float32 always.
        oldest_behaviour: registry version below which an agent's episodes are too stale to learn from; they are
            passed over.
        on_metrics: called after each update with its number (from 1) and its metrics (`accumulate_gradients`,
        with
            staleness, seconds and tokens_per_second). After a resume, updates made since the last checkpoint
            come again.

    Raises:
        Unavailable: no GPU where one was asked for, or a full disk.
        Corrupt: a shard or the finished export differs from its digest.
        Refused: rows do not fit the policy or the objective; the column is named.
        Conflict: another process works in `run_dir`, or it holds a run of other inputs.
        UsageError: the initial model cannot be read.
    """
    place = resolve_device(device)
    autocast = _autocast(place, dtype)
    inputs = digest_json(
        {
            "init": digest_tree(init_dir),
            "shards": [shard.sha256 for shard in shards],
            "settings": settings.model_dump(mode="json"),
            "seed": seed,
            "dtype": str(autocast),
            "oldest_behaviour": oldest_behaviour,
        }
    )
    with file_lock(run_dir / ".lock", timeout=0, what=f"the run in {run_dir}"):
        result = _read_result(run_dir, inputs)
        if result is None:
            model, policy = _initial(init_dir, place)
            needs = objectives.get(settings.objective).needs
            replay = read_replay(shards, shard_root, policy, needs, oldest_behaviour)
            progress, reason, metrics = _updates(
                model, replay, settings, seed, autocast, run_dir / "checkpoints", inputs, on_metrics
            )
            if reason != FINISHED and progress.step == 0:
                model, _ = _initial(init_dir, place)
            result = _write_result(run_dir, init_dir, model, progress, reason, metrics, inputs)
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        return result


def resolve_device(device: str) -> torch.device:
    """The device that "cpu", "cuda" or "auto" means here.

    Raises:
        Unavailable: a GPU was asked for and PyTorch sees none.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise Unavailable(
            "compute.device is cuda, but PyTorch sees no GPU on this machine; set it to cpu or auto."
        )
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def stop_reason(metrics: Metrics, guards: Guards) -> str | None:
    """The name of the guard that the metrics of an update trip, or None."""
    if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
        return "not_finite"
    if metrics["ess"] < guards.min_ess:
        return "ess_collapse"
    if metrics["kl_k3"] > guards.max_kl:
        return "kl_blow_up"
    return None


def _updates(
    model: PreTrainedModel,
    replay: Replay,
    settings: TrainingSettings,
    seed: int,
    autocast: torch.dtype | None,
    checkpoints: Path,
    inputs: str,
    on_metrics: OnMetrics,
) -> tuple[Progress, str, Metrics]:
    """Make the updates that are left; the model ends with the weights to export, those of the progress
    returned."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    checkpoint.discard_unfinished(checkpoints)
    progress = checkpoint.restore(checkpoints, model, optimizer, inputs) or Progress(0)
    metrics: Metrics = {}
    while progress.step < settings.steps:
        started = time.perf_counter()
        groups = groups_of_step(replay.groups, seed, progress.step, settings.groups_per_step)
        metrics = accumulate_gradients(model, replay.episodes(groups), settings, autocast)
        metrics["staleness"] = float(progress.step)
        reason = stop_reason(metrics, settings.guards)
        if reason is None:
            optimizer.step()
        seconds = time.perf_counter() - started
        metrics |= {"seconds": seconds, "tokens_per_second": metrics["tokens"] / seconds}
        on_metrics(progress.step + 1, metrics)
        if reason is not None:
            # These weights tripped the guard; a checkpoint of fewer updates was trained on further and did
            # not.
            good = checkpoint.restore(checkpoints, model, optimizer, inputs, before=progress.step)
            return good or Progress(0), reason, metrics
        progress = Progress(progress.step + 1, tuple(dict.fromkeys((*progress.groups, *groups))))
        if progress.step % settings.checkpoint_every == 0 and progress.step < settings.steps:
            checkpoint.save(checkpoints, model, optimizer, progress, inputs)
    return progress, FINISHED, metrics


def _initial(init_dir: Path, place: torch.device) -> tuple[PreTrainedModel, Policy]:
    try:
        model = load_policy(init_dir, str(place), "float32")
        config = model.config
        return model, Policy(tokenizer_digest(init_dir), config.vocab_size, config.max_position_embeddings)
    except ModelError as error:
        raise UsageError(str(error)) from error


def _autocast(place: torch.device, dtype: str) -> torch.dtype | None:
    lower = dtype == "bfloat16" or (dtype == "auto" and place.type == "cuda")
    return torch.bfloat16 if lower else None


def _write_result(
    run_dir: Path,
    init_dir: Path,
    model: PreTrainedModel,
    progress: Progress,
    reason: str,
    metrics: Metrics,
    inputs: str,
) -> TrainResult:
    export = run_dir / "export"
    shutil.rmtree(export, ignore_errors=True)
    with whole_directory(export) as aside:
        save_policy(model, aside, like=init_dir)
    files = digest_tree(export)
    # JSON has no NaN, and a guard may have stopped on one.
    shown = {name: value for name, value in metrics.items() if math.isfinite(value)}
    result = TrainResult(export, files, digest_files(files), progress.step, reason, progress.groups, shown)
    body = {
        "files": files,
        "steps": progress.step,
        "stop_reason": reason,
        "groups": list(progress.groups),
        "metrics": shown,
        "inputs": inputs,
    }
    write_atomic(run_dir / "result.json", canonical_json(body))
    return result


def _read_result(run_dir: Path, inputs: str) -> TrainResult | None:
    path, export = run_dir / "result.json", run_dir / "export"
    if not path.exists():
        return None
    body = json.loads(path.read_bytes())
    if body["inputs"] != inputs:
        raise Conflict(
            f"{run_dir} holds a run of other weights, shards, settings or seed; give this run its own folder."
        )
    files = digest_tree(export) if export.is_dir() else {}
    wrong = sorted(
        name for name in files.keys() | body["files"].keys() if files.get(name) != body["files"].get(name)
    )
    if wrong:
        raise Corrupt(f"{export / wrong[0]} differs from its digest; remove {run_dir} to train again.")
    return TrainResult(
        export,
        files,
        digest_files(files),
        body["steps"],
        body["stop_reason"],
        tuple(body["groups"]),
        body["metrics"],
    )
