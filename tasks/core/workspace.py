"""Where things lie. A workspace is a folder with settings, a git and DVC repository, stores and the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tasks.core.errors import NotFound

STATE = ".forebay"


@dataclass(frozen=True)
class Workspace:
    """The folders of one workspace; `root` is absolute."""

    root: Path

    @classmethod
    def find(cls, start: Path) -> Workspace:
        """Return the nearest workspace at `start` or above it.

        Raises:
            NotFound: there is none; the sentence says how to make one.
        """
        start = start.resolve()
        for folder in (start, *start.parents):
            if (folder / STATE / "ledger.db").exists() or (folder / STATE / "workspace.json").exists():
                return cls(folder)
        raise NotFound(f"No Forebay workspace at {start} or above it; make one with `forebay init {start}`.")

    @property
    def state(self) -> Path:
        """Everything that is not for git."""
        return self.root / STATE

    @property
    def params(self) -> Path:
        """The settings file."""
        return self.root / "params.yaml"

    @property
    def policy(self) -> Path:
        """The promotion policy."""
        return self.root / "policy.yaml"

    @property
    def trust(self) -> Path:
        """The public keys that may sign; in git."""
        return self.root / "keys.yaml"

    @property
    def keys(self) -> Path:
        """The private keys of the service; never in git."""
        return self.state / "keys"

    @property
    def heads(self) -> Path:
        """Signed heads of the ledger."""
        return self.state / "heads"

    @property
    def replay(self) -> Path:
        """Sealed shards, their DVC pointers and manifests."""
        return self.root / "data" / "replay"

    @property
    def remote(self) -> Path:
        """The local DVC remote."""
        return self.state / "remote"

    @property
    def segments(self) -> Path:
        """Open segments: episodes that are not sealed yet."""
        return self.state / "segments"

    @property
    def models(self) -> Path:
        """Base models and reward models."""
        return self.state / "models"

    @property
    def preferences(self) -> Path:
        """Sets of preferences, content-addressed."""
        return self.state / "preferences"

    @property
    def pinned(self) -> Path:
        """Hard links that keep the predecessor's files, by its digest."""
        return self.state / "pinned"

    @property
    def runs(self) -> Path:
        """One folder a training run: recovery checkpoints, export, metrics."""
        return self.state / "runs"

    @property
    def evidence(self) -> Path:
        """What decisions rest on, content-addressed."""
        return self.state / "evidence"

    @property
    def audits(self) -> Path:
        """Pages of audits, one a thing that was audited; the newest takes the place of the one before."""
        return self.state / "audits"

    @property
    def digests(self) -> Path:
        """What `verify` knows of files by their stat; may be deleted at any time."""
        return self.state / "digests.db"

    @property
    def locks(self) -> Path:
        """Lock files."""
        return self.state / "locks"

    @property
    def servers(self) -> Path:
        """State and logs of Prefect, MLflow and the runner."""
        return self.state / "servers"

    @property
    def artifacts(self) -> Path:
        """Where MLflow keeps the artifacts of runs and models."""
        return self.state / "mlartifacts"

    @property
    def ledger_url(self) -> str:
        """SQLAlchemy URL of the ledger."""
        return f"sqlite:///{self.state / 'ledger.db'}"

    @property
    def mlflow_uri(self) -> str:
        """Tracking URI of the workspace's own MLflow store."""
        return f"sqlite:///{self.state / 'mlflow.db'}"

    def relative(self, path: Path) -> str:
        """Return `path` relative to the root, as it is written into the ledger."""
        return path.resolve().relative_to(self.root).as_posix()
