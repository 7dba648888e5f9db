"""What a reproduction is called: bits where they must agree, metrics where they cannot."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from tasks.core.digest import sha256_bytes
from tasks.core.errors import Corrupt, Refused, UsageError
from tasks.core.stages import code_digest
from tasks.lineage import reproduce
from tasks.lineage.reproduce import code_of, compare, fetch_data, lay_workspace
from tasks.replay.manifest import Manifest, Shard

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
    with pytest.raises(Refused, match=f"have the digest {code_digest()[:12]}"):
        code_of(wrong, tmp_path)


def git(root: Path, *words: str, stdin: bytes = b"") -> str:
    who = ["-c", "user.name=eve", "-c", "user.email=eve@localhost"]
    done = subprocess.run(
        ["git", "-C", str(root), *who, *words], input=stdin, check=True, capture_output=True
    )
    return done.stdout.decode().strip()


def test_code_is_hashed_by_the_code_that_runs_and_not_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    project, mark = tmp_path / "project", tmp_path / "it-ran"
    (project / "tasks" / "core").mkdir(parents=True)
    (project / "models").mkdir()
    (project / "flows").mkdir()
    (project / "tasks" / "core" / "__init__.py").write_text(f"open({str(mark)!r}, 'w').close()")
    (project / "tasks" / "core" / "stages.py").write_text("def code_digest():\n    return 64 * 'd'\n")
    (project / "tasks" / "core" / "stages.so").write_text("loaded before stages.py")
    (project / "models" / "link.py").symlink_to("/etc/hostname")
    for name in ("models/one.py", "flows/again.py", "constraints.txt"):
        (project / name).touch()
    git(tmp_path, "init", "-q", str(project))
    git(project, "add", "-A")
    git(project, "commit", "-qm", "x")
    monkeypatch.setattr(reproduce, "_PROJECT", project)
    commit = {"commit": git(project, "rev-parse", "HEAD"), "dirty": False}
    claimed = {"agent": {"version": 2}, "run": {"code": "d" * 64, "commit": commit}}
    with pytest.raises(Refused, match="as this version of Forebay computes it"):
        code_of(claimed, tmp_path)
    assert not mark.exists()
    taken = tmp_path / f"code-{commit['commit'][:12]}"
    assert (taken / "tasks" / "core" / "stages.py").exists()
    assert not (taken / "tasks" / "core" / "stages.so").exists()
    assert not (taken / "models" / "link.py").exists()
    with pytest.raises(Refused, match="nobody who is trusted says so"):
        code_of(claimed, tmp_path, vouched=False)
    commit["commit"] = "--output=/tmp/x"
    with pytest.raises(Refused, match="which is not here"):
        code_of(claimed, tmp_path)


SHARD = "data/replay/main/shards/v00001-00000.parquet"
MANIFEST = "data/replay/main/manifests/v00001.json"


class Stranger:
    """A repository and a remote that somebody else wrote, and the recipe's words about a dataset in them."""

    def __init__(self, folder: Path, path: str = SHARD, listed: str = "v00001-00000.parquet"):
        self.root, self.remote = folder / "theirs", folder / "remote"
        git(folder, "init", "-q", str(self.root))
        data = b"rows"
        shard = Shard(path, sha256_bytes(data), 2, 1, len(data))
        manifest = Manifest.append("main", None, [shard], [], "2026-01-01T00:00:00+00:00")
        md5 = self._stored(data, "")
        listing = json.dumps([{"md5": md5, "relpath": listed}]).encode()
        pointer = f"outs:\n- md5: {self._stored(listing, '.dir')}\n  path: ../../../../shards\n".encode()
        self.files = {MANIFEST: manifest.to_bytes(), "data/replay/main/shards.dvc": pointer}
        self.dataset = {
            "name": "main", "version": 1, "root": manifest.root, "manifest": MANIFEST,
            "manifest_sha256": sha256_bytes(manifest.to_bytes()),
            "shards": [vars(shard)], "git_commit": "",
        }  # fmt: skip

    def _stored(self, data: bytes, ending: str) -> str:
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        path = self.remote / "files" / "md5" / md5[:2] / f"{md5[2:]}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return md5 + ending

    def fetch(self, to: Path, **changed: object) -> Path:
        """Commit the files by git's plumbing, which writes trees that lead out; fetch by them into the folder `to`."""
        tree: dict = {}
        for name, data in self.files.items():
            here = tree
            *folders, last = name.split("/")
            for folder in folders:
                here = here.setdefault(folder, {})
            here[last] = data
        commit = git(self.root, "commit-tree", self._tree(tree), "-m", "x")
        workspace = lay_workspace(to, str(self.remote))
        fetch_data(self.root, workspace, {**self.dataset, "git_commit": commit, **changed})
        return workspace.root

    def _tree(self, tree: dict) -> str:
        lines = [
            f"040000 tree {self._tree(value)}\t{name}"
            if isinstance(value, dict)
            else f"100644 blob {git(self.root, 'hash-object', '-w', '--stdin', stdin=value)}\t{name}"
            for name, value in sorted(tree.items())
        ]
        return git(self.root, "mktree", stdin="".join(f"{line}\n" for line in lines).encode())


def test_data_comes_from_a_repository_and_a_remote(tmp_path: Path):
    root = Stranger(tmp_path).fetch(tmp_path / "again")
    assert (root / SHARD).read_bytes() == b"rows"
    assert Manifest.from_dict(json.loads((root / MANIFEST).read_bytes())).subject == "main/v1"


@pytest.mark.parametrize(
    "changed",
    [
        {"manifest": "data/../../../pwned"},
        {"manifest": "/pwned"},
        {"name": "../../../pwned"},
        {"name": "/pwned"},
        {"version": "1/../../../../../pwned"},
        {"git_commit": "--output=pwned"},
    ],
)
def test_no_word_of_a_recipe_leads_out_of_the_clean_folder(tmp_path: Path, changed: dict):
    stranger = Stranger(tmp_path)
    stranger.files["data/../../../pwned"] = b"pwned"
    before = {path for path in tmp_path.rglob("*") if stranger.root not in path.parents}
    clean = tmp_path / "deep" / "er" / "again"
    with pytest.raises((Corrupt, Refused, reproduce.NotFound)):
        stranger.fetch(clean, manifest_sha256=sha256_bytes(b"pwned"), **changed)
    made = {path for path in tmp_path.rglob("*") if stranger.root not in path.parents} - before
    assert not [path for path in made if "pwned" in str(path)]
    assert not (clean / "data").exists()


@pytest.mark.parametrize("path", ["data/replay/main/shards/../../../../../pwned", "/tmp/pwned", "pwned"])
def test_shards_lie_in_the_folder_of_their_dataset(tmp_path: Path, path: str):
    with pytest.raises(Corrupt, match="not in its folder"):
        Stranger(tmp_path, path=path).fetch(tmp_path / "again")


def test_a_listing_that_leads_out_lays_nothing_down(tmp_path: Path):
    with pytest.raises(reproduce.Unavailable, match="does not hold all of main/v1"):
        Stranger(tmp_path, listed="../../../../../pwned").fetch(tmp_path / "a" / "b" / "again")
    assert not list(tmp_path.rglob("pwned"))


def test_a_shard_that_was_exchanged_in_the_remote_is_not_kept(tmp_path: Path):
    stranger = Stranger(tmp_path)
    md5 = hashlib.md5(b"rows", usedforsecurity=False).hexdigest()
    (stranger.remote / "files" / "md5" / md5[:2] / md5[2:]).write_bytes(b"sown")
    with pytest.raises(Corrupt, match="is not what was sealed"):
        stranger.fetch(tmp_path / "again")
    assert not (tmp_path / "again" / SHARD).exists()


@pytest.mark.parametrize("odd", [b"", b"{", b"[]", b"\xff", b'{"outs": 5}'])
def test_files_that_are_not_what_they_should_be_are_a_sentence(tmp_path: Path, odd: bytes):
    stranger = Stranger(tmp_path)
    stranger.files["data/replay/main/shards.dvc"] = odd
    with pytest.raises(Corrupt, match="not one that DVC writes"):
        stranger.fetch(tmp_path / "again")
    stranger.files[MANIFEST] = odd
    with pytest.raises(Corrupt, match="of another dataset"):
        stranger.fetch(tmp_path / "more", manifest_sha256=sha256_bytes(odd))


def test_a_clean_folder_is_a_folder(tmp_path: Path):
    (tmp_path / "file").touch()
    for into in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="choose another with --into"):
            lay_workspace(into, None)
