"""What a reproduction is called: bits where they must agree, metrics where they cannot."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tasks.core.errors import Refused
from tasks.core.stages import code_digest
from tasks.lineage.reproduce import code_of, compare

MACHINE = {"processor": "AVX2", "torch": "2.0"}
FILES = {"model.safetensors": "a" * 64, "config.json": "b" * 64}
OTHER = {**FILES, "model.safetensors": "c" * 64}


def recipe(device: str = "cpu") -> dict:
    result = {"metrics": {"loss": -0.5, "kl_k3": 1e-6, "ess": 0.9}, "steps": 8, "stop_reason": "finished"}
    run = {"device": device, "machine": MACHINE, "lock": "l" * 64}
    return {"agent": {"version": 2, "files": FILES}, "run": run, "result": result}


def again(files: dict, device: str = "cpu", **metrics: float) -> dict:
    values = {"loss": -0.5, "kl_k3": 1e-6, "ess": 0.9, **metrics}
    return {"files": files, "device": device, "metrics": values, "steps": 8, "stop_reason": "finished"}


HERE = {"machine": MACHINE, "lock": "l" * 64}
ELSEWHERE = {**HERE, "machine": {**MACHINE, "processor": "AVX512"}}


@pytest.mark.parametrize(
    ("was", "made", "here", "verdict", "says"),
    [
        ("cpu", again(FILES), HERE, "identical", "2 files bit for bit"),
        ("cpu", again(FILES), ELSEWHERE, "identical", "bit for bit"),
        ("cpu", again(OTHER), HERE, "different", "nothing explains it"),
        ("cpu", again(OTHER), ELSEWHERE, "within tolerance", "another processor"),
        ("cpu", again(OTHER), {**HERE, "lock": None}, "within tolerance", "other packages"),
        ("cuda", again(OTHER, "cuda", loss=-0.51), HERE, "within tolerance", "a GPU trained it"),
        ("cuda", again(OTHER, "cpu"), HERE, "within tolerance", "another device, a GPU trained it"),
        ("cuda", again(OTHER, "cuda", loss=-0.6), HERE, "different", "beyond the tolerance: loss"),
        ("cuda", again(OTHER, "cuda", kl_k3=3e-5), HERE, "within tolerance", "a GPU"),  # noise near zero
        ("cuda", {**again(OTHER, "cuda"), "steps": 4}, HERE, "different", "how the run ended"),
        ("cpu", again({}), HERE, "different", "config.json"),
    ],
)
def test_verdicts(was: str, made: dict, here: dict, verdict: str, says: str):
    found = compare(recipe(was), made, here, 0.05)
    assert found.verdict == verdict
    assert says in found.says


def test_code_that_is_not_here_is_named(tmp_path: Path):
    commit = {"commit": None, "dirty": False}
    wanted = {"agent": {"version": 2}, "run": {"code": "d" * 64, "commit": commit}}
    with pytest.raises(Refused, match=r"trained by the code dddddddddddd… \(no commit\), which is not here"):
        code_of(wanted, tmp_path)
    commit["commit"] = "e" * 40
    with pytest.raises(Refused, match="commit eeeeeeeeeeee"):
        code_of(wanted, tmp_path)


def test_code_of_an_earlier_commit_is_taken_from_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    project = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(project)]
    done = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    clean = subprocess.run(
        [*git, "status", "--porcelain", "tasks", "models", "flows"], capture_output=True, check=False
    )
    if done.returncode or clean.stdout:
        pytest.skip("needs the project's repository, without changes")
    commit = {"commit": done.stdout.strip(), "dirty": False}
    here = {"agent": {"version": 2}, "run": {"code": code_digest(), "commit": commit}}
    assert code_of(here, tmp_path) == project
    with monkeypatch.context() as patched:
        patched.setattr(
            "tasks.lineage.reproduce.code_digest", lambda: "f" * 64
        )  # the code has moved on since
        taken = code_of(here, tmp_path)
    assert taken != project
    assert (taken / "tasks" / "training" / "trainer.py").exists()
    wrong = {"agent": {"version": 2}, "run": {"code": "d" * 64, "commit": commit}}
    with pytest.raises(Refused, match=f"has the digest {code_digest()[:12]}"):
        code_of(wrong, tmp_path)
