"""What follows from a thing: the agents, runs and datasets whose bytes depend on it, and what was decided about them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from tasks.core.ledger import Ledger
from tasks.core.workspace import Workspace
from tasks.lineage import rows
from tasks.lineage.graph import gather, open_index, resolve
from tasks.lineage.index import Index
from tasks.lineage.rows import Selection
from tasks.lineage.types import RELATIONS, SHAPING, Edge, Kind, Lineage, Node, Ref
from tasks.replay.index import By

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
_USES = frozenset(
    {"trained on", "made from", "scored from"}
)  # by these a dataset's rows go on, not all of them each time
_JUDGING = tuple(relation for relation in RELATIONS if relation not in SHAPING)


def descendants(ledger: Ledger, workspace: Workspace, ref: str, index: Index | None = None) -> Lineage:
    """Return everything that follows from `ref`, root first: by SHAPING relations, and the decisions, evaluations and
    promotions that rest on what is found.

    Of rows it is exact: a run is told only if it learnt from a selected group, a set of preferences only if it compares a
    selected answer. What follows from such a run follows as a whole: its agents' episodes count as shaped.

    Args:
        ref: as of `graph.lineage`; or episode:ID, group:ID, prompt:TEXT or its SHA-256, source:NAME, licence:NAME.

    Raises:
        NotFound, UsageError, Corrupt: as `graph.lineage` and `rows.select`.
    """
    index = index or open_index(ledger, workspace)
    word, colon, value = ref.partition(":")
    if colon and word in _ROWS:
        selection = rows.select(ledger, workspace, index, _ROWS[word], value)
        holding, using = reach(workspace, index, selection)
        return _with_rows(gather(index, _root(selection), _and_judged(index, [*holding, *using])), selection)
    root = resolve(index, ref)
    number = index.id(root)
    assert number is not None
    return gather(index, root, _and_judged(index, index.walk([number], back=True, relations=SHAPING)))


def reach(workspace: Workspace, index: Index, selection: Selection) -> tuple[list[int], list[int]]:
    """Return (what holds the selected rows: shards and dataset versions; what was shaped by them), nearest first."""
    numbers = [index.id(ref) for ref in rows.shard_refs(selection)]
    shards = [number for number in numbers if number is not None]
    holding = index.walk(shards, back=True, relations=("holds", "continues"))
    names = {
        number: ref[1].rpartition("/")[0]
        for number, (ref, _) in index.refs(holding).items()
        if ref[0] == "dataset"
    }
    candidates: dict[int, list[str]] = defaultdict(list)
    collected: list[int] = []
    for source, relation, target in index.edges(holding, back=True):
        if relation in ("trained on", "made from"):  # rows that were scored anew lie in shards of their own
            candidates[source].append(names[target])
        elif relation == "collected":  # a run learns from what it collects
            collected.append(source)
    used = rows.consumers(workspace, index, selection, list(candidates), candidates)
    shaped = index.walk(dict.fromkeys([*collected, *used]), back=True, relations=SHAPING)
    return holding, [number for number in shaped if number not in set(holding)]


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
    """Put what was asked for, and the groups where they are few, before the shards that contain them."""
    root = _root(selection)
    groups = sorted(selection.groups)
    facts = {
        "groups": len(groups),
        "datasets": sorted({place.dataset for place in selection.places}),
        "sources": sorted({place.source for place in selection.places}),
        "licences": sorted({place.licence for place in selection.places}),
        "environments": sorted({place.env for place in selection.places}),
        "group_ids": groups[:100],
    }
    node = found.nodes.get(root) or Node(root[0], root[1], None)
    contains = [Edge(shard, "contains", root) for shard in rows.shard_refs(selection) if shard in found.nodes]
    nodes = {root: replace(node, facts=facts), **{ref: n for ref, n in found.nodes.items() if ref != root}}
    return Lineage(root, nodes, (*contains, *found.edges))
