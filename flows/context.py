"""What a flow works with: one workspace, its settings and its ledger."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.settings import Settings
from tasks.core.digest import digest_json, digest_tree
from tasks.core.errors import Corrupt, NotFound, Unavailable
from tasks.core.ledger import Entry, Ledger
from tasks.core.locks import file_lock
from tasks.core.workspace import Workspace
from tasks.promotion.policy import Policy, load_policy

if TYPE_CHECKING:
    from tasks.arena.guarded import Environments
    from tasks.promotion.registry import Registry

# Settings that say where things run, or that no cycle reads: they change no result by more than rounding.
_PLACEMENT: Any = {
    "stores": True,
    "servers": True,
    "compute": {"threads", "processes"},
    "guard": {"workers"},
    "collect": {"engine": {"url", "api_key_env", "timeout_s", "retries", "parallel"}},
    "arena": True,  # no cycle reads it
}


@dataclass(frozen=True)
class Context:
    """One workspace with the settings of this invocation."""

    workspace: Workspace
    settings: Settings
    overrides: tuple[str, ...] = field(default=())

    @classmethod
    def open(cls, start: Path, overrides: Sequence[str] = ()) -> Context:
        """Open the workspace at or above `start`, with settings overridden by `section.key=value` strings."""
        workspace = Workspace.find(start)
        return cls(workspace, Settings.load(workspace.params, overrides), tuple(overrides))

    @cached_property
    def ledger(self) -> Ledger:
        """The ledger of the workspace, or the shared one that `stores.ledger` names."""
        return Ledger(self.settings.stores.ledger or self.workspace.ledger_url)

    @cached_property
    def registry(self) -> Registry:
        """The MLflow adapter (importing it takes seconds, so it happens at first use)."""
        from tasks.promotion.registry import Registry

        uri = self.settings.stores.mlflow or self.workspace.mlflow_uri
        return Registry(uri, self.workspace.artifacts, self.workspace.locks)

    @cached_property
    def policy(self) -> Policy:
        """The promotion policy file."""
        return load_policy(self.workspace.policy)

    @cached_property
    def pins(self) -> dict[str, str]:
        """Digests of what, beside the data, decides the result of a cycle."""
        from tasks.core.stages import code_digest, lock_digest

        outside = self.settings.training.outside_code()
        meaningful = self.settings.model_dump(mode="json", exclude=_PLACEMENT)
        pins = {
            "settings": digest_json(meaningful),
            "policy": self.policy.digest(),
            "code": digest_json([code_digest(), outside]) if outside else code_digest(),
            "lock": lock_digest() or "",
        }
        return {**pins, "revoked data": self.revoked} if self.revoked else pins

    @property
    def revoked(self) -> str:
        """The digest of all revocations that hold now, empty where none does: what was found before may not hold."""
        from tasks.lineage.revocation import standing_entries

        held = [entry.digest for entry in standing_entries(self.ledger)]
        return digest_json(held) if held else ""

    def agent(self, ref: str) -> Entry:
        """Return the registration of `champion`, `candidate`, `previous`, a version number, or agent/N, agent@alias.

        Raises:
            NotFound: no such version; those that exist are named.
        """
        from tasks.promotion.promote import champion, previous

        name = ref.removeprefix("agent").lstrip("/@") or "champion"
        registered = {str(e.payload["version"]): e for e in self.ledger.entries("agent.registered")}
        aliases = {"champion": champion, "previous": previous}
        if name in aliases:
            version = aliases[name](self.ledger)
            name = "none" if version is None else str(version)
        elif name == "candidate":
            name = max(registered, key=int, default="none")
        if name not in registered:
            known = ", ".join(f"agent/{v}" for v in sorted(registered, key=int)) or "none yet"
            raise NotFound(f"There is no agent `{ref}`; registered here: {known}.")
        return registered[name]

    def registration(self, subject: str) -> Mapping[str, Any] | None:
        """Return what the ledger knows of `agent/3` or `reward/2`, None where it is not registered."""
        entry = self.ledger.last(f"{subject.partition('/')[0]}.registered", subject)
        return None if entry is None else entry.payload

    def environments(self) -> Environments:
        """Return where environments are found, each in processes of its own; a context manager that ends them."""
        from tasks.arena.guarded import Environments, Limits

        guard = self.settings.guard
        return Environments(Limits(seconds=guard.seconds, memory=guard.memory_mib << 20), guard.workers)

    def weights(self, agent: Mapping[str, Any]) -> Path:
        """Return the folder of a registered agent after hashing its files: nothing is loaded that was changed.

        Raises:
            Corrupt: a file is missing or differs; it is named.
            Refused: a file can run code when it is loaded (an earlier release registered it).
        """
        from tasks.promotion.inert import require_inert

        folder = self.workspace.root / str(agent["path"])
        found = digest_tree(folder)
        odd = sorted(dict(found.items() ^ agent["files"].items()))
        if odd:
            raise Corrupt(
                f"{folder / odd[0]} is not what agent/{agent['version']} was registered with; "
                f"`forebay verify agent/{agent['version']}` lists every difference."
            )
        require_inert(folder, found)
        return folder

    def device(self) -> str:
        """Return "cpu" or "cuda".

        Raises:
            Unavailable: the settings ask for a GPU and there is none.
        """
        import torch

        wanted = self.settings.compute.device
        if self.settings.compute.threads:
            torch.set_num_threads(self.settings.compute.threads)
        if wanted == "cuda" and not torch.cuda.is_available():
            raise Unavailable(
                "compute.device is `cuda` but PyTorch sees no GPU; set compute.device=auto or cpu."
            )
        return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted

    def dtype(self) -> str:
        """Return "float32" or "bfloat16": on a GPU bfloat16 is the default, on a CPU it is slower than float32."""
        wanted = self.settings.compute.dtype
        return ("bfloat16" if self.device() == "cuda" else "float32") if wanted == "auto" else wanted

    @contextlib.contextmanager
    def exclusive(self, what: str) -> Iterator[None]:
        """Let one process at a time change the agents of this workspace."""
        with file_lock(
            self.workspace.locks / "cycle.lock", timeout=0, what=f"{what} in {self.workspace.root}"
        ):
            yield


def as_json(entry: Entry) -> dict[str, Any]:
    """Return a ledger entry as plain values."""
    return {**vars(entry), "payload": dict(entry.payload)}
