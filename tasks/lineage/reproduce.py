"""Reproduction: the pinned data, code and settings in a clean workspace, trained again, and compared."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from tasks.core.atomic import write_atomic, write_file_atomic
from tasks.core.digest import digest_files, digest_tree, sha256_bytes, sha256_file
from tasks.core.errors import Corrupt, NotFound, Refused, Unavailable, UsageError
from tasks.core.settings import Replay, build_section
from tasks.core.stages import code_digest, digest_code
from tasks.core.workspace import Workspace
from tasks.replay.manifest import Manifest, Shard

if TYPE_CHECKING:
    from tasks.replay.dvc_store import Remote

Verdict = Literal["identical", "within tolerance", "different"]
OnStep = Callable[[int, int], None]
"""on_step(updates done, updates in all)"""

_PROJECT = Path(__file__).resolve().parents[2]
_SMALLEST = 1e-3  # metrics below it are compared as if they were this large: a relative difference of noise says nothing
_COMPARED = ("reward_estimate", "loss", "kl_k3", "ess", "entropy", "grad_norm", "phi")
_OTHER = {"device": "another device", "machine": "another processor or PyTorch", "lock": "other packages"}
_TAIL = 5
_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")


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
        Refused: the folder is not empty. UsageError: it cannot be a folder.
    """
    from tasks.replay import dvc_store

    try:
        root.mkdir(parents=True, exist_ok=True)
        empty = not any(root.iterdir())
    except OSError as error:
        raise UsageError(
            f"{root} cannot be a folder to work in ({error.strerror}); choose another with --into."
        ) from None
    if not empty:
        raise Refused(f"{root} is not empty; a reproduction needs a folder of its own.")
    workspace = Workspace(root.resolve())
    _git(root, "init", "--quiet", "--initial-branch=main", ".")
    workspace.state.mkdir()
    (workspace.state / "workspace.json").write_text('{"schema":1}\n')
    dvc_store.init(workspace, remote)
    return workspace


def fetch_data(source: Path, workspace: Workspace, dataset: Mapping[str, Any]) -> None:
    """Bring a dataset version from git and the remote: its manifest and its shards, each written once it is what was sealed.

    A clone may be anybody's. So no path is taken from it: all follow from the dataset's name and version. Of DVC's pointer only
    the MD5 is read, and DVC lays down nothing itself, for a listing can name files outside of its folder too.

    Args:
        source: the repository that has the commit.
        dataset: of a recipe.

    Raises:
        NotFound: the repository lacks the commit. Unavailable: the remote does not have the bytes.
        Corrupt: what came is not what was sealed, or a path leads out of the dataset's folder.
    """
    from tasks.replay import dvc_store
    from tasks.replay.seal import manifest_path
    from tasks.replay.shards import folder_of, verify

    name, version, commit = dataset["name"], dataset["version"], dataset["git_commit"]
    subject = f"{name}/v{version}"
    if _odd_name(name, version):
        raise Corrupt(f"`{subject}` of the recipe is no name of a dataset.")
    if not _is_commit(source, commit):
        raise NotFound(f"{source} lacks the commit {commit[:12]} of {subject}; fetch all branches.")
    folder = folder_of(workspace, name)
    place = workspace.relative(manifest_path(workspace, name, version))
    files = {shard["path"].rpartition("/")[2]: shard for shard in dataset["shards"]}
    inside = {f"{workspace.relative(folder)}/{file}" for file in files if file not in ("", ".", "..")}
    if dataset["manifest"] != place or {shard["path"] for shard in dataset["shards"]} != inside:
        raise Corrupt(f"The recipe names files of {subject} that are not in its folder.")
    manifest = _git(source, "cat-file", "blob", f"{commit}:{place}")
    if sha256_bytes(manifest) != dataset["manifest_sha256"]:
        raise Corrupt(f"The manifest of {subject} in commit {commit[:12]} was changed.")
    if _root_of(manifest) != dataset["root"]:
        raise Corrupt(f"The manifest in commit {commit[:12]} is of another dataset than the recipe.")
    md5 = _locator(_git(source, "cat-file", "blob", f"{commit}:{workspace.relative(folder)}.dvc"))
    if md5 is None:
        raise Corrupt(f"The pointer of {subject} in commit {commit[:12]} is not one that DVC writes.")
    write_atomic(workspace.root / place, manifest)
    remote = dvc_store.remote(workspace)
    try:
        listed = remote.listing(md5)
        for file, shard in files.items():
            if not (folder / file).exists():
                write_file_atomic(folder / file, partial(_bring, remote, listed.get(file, ""), shard))
    except FileNotFoundError:
        raise Unavailable(f"The DVC remote {remote.url} does not hold all of {subject}.") from None
    verify(workspace, [Shard(**shard) for shard in dataset["shards"]])


def _bring(remote: Remote, md5: str, shard: Mapping[str, Any], to: Path) -> None:
    """Copy a shard out of the remote to the file `to`, which is dropped where its bytes are others."""
    if not _MD5.fullmatch(md5):
        raise FileNotFoundError(shard["path"])
    with remote.open(md5) as stream, to.open("wb") as file:
        shutil.copyfileobj(stream, file)
    if sha256_file(to) != shard["sha256"]:
        raise Corrupt(f"{shard['path']} in the remote {remote.url} is not what was sealed.")


def _root_of(manifest: bytes) -> str | None:
    """Return the identity of the rows that a manifest is of, None where it is another file."""
    try:
        return Manifest.from_dict(json.loads(manifest)).root
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _locator(pointer: bytes) -> str | None:
    """Return the MD5 that a pointer of DVC names, None where it is another file."""
    try:
        md5 = str(yaml.safe_load(pointer)["outs"][0]["md5"])
    except (yaml.YAMLError, KeyError, IndexError, TypeError, ValueError, RecursionError):
        return None
    return md5 if _MD5.fullmatch(md5) else None


def _odd_name(name: Any, version: Any) -> bool:
    try:
        build_section(Replay, {"dataset": name}, "recipe")
    except UsageError:
        return True
    return type(version) is not int or version < 1


def _is_commit(root: Path, commit: Any) -> bool:
    """Tell whether a repository has a commit of this id; what is no id is not shown to git, which reads options."""
    known = isinstance(commit, str) and _COMMIT.fullmatch(commit) is not None
    return known and _run(root, "cat-file", "-e", f"{commit}^{{commit}}").returncode == 0


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


def code_of(recipe: Mapping[str, Any], into: Path, vouched: bool = True) -> Path:
    """Return the folder of the code that trained an agent: this one, or its commit taken from this project's repository.

    The digest of what is taken is computed by the code that runs now, over the layout that it knows, before any of it runs.

    Args:
        vouched: a trusted key or the ledger says so. Without, code that is not this one is not run: the digest is of what
            computes results, and a commit holds more than that.

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
    if not _is_commit(_PROJECT, commit):
        raise Refused(f"{wanted}, which is not here; check it out and run this from there.")
    if not vouched:
        raise Refused(
            f"{wanted}, and nobody who is trusted says so; look at that commit, and run this from there."
        )
    target = into / f"code-{commit[:12]}"
    if not target.exists():
        _unpack(
            _git(_PROJECT, "archive", "--format=tar", commit, "tasks", "models", "flows", "constraints.txt"),
            target,
        )
    found = digest_code(target)
    if found != run["code"]:
        raise Refused(
            f"{wanted}, but the files of that commit have the digest {found[:12]}… as this version of Forebay "
            "computes it; where a digest was of other files then, check that commit out and run this from there."
        )
    return target


def _unpack(archive: bytes, target: Path) -> None:
    """Unpack the Python files, and the lock file, of a tar archive.

    Nothing else: a compiled module would be loaded in place of the file of that name whose digest was checked.
    """
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        wanted = [m for m in tar if m.isfile() and m.name.endswith((".py", "constraints.txt"))]
        try:
            tar.extractall(target, wanted, filter="data")
        except tarfile.FilterError as error:
            raise Refused(f"The commit holds a file that leads out of its folder: {error}") from None


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
