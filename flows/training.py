"""Train a candidate on a pinned dataset version, train the reward model, register what came out."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import progress
from flows.champions import register_agent
from flows.context import Context
from flows.hybrid import allowed, fresh_source
from flows.logs import flow_run_id
from flows.scoring import require_valid_reward
from tasks.core.atomic import write_atomic
from tasks.core.digest import digest_json, sha256_bytes
from tasks.core.errors import Conflict, Refused, UsageError
from tasks.core.ledger import Ledger, LedgerView
from tasks.core.stages import code_commit, code_digest, lock_digest

if TYPE_CHECKING:
    from tasks.promotion.promote import Entries
    from tasks.promotion.registry import DatasetRef
    from tasks.training.trainer import TrainResult


def train_agent(context: Context, dataset: Mapping[str, Any], champion: int) -> dict[str, Any]:
    """Train from the champion on the dataset; a run that was killed goes on from its last checkpoint.

    The run is named by everything that decides its result, so the same request finds the same run.

    Returns:
        {key, path, digest, files, steps, stop_reason, groups, metrics, mlflow_run, resources}; resources are those
        of the process that finished the run and of the processes it started: what a killed one used is not known.
    """
    from torch import get_num_threads

    from tasks.lineage.revocation import require_not_erased
    from tasks.lineage.rows import keep_consumed
    from tasks.training.shards import ShardRef
    from tasks.training.trainer import encoder_of

    check_settings(context)
    require_not_erased(context.ledger, f"{dataset['name']}/v{dataset['version']}", dataset["shards"])
    require_valid_reward(context, dataset["root"])
    device, dtype = context.device(), context.dtype()
    agent = context.agent(str(champion)).payload
    settings, ledger = context.settings.training, context.ledger
    inputs = {
        "dataset": dataset["root"],
        "init": {"agent": f"agent/{champion}", "digest": agent["digest"]},
        "settings": settings.model_dump(mode="json"),
        "seed": context.settings.seed,
        "dtype": dtype,
        "oldest_behaviour": champion - context.settings.validation.max_policy_lag,
        "code": code_digest(),
        "outside_code": settings.outside_code(),
        "lock": lock_digest(),
    }
    watch = _Revocations(context, dataset["root"], agent["digest"])
    if watch.left_out:
        inputs["left_out"] = watch.kept()
    if settings.mixture.schedule != "replay":
        inputs["collect"] = {
            **context.settings.collect.model_dump(mode="json"),
            "environments": watch.environments,
        }
        if watch.prompts:
            inputs["without_prompts"] = watch.prompts
    encoder = encoder_of(settings)
    if encoder is not None:
        inputs["encoder"] = encoder.digest()
    key = digest_json(inputs)
    run_dir = context.workspace.runs / key[:16]
    finished = ledger.last("run.finished", key)
    if finished is not None and (run_dir / "export").exists():
        return {"key": key, **finished.payload["outputs"]}
    started = ledger.last("run.started", key) or ledger.append(
        "run.started",
        key,
        {
            "key": key,
            **inputs,
            "commit": code_commit(),
            "device": device,
            "threads": get_num_threads(),
            "processes": context.settings.compute.processes,
            "machine": machine(),
            "prefect": flow_run_id(),
        },
    )
    tracked = context.registry.run(
        context.settings.replay.dataset,
        key,
        name=f"train {key[:8]}",
        params={
            **settings.model_dump(mode="json"),
            "seed": context.settings.seed,
            "init": f"agent/{champion}",
        },
        dataset=dataset_ref(dataset),
    )
    spent = _processor_seconds()
    with (
        progress.current().bar("train") as report,
        tracked as run,
        _recorded_failure(ledger, key),
        ExitStack() as stack,
    ):
        report(0, settings.steps, "loading")

        def on_metrics(step: int, values: Mapping[str, float]) -> None:
            watch.require_same(ledger)
            run.log(values, step)
            _append_curve(run_dir, step, values)
            note = (
                f"reward {values['reward_estimate']:.3f}  kl {values['kl_k3']:.4f}  ess {values['ess']:.2f}"
            )
            report(step, settings.steps, note)

        result = stack.enter_context(_trainer(context, agent, key, started.time, watch))(
            run_dir=run_dir,
            init_dir=context.weights(agent),
            shards=[ShardRef(s["path"], s["sha256"]) for s in dataset["shards"]],
            shard_root=context.workspace.root,
            settings=settings,
            seed=context.settings.seed,
            device=device,
            dtype=dtype,
            oldest_behaviour=inputs["oldest_behaviour"],
            left_out=watch.left_out,
            cache=context.workspace.state / "decoded",
            on_metrics=on_metrics,
        )
        outputs = {
            "path": context.workspace.relative(result.export_dir),
            "digest": result.digest,
            "files": dict(result.files),
            "steps": result.steps,
            "stop_reason": result.stop_reason,
            "groups": keep_consumed(context.workspace, run_dir, result.groups_consumed),
            "fresh": [{"path": shard.path, "sha256": shard.sha256} for shard in result.fresh],
            "metrics": dict(result.metrics),
            "mlflow_run": run.run_id,
            "resources": {
                "cpu_seconds": round(_processor_seconds() - spent, 3),
                "memory_mib": round(_peak_mib(device), 1),
            },
        }
    # After the block: MLflow has every metric and the end of the run before the ledger says that it is finished.
    watch.finish(key, {"key": key, "outputs": outputs})
    return {"key": key, **outputs}


class _Revocations:
    """What a run leaves out because it is revoked, and the promise that this is still so when it ends."""

    def __init__(self, context: Context, root: str, init: str) -> None:
        self._context, self._root, self._init = context, root, init
        self._mixed = context.settings.training.mixture.schedule != "replay"
        self._revision, self.left_out, self.prompts, self.environments = self._look()
        if not self.environments and self._mixed:
            raise Refused(
                "Everything that fresh groups could be sampled from is revoked by its source or licence; set "
                "training.mixture.schedule=replay, or other collect.environments."
            )
        if self.left_out:
            groups = len(self.left_out)
            progress.current().say(f"    {groups} groups are left out: revoked, or sampled by flagged agents")

    def kept(self) -> dict[str, Any]:
        """Keep the ids as evidence; return {path, sha256, count}."""
        data = "".join(f"{name}\n" for name in self.left_out).encode()
        digest = sha256_bytes(data)
        path = self._context.workspace.evidence / "left_out" / f"{digest}.txt"
        write_atomic(path, data)
        return {
            "path": self._context.workspace.relative(path),
            "sha256": digest,
            "count": len(self.left_out),
        }

    def require_same(self, ledger: Entries) -> None:
        """Stop a run that learns from what has been revoked meanwhile.

        Raises:
            Conflict: the same run would leave out other groups now.
        """
        from tasks.lineage.revocation import revision

        if revision(ledger) == self._revision:
            return
        now, left_out, *asked = self._look()
        if (left_out, asked) != (self.left_out, [self.prompts, self.environments]):
            more = len(set(left_out) - set(self.left_out))
            raise Conflict(
                f"Data of this run was revoked or reinstated while it trained ({more} more groups are to be left out now); "
                "no agent is made of it, run `forebay retrain` again. What it sampled itself can be revoked and erased too."
            )
        self._revision = now

    def finish(self, key: str, payload: Mapping[str, Any]) -> None:
        """Record the end of the run, unless something was revoked: looked at again under the ledger's lock.

        Raises:
            Conflict: as `require_same`.
        """
        from tasks.lineage.revocation import revision

        class Moved(Exception):
            pass

        def check(view: LedgerView) -> None:
            if revision(view) != self._revision:
                raise Moved

        while True:
            self.require_same(self._context.ledger)
            try:
                self._context.ledger.append("run.finished", key, payload, check)
                return
            except Moved:
                continue

    def _look(self) -> tuple[int, tuple[str, ...], list[str], dict[str, int]]:
        from tasks.lineage.flagged import left_out
        from tasks.lineage.revocation import revoked

        ledger, workspace = self._context.ledger, self._context.workspace
        now = revoked(ledger, workspace)
        prompts = sorted(now.values.get("prompt_sha256", ()))
        environments = dict(self._context.settings.collect.environments)
        if self._mixed:
            environments = allowed(environments, now)
        return (
            now.revision,
            left_out(ledger, workspace, self._root, self._init, now),
            prompts,
            environments,
        )


def machine() -> dict[str, str]:
    """Return what decides how numbers are rounded here beside the code: instructions of the processor, and PyTorch."""
    import torch

    return {"processor": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}


def _processor_seconds() -> float:
    """Processor time of this process and of those it has waited for."""
    return sum(os.times()[:4])


def _peak_mib(device: str) -> float:
    """The most memory that this process, or one that it has waited for, had at once: tensors on a GPU, else resident."""
    import resource

    import torch

    if device == "cuda" and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return most / (2**20 if sys.platform == "darwin" else 1024)


def check_settings(context: Context) -> None:
    """Refuse training settings that cannot work, before anything is collected for them.

    Raises:
        UsageError: the sentence names the setting.
    """
    from tasks.training.trainer import check

    check(context.settings.training)
    if context.settings.compute.processes > 1 and context.settings.training.mixture.schedule != "replay":
        raise UsageError(
            "Fresh groups are sampled by one process; set compute.processes=1 or training.mixture.schedule=replay."
        )


@contextmanager
def _trainer(
    context: Context, agent: Mapping[str, Any], key: str, started: str, watch: _Revocations
) -> Iterator[Callable[..., TrainResult]]:
    """`train`, with a source of fresh groups where the settings mix them in, or by several processes."""
    from tasks.training.trainer import train
    from tasks.training.worker import train_in_processes

    if context.settings.training.mixture.schedule != "replay":
        with context.environments() as found:
            fresh = fresh_source(context, agent, key, started, watch.prompts, watch.environments, found)
            yield partial(train, fresh=fresh)
        return
    processes = context.settings.compute.processes
    yield partial(train_in_processes, processes) if processes > 1 else train


@contextmanager
def _recorded_failure(ledger: Ledger, key: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        ledger.append(
            "run.failed", key, {"key": key, "error": type(error).__name__, "reason": str(error)[:500]}
        )
        raise


def _append_curve(run_dir: Path, step: int, values: Mapping[str, float]) -> None:
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": step, **values}) + "\n")


def register_trained(
    context: Context, run: Mapping[str, Any], dataset: Mapping[str, Any], champion: int
) -> dict[str, Any]:
    """Register the trained agent as a version with the alias `candidate`; the same bytes give the same version."""
    from tasks.promotion.promote import show_candidate

    init = context.agent(str(champion)).payload
    version = register_agent(
        context,
        context.workspace.root / run["path"],
        run["files"],
        origin="trained",
        parents={
            "base": init["parents"]["base"] or init["digest"],
            "init": f"agent/{champion}",
            "dataset": dataset["root"],
            "run": run["key"],
        },
        source={"name": f"run {run['key'][:12]}", "digest": run["digest"]},
        metrics=run["metrics"],
        tokenizer=init["tokenizer_digest"],
        template=init["template_digest"],
        run_id=run["mlflow_run"],
        dataset=dataset_ref(dataset),
    )
    show_candidate(context.ledger, context.registry)
    return {"version": version, "digest": run["digest"]}


def train_and_validate_reward_model(
    context: Context, dataset: Mapping[str, Any], champion: int
) -> dict[str, Any]:
    """Train the reward source of the settings on preferences of the dataset and judge it on prompts it has not seen."""
    from flows.rewards import replay_set, train_reward
    from flows.scoring import resting_on
    from flows.validation import validate_registered

    # Where a registered model gave the rewards it is the one to be judged; another trained on them would echo it.
    registered = resting_on(context, dataset["root"])
    if registered is None:
        agent = f"agent/{champion}"
        registered = train_reward(context, replay_set(context, dataset, agent), agent)
    return validate_registered(context, registered, dataset)


def dataset_ref(dataset: Mapping[str, Any]) -> DatasetRef:
    """Return what MLflow shows as the dataset of a run: a DVC locator beside Forebay's own digest."""
    from tasks.promotion.registry import DatasetRef

    dvc = dataset["dvc"]
    name = f"{dataset['name']}/v{dataset['version']}"
    return DatasetRef(name, dataset["root"], dvc["path"], dataset["git_commit"], dvc["md5"])


def training_curves(context: Context, key: str) -> bytes:
    """Return a PNG of reward, KL, effective sample size and entropy over the steps of a run."""
    from matplotlib.figure import Figure

    rows = read_curve(context, key)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axis, name in zip(
        figure.subplots(2, 3).flat,
        ("reward_estimate", "kl_k3", "ess", "phi", "entropy", "grad_norm"),
        strict=True,
    ):
        axis.plot([row["step"] for row in rows], [row.get(name) for row in rows], color="#1f6f8b")
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.25)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=90)
    return picture.getvalue()


def read_curve(context: Context, key: str) -> list[dict[str, float]]:
    """Return the metrics of a run, one mapping per step; of a step done twice (after a kill) the last."""
    from tasks.training import curve

    return curve.read_curve(context.workspace.runs / key[:16])
