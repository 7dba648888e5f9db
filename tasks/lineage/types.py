"""The words of the lineage graph: kinds of nodes, relations, and a graph that was asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

Kind = Literal[
    "agent", "base", "run", "code", "lock", "dataset", "shard", "group", "episode", "prompt", "environment", "origin", "licence", "validation",
    "reward", "source", "preferences", "tasks", "evaluation", "decision", "policy", "promotion", "outside",
]  # fmt: skip
Relation = Literal[
    "trained by", "converted from", "descends from",  # of an agent
    "run by code", "with packages", "trained on", "collected", "started from",  # of a run
    "holds", "rewritten from", "checked by", "continues", "sampled from", "scored from", "rewarded by",  # of a dataset
    "gathered in", "comes from", "licensed under",
    "contains",  # of a shard
    "learnt from", "reads states of", "made from", "judges",  # of a reward model and its preferences
    "judged by", "in office",  # of an agent or a reward model
    "asks", "compares",  # of an evaluation
    "under policy", "rests on", "compared with",  # of a decision
]  # fmt: skip
SPOKEN: frozenset[Kind] = frozenset(
    {
        "agent", "base", "run", "dataset", "shard", "validation", "reward", "source", "preferences", "evaluation",
        "decision", "promotion",
    }
)  # fmt: skip
"""Kinds that must have ledger entries of their own; the others are only named by entries."""
Ref = tuple[Kind, str]
"""What a node is found by: its kind and its full digest, or the subject of its ledger entry."""

RELATIONS: tuple[Relation, ...] = get_args(Relation)
SHAPING: frozenset[Relation] = frozenset(
    {
        "trained by", "converted from", "descends from", "run by code", "with packages", "trained on", "collected", "started from",
        "holds", "rewritten from", "contains", "continues", "sampled from", "scored from", "rewarded by", "gathered in", "comes from",
        "licensed under", "learnt from", "reads states of", "made from",
    }
)  # fmt: skip
"""By these the bytes of one thing depend on another. The others judge it: a decision about two agents makes neither
descend from the other."""


@dataclass(frozen=True)
class File:
    """A file that belongs to a node: its path relative to the workspace, and the SHA-256 it must have."""

    path: str
    sha256: str


@dataclass(frozen=True)
class Node:
    """One thing with an identity.

    Attributes:
        name: what people call it: "agent/3", "main/v2", a verdict, a commit.
        digest: its SHA-256 in full; None where it has none, as for an outside policy.
        facts: what the ledger says of it, as JSON values.
        files: its bytes in the workspace.
        known: False where another entry names it but the ledger has no entry of it.
    """

    kind: Kind
    name: str
    digest: str | None
    facts: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[File, ...] = ()
    known: bool = True


@dataclass(frozen=True)
class Edge:
    """`source` follows from `target`."""

    source: Ref
    relation: Relation
    target: Ref


@dataclass(frozen=True)
class Lineage:
    """Nodes around `root`, nearest first, each one's edges in the order in which they are best read."""

    root: Ref
    nodes: Mapping[Ref, Node]
    edges: tuple[Edge, ...]

    @cached_property
    def following(self) -> Mapping[Ref, tuple[Edge, ...]]:
        """The edges that leave each node."""
        leaving: dict[Ref, list[Edge]] = defaultdict(list)
        for edge in self.edges:
            leaving[edge.source].append(edge)
        return {ref: tuple(leaving[ref]) for ref in self.nodes}

    @cached_property
    def shaping(self) -> tuple[Ref, ...]:
        """The root and what shaped its bytes, nearest first; what it was only compared with is left out."""
        reached = {self.root: None}
        waiting = [self.root]
        for here in waiting:
            for edge in self.following.get(here, ()):
                if edge.relation in SHAPING and edge.target not in reached:
                    reached[edge.target] = None
                    waiting.append(edge.target)
        return tuple(reached)
