"""What the page of an audit is drawn from: plain values, read once. Equal ones give equal pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tasks.lineage.types import Lineage, Ref
from tasks.promotion.policy import Policy

Part = tuple[str, str, str]
"""Environment with its version, source, licence: what rows are told apart by."""


@dataclass(frozen=True)
class Amount:
    """Rows and groups of one kind; `learnt`: groups of it that the run learnt from, None where that is not known."""

    rows: int
    groups: int
    learnt: int | None


@dataclass(frozen=True)
class Version:
    """One version of a dataset, by what it brought in.

    Attributes:
        ref: its node.
        new: its new rows and groups; `parts` splits them, None where the ledger is of an earlier release and does not say.
    """

    ref: Ref
    new: Amount
    parts: Mapping[Part, Amount] | None


@dataclass(frozen=True)
class Data:
    """The versions that the audited thing rests on, newest first.

    Attributes:
        learnt: groups of the replay that its run learnt from; None for what no run made.
        gap: why it is not known of which kind they were, "" where it is.
    """

    versions: tuple[Version, ...]
    learnt: int | None
    gap: str = ""


@dataclass(frozen=True)
class Training:
    """The run that made an agent: `ref` its node, `curve` one mapping of metrics a step, `resources` what it cost."""

    ref: Ref
    mlflow_run: str | None
    curve: tuple[Mapping[str, float], ...]
    resources: Mapping[str, float]


@dataclass(frozen=True)
class Evidence:
    """An evidence file with a digest: `content` as JSON values, None where it cannot be shown, and `gap` says why."""

    path: str
    content: Mapping[str, Any] | None
    gap: str = ""


@dataclass(frozen=True)
class Signature:
    """Whether an entry's signature holds: by which key, or "" and why not."""

    name: str
    key: str
    says: str = ""


@dataclass(frozen=True)
class Event:
    """A ledger entry about the audited thing. `signature`: None for a kind that carries none of its own."""

    seq: int
    time: str
    what: str
    by: str
    says: str
    signature: Signature | None = None


@dataclass(frozen=True)
class Term:
    """A time in office; `until` is None while it lasts."""

    since: str
    until: str | None
    by: str
    reason: str


@dataclass(frozen=True)
class Flag:
    """Something that an auditor has to know: "open" stands until somebody acts, "note" only explains."""

    level: Literal["open", "note"]
    says: str


@dataclass(frozen=True)
class Audit:
    """Everything that a page shows.

    Attributes:
        time: of the audit, ISO 8601 in UTC.
        entries, head: length of the ledger and the digest of its last entry.
        lineage: the audited thing and all that it follows from.
        report: the verification (`VerifyReport` as JSON values), None where nothing was verified.
        policy: that reward models are judged by, where no decision says it.
        decision: the record of the newest decision about it, `reward` the report of its reward model.
        decisions: how many there are.
        page: where the page of the decision lies, relative to this one; None where it does not.
        descendants: how many things of each kind follow from it, None where that cannot be told.
    """

    time: str
    entries: int
    head: str
    lineage: Lineage
    report: Mapping[str, Any] | None
    data: Data | None
    training: Training | None
    decision: Evidence | None
    decisions: int
    page: str | None
    reward: Evidence | None
    policy: Policy
    terms: tuple[Term, ...]
    events: tuple[Event, ...]
    flags: tuple[Flag, ...]
    descendants: Mapping[str, int] | None

    @property
    def open(self) -> Sequence[Flag]:
        """The flags on which somebody has to act."""
        return [flag for flag in self.flags if flag.level == "open"]
