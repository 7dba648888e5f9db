"""A lineage to look at: a tree for the terminal, plain values for programs. Equal lineages look equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

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


def to_tree(lineage: Lineage, generations: int = GENERATIONS) -> Tree:
    """Return the tree that `forebay lineage` prints.

    Each node is drawn once, where it is nearest to the root; elsewhere it is named, with "see above" or "see
    below".

    Args:
        generations: how many steps back to earlier agents and dataset versions are drawn.
    """
    left = {lineage.root: generations}  # how many steps back may still be drawn below a node
    place: dict[Ref, Edge] = {}  # the edge under which a node is drawn
    for edge in lineage.edges:  # nearest first, so the source has been placed if it is drawn at all
        if left.get(edge.source, -1) >= 0 and edge.target not in left:
            left[edge.target] = left[edge.source] - (edge.relation in _OLDER)
            place[edge.target] = edge
    drawn: set[Ref] = set()

    def grow(branch: Tree, ref: Ref) -> None:
        drawn.add(ref)
        edges = lineage.following[ref] if left[ref] >= 0 else ()
        shards = [edge.target for edge in edges if edge.relation == "holds"]
        unnamed = shards[_SHARDS:] if len(shards) > _SHARDS + 1 else []
        hidden = set(unnamed)
        for edge in edges:
            if edge.target in hidden:
                if edge.target == unnamed[0]:
                    branch.add(_more_shards([lineage.nodes[shard] for shard in unnamed]))
                continue
            label = Text(f"{edge.relation} ", style="dim") if edge.relation != "holds" else Text()
            node = lineage.nodes[edge.target]
            if place.get(edge.target) is edge:
                cut = "  … earlier: ask for it by name" if left[edge.target] < 0 else ""
                grow(branch.add(label + _line(node) + Text(cut, style="dim italic")), edge.target)
            else:
                where = "above" if edge.target in drawn else "below"
                branch.add(label + _name(node) + Text(f"  see {where}", style="dim italic"))

    tree = Tree(_line(lineage.nodes[lineage.root]), guide_style="dim")
    grow(tree, lineage.root)
    return tree


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
    over = "" if facts["from"] is None else f"over agent/{facts['from']} "
    return f"{over}by {facts['by']} · {_day(facts)} · ledger entry {facts['seq']}"


def _day(facts: Mapping[str, Any]) -> str:
    return str(facts["time"])[:16].replace("T", " ")


_SAYS: Mapping[Kind, Callable[[Mapping[str, Any]], str]] = {
    "agent": _agent,
    "run": _run,
    "code": lambda facts: "with changes that were not committed" if facts["changed"] else "",
    "dataset": _dataset,
    "shard": lambda facts: f"{facts['rows']:,} rows",
    "validation": lambda facts: f"{facts['checks']} checks",
    "reward": _reward,
    "source": lambda facts: " · ".join([*facts["roles"], facts["kind"]]),
    "preferences": lambda facts: f"{facts['pairs']:,} pairs on {facts['groups']:,} prompts",
    "evaluation": _evaluation,
    "decision": _decision,
    "promotion": _promotion,
}
