"""What follows from a thing: the agents, runs and datasets whose bytes depend on it, and what was decided about them.

Exact to the row in every generation. A run follows from a row only if it learnt from its group, from an agent only if it
started from it or learnt from a group that it sampled or that a reward model made of it rewarded; a set of preferences
only if it compares such an answer. The graph says quickly what may follow; then each run and each set in question is asked, in
the ledger's order, so that what it follows from has been settled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from tasks.core.ledger import Entry, Ledger
from tasks.core.workspace import Workspace
from tasks.lineage import rows
from tasks.lineage.graph import gather, open_index, resolve
from tasks.lineage.index import Index
from tasks.lineage.rows import BROAD, Rows, Selection
from tasks.lineage.types import RELATIONS, SHAPING, Edge, Kind, Lineage, Node, Ref, Relation
from tasks.replay.index import By, KindOfRow

_ROWS: dict[str, By] = {
    "episode": "episode",
    "group": "group",
    "prompt": "prompt",
    "source": "source",
    "licence": "licence",
}
_ROOTS: dict[By, Kind] = {
    "episode": "episode",
    "group": "group",
    "prompt": "prompt",
    "source": "origin",
    "licence": "licence",
}
_BY_ROWS = frozenset(
    {
        "trained on",
        "made from",
        "scored from",
        "sampled from",
        "rewarded by",
        "continues",
        "holds",
        "rewritten from",
    }
)
"""By these a dataset's rows are handed on, and not all of them each time."""
_SAME_ROWS: tuple[Relation, ...] = ("continues", "scored from")
_REWRITTEN: tuple[Relation, ...] = ("rewritten from",)
_JUDGING = tuple(relation for relation in RELATIONS if relation not in SHAPING)
_LISTED = 100  # ids of groups in the facts
_AT_ONCE = 200  # things whose entries are read together


def descendants(ledger: Ledger, workspace: Workspace, ref: str, index: Index | None = None) -> Lineage:
    """Return everything that follows from `ref`, root first: by SHAPING relations, and the decisions, evaluations and
    promotions that rest on what is found.

    Dataset versions are told that hold a row in question, or one that a shaped agent sampled or reward model rewarded.

    Args:
        ref: as of `graph.lineage`; or episode:ID, group:ID, prompt:TEXT or its SHA-256, source:NAME, licence:NAME.

    Raises:
        NotFound, UsageError, Corrupt: as `graph.lineage` and `rows.select`.
    """
    return held_and_shaped(ledger, workspace, ref, index)[1]


def held_and_shaped(
    ledger: Ledger, workspace: Workspace, ref: str, index: Index | None = None
) -> tuple[list[Ref], Lineage]:
    """Return what holds a thing (shards and dataset versions, oldest first), and everything that follows from it: `descendants`."""
    index = index or open_index(ledger, workspace)
    word, colon, value = ref.partition(":")
    with Rows(ledger, workspace, index) as opened:
        if colon and word in _ROWS:
            selection = rows.select(opened, _ROWS[word], value)
            root, start = _root(selection), _holders(index, selection)
        else:
            selection, root = None, resolve(index, ref)
            start = [number for number in [index.id(root)] if number is not None]
        walk = _Descent(index, opened, selection)
        found = gather(index, root, _and_judged(index, walk.walk(start)))
    holding = [named for named, _ in index.refs(sorted(walk.holding)).values()]
    return holding, found if selection is None else _with_rows(found, selection)


def _holders(index: Index, selection: Selection) -> list[int]:
    """Return what holds the selected rows: shards (and those that they were rewritten from), sets of preferences, or the
    versions that held them where they were erased.
    """
    refs: list[Ref] = [*rows.shard_refs(selection), *(("preferences", digest) for digest in selection.sets)]
    for root in selection.roots:
        refs += index.all_called("dataset", root)
    numbers = [number for number in map(index.id, refs) if number is not None]
    return index.walk(numbers, back=False, relations=_REWRITTEN)


@dataclass
class _Descent:
    """One walk. Numbers are the index's.

    Attributes:
        rows: the row indices.
        selection: rows that were asked for; None where a whole thing was.
        shaped: what was found to follow, in the order in which it was settled.
        holding: dataset versions and shards that only hold a row in question.
        shards: paths of the shards that were asked for, or that the dataset version asked for holds.
        samplers, rewarders: digests of shaped agents and reward models.
        whole: shaped dataset versions of which any row counts.
        refs, targets: what may follow, and the edges that leave it.
        said: the entries that speak of runs and preferences that are asked next.
        names: of datasets in which the rows of a version lie.
        sought: {dataset's name: (how much was shaped then, numbers of shards and kinds of rows in question)}.
    """

    index: Index
    rows: Rows
    selection: Selection | None = None
    shaped: dict[int, None] = field(default_factory=dict)
    holding: dict[int, None] = field(default_factory=dict)
    shards: set[str] = field(default_factory=set)
    samplers: set[str] = field(default_factory=set)
    rewarders: set[str] = field(default_factory=set)
    whole: set[int] = field(default_factory=set)
    refs: dict[int, tuple[Ref, str | None]] = field(default_factory=dict)
    targets: dict[int, list[tuple[Relation, int]]] = field(default_factory=lambda: defaultdict(list))
    said: dict[int, list[Entry]] = field(default_factory=dict)
    names: dict[int, dict[str, None]] = field(default_factory=dict)
    sought: dict[str, tuple[int, set[int], set[int]]] = field(default_factory=dict)

    def walk(self, start: Sequence[int]) -> list[int]:
        """Return what follows from `start`, those first."""
        index, first = self.index, set(start)
        self.refs = index.refs(index.walk(start, back=True, relations=SHAPING))
        rest = [number for number in self.refs if number not in first]
        for source, relation, target in index.edges(rest):
            self.targets[source].append((relation, target))
        for number in start:
            (kind, key), digest = self.refs[number]
            if kind not in ("shard", "dataset"):
                self._mark(number, key if kind == "outside" else digest)
        self._hold([number for number in start if self.refs[number][0][0] in ("shard", "dataset")])
        order = index.settled(rest)
        rest.sort(key=lambda number: order[number])
        for first_of in range(0, len(rest), _AT_ONCE):
            part = rest[first_of : first_of + _AT_ONCE]
            self.said = index.said(n for n in part if self.refs[n][0][0] in ("run", "preferences"))
            for number in part:
                if number not in self.shaped and self._follows(number):
                    self._mark(number, self.refs[number][1])
        return list({**dict.fromkeys(start), **self.holding, **self.shaped})

    def _hold(self, start: Sequence[int]) -> None:
        """Note the shards that hold a row in question, and the dataset versions that hold such a shard.

        Of a whole shard all heirs do, of a row those in which it still lies.
        """
        index = self.index
        whole = {number for number in start if self.refs[number][0][0] == "dataset"}
        asked = dict.fromkeys(number for number in start if number not in whole)
        # The shards of a version that was asked for do not follow from it; what became of them does.
        parts: dict[int, None] = {}
        if self.selection is None and whole:
            held = index.held(whole)
            parts = dict.fromkeys(sorted(shard for number in whole for shard in held[number]))
        heirs = [n for n in index.walk([*asked, *parts], back=True, relations=_REWRITTEN) if n not in parts]
        if self.selection is not None:
            heirs = [n for n in heirs if n in asked or not self._is_known(n)]
        sought = {*parts, *heirs}
        reached = index.walk([*start, *sought], back=True, relations=("holds", "continues"))
        named = index.refs({*reached, *sought})
        versions = [number for number in reached if named[number][0][0] == "dataset"]
        held = index.held(versions, sought)
        holders = (v for v in versions if v in whole or not sought.isdisjoint(held[v]))
        self.holding = dict.fromkeys((*heirs, *holders))
        self.shards = {named[number][0][1] for number in sought}

    def _is_known(self, shard: int) -> bool:
        """Tell whether the rows of a shard are in the index of a dataset that holds it."""
        (_, path), _ = self.refs[shard]
        holders = (s for s, relation, _ in self.index.edges([shard], back=True) if relation == "holds")
        names = {key.rpartition("/")[0] for (_, key), _ in self.index.refs(holders).values()}
        return any(self.rows.of(name).shard_numbers([path]) for name in names)

    def _mark(self, number: int, digest: str | None) -> None:
        kind = self.refs[number][0][0]
        self.shaped[number] = None
        if digest and kind in ("agent", "base", "outside", "source"):
            (self.rewarders if kind == "source" else self.samplers).add(digest.rpartition("@")[2])

    def _follows(self, number: int) -> bool:
        """Tell whether a thing follows; whatever it follows from has been settled."""
        kind, links = self.refs[number][0][0], self.targets[number]
        if any(target in self.shaped for relation, target in links if relation not in _BY_ROWS):
            if kind == "dataset":
                self.whole.add(number)  # by an environment: which of its rows come from it is not asked
            return True
        if kind == "run":
            return self._learnt(number)
        if kind == "preferences":
            return self._compared(number)
        if kind == "dataset":
            if any(relation == "continues" and target in self.whole for relation, target in links):
                self.whole.add(number)
            return any(
                target in self.shaped or (relation == "scored from" and target in self.holding)
                for relation, target in links
            )
        return any(self._in_question(target) for _, target in links)

    def _learnt(self, number: int) -> bool:
        entries = {entry.kind: entry for entry in self.said.get(number, ())}
        if "run.finished" not in entries:
            return False  # it made no agent
        links = self.targets[number]
        if any(relation == "collected" and target in self.holding for relation, target in links):
            return True  # a run learns from what it collects
        datasets = [
            target for relation, target in links if relation == "trained on" and self._in_question(target)
        ]
        if not self.whole.isdisjoint(datasets):
            return True
        if not datasets:
            return False
        groups = rows.consumed(self.rows.workspace, entries["run.finished"].payload["outputs"])
        names = self._names(datasets)
        return self._asked(groups) or any(self._of(groups, name) for name in names) or self._unsure(names)

    def _compared(self, number: int) -> bool:
        links = self.targets[number]
        datasets = [
            target for relation, target in links if relation == "made from" and self._in_question(target)
        ]
        if not datasets:
            return False
        (_, digest), made = self.refs[number][0], self.said[number][-1]
        compared = rows.pairs(self.rows.workspace, made.payload["path"], digest)
        if compared is None:
            return True  # of an erased set it is not told that it does not follow
        asked = self.selection
        if (
            asked is not None
            and asked.by in BROAD
            and any(pair[asked.by] == asked.value for pair in compared)
        ):
            return True
        episodes = {pair[name] for pair in compared for name in ("chosen_id", "rejected_id")} - {""}
        names = self._names(datasets)
        answers = {name: self.rows.of(name).groups_of(episodes) for name in names}
        if asked is not None and asked.by == "episode":
            found = asked.value in episodes  # it, and not another answer of its group
        else:
            found = any(map(self._asked, answers.values()))
        return found or any(self._of(groups, name) for name, groups in answers.items()) or self._unsure(names)

    def _unsure(self, names: Sequence[str]) -> bool:
        """Tell whether rows are not known by which it might follow; groups that were asked for by id are."""
        narrow = (
            self.selection is not None and self.selection.groups and not (self.samplers or self.rewarders)
        )
        return bool(names) and not narrow and not all(map(self.rows.whole, names))

    def _names(self, datasets: Sequence[int]) -> list[str]:
        """Return the names of dataset versions, and of those that they were scored from: there the same rows lie."""
        if not self.names:
            every = [number for number, ((kind, _), _) in self.refs.items() if kind == "dataset"]
            self.names = self._names_behind([*every, *self.holding])
        return list(dict.fromkeys(name for dataset in datasets for name in self.names[dataset]))

    def _names_behind(self, datasets: Sequence[int]) -> dict[int, dict[str, None]]:
        numbers = self.index.walk(datasets, back=False, relations=_SAME_ROWS)
        named = self.index.refs(numbers)
        behind: dict[int, list[int]] = defaultdict(list)
        for source, relation, target in self.index.edges(numbers):
            if relation in _SAME_ROWS:
                behind[source].append(target)
        found: dict[int, dict[str, None]] = {}
        for number in sorted(numbers):  # what its rows come from was recorded before it
            key = named[number][0][1]
            found[number] = dict.fromkeys([key.rpartition("/")[0]] if "/" in key else [])
            for target in behind[number]:
                found[number] |= found.get(target, {})
        return found

    def _in_question(self, dataset: int) -> bool:
        return dataset in self.holding or dataset in self.shaped

    def _asked(self, groups: Iterable[str]) -> bool:
        """Tell whether one of `groups` was asked for."""
        return self.selection is not None and not self.selection.groups.isdisjoint(groups)

    def _of(self, groups: Collection[str], dataset: str) -> bool:
        """Tell whether one of `groups` lies in a shard that was asked for, comes from a source or licence that was, or was
        sampled or rewarded by something shaped.
        """
        index = self.rows.of(dataset)
        shaped = len(self.samplers) + len(self.rewarders)  # they only grow
        if self.sought.get(dataset, (-1,))[0] != shaped:
            shards = set() if self.selection is not None else index.shard_numbers(self.shards)
            kinds = {number for number, kind in index.kinds.items() if self._picks(kind)}
            self.sought[dataset] = (shaped, shards, kinds)
        return index.any_of(groups, *self.sought[dataset][1:])

    def _picks(self, kind: KindOfRow) -> bool:
        asked = self.selection
        if asked is not None and asked.by in BROAD and getattr(kind, asked.by) == asked.value:
            return True
        return not (self.samplers.isdisjoint(kind.samplers) and self.rewarders.isdisjoint(kind.rewarders))


def _and_judged(index: Index, numbers: Iterable[int]) -> list[int]:
    """Add what judges the agents and reward models found, or rests on what was found."""
    found = dict.fromkeys(numbers)
    for _, relation, target in index.edges(list(found)):
        if relation in ("judged by", "in office"):
            found.setdefault(target)
    for source, relation, _ in index.edges(list(found), back=True):
        if relation in _JUDGING and relation not in ("judged by", "in office", "under policy"):
            found.setdefault(source)
    return list(found)


def _root(selection: Selection) -> Ref:
    return _ROOTS[selection.by], selection.value


def _with_rows(found: Lineage, selection: Selection) -> Lineage:
    """Put what was asked for before the shards that contain it."""
    root = _root(selection)
    facts = {
        "groups": len(selection.groups) or sum(place.groups for place in selection.places),
        "datasets": sorted({place.dataset for place in selection.places}),
        "sources": sorted({place.source for place in selection.places}),
        "licences": sorted({place.licence for place in selection.places}),
        "environments": sorted({place.env for place in selection.places}),
        "group_ids": sorted(selection.groups)[:_LISTED],
    }
    node = found.nodes.get(root) or Node(root[0], root[1], None)
    contains = [Edge(shard, "contains", root) for shard in rows.shard_refs(selection) if shard in found.nodes]
    nodes = {
        root: replace(node, facts=facts),
        **{ref: n for ref, n in found.nodes.items() if ref != root},
    }
    return Lineage(root, nodes, (*contains, *found.edges))
