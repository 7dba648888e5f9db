"""The off-policy trainer: a plain loop from a pinned dataset version to an exported agent.

One update samples groups, packs their episodes into rows without repeating a token, adds up the gradients of
the rows and makes one AdamW step. A run is a function of (initial weights, shards, settings, seed): killed
and started again it continues from its last recovery checkpoint, and on a CPU the export has the same bytes
as without the interruption.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from models import adapters, objectives
from models.causal_lm import ModelError, load_policy, save_policy, tokenizer_digest
from models.diversity import Encoder
from models.memory import keep_freed_memory
from tasks.core.atomic import discard_unfinished, whole_directory, write_atomic
from tasks.core.digest import canonical_json, digest_files, digest_json, digest_tree
from tasks.core.errors import Conflict, Corrupt, UsageError
from tasks.core.locks import file_lock
from tasks.training import checkpoint, parallel
from tasks.training.decoded import Shard
from tasks.training.parallel import World
from tasks.training.rounds import Curriculum, FreshSource, Policies, Progress, admitted
from tasks.training.sampler import MEASURED_ORDERS, Sampler
from tasks.training.settings import Guards, TrainingSettings
from tasks.training.shards import Policy, ShardRef, read_replay
from tasks.training.stability import Watch
from tasks.training.update import Metrics, accumulate_gradients, needs, rehearse

OnMetrics = Callable[[int, Metrics], None]

FINISHED = "finished"
COLLAPSE = "collapse"
_SETTLES = 10  # updates after a remedy in which signals are not judged again, for it takes time to help


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished run. `files` are {relative path: SHA-256} under `export_dir`, `digest` stands for all of
    them.

    `stop_reason` is "finished", or the guard that ended the run: "not_finite", "ess_collapse", "kl_blow_up", "collapse";
    then `steps` is that of the last good checkpoint, which is what was exported (0: the initial weights).
    `groups_consumed` are the groups of the replay that the exported weights learnt from, `fresh` the shards of
    those sampled on the way. `metrics` are those of the last update that was measured.
    """

    export_dir: Path
    files: dict[str, str]
    digest: str
    steps: int
    stop_reason: str
    groups_consumed: tuple[str, ...]
    fresh: tuple[ShardRef, ...]
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class _Run:
    """A run that is set up: where its state lies, what it trains, and from what."""

    checkpoints: Path
    inputs: str
    policies: Policies
    optimizer: torch.optim.Optimizer
    curriculum: Curriculum


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
    left_out: Sequence[str] = (),
    fresh: FreshSource | None = None,
    cache: Path | None = None,
    on_metrics: OnMetrics = lambda step, metrics: None,
) -> TrainResult:
    """Train the agent in `init_dir` on replay and export it to `run_dir`/export.

    A run that is finished already is returned at once, after its files are checked; one that was killed goes
    on. Under torchrun every process calls this with the same arguments, and they share the work.

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
        left_out: ids of groups that nothing may learn from (revoked); part of what the run is.
        fresh: samples groups from the policy in training; needed by every mixture but replay.
        cache: folder of decoded shards, see `read_replay`.
        on_metrics: called after each update with its number (from 1) and its metrics (`accumulate_gradients`,
        with
            staleness, fresh_groups, seconds and tokens_per_second). After a resume, updates made since the last
            checkpoint come again.

    Raises:
        Unavailable: no GPU where one was asked for, or a full disk.
        Corrupt: a shard or the finished export differs from its digest.
        Refused: rows do not fit the policy or the objective (the column is named), or no group is admitted.
        Conflict: another process works in `run_dir`, or it holds a run of other inputs.
        UsageError: the initial model cannot be read, or the settings name something that does not exist.
    """
    world = parallel.join(device)
    if world.device.type == "cpu":
        keep_freed_memory()
    autocast = _autocast(world.device, dtype)
    check(settings)
    encoder = encoder_of(settings)
    inputs = digest_json(
        {
            "init": digest_tree(init_dir),
            "shards": [shard.sha256 for shard in shards],
            "settings": settings.model_dump(mode="json"),
            "outside_code": settings.outside_code(),
            "encoder": encoder.digest() if encoder else None,
            "seed": seed,
            "dtype": str(autocast),
            "oldest_behaviour": oldest_behaviour,
            **({"left_out": sorted(left_out)} if left_out else {}),
        }
    )
    if settings.mixture.schedule != "replay" and fresh is None:
        raise UsageError(
            f"training.mixture.schedule={settings.mixture.schedule} needs a source of fresh groups."
        )
    with _alone(run_dir, world):
        result = _read_result(run_dir, inputs)
        if result is None:
            policies, policy = _policies(init_dir, settings, seed, autocast, world)
            replay = read_replay(
                shards,
                shard_root,
                policy,
                needs(settings),
                oldest_behaviour,
                cache,
                mask_truncated=settings.overlong.mask,
                left_out=frozenset(left_out),
            )
            table, report = admitted(replay, settings, policies, run_dir / f"divergence-{inputs[:16]}.f64")
            sampler = Sampler(table, settings.sampling, seed)
            optimizer = torch.optim.AdamW(
                [p for p in policies.scorer.parameters() if p.requires_grad],
                lr=settings.learning_rate,
                weight_decay=settings.weight_decay,
                fused=True,
            )
            run = _Run(
                run_dir / "checkpoints",
                inputs,
                policies,
                optimizer,
                Curriculum(replay, sampler, policies, settings, shard_root, policy, encoder, fresh),
            )
            progress, reason, metrics = _updates(run, settings, report.metrics(), on_metrics)
            consumed = tuple(sampler.consumed(progress.frontier))
            weights = parallel.gather_export(policies.scorer.model, world)
            if world.main:
                model = load_policy(init_dir, "cpu", "float32")
                if reason == FINISHED or progress.step:
                    assert weights.keys() >= dict(model.named_parameters()).keys()  # tied ones have one name
                    model.load_state_dict(weights, strict=False)
                _write_result(run_dir, init_dir, model, progress, consumed, reason, metrics, inputs)
            world.wait()
            result = _read_result(run_dir, inputs)
            assert result is not None  # it has just been written
        if world.main:
            shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
        return result


def check(settings: TrainingSettings) -> None:
    """Refuse settings that name functions or constants which do not exist.

    Raises:
        UsageError: the sentence names what is wrong.
    """
    settings.outside_code()
    try:
        rehearse(settings)
    except Exception as error:  # the user's own functions may raise anything
        raise UsageError(f"These training settings cannot work: {error}") from error
    proximal = "old_logprobs" in objectives.get(settings.objective).needs
    if settings.updates_per_round == 1 and proximal:
        raise UsageError(
            f"training.objective={settings.objective} clips against the policy at the beginning of a round, which "
            "with one update a round is the policy itself; set training.updates_per_round to 2 or more."
        )
    idle = settings.mixture.schedule == "replay" and settings.sampling.order not in MEASURED_ORDERS
    if settings.updates_per_round > 1 and idle and "old_logprobs" not in needs(settings):
        raise UsageError(
            f"training.updates_per_round={settings.updates_per_round} would change nothing: objective "
            f"{settings.objective} needs no proximal policy, and there is no correction."
        )


def stop_reason(metrics: Metrics, guards: Guards) -> str | None:
    """The name of the guard that the metrics of an update trip, or None."""
    if not all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm", "ess", "kl_k3")):
        return "not_finite"
    if metrics["ess"] < guards.min_ess:
        return "ess_collapse"
    if metrics["kl_k3"] > guards.max_kl:
        return "kl_blow_up"
    return None


def _updates(
    run: _Run, settings: TrainingSettings, admission: Metrics, on_metrics: OnMetrics
) -> tuple[Progress, str, Metrics]:
    """Make the updates that are left; the model ends with the weights to export, those of the progress
    returned."""
    policies, world, curriculum = run.policies, run.policies.world, run.curriculum
    if world.main:
        discard_unfinished(run.checkpoints)
    world.wait()
    guarded = settings.guards.collapse != "report"
    progress = _restore(run) or curriculum.start()
    if settings.guards.roll_back and not progress.step:
        _keep(run, progress)  # to go back to, if the first updates are bad already
    metrics: Metrics = {}
    while progress.step < settings.steps:
        began = progress.step
        started = time.perf_counter()
        lessons, progress = curriculum.round(progress)
        loss = settings if progress.reacted is None else settings.against_collapse()
        for number, lesson in enumerate(lessons, start=1):
            update = accumulate_gradients(
                policies.scorer,
                lesson.episodes,
                loss,
                policies.autocast,
                world,
                old_logprobs=lesson.old_logprobs,
                reference_logprobs=lesson.reference_logprobs,
                diversity=lesson.diversity,
            )
            step = began + number
            metrics = update.metrics | admission
            metrics["staleness"] = float(step - 1)
            metrics["fresh_groups"] = float(len(lesson.episodes.group_ids) - lesson.replayed)
            reason = stop_reason(metrics, settings.guards)
            # These weights tripped the guard; a checkpoint of fewer updates was trained on further and did not.
            good = _good(progress, step - 1)
            if reason is None:
                run.optimizer.step()
                progress = curriculum.learnt(progress, lesson, update)
                if guarded:
                    progress = replace(progress, watch=_watched(progress, step, metrics))
            collapse = progress.watch.collapse()
            if collapse is not None and (settings.guards.collapse == "stop" or progress.reacted is not None):
                reason, good = COLLAPSE, _good(progress, collapse[1])
            metrics["reacted"] = float(progress.reacted is not None)
            seconds = time.perf_counter() - started
            started = time.perf_counter()
            metrics |= {"seconds": seconds, "tokens_per_second": metrics["tokens"] / seconds}
            if world.main:
                on_metrics(step, metrics)
            if reason is not None:
                return _restore(run, before=good) or curriculum.start(), reason, metrics
        collapse = progress.watch.collapse()
        if collapse is not None:  # the whole round was drawn, so it is learnt from before anything changes
            reacted = _react(run, progress, collapse[1], settings.guards)
            if reacted is None:
                return curriculum.start(), COLLAPSE, metrics
            progress = reacted
        due = progress.step // settings.checkpoint_every > began // settings.checkpoint_every
        if due and progress.step < settings.steps:
            _keep(run, progress)
    return progress, FINISHED, metrics


def _watched(progress: Progress, step: int, metrics: Metrics) -> Watch:
    """What the signals of a collapse say after update `step`."""
    watch = progress.watch.seen(step, metrics)
    settling = progress.reacted is not None and step <= progress.reacted + _SETTLES
    return watch.anew() if settling else watch


def _react(run: _Run, progress: Progress, onset: int, guards: Guards) -> Progress | None:
    """The progress to go on with against a collapse that began with update `onset`: from here, or from before it; None where
    there is nothing to go back to."""
    now: Progress | None = replace(progress, watch=progress.watch.anew(), onset=onset)
    if guards.roll_back:
        now = _restore(run, before=onset)
    if now is None:
        return None
    # What the other way would have sampled after this point is of other weights: its shards are not taken up again.
    now = replace(now, reacted=progress.step, watch=now.watch.anew(), asked=progress.asked)
    _keep(run, now)
    if guards.roll_back and run.policies.world.main:
        # Last, for killed before it the run tells the collapse again.
        checkpoint.drop_after(run.checkpoints, now.step)
    run.policies.world.wait()
    return now


def _keep(run: _Run, progress: Progress) -> None:
    policies = run.policies
    weights = parallel.gather_weights(policies.scorer.model, policies.world)
    moments = parallel.gather_moments(policies.scorer.model, run.optimizer, policies.world)
    if policies.world.main:
        state = progress.to_json() | {"threads": torch.get_num_threads()}
        good = _good(progress)
        checkpoint.save(run.checkpoints, progress.step, state, weights, moments, run.inputs, good=good)


def _good(progress: Progress, before: int | None = None) -> int | None:
    """Weights of fewer updates than this are from before any collapse that is told or suspected (or from before `before`)."""
    bounds = [one for one in (progress.onset, progress.watch.suspected(), before) if one is not None]
    return min(bounds, default=None)


def _restore(run: _Run, before: int | None = None) -> Progress | None:
    """Go back to the newest checkpoint (of fewer than `before` updates), if there is one."""
    found = checkpoint.load(run.checkpoints, run.inputs, before=before)
    if found is None:
        return None
    model, world = run.policies.scorer.model, run.policies.world
    if world.size == 1 and world.device.type == "cpu":
        # How a product is split over threads decides its last bits.
        torch.set_num_threads(found.progress["threads"])
    parallel.load_state(model, run.optimizer, found.weights, found.moments, found.step)
    return Progress.from_json(found.progress)


def _policies(
    init_dir: Path, settings: TrainingSettings, seed: int, autocast: torch.dtype | None, world: World
) -> tuple[Policies, Policy]:
    try:
        # Where it is split, every process moves its part to its own device.
        model = load_policy(init_dir, str(world.device) if world.size == 1 else "cpu", "float32")
        policy = Policy(
            tokenizer_digest(init_dir), model.config.vocab_size, model.config.max_position_embeddings
        )
    except ModelError as error:
        raise UsageError(str(error)) from error
    frozen = None
    if settings.adapter.rank:
        adapter = settings.adapter
        try:
            model = adapters.attach(model, adapter.rank, adapter.alpha, adapter.targets, seed)
        except ValueError as error:
            raise UsageError(f"training.adapter: {error}") from error
    elif "reference_logprobs" in needs(settings):
        frozen = parallel.split(copy.deepcopy(model).requires_grad_(False), world)
    scorer = parallel.split(model, world)
    parallel.prepare(
        model, activation_checkpointing=settings.activation_checkpointing, compile=settings.compile
    )
    as_reference = partial(adapters.without, model) if settings.adapter.rank else nullcontext
    return Policies(scorer, frozen or scorer, as_reference, autocast, world), policy


def encoder_of(settings: TrainingSettings) -> Encoder | None:
    """The sentence encoder that the settings name, if they ask for DSDR.

    Raises:
        UsageError: it is not there.
    """
    if not (settings.diversity.reward or settings.diversity.entropy):
        return None
    try:
        return Encoder(settings.diversity.encoder)
    except ModelError as error:
        raise UsageError(str(error)) from error


@contextmanager
def _alone(run_dir: Path, world: World) -> Iterator[None]:
    """The main process holds the run's lock while all of them work."""
    if not world.main:
        world.wait()
        yield
        return
    with file_lock(run_dir / ".lock", timeout=0, what=f"the run in {run_dir}"):
        world.wait()
        yield


def _autocast(place: torch.device, dtype: str) -> torch.dtype | None:
    lower = dtype == "bfloat16" or (dtype == "auto" and place.type == "cuda")
    return torch.bfloat16 if lower else None


def _write_result(
    run_dir: Path,
    init_dir: Path,
    model: PreTrainedModel,
    progress: Progress,
    consumed: tuple[str, ...],
    reason: str,
    metrics: Metrics,
    inputs: str,
) -> None:
    export = run_dir / "export"
    with whole_directory(export) as aside:
        save_policy(model, aside, like=init_dir)
    files = digest_tree(export)
    # JSON has no NaN, and a guard may have stopped on one.
    shown = {name: value for name, value in metrics.items() if math.isfinite(value)}
    body = {
        "files": files,
        "steps": progress.step,
        "stop_reason": reason,
        "groups": list(consumed),
        "fresh": [[shard.path, shard.sha256] for shard in progress.fresh],
        "metrics": shown,
        "inputs": inputs,
    }
    write_atomic(run_dir / "result.json", canonical_json(body))


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
        tuple(ShardRef(path, sha256) for path, sha256 in body["fresh"]),
        body["metrics"],
    )
