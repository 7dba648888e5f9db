"""Where else the bytes are: the DVC remote has the shards, MLflow's artifact store the files of agents."""

from __future__ import annotations

from typing import BinaryIO, Protocol

from tasks.core.errors import Corrupt, Unavailable
from tasks.lineage.report import Problem
from tasks.lineage.types import Lineage
from tasks.promotion.promote import Office
from tasks.promotion.registry import Registry
from tasks.replay.dvc_store import Remote


class Store(Protocol):
    """A place to read files from instead of the workspace. Paths are those that the ledger has."""

    def prepare(self, found: Lineage) -> list[Problem]:
        """Look up where the files behind an agent are; return what is wrong with the store's own records."""

    def holds(self, path: str) -> bool:
        """Tell whether a file is to be read here."""

    def open(self, path: str) -> BinaryIO:
        """Open one of them.

        Raises:
            FileNotFoundError: the store does not hold it. Unavailable: that cannot be told.
        """


class RemoteStore:
    """Shards, straight from the DVC remote: by the listing of each dataset version that was pushed with it.

    DVC's MD5s only say where to look; what is found there must have the ledger's SHA-256.
    """

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._objects: dict[str, str] = {}
        self._folders: set[str] = set()
        self._lacks: dict[str, str] = {}  # folder: why it cannot be told where its shards are

    def prepare(self, found: Lineage) -> list[Problem]:
        """Read the listings."""
        problems = []
        for node in found.nodes.values():
            if node.kind != "dataset" or not node.known:
                continue
            folder, md5 = node.facts["dvc"]["path"], node.facts["dvc"]["md5"]
            self._folders.add(f"{folder}/")
            try:
                listed = self._remote.listing(md5)
            except (FileNotFoundError, Corrupt) as error:
                changed = isinstance(error, Corrupt)
                self._lacks[f"{folder}/"] = (
                    f"The remote's listing {md5} {'was changed' if changed else 'is gone'}."
                )
                name = f"remote: {folder} as of {md5}"
                owner, expected = f"listing of dataset {node.name}", f"md5 {md5}"
                problems.append(Problem("changed" if changed else "missing", name, owner, expected, None))
            except Unavailable as error:
                self._lacks[f"{folder}/"] = str(error)
            else:
                self._objects |= {f"{folder}/{name}": md5 for name, md5 in listed.items()}
        return problems

    def holds(self, path: str) -> bool:
        """Tell whether a file is in a folder of shards."""
        return any(path.startswith(folder) for folder in self._folders)

    def open(self, path: str) -> BinaryIO:
        """Open a shard in the remote."""
        if path not in self._objects:
            for folder, why in self._lacks.items():
                if path.startswith(folder):
                    raise Unavailable(why)
            raise FileNotFoundError(path)
        return self._remote.open(self._objects[path])


class ServedStore:
    """The files of agents and reward models, as MLflow's artifact store has them."""

    def __init__(self, registry: Registry) -> None:
        self._registries = {office: registry.for_office(office) for office in ("agent", "reward")}
        self._files: dict[str, tuple[Office, int, str]] = {}

    def prepare(self, found: Lineage) -> list[Problem]:
        """Note which file is of which version."""
        offices: dict[str, Office] = {"agent": "agent", "source": "reward"}
        for node in found.nodes.values():
            if node.kind not in offices or not node.known:
                continue
            folder, version = f"{node.facts['path']}/", int(node.facts["mlflow"]["version"])
            for file in node.files:
                name = file.path.removeprefix(folder)
                self._files[file.path] = (offices[node.kind], version, name)
        return []

    def holds(self, path: str) -> bool:
        """Tell whether a file is one of a registered version."""
        return path in self._files

    def open(self, path: str) -> BinaryIO:
        """Open a file of a version."""
        office, version, name = self._files[path]
        return self._registries[office].open_file(version, name)
