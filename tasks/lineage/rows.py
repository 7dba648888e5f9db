"""Down to the row: where an episode lies, which groups a run learnt from, and so what an episode shaped."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.core.digest import sha256_bytes, write_atomic
from tasks.core.errors import Corrupt, NotFound
from tasks.core.ledger import Ledger
from tasks.core.workspace import Workspace
from tasks.lineage.index import Index
from tasks.lineage.types import Ref
from tasks.replay import index as replay
from tasks.replay.index import By, Place
from tasks.replay.manifest import Shard

_FRESH = "_fresh"  # the index of what runs collected themselves
GROUPS = "groups.txt"
_BROAD: tuple[By, ...] = (
    "source",
    "licence",
)  # may select so many groups that they are not listed one by one


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
    try:
        data = (workspace.root / kept["path"]).read_bytes()
    except OSError as error:
        raise Corrupt(
            f"{kept['path']}, which says what a run learnt from, cannot be read: {error.strerror}."
        ) from error
    if sha256_bytes(data) != kept["sha256"]:
        raise Corrupt(
            f"{kept['path']}, which says what a run learnt from, differs from its digest; run `forebay verify`."
        )
    return bytes(data).decode().splitlines()


@dataclass(frozen=True)
class Selection:
    """The groups that an episode, a group, a prompt, a source or a licence selects.

    Attributes:
        by, value: what was asked for.
        places: where they lie; one group may lie in several datasets.
    """

    by: By
    value: str
    places: tuple[Place, ...]

    @property
    def groups(self) -> frozenset[str]:
        """Their ids."""
        return frozenset(place.group_id for place in self.places)


def select(ledger: Ledger, workspace: Workspace, index: Index, by: By, value: str) -> Selection:
    """Return the groups that `by` and `value` select, wherever they lie.

    Args:
        value: an id, the SHA-256 of a prompt's text or that text, the name of a source or licence.

    Raises:
        NotFound: there are none.
        Corrupt: a shard that is not in the index yet differs from its digest.
    """
    if by == "prompt" and not _is_digest(value):
        value = sha256_bytes(value.encode())
    found = [
        place
        for name in datasets(ledger, workspace, index)
        for place in replay.places(workspace, name, by, value)
    ]
    if not found:
        _index_fresh(workspace, index)
        found = replay.places(workspace, _FRESH, by, value)
    if not found:
        raise NotFound(
            f"No sealed dataset and no run holds {by} `{value}`; `forebay log --kind dataset.sealed` lists them."
        )
    return Selection(by, value, tuple(found))


def datasets(ledger: Ledger, workspace: Workspace, index: Index) -> list[str]:
    """Return the names of all datasets, their row indices caught up."""
    newest: dict[str, str] = {}
    for subject in index.keys("dataset"):  # newest first
        newest.setdefault(subject.rpartition("/")[0], subject)
    for name, subject in newest.items():
        number = index.id(("dataset", subject))
        held = [
            target for _, relation, target in index.edges([number] if number else []) if relation == "holds"
        ]
        shards = [digest for _, digest in index.refs(held).values()]
        if not all(replay.holds(workspace, name, digest) for digest in shards if digest):
            entry = ledger.last("dataset.sealed", subject)
            assert entry is not None
            replay.add_shards(workspace, name, [Shard(**shard) for shard in entry.payload["shards"]])
    return sorted(newest)


def _index_fresh(workspace: Workspace, index: Index) -> None:
    """Index the shards of fresh groups that lie with the runs."""
    wanted = []
    for number in index.targets("collected"):
        ((_, path), digest) = index.refs([number])[number]
        if (workspace.root / path).exists():
            wanted.append(Shard(path, digest or "", 0, 0, 0))
    replay.add_shards(workspace, _FRESH, wanted)


def consumers(
    workspace: Workspace,
    index: Index,
    selection: Selection,
    candidates: Collection[int],
    among: Mapping[int, Sequence[str]],
) -> Iterator[int]:
    """Yield those of `candidates` (runs, sets of preferences, validations) that really used a selected group.

    Args:
        among: for each candidate, the names of the datasets through which it was reached.

    Raises:
        Corrupt: a list of groups is missing or was changed.
    """
    said = index.said(candidates)
    episodes: set[str] | None = None
    for number in candidates:
        entries = {entry.kind: entry for entry in said.get(number, ())}
        if "run.finished" in entries:
            used = consumed(workspace, entries["run.finished"].payload["outputs"])
            shaped = _learnt(workspace, selection, used, among[number])
        elif made := entries.get("preferences.made") or entries.get("preferences.imported"):
            episodes = _episodes(workspace, selection) if episodes is None else episodes
            shaped = _compared(workspace, selection, made.payload["path"], episodes)
        else:
            shaped = (
                "run.started" not in entries
            )  # such a run made no agent; of others it is not known row by row
        if shaped:
            yield number


def _learnt(workspace: Workspace, selection: Selection, used: Sequence[str], names: Sequence[str]) -> bool:
    if selection.by in _BROAD:
        return any(replay.any_of(workspace, name, used, selection.by, selection.value) for name in names)
    return not selection.groups.isdisjoint(used)


def _compared(workspace: Workspace, selection: Selection, path: str, episodes: Collection[str]) -> bool:
    """Tell whether a set of preferences has a pair of a selected answer."""
    try:
        lines = (workspace.root / path).read_text().splitlines()
    except OSError as error:
        raise Corrupt(
            f"{path}, which a reward model learnt from, cannot be read: {error.strerror}."
        ) from error
    pairs = (json.loads(line) for line in lines if line.strip())
    if selection.by in _BROAD:
        return any(pair[selection.by] == selection.value for pair in pairs)
    return any(pair["chosen_id"] in episodes or pair["rejected_id"] in episodes for pair in pairs)


def _episodes(workspace: Workspace, selection: Selection) -> set[str]:
    if selection.by == "episode":
        return {selection.value}
    if selection.by in _BROAD:
        return set()
    return {
        episode
        for place in selection.places
        for episode in replay.episodes(workspace, place.dataset, place.group_id)
    }


def shard_refs(selection: Selection) -> list[Ref]:
    """Return the shards in which the selected groups lie, each once."""
    return [("shard", path) for path in dict.fromkeys(place.shard for place in selection.places)]


def _is_digest(value: str) -> bool:
    return len(value) == 64 and set(value) <= set("0123456789abcdef")
