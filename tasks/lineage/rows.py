"""Down to the row: where an episode lies, which groups a run learnt from, and so what an episode shaped."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tasks.core.digest import sha256_bytes, write_atomic
from tasks.core.errors import Corrupt, NotFound
from tasks.core.ledger import Ledger
from tasks.core.workspace import Workspace
from tasks.lineage.index import Index
from tasks.lineage.types import Ref
from tasks.replay import index as replay
from tasks.replay.index import About, By, Place
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
        known: of all datasets, whether all their rows are; see `datasets`.
    """

    by: By
    value: str
    places: tuple[Place, ...]
    groups: frozenset[str] = frozenset()
    sets: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()
    known: Mapping[str, bool] = field(default_factory=dict)


def select(ledger: Ledger, workspace: Workspace, index: Index, by: By, value: str) -> Selection:
    """Return the rows that `by` and `value` select, wherever they lie.

    Args:
        value: an id, the SHA-256 of a prompt's text or that text, the name of a source or licence.

    Raises:
        NotFound: there are none.
        Corrupt: a shard that is not in the index yet, or a set of preferences, differs from its digest.
    """
    if by == "prompt" and not _is_digest(value):
        value = sha256_bytes(value.encode())
    known = datasets(ledger, workspace, index)
    names = [*known, _fresh(workspace, index)]
    found = tuple(place for name in names for place in replay.places(workspace, name, by, value))
    sets = () if by in ("episode", "group") else _sets(ledger, workspace, index, by, value)
    if not found and not sets:
        erased = _erased(ledger, workspace, by, value, known)
        if erased is None:
            raise NotFound(
                f"No sealed dataset, no run and no set of preferences holds {by} `{value}`; "
                "`forebay log --kind dataset.sealed` lists the datasets."
            )
        return erased
    groups: set[str] = set()
    if by not in _BROAD:
        for name in dict.fromkeys(place.dataset for place in found):
            groups |= set(replay.groups(workspace, name, by, value))
    return Selection(by, value, found, frozenset(groups), sets, known=known)


def _sets(ledger: Ledger, workspace: Workspace, index: Index, by: By, value: str) -> tuple[str, ...]:
    """Return the sets of preferences with a pair of that prompt, source or licence: they may come from elsewhere."""
    found = []
    for key in index.keys("preferences"):
        entry = ledger.last("preferences.imported", key) or ledger.last("preferences.made", key)
        pairs = _pairs(workspace, entry.payload["path"], key) if entry is not None else None
        for pair in pairs or ():
            if value == (sha256_bytes(pair["prompt"].encode()) if by == "prompt" else pair[by]):
                found.append(key)
                break
    return tuple(found)


def _erased(
    ledger: Ledger, workspace: Workspace, by: By, value: str, known: Mapping[str, bool]
) -> Selection | None:
    """Return what a revocation noted of rows whose bytes are gone."""
    for entry in ledger.entries("data.revoked"):
        lists = json.loads(_checked(workspace, entry.payload["lists"]))
        named = value in lists["groups"] if by == "group" else value in lists["episodes"]
        if entry.payload["what"] == f"{by}:{value}" or (by in ("group", "episode") and named):
            groups = {value} if by == "group" else set(lists["groups"])
            return Selection(
                by, value, (), frozenset(groups), roots=tuple(entry.payload["roots"]), known=known
            )
    return None


def datasets(ledger: Ledger, workspace: Workspace, index: Index) -> dict[str, bool]:
    """Return {name: whether all rows of its newest version are known} of all datasets, their row indices caught up.

    Rows are not known of shards that are not in this workspace: of whoever was given them it is not said that it did not
    learn from a row.
    """
    found: dict[str, bool] = {}
    newest: dict[str, str] = {}
    for subject in index.keys("dataset"):  # newest first
        newest.setdefault(subject.rpartition("/")[0], subject)
    for name, subject in newest.items():
        number = index.id(("dataset", subject))
        held = [
            target for _, relation, target in index.edges([number] if number else []) if relation == "holds"
        ]
        digests = [digest for _, digest in index.refs(held).values() if digest]
        found[name] = bool(digests) and all(replay.holds(workspace, name, digest) for digest in digests)
        if not found[name]:
            entry = ledger.last("dataset.sealed", subject)
            assert entry is not None
            present = [Shard(**shard) for shard in entry.payload["shards"]]
            found[name] = replay.add_present(workspace, name, present)
    return found


def _fresh(workspace: Workspace, index: Index) -> str:
    """Index the shards of fresh groups that lie with the runs; return the name of that index."""
    wanted = []
    for (_, path), digest in index.refs(index.targets("collected")).values():
        wanted.append(Shard(path, digest or "", 0, 0, 0))
    replay.add_present(workspace, _FRESH, wanted)
    return _FRESH


@dataclass(frozen=True)
class Use:
    """What a run learnt from, or a set of preferences compares.

    Attributes:
        groups: ids; of preferences, the groups of the answers.
        about: what they are.
        episodes: of preferences, the answers themselves; None for a run, which learns from whole groups.
        sources, licences: of preferences, what each pair says of itself.
    """

    groups: frozenset[str]
    about: About
    episodes: frozenset[str] | None = None
    sources: frozenset[str] = frozenset()
    licences: frozenset[str] = frozenset()

    def of(self, selection: Selection) -> bool:
        """Tell whether a selected row is among it."""
        if selection.by in _BROAD:
            name = "sources" if selection.by == "source" else "licences"
            return selection.value in getattr(self, name) | getattr(self.about, name)
        if selection.by == "episode" and self.episodes is not None:
            return selection.value in self.episodes
        return not selection.groups.isdisjoint(self.groups)  # of an erased one, too


def run_use(workspace: Workspace, outputs: Mapping[str, Any], dataset: str) -> Use:
    """Return what a run learnt from.

    Args:
        outputs: of its `run.finished` entry.
        dataset: name of the dataset that it was given.

    Raises:
        Corrupt: the list of groups is missing or was changed.
    """
    groups = frozenset(consumed(workspace, outputs))
    return Use(groups, replay.about(workspace, dataset, groups))


def preferences_use(workspace: Workspace, path: str, sha256: str, datasets_: Collection[str]) -> Use | None:
    """Return what a set of preferences compares, None where its file is gone (erased, as a rule).

    Args:
        path, sha256: of its file.
        datasets_: names of the datasets that it may have been made from.

    Raises:
        Corrupt: its file was changed.
    """
    pairs = _pairs(workspace, path, sha256)
    if pairs is None:
        return None
    episodes = {pair[name] for pair in pairs for name in ("chosen_id", "rejected_id")} - {""}
    known = [(name, replay.groups_of(workspace, name, episodes)) for name in datasets_]
    told = [replay.about(workspace, name, groups) for name, groups in known]
    return Use(
        frozenset(group for _, groups in known for group in groups),
        About(*(frozenset().union(*(getattr(each, f.name) for each in told)) for f in fields(About))),
        frozenset(episodes),
        frozenset(pair["source"] for pair in pairs),
        frozenset(pair["licence"] for pair in pairs),
    )


def _pairs(workspace: Workspace, path: str, sha256: str) -> list[dict[str, Any]] | None:
    """Return the pairs of a set of preferences, bytes checked; None where its file is gone."""
    if not (workspace.root / path).exists():
        return None
    data = _checked(workspace, {"path": path, "sha256": sha256})
    return [json.loads(line) for line in data.splitlines() if line.strip()]


def shard_refs(selection: Selection) -> list[Ref]:
    """Return the shards in which the selected groups lie, each once."""
    return [("shard", path) for path in dict.fromkeys(place.shard for place in selection.places)]


def _is_digest(value: str) -> bool:
    return len(value) == 64 and set(value) <= set("0123456789abcdef")
