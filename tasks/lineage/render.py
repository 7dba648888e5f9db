"""A lineage to look at: trees and tables for the terminal, plain values for programs. Equal lineages look equal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from tasks.lineage.types import Edge, Kind, Lineage, Node, Ref, Relation

SCHEMA = "forebay.lineage/1"
GENERATIONS = 3  # older ones are deeper than a terminal is wide; the JSON has them all
_SHARDS = 6  # of one dataset version that are named one by one
_DIGITS = 12

_OLDER: frozenset[Relation] = frozenset(
    {"started from", "continues", "sampled from", "scored from", "compared with"}
)
_ABOUT: frozenset[Relation] = frozenset({"judged by", "in office"})  # drawn below the agent either way
_STYLES: Mapping[str, str] = {
    "agent": "bold cyan",
    "source": "bold cyan",
    "base": "bold magenta",
    "dataset": "bold blue",
    "run": "bold",
    "PASS": "bold green",
    "FAIL": "bold red",
    "INCONCLUSIVE": "bold yellow",
}
INVERSE: Mapping[Relation, str] = {
    "trained by": "made", "converted from": "became", "descends from": "base of", "run by code": "ran",
    "with packages": "used by", "trained on": "taught", "collected": "collected by", "started from": "start of",
    "holds": "held by", "rewritten from": "rewritten as", "contains": "within", "checked by": "checks", "continues": "continued by",
    "sampled from": "sampled into", "scored from": "scored into", "rewarded by": "rewarded", "gathered in": "gathered",
    "comes from": "source of", "licensed under": "licence of", "learnt from": "taught", "reads states of": "read by",
    "made from": "made into", "judges": "judged by", "judged by": "about", "in office": "of", "asks": "asked by", "compares": "was compared in",
    "under policy": "rules", "rests on": "supports", "compared with": "was compared in",
}  # fmt: skip
"""How a relation reads from its target to its source."""
_ORDER: tuple[Kind, ...] = (
    "agent", "source", "dataset", "run", "preferences", "reward", "evaluation", "decision", "promotion", "validation",
    "shard", "base", "outside", "episode", "group", "prompt", "environment", "origin", "licence", "tasks", "policy",
    "code", "lock",
)  # fmt: skip
_ROLES = ("champion", "previous", "candidate")
_TITLES: Mapping[Kind, str] = {
    "base": "base model",
    "run": "run",
    "shard": "shard",
    "validation": "data validation",
    "reward": "reward model",
    "preferences": "preferences",
    "evaluation": "paired evaluation of",
    "decision": "decision",
    "outside": "outside policy",
    "group": "group",
    "episode": "episode",
    "prompt": "prompt",
    "environment": "environment",
    "origin": "source",
    "licence": "licence",
}


def to_json(lineage: Lineage) -> dict[str, Any]:
    """Return the whole lineage as JSON values: a flat graph, for a tree is too deep for readers of JSON.

    Returns:
        {schema, root, nodes: [{id, kind, name, digest, facts, files: [{path, sha256}], known}],
        edges: [{source, relation, target}]}; ids are "kind:key", nodes are ordered nearest first.
    """
    return {
        "schema": SCHEMA,
        "root": _id(lineage.root),
        "nodes": [{"id": _id(ref), **asdict(node)} for ref, node in lineage.nodes.items()],
        "edges": [
            {"source": _id(edge.source), "relation": edge.relation, "target": _id(edge.target)}
            for edge in lineage.edges
        ],
    }


def to_tree(lineage: Lineage, generations: int = GENERATIONS, back: bool = False) -> Tree:
    """Return the tree that `forebay lineage` prints.

    Each node is drawn once, where it is nearest to the root; elsewhere it is named, with "see above" or "see
    below".

    Args:
        generations: how many steps to earlier (or later) agents and dataset versions are drawn.
        back: against the edges, from the root to what follows from it.
    """
    leaving: dict[Ref, list[Edge]] = defaultdict(list)

    def turned(edge: Edge) -> bool:
        return back and edge.relation not in _ABOUT

    for edge in lineage.edges:
        leaving[edge.target if turned(edge) else edge.source].append(edge)

    def far(edge: Edge) -> Ref:
        return edge.source if turned(edge) else edge.target

    left = {lineage.root: generations}  # how many steps may still be drawn below a node
    place: dict[Ref, Edge] = {}  # the edge under which a node is drawn
    waiting = [lineage.root]
    for here in waiting:  # nearest first
        for edge in leaving[here] if left[here] >= 0 else ():
            if far(edge) not in left:
                left[far(edge)] = left[here] - (edge.relation in _OLDER)
                place[far(edge)] = edge
                waiting.append(far(edge))
    drawn: set[Ref] = set()

    def grow(branch: Tree, ref: Ref) -> None:
        drawn.add(ref)
        edges = leaving[ref] if left[ref] >= 0 else ()
        shards = [far(edge) for edge in edges if edge.relation == "holds" and not back]
        unnamed = shards[_SHARDS:] if len(shards) > _SHARDS + 1 else []
        hidden = set(unnamed)
        for edge in edges:
            if far(edge) in hidden:
                if far(edge) == unnamed[0]:
                    branch.add(_more_shards([lineage.nodes[shard] for shard in unnamed]))
                continue
            words = INVERSE[edge.relation] if turned(edge) else edge.relation
            label = Text(f"{words} ", style="dim") if edge.relation != "holds" else Text()
            node = lineage.nodes[far(edge)]
            if place.get(far(edge)) is edge:
                cut = (
                    f"  … {'later' if back else 'earlier'}: ask for it by name" if left[far(edge)] < 0 else ""
                )
                grow(branch.add(label + _line(node) + Text(cut, style="dim italic")), far(edge))
            else:
                where = "above" if far(edge) in drawn else "below"
                branch.add(label + _name(node) + Text(f"  see {where}", style="dim italic"))

    tree = Tree(_line(lineage.nodes[lineage.root]), guide_style="dim")
    grow(tree, lineage.root)
    return tree


def to_table(lineage: Lineage) -> Table:
    """Return one row a node: agents first, those in office before the others, then data, runs and what was decided."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, wraps in (("thing", True), ("digest", False), ("when", False), ("says", True)):
        table.add_column(name, no_wrap=not wraps, overflow="fold")
    for node in sorted(lineage.nodes.values(), key=_rank):
        says = _SAYS[node.kind](node.facts) if node.kind in _SAYS and node.known and node.facts else ""
        when = next((str(node.facts[k])[:16].replace("T", " ") for k in _TIMES if node.facts.get(k)), "")
        table.add_row(
            _name(node),
            Text((node.digest or "")[:_DIGITS], style="yellow"),
            when,
            says if node.known else Text("not in the ledger", style="bold red"),
        )
    return table


_TIMES = ("registered", "sealed", "finished", "time")


def _rank(node: Node) -> tuple[int, int, int, str]:
    roles = [_ROLES.index(role) for role in node.facts.get("roles", ()) if role in _ROLES]
    digits = node.name.rpartition("/")[2].removeprefix("v")
    return _ORDER.index(node.kind), min(roles, default=9), int(digits) if digits.isdecimal() else 0, node.name


def _id(ref: Ref) -> str:
    return ":".join(ref)


def _name(node: Node) -> Text:
    title = _TITLES.get(node.kind, "")
    style = _STYLES.get(node.name, _STYLES.get(node.kind, ""))
    return Text(f"{title} ".lstrip()) + Text(node.name, style=style)


def _line(node: Node) -> Text:
    line = _name(node)
    if node.digest and node.kind != "run":  # a run is named by its digest
        line += Text(f"  {node.digest[:_DIGITS]}", style="yellow")
    if not node.known:
        return line + Text("  not in the ledger", style="bold red")
    says = _SAYS[node.kind](node.facts) if node.kind in _SAYS else ""
    return line + Text(f"  {says}", style="default") if says else line


def _more_shards(nodes: list[Node]) -> Text:
    rows = sum(node.facts["rows"] for node in nodes)
    return Text(f"… and {len(nodes)} more shards with {rows:,} rows", style="dim")


def _agent(facts: Mapping[str, Any]) -> str:
    return " · ".join([*facts["roles"], facts["origin"]])


def _run(facts: Mapping[str, Any]) -> str:
    objective = facts["settings"]["objective"]
    return f"{objective} · {facts['steps']} steps · seed {facts['seed']} · {facts['stop_reason']}"


def _dataset(facts: Mapping[str, Any]) -> str:
    rows = f"{facts['rows']:,} rows in {facts['groups']:,} groups, {facts['new_rows']:,} new"
    return f"{rows} · git {facts['git_commit'][:_DIGITS]}"


def _decision(facts: Mapping[str, Any]) -> str:
    answers = [f"approved by {approval['by']}" for approval in facts["approvals"]]
    answers += [f"rejected by {rejection['by']}" for rejection in facts["rejections"]]
    return " · ".join([_day(facts), *answers])


def _reward(facts: Mapping[str, Any]) -> str:
    found = facts["accuracy"]
    if found["estimate"] is None:
        return "no held-out pair"
    return f"right on {found['estimate']:.3f} [{found['low']:.3f}, {found['high']:.3f}] of {found['n']} pairs"


def _evaluation(facts: Mapping[str, Any]) -> str:
    row = facts["slices"]["all"]
    return f"{row['candidate']:.3f} against {row['champion']:.3f} on {row['n']} tasks"


def _promotion(facts: Mapping[str, Any]) -> str:
    over = "" if facts["from"] is None else f"over {facts['office']}/{facts['from']} "
    return f"{over}by {facts['by']} · {_day(facts)} · ledger entry {facts['seq']}"


def _rows(facts: Mapping[str, Any]) -> str:
    if "groups" not in facts:
        return ""
    where = ", ".join(facts["datasets"])
    return f"{facts['groups']:,} groups in {where} · {', '.join(facts['sources'])} · {', '.join(facts['licences'])}"


def _day(facts: Mapping[str, Any]) -> str:
    return str(facts["time"])[:16].replace("T", " ")


_SAYS: Mapping[Kind, Callable[[Mapping[str, Any]], str]] = {
    "agent": _agent,
    "run": _run,
    "code": lambda facts: "with changes that were not committed" if facts["changed"] else "",
    "dataset": _dataset,
    "shard": lambda facts: f"{facts['rows']:,} rows" if "rows" in facts else "collected by the run",
    "episode": _rows,
    "group": _rows,
    "prompt": _rows,
    "origin": _rows,
    "licence": _rows,
    "validation": lambda facts: f"{facts['checks']} checks",
    "reward": _reward,
    "source": lambda facts: " · ".join([*facts["roles"], facts["kind"]]),
    "preferences": lambda facts: f"{facts['pairs']:,} pairs on {facts['groups']:,} prompts",
    "evaluation": _evaluation,
    "decision": _decision,
    "promotion": _promotion,
}
