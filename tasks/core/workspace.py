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
        return self.root / STATE

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def policy(self) -> Path:
        return self.root / "policy.yaml"

    @property
    def replay(self) -> Path:
        return self.root / "data" / "replay"

    @property
    def remote(self) -> Path:
        return self.state / "remote"

    @property
    def segments(self) -> Path:
        return self.state / "segments"

    @property
    def models(self) -> Path:
        return self.state / "models"

    @property
    def runs(self) -> Path:
        return self.state / "runs"

    @property
    def evidence(self) -> Path:
        return self.state / "evidence"

    @property
    def locks(self) -> Path:
        return self.state / "locks"

    @property
    def servers(self) -> Path:
        return self.state / "servers"

    @property
    def artifacts(self) -> Path:
        """Where MLflow keeps the artifacts of runs and models."""
        return self.state / "mlartifacts"

    @property
    def ledger_url(self) -> str:
        return f"sqlite:///{self.state / 'ledger.db'}"

    @property
    def mlflow_uri(self) -> str:
        return f"sqlite:///{self.state / 'mlflow.db'}"

    def relative(self, path: Path) -> str:
        """Return `path` relative to the root, as it is written into the ledger."""
        return path.resolve().relative_to(self.root).as_posix()
