"""Down to the row: where an episode lies, which groups a run learnt from, and so what an episode shaped."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tasks.core.atomic import write_atomic
from tasks.core.digest import sha256_bytes
from tasks.core.errors import Corrupt, NotFound
from tasks.core.ledger import Ledger
from tasks.core.workspace import Workspace
from tasks.lineage.index import Index
from tasks.lineage.types import Ref
from tasks.replay.index import By, Place, RowIndex
from tasks.replay.manifest import Shard

_FRESH = "_fresh"  # the index of what runs collected themselves
_AT_ONCE = 64  # files that are open
GROUPS = "groups.txt"
BROAD: tuple[By, ...] = ("source", "licence")
"""What may select so many groups that they are not listed one by one."""


def keep_consumed(workspace: Workspace, folder: Path, groups: Iterable[str]) -> dict[str, Any]:
    """Write which groups a run learnt from, one id a line, sorted; return {path, sha256, count} for the ledger."""
    names = sorted(groups)
    data = "".join(f"{name}\n" for name in names).encode()
    path = folder / GROUPS
    write_atomic(path, data)
    return {"path": workspace.relative(path), "sha256": sha256_bytes(data), "count": len(names)}


def consumed(workspace: Workspace, outputs: Mapping[str, Any]) -> list[str]:
    """Return the ids of the groups of the replay that a run learnt from.

    Args:
        outputs: of its `run.finished` entry.

    Raises:
        Corrupt: the list is missing or was changed.
    """
    kept = outputs["groups"]
    if not isinstance(kept, Mapping):
        return list(kept)  # a ledger of an earlier release holds the ids themselves
    return _checked(workspace, kept).decode().splitlines()


def _checked(workspace: Workspace, file: Mapping[str, Any]) -> bytes:
    try:
        data: bytes = (workspace.root / file["path"]).read_bytes()
    except OSError as error:
        raise Corrupt(
            f"{file['path']}, on which the answer rests, cannot be read: {error.strerror}."
        ) from error
    if sha256_bytes(data) != file["sha256"]:
        raise Corrupt(
            f"{file['path']}, on which the answer rests, differs from its digest; run `forebay verify`."
        )
    return data


@dataclass(frozen=True)
class Selection:
    """The rows that an episode, a group, a prompt, a source or a licence selects.

    Attributes:
        by, value: what was asked for.
        places: where their groups lie; one group may lie in several datasets.
        groups: ids of the groups; none for a source or a licence, which may select millions.
        sets: digests of sets of preferences that have an answer of it by what they say themselves.
        roots: of dataset versions that held them, where their bytes were erased and no place is known.
    """

    by: By
    value: str
    places: tuple[Place, ...]
    groups: frozenset[str] = frozenset()
    sets: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()


class Rows:
    """The row indices of a workspace while a question is answered: each is opened when it is asked for, and caught up."""

    def __init__(self, ledger: Ledger, workspace: Workspace, index: Index) -> None:
        self.ledger, self.workspace, self.index = ledger, workspace, index
        self._newest = index.newest_versions()
        self._open: OrderedDict[str, RowIndex] = OrderedDict()
        self._whole: dict[str, bool] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def every(self) -> Iterator[RowIndex]:
        """Yield the indices of all datasets, and of what runs collected themselves."""
        yield from map(self.of, self._newest)
        collected = self.index.every_called("fresh")
        fresh = [Shard(path, digest, 0, 0, 0) for (_, path), digest in collected.items()]
        if fresh:
            index = self._opened(_FRESH)
            index.add_present(fresh)
            yield index

    def of(self, dataset: str) -> RowIndex:
        """Return the index of a dataset, with the shards of its newest version as far as they are there.

        Raises:
            Corrupt: a shard that is not in it yet differs from its digest.
        """
        index = self._opened(dataset)
        if dataset not in self._whole and dataset in self._newest:
            (_, subject), root = self._newest[dataset]
            assert root is not None
            self._whole[dataset] = index.whole(root) or index.add_present(self._shards(subject), root)
        return index

    def _shards(self, subject: str) -> list[Shard]:
        entry = self.ledger.last("dataset.sealed", subject)
        assert entry is not None
        return [Shard(**shard) for shard in entry.payload["shards"]]

    def whole(self, dataset: str) -> bool:
        """Tell whether all rows of a dataset's newest version are known.

        They are not of shards that are not in this workspace: of whoever was given them it is not said that it did not
        learn from a row.
        """
        self.of(dataset)
        return self._whole.get(dataset, False)

    def _opened(self, name: str) -> RowIndex:
        if name not in self._open:
            if len(self._open) == _AT_ONCE:
                self._open.popitem(last=False)[1].close()
            self._open[name] = RowIndex.open(self.workspace, name)
        self._open.move_to_end(name)
        return self._open[name]


def select(rows: Rows, by: By, value: str) -> Selection:
    """Return the rows that `by` and `value` select, wherever they lie.

    Args:
        value: an id, the SHA-256 of a prompt's text or that text, the name of a source or licence.

    Raises:
        NotFound: there are none.
        Corrupt: a shard that is not in the index yet, or a set of preferences, differs from its digest.
    """
    if by == "prompt" and not _is_digest(value):
        value = sha256_bytes(value.encode())
    found: list[Place] = []
    groups: set[str] = set()
    for index in rows.every():
        here = index.places(by, value)
        found += here
        if here and by not in BROAD:
            groups |= set(index.groups(by, value))
    sets = () if by in ("episode", "group") else _sets(rows, by, value)
    if not found and not sets:
        erased = _erased(rows, by, value)
        if erased is None:
            raise NotFound(
                f"No sealed dataset, no run and no set of preferences holds {by} `{value}`; "
                "`forebay log --kind dataset.sealed` lists the datasets."
            )
        return erased
    return Selection(by, value, tuple(found), frozenset(groups), sets)


def _sets(rows: Rows, by: By, value: str) -> tuple[str, ...]:
    """Return the sets of preferences with a pair of that prompt, source or licence: they may come from elsewhere."""
    found = []
    for key in rows.index.keys("preferences"):
        entry = rows.ledger.last("preferences.imported", key) or rows.ledger.last("preferences.made", key)
        compared = pairs(rows.workspace, entry.payload["path"], key) if entry is not None else None
        for pair in compared or ():
            if value == (sha256_bytes(pair["prompt"].encode()) if by == "prompt" else pair[by]):
                found.append(key)
                break
    return tuple(found)


def _erased(rows: Rows, by: By, value: str) -> Selection | None:
    """Return what a revocation noted of rows whose bytes are gone."""
    for entry in rows.ledger.entries("data.revoked"):
        lists = json.loads(_checked(rows.workspace, entry.payload["lists"]))
        named = value in lists["groups"] if by == "group" else value in lists["episodes"]
        if entry.payload["what"] == f"{by}:{value}" or (by in ("group", "episode") and named):
            groups = {value} if by == "group" else set(lists["groups"])
            return Selection(by, value, (), frozenset(groups), roots=tuple(entry.payload["roots"]))
    return None


def pairs(workspace: Workspace, path: str, sha256: str) -> list[dict[str, Any]] | None:
    """Return the pairs of a set of preferences, bytes checked; None where its file is gone (erased, as a rule).

    Raises:
        Corrupt: its file was changed.
    """
    if not (workspace.root / path).exists():
        return None
    data = _checked(workspace, {"path": path, "sha256": sha256})
    return [json.loads(line) for line in data.splitlines() if line.strip()]


def shard_refs(selection: Selection) -> list[Ref]:
    """Return the shards in which the selected groups lie, each once."""
    return [("shard", path) for path in dict.fromkeys(place.shard for place in selection.places)]


def _is_digest(value: str) -> bool:
    return len(value) == 64 and set(value) <= set("0123456789abcdef")
