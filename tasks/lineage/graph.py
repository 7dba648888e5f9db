"""The lineage of an agent or a dataset, both ways: what it follows from, and what follows from it.

Nothing here is kept by hand. Whatever a node says stands in the ledger, and its edges are the digests and
names that its entry gives. Edges lead to what came before, so following them ends at base models and shards.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tasks.core.errors import Corrupt, NotFound, UsageError
from tasks.core.ledger import Entry, Ledger
from tasks.core.workspace import Workspace
from tasks.lineage.entries import Role
from tasks.lineage.facts import Roles, describe
from tasks.lineage.index import Index
from tasks.lineage.types import SHAPING, Edge, Kind, Lineage, Node, Ref
from tasks.promotion.promote import OFFICES, standing


class Circle(Corrupt):
    """The ledger leads in a circle."""


_MIN_PREFIX = 4  # digits; with fewer, a digest prefix is more likely a typing error
_NEWEST = 1000  # names of a kind among which the nearest are looked for
_AT_ONCE = 200  # nodes that are described together
_HEX = set("0123456789abcdef")
_LOCATORS: Mapping[str, Role] = {"prefect": "prefect", "mlflow": "mlflow", "git": "git", "dvc": "dvc"}
_NAMED: Mapping[str, Kind] = {
    "dataset": "dataset", "shard": "shard", "run": "run", "decision": "decision", "environment": "environment",
    "source": "origin", "licence": "licence",
}  # fmt: skip


def open_index(ledger: Ledger, workspace: Workspace) -> Index:
    """Return the workspace's index of the ledger, caught up."""
    return Index.open(ledger, workspace.state / "lineage.db")


def lineage(ledger: Ledger, workspace: Workspace, ref: str, index: Index | None = None) -> Lineage:
    """Return everything that `ref` follows from, root first.

    Args:
        ref: agent@champion, agent@candidate, agent@previous, agent/12, reward/2, dataset:main/v3 (dataset:main is its
            newest version), shard:PATH, run:DIGITS, source:NAME, licence:NAME, environment:NAME, the id that
            another tool has for it (prefect:RUN, mlflow:RUN or MODEL, git:COMMIT, dvc:MD5), or the first digits of a
            digest that the ledger names.
        index: to read from; the workspace's own by default.

    Raises:
        NotFound: there is no such thing; the nearest names are given.
        UsageError: the digits fit several things.
        Corrupt: a ledger entry lacks a field that its kind must have, or the ledger leads in a circle.
    """
    index = index or open_index(ledger, workspace)
    root = resolve(index, ref)
    start = index.id(root)
    assert start is not None
    return gather(index, root, index.walk([start], back=False))


def gather(index: Index, root: Ref, ids: Iterable[int]) -> Lineage:
    """Return the graph of the nodes `ids`, described, with the edges between them.

    Raises:
        Corrupt: as `lineage`.
    """
    numbers = list(ids)
    named = index.refs(numbers)
    roles = roles_of(index)
    nodes: dict[Ref, Node] = {}
    for start in range(0, len(numbers), _AT_ONCE):  # so that entries of a long history are not all held
        part = numbers[start : start + _AT_ONCE]
        kept = index.kept(part)
        said = index.said(number for number in part if number not in kept)
        for number in part:
            ref, digest = named[number]
            nodes[ref] = _described(index, ref, digest, said.get(number, []), kept.get(number), roles)
    edges = tuple(
        Edge(named[source][0], relation, named[target][0])
        for source, relation, target in index.edges(numbers)
        if target in named
    )
    require_no_circle(edges)
    return Lineage(root, nodes, edges)


def _described(
    index: Index,
    ref: Ref,
    digest: str | None,
    said: Sequence[Entry],
    kept: Mapping[str, Any] | None,
    roles: Roles,
) -> Node:
    try:
        node = describe(ref, digest, said, kept, roles)
    except (KeyError, TypeError) as error:
        raise _broken(ref, str(error)) from error
    if not node.known:
        wrong = index.broken(ref[1])
        if wrong is not None:
            raise _broken(ref, wrong[1])
    return node


def _broken(ref: Ref, reason: str) -> Corrupt:
    return Corrupt(f"The ledger's entry of {ref[0]} {ref[1]} is not whole ({reason}); run `forebay verify`.")


def require_no_circle(edges: Iterable[Edge]) -> None:
    """See that nothing is made of itself.

    Raises:
        Corrupt: it is; the circle is spelt out.
    """
    follows: dict[Ref, list[Ref]] = defaultdict(list)
    for edge in edges:
        if edge.relation in SHAPING:
            follows[edge.source].append(edge.target)
    done: set[Ref] = set()
    for start in list(follows):
        path: dict[Ref, None] = {}
        stack: list[tuple[Ref, bool]] = [(start, False)]
        while stack:
            ref, left = stack.pop()
            if left:
                path.pop(ref)
                done.add(ref)
            elif ref in path:
                circle = [*path][[*path].index(ref) :]
                told = " -> ".join(f"{kind} {key[:24]}" for kind, key in (*circle, ref))
                raise Circle(
                    f"The ledger leads in a circle, which no history does: {told}. Run `forebay verify`; nothing was changed."
                )
            elif ref not in done:
                path[ref] = None
                stack.append((ref, True))
                stack += ((target, False) for target in follows.get(ref, ()))


def roles_of(index: Index) -> dict[str, list[str]]:
    """Return the aliases that each subject holds: {"agent/3": ["champion"]}."""
    return index.derived("roles", lambda: _roles(index))


def _roles(index: Index) -> dict[str, list[str]]:
    roles: dict[str, list[str]] = defaultdict(list)
    for office in OFFICES:
        for alias, version in standing(index, office).aliases().items():
            if version is not None:
                roles[f"{office}/{version}"].append(alias)
    return dict(roles)


def resolve(index: Index, ref: str) -> Ref:
    """Return the node that `ref` names; see `lineage`."""
    held = {
        f"{subject.partition('/')[0]}@{alias}": subject
        for subject, roles in roles_of(index).items()
        for alias in roles
    }
    name = held.get(ref, ref)
    office = name.partition("/")[0]
    if office in OFFICES:
        found: Ref = ("agent" if office == "agent" else "source", name)
        if index.id(found) is not None:
            return found
        wrong = index.broken(name)
        if wrong is not None:
            raise _broken(found, wrong[1])
    word, colon, key = ref.partition(":")
    if colon and word in _NAMED:
        found = (_NAMED[word], key)
        if word == "dataset" and "/" not in key:
            found = next(reversed(index.all_called("version", key)), ("dataset", key))
        if index.id(found) is not None:
            return found
    role = _LOCATORS.get(word) if colon else None
    only = _NAMED.get(word) if colon else None
    digits = key if role or only in ("run", "decision", "shard", "dataset") else ref
    if len(digits) >= _MIN_PREFIX and (role or set(digits) <= _HEX):
        fits = {fit: digest for fit, digest in index.prefixed(digits, role).items() if only in (None, fit[0])}
        # A reward model and the reports about it have one digest: the thing itself is meant.
        named = [fit for fit in fits if fit[0] in ("agent", "source")] if len(set(fits.values())) == 1 else []
        chosen = named or [*fits]
        if len(chosen) > 1:
            raise UsageError(_several(ref, len(set(fits.values())) == 1, chosen))
        if chosen:
            return chosen[0]
    raise NotFound(f"Nothing here is called `{ref}`; the nearest names are: {_nearest(index, ref, held)}.")


def _several(ref: str, alike: bool, fits: Sequence[Ref]) -> str:
    named = ", ".join(f"{kind} {key[:24]}" for kind, key in fits[:5])
    told = "they have it in common; ask for one by name" if alike else "give more digits"
    return f"`{ref}` fits {len(fits)} things ({named}); {told}."


def _nearest(index: Index, ref: str, held: Mapping[str, str]) -> str:
    known = [
        *held,
        *index.keys("agent", _NEWEST),
        *index.keys("source", _NEWEST),
        *(f"dataset:{key}" for key in index.keys("dataset", _NEWEST)),
    ]
    known += [f"source:{key}" for key in index.keys("origin", _NEWEST)]
    known += [f"licence:{key}" for key in index.keys("licence", _NEWEST)]
    near = difflib.get_close_matches(ref, known, n=5, cutoff=0.5) or known[:5]
    return ", ".join(near) or "none yet"
