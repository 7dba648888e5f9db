"""The order in which an evaluation that may stop early asks its tasks, and what it plans before the first answer.

Families come in the order of a hash of their names, all environments mixed, so that those answered so far are as good as
a random sample of all, whatever the agents do. A family is never divided: its answers are one observation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from tasks.core.digest import digest_json, sha256_bytes
from tasks.evaluation.paired import Plan


class Asked(Protocol):
    """What is looked at of a task."""

    @property
    def id(self) -> str:
        """Which task."""

    @property
    def family(self) -> str:
        """Its family."""


T = TypeVar("T", bound=Asked)


def plan_of(tasks: Mapping[str, Sequence[Asked]], first: int, every: int) -> Plan:
    """Return the plan for `tasks` by environment, each answered once, looked at after `first` tasks and `every` more."""
    sizes = {env: _families(env, found) for env, found in tasks.items() if found}
    return Plan(
        {env: len(tasks[env]) for env in sizes},
        {env: digest_json(sorted({task.id for task in tasks[env]})) for env in sizes},
        {env: max(map(len, families.values())) for env, families in sizes.items()},
        (first, every),
    )


def chunks(tasks: Mapping[str, Sequence[T]], first: int, every: int) -> Iterator[dict[str, list[T]]]:
    """Yield the tasks to answer before each look, by environment; whole families, so chunks may be a little larger."""
    families = [
        (sha256_bytes(name.encode()), env, members)
        for env, found in tasks.items()
        for name, members in _families(env, found).items()
    ]
    chunk: dict[str, list[T]] = defaultdict(list)
    wanted = first
    for _, env, members in sorted(families, key=lambda family: family[0]):
        chunk[env] += members
        if sum(map(len, chunk.values())) >= wanted:
            yield dict(chunk)
            chunk, wanted = defaultdict(list), every
    if chunk:
        yield dict(chunk)


def _families(env: str, tasks: Sequence[T]) -> dict[str, list[T]]:
    found: dict[str, list[T]] = defaultdict(list)
    for task in tasks:
        found[f"{env}/{task.family}"].append(task)
    return found
