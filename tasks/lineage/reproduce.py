"""Reproduction: the pinned data, code and settings in a clean workspace, trained again, and compared."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tasks.core.digest import digest_files, digest_tree, sha256_file
from tasks.core.errors import Corrupt, NotFound, Refused, Unavailable
from tasks.core.stages import code_digest
from tasks.core.workspace import Workspace

Verdict = Literal["identical", "within tolerance", "different"]
OnStep = Callable[[int, int], None]
"""on_step(updates done, updates in all)"""

_PROJECT = Path(__file__).resolve().parents[2]
_SMALLEST = 1e-3  # metrics below it are compared as if they were this large: a relative difference of noise says nothing
_COMPARED = ("reward_estimate", "loss", "kl_k3", "ess", "entropy", "grad_norm", "phi")
_OTHER = {"device": "another device", "machine": "another processor or PyTorch", "lock": "other packages"}
_TAIL = 5


@dataclass(frozen=True)
class Comparison:
    """What became of a reproduction.

    Attributes:
        differs: files whose bytes differ.
        metrics: {name: (recorded, now)} of the last update.
        says: one sentence.
    """

    verdict: Verdict
    differs: tuple[str, ...]
    metrics: Mapping[str, tuple[float, float]]
    says: str


def compare(
    recipe: Mapping[str, Any], made: Mapping[str, Any], here: Mapping[str, Any], tolerance: float
) -> Comparison:
    """Compare a reproduction with the recorded agent: bit for bit, and where bits cannot agree, its metrics.

    Bits must agree where device, kind of processor and environment are those of the first run; a GPU adds up in no
    fixed order, and another processor or library rounds otherwise.

    Args:
        made: {files, metrics, device}: what training gave now.
        here: {machine, lock}: where.
        tolerance: largest relative difference of a metric.
    """
    expected, run = recipe["agent"]["files"], recipe["run"]
    differs = tuple(
        sorted(n for n in expected.keys() | made["files"].keys() if expected.get(n) != made["files"].get(n))
    )
    if not differs:
        return Comparison("identical", (), {}, f"identical, {len(expected)} files bit for bit")
    if run is None:
        return Comparison(
            "different", differs, {}, f"the base model here is another one: {differs[0]} differs"
        )
    was = {"device": run["device"], "machine": run.get("machine"), "lock": run["lock"]}
    now = {"device": made["device"], **here}
    excuses = [phrase for name, phrase in _OTHER.items() if was[name] != now[name]]
    excuses += ["a GPU trained it"] if was["device"] == "cuda" else []
    recorded = recipe["result"]["metrics"]
    metrics = {
        n: (recorded[n], made["metrics"][n]) for n in _COMPARED if n in recorded and n in made["metrics"]
    }
    far = [n for n, (a, b) in metrics.items() if not _near(a, b, tolerance)]
    names = ", ".join(differs[:3])
    if not excuses:
        return Comparison("different", differs, metrics, f"different: {names}; nothing explains it")
    why = f"bits cannot agree ({', '.join(excuses)})"
    same_end = (made["steps"], made["stop_reason"]) == (
        recipe["result"]["steps"],
        recipe["result"]["stop_reason"],
    )
    if far or not metrics or not same_end:
        what = ", ".join(far) or "how the run ended"
        return Comparison(
            "different", differs, metrics, f"different: {why}, and beyond the tolerance: {what}"
        )
    return Comparison("within tolerance", differs, metrics, f"{why}; all metrics within {tolerance:.0%}")


def _near(a: float, b: float, tolerance: float) -> bool:
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance * _SMALLEST)


def lay_workspace(root: Path, remote: str | None) -> Workspace:
    """Make an empty folder a clean workspace with git and DVC, `remote` its default remote.

    Raises:
        Refused: the folder is not empty.
    """
    from tasks.replay import dvc_store

    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()):
        raise Refused(f"{root} is not empty; a reproduction needs a folder of its own.")
    workspace = Workspace(root.resolve())
    _git(root, "init", "--quiet", "--initial-branch=main", ".")
    workspace.state.mkdir()
    (workspace.state / "workspace.json").write_text('{"schema":1}\n')
    dvc_store.init(workspace, remote)
    return workspace


def fetch_data(source: Path, workspace: Workspace, dataset: Mapping[str, Any]) -> None:
    """Bring the shards of a dataset version from the remote: pointer and manifest from git, bytes by DVC, all checked.

    Args:
        source: the repository that has the commit.
        dataset: of a recipe.

    Raises:
        NotFound: the repository lacks the commit. Unavailable: the remote does not have the bytes.
        Corrupt: what came is not what was sealed.
    """
    from tasks.replay import dvc_store, shards
    from tasks.replay.manifest import Manifest, Shard

    folder = shards.folder_of(workspace, dataset["name"])
    commit = dataset["git_commit"]
    if _run(source, "cat-file", "-e", f"{commit}^{{commit}}").returncode:
        raise NotFound(
            f"{source} lacks the commit {commit[:12]} of {dataset['name']}/v{dataset['version']}; fetch all branches."
        )
    pointer = workspace.relative(folder) + ".dvc"
    for name in (pointer, dataset["manifest"]):
        path = workspace.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_git(source, "cat-file", "blob", f"{commit}:{name}"))
    if sha256_file(workspace.root / dataset["manifest"]) != dataset["manifest_sha256"]:
        raise Corrupt(
            f"The manifest of {dataset['name']}/v{dataset['version']} in commit {commit[:12]} was changed."
        )
    listed = Manifest.from_dict(json.loads((workspace.root / dataset["manifest"]).read_bytes()))
    wanted = [Shard(**shard) for shard in dataset["shards"]]
    if listed.root != dataset["root"]:
        raise Corrupt(f"The manifest in commit {commit[:12]} is of another dataset than the recipe.")
    dvc_store.pull(workspace, folder)
    shards.verify(workspace, wanted)


def base_model(recipe: Mapping[str, Any], source: Path, workspace: Workspace) -> Path:
    """Convert the base model once more, from where it came from; return its folder in the workspace.

    Raises:
        Unavailable: it cannot be read here.
    """
    from models.causal_lm import ModelError, convert

    name = recipe["agent"]["source"]["name"]
    if (source / name).is_dir():
        name = str(source / name)
    target = workspace.models / f"base-{recipe['agent']['digest'][:16]}"
    try:
        convert(name, target)
    except ModelError as error:
        raise Unavailable(f"The base model {name} cannot be read here: {error}") from None
    return target


def code_of(recipe: Mapping[str, Any], into: Path) -> Path:
    """Return the folder of the code that trained an agent: this one, or its commit taken from this project's repository.

    Raises:
        Refused: it is neither; the sentence says which code it was.
    """
    run = recipe["run"]
    if run["code"] == code_digest():
        return _PROJECT
    commit, dirty = run["commit"]["commit"], run["commit"]["dirty"]
    agent = f"agent/{recipe['agent']['version']}"
    place = (
        f"commit {commit[:12]}{' with changes that were not committed' if dirty else ''}"
        if commit
        else "no commit"
    )
    wanted = f"{agent} was trained by the code {run['code'][:12]}… ({place})"
    if not commit or _run(_PROJECT, "cat-file", "-e", f"{commit}^{{commit}}").returncode:
        raise Refused(f"{wanted}, which is not here; check it out and run this from there.")
    target = into / f"code-{commit[:12]}"
    if not target.exists():
        target.mkdir(parents=True)
        archive = _git(
            _PROJECT, "archive", "--format=tar", commit, "tasks", "models", "flows", "constraints.txt"
        )
        subprocess.run(["tar", "-x", "-C", str(target)], input=archive, check=True)
    found = subprocess.run(
        [sys.executable, "-P", "-c", "from tasks.core.stages import code_digest; print(code_digest())"],
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    if found != run["code"]:
        raise Refused(f"{wanted}, but that commit has the digest {found[:12] or 'of no code'}….")
    return target


def train_again(
    recipe: Mapping[str, Any],
    init: Path,
    workspace: Workspace,
    code: Path,
    device: str,
    script: Path,
    on_step: OnStep = lambda done, total: None,
) -> dict[str, Any]:
    """Train by a recipe in a process of its own, with the recorded settings, seed, precision and threads.

    Args:
        init: folder of the initial agent under the workspace, its digests verified.
        code: folder of the code.
        device: cpu or cuda.
        script: what the process runs, `flows/again.py`.

    Returns:
        {path, files, digest, metrics, steps, stop_reason, device}.

    Raises:
        Unavailable: the process ended without a result; what it said last is quoted.
        Refused: it refused.
    """
    run = recipe["run"]
    first = recipe["init"]
    job = {
        "root": str(workspace.root),
        "key": run["key"],
        "started": run["started"],
        "code": run["code"],
        "outside_code": run["outside_code"],
        "settings": run["settings"],
        "seed": run["seed"],
        "dtype": run["dtype"],
        "threads": run["threads"],
        "processes": run.get("processes", 1),
        "device": device,
        "oldest_behaviour": run["oldest_behaviour"],
        "left_out": recipe["left_out"],
        "without_prompts": run.get("without_prompts", []),
        "shards": recipe["dataset"]["shards"],
        "init": {**first, "path": workspace.relative(init)},
    }
    path = workspace.state / f"job-{run['key'][:16]}.json"
    path.write_text(json.dumps(job))
    params = {"base_model": "none", "seed": run["seed"], "training": run["settings"]}
    if "collect" in run:
        params["collect"] = run["collect"]
    workspace.params.write_text(json.dumps(params))  # JSON is YAML
    log = path.with_suffix(".log")
    environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": str(run["threads"])}
    result: dict[str, Any] | None = None
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-P", str(script), str(path)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
            cwd=workspace.root,
        ) as running,
    ):
        assert running.stdout is not None
        for line in running.stdout:
            try:
                said = json.loads(line)
            except json.JSONDecodeError:
                continue  # a library's
            if "error" in said:
                raise Refused(f"Training agent/{recipe['agent']['version']} again failed: {said['error']}")
            if "result" in said:
                result = said["result"]
            elif "step" in said:
                on_step(said["step"], run["settings"]["steps"])
    if result is None:
        tail = " ".join(log.read_text().split("\n")[-_TAIL:])
        raise Unavailable(f"Training agent/{recipe['agent']['version']} again ended without a result: {tail}")
    return {**result, "device": device}


def folder_of(workspace: Workspace, recipe: Mapping[str, Any], folder: Path) -> bool:
    """Tell whether a folder holds exactly the files of a recipe's agent."""
    return folder.is_dir() and digest_files(digest_tree(folder)) == recipe["agent"]["digest"]


def _git(root: Path, *words: str) -> bytes:
    done = _run(root, *words)
    if done.returncode:
        raise Unavailable(f"`git {words[0]}` failed in {root}: {done.stderr.decode().strip()}")
    return done.stdout


def _run(root: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(["git", "-C", str(root), *words], env=inherited, capture_output=True, check=False)
