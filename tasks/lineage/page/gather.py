"""Read what the page of an audit shows: from the ledger, and from files whose digests are checked.

Nothing here stops because a file is missing or was changed: an audit is asked for when something may be wrong. What cannot be
shown is left out and said.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from tasks.core.digest import sha256_bytes
from tasks.core.errors import ForebayError
from tasks.core.keys import Trust, read_trust
from tasks.core.ledger import Ledger
from tasks.core.workspace import Workspace
from tasks.lineage import rows
from tasks.lineage.descent import descendants
from tasks.lineage.graph import lineage as walk
from tasks.lineage.graph import open_index
from tasks.lineage.index import Index
from tasks.lineage.page.flags import flags
from tasks.lineage.page.history import events, terms
from tasks.lineage.page.types import Amount, Audit, Data, Evidence, Part, Training, Version
from tasks.lineage.types import SHAPING, Lineage, Ref, Relation
from tasks.promotion.policy import Policy, load_policy
from tasks.training.curve import read_curve


def gather(
    ledger: Ledger,
    workspace: Workspace,
    ref: str,
    *,
    time: str,
    report: Mapping[str, Any] | None = None,
    page: str | None = None,
) -> Audit:
    """Return everything that the page of `ref` shows.

    Args:
        ref: an agent, a reward model, a dataset, or another thing as of `lineage.graph.lineage`.
        time: of the audit, ISO 8601 in UTC.
        report: the verification of `ref`, a `VerifyReport` as JSON values.
        page: where the page of its newest decision lies, relative to the page of the audit.

    Raises:
        NotFound, UsageError, Corrupt: as `lineage.graph.lineage`: there is no such thing, or its history cannot be read.
    """
    index = open_index(ledger, workspace)
    found = walk(ledger, workspace, ref, index)
    root, subject = found.root, found.root[1]
    made = ledger.entries("decision.made", subject) if root[0] in ("agent", "source") else []
    decision = _evidence(workspace, made[-1].payload["record"]) if made else None
    trust = _trust(workspace)
    happened = events(ledger, workspace, found, made, trust)
    data = _data(ledger, workspace, index, found)
    training = _training(ledger, workspace, found)
    held = terms(ledger, subject) if root[0] in ("agent", "source") else ()
    newest = ledger.last()
    return Audit(
        time=time,
        entries=newest.seq if newest else 0,
        head=newest.digest if newest else "",
        lineage=found,
        report=report,
        data=data,
        training=training,
        decision=decision,
        decisions=len(made),
        page=page,
        reward=_reward(ledger, workspace, found, decision),
        policy=_policy(workspace),
        terms=held,
        events=happened,
        flags=flags(ledger, workspace, found, report, made, held, happened, data),
        descendants=_descendants(ledger, workspace, ref, index),
    )


def _trust(workspace: Workspace) -> Trust | None:
    try:
        return read_trust(workspace.trust) if workspace.trust.exists() else None
    except ForebayError:
        return None  # the verification names it


def _policy(workspace: Workspace) -> Policy:
    try:
        return load_policy(workspace.policy)
    except (ForebayError, OSError):
        return Policy()


def _evidence(workspace: Workspace, file: Mapping[str, str]) -> Evidence:
    """Read an evidence file, its digest checked."""
    path = file["path"]
    try:
        data = (workspace.root / path).read_bytes()
    except OSError as error:
        return Evidence(path, None, f"{path} cannot be read ({error.strerror}).")
    if sha256_bytes(data) != file["sha256"]:
        return Evidence(
            path, None, f"{path} was changed: its bytes are not those of the digest in the ledger."
        )
    try:
        return Evidence(path, json.loads(data))
    except ValueError:
        return Evidence(path, None, f"{path} is as it was recorded, but is not JSON.")


def _along(found: Lineage, ref: Ref, relation: Relation) -> Iterator[Ref]:
    return (edge.target for edge in found.following.get(ref, ()) if edge.relation == relation)


def _first(found: Lineage, ref: Ref | None, relation: Relation) -> Ref | None:
    return None if ref is None else next(_along(found, ref, relation), None)


# -------------------------------------------------------------------------------------------------------- data


def _data(ledger: Ledger, workspace: Workspace, index: Index, found: Lineage) -> Data | None:
    """Return the versions behind the audited thing: those that its dataset continues, one after the other."""
    root = found.root
    run = root if root[0] == "run" else _first(found, root, "trained by")
    pairs = root if root[0] == "preferences" else _first(found, root, "learnt from")
    here = (
        root
        if root[0] == "dataset"
        else _first(found, run, "trained on") or _first(found, pairs, "made from")
    )
    line: list[Ref] = []
    while here is not None and here not in line and found.nodes[here].known:
        line.append(here)
        here = _first(found, here, "continues")
    if not line:
        return None
    learnt, kinds, gap = None, None, ""
    if run is not None:
        learnt, kinds, gap = _learnt(ledger, workspace, index, found, run, line[0])
    return Data(tuple(_version(found, ref, kinds) for ref in line), learnt, gap)


_Kinds = Mapping[tuple[str, str, str, str], int]


def _learnt(
    ledger: Ledger, workspace: Workspace, index: Index, found: Lineage, run: Ref, dataset: Ref
) -> tuple[int | None, _Kinds | None, str]:
    """Return how many groups a run learnt from, and {(shard, environment, source, licence): how many}."""
    finished = ledger.last("run.finished", run[1])
    if finished is None:
        return None, None, "The run did not finish."
    try:
        groups = rows.consumed(workspace, finished.payload["outputs"])
        name = dataset[1].rpartition("/")[0]
        with rows.Rows(ledger, workspace, index) as opened:
            if opened.whole(name):
                return len(groups), opened.of(name).tally(groups), ""
        gap = "Which of them the run learnt from cannot be told: not all shards are here."
        return len(groups), None, gap
    except ForebayError as error:
        kept = finished.payload["outputs"]["groups"]
        count = kept["count"] if isinstance(kept, Mapping) else len(kept)
        return count, None, f"Which of them the run learnt from cannot be told: {error}"


def _version(found: Lineage, ref: Ref, kinds: _Kinds | None) -> Version:
    facts = found.nodes[ref].facts
    shards = {target[1] for target in _along(found, ref, "holds")}
    here: Counter[Part] = Counter()
    for (shard, env, source, licence), count in (kinds or {}).items():
        if shard in shards:
            here[(env, source, licence)] += count
    earlier = _first(found, ref, "continues")
    groups = facts["groups"] - (found.nodes[earlier].facts.get("groups", 0) if earlier else 0)
    contents = facts["contents"]
    alike = Counter((part["env"], part["source"], part["licence"]) for part in contents)
    parts: dict[Part, Amount] = {}
    for part in contents:
        kind = (part["env"], part["source"], part["licence"])
        # Two versions of one environment are told apart by the ledger, not by the index of rows.
        learnt = None if kinds is None or alike[kind] > 1 else here[kind]
        parts[(f"{part['env']}@{part['env_version']}", part["source"], part["licence"])] = Amount(
            part["rows"], part["groups"], learnt
        )
    new = Amount(facts["new_rows"], groups, None if kinds is None else here.total())
    return Version(ref, new, parts if contents else None)


# ------------------------------------------------------------------------------------------------ run and judges


def _training(ledger: Ledger, workspace: Workspace, found: Lineage) -> Training | None:
    root = found.root
    run = root if root[0] == "run" else _first(found, root, "trained by")
    if run is None or not found.nodes[run].known:
        return None
    finished = ledger.last("run.finished", run[1])
    outputs = finished.payload["outputs"] if finished else {}
    try:
        curve = read_curve(workspace.runs / run[1][:16])
    except (OSError, ValueError, KeyError, TypeError):
        curve = []  # it has no digest: whoever changed it changed a picture
    return Training(run, outputs.get("mlflow_run"), tuple(curve), outputs.get("resources", {}))


def _reward(
    ledger: Ledger, workspace: Workspace, found: Lineage, decision: Evidence | None
) -> Evidence | None:
    """Return the report of the reward model: the audited one's newest, or that on which the newest decision rests."""
    root = found.root
    if root[0] == "source":
        validated = ledger.last("reward.validated", found.nodes[root].digest or "")
        return None if validated is None else _evidence(workspace, validated.payload["evidence"])
    named = (decision.content if decision and decision.content else {}).get("inputs", {}).get("reward")
    if not isinstance(named, Mapping):
        return None
    path = workspace.relative(workspace.evidence / named["path"])
    return _evidence(workspace, {"path": path, "sha256": named["sha256"]})


def _descendants(ledger: Ledger, workspace: Workspace, ref: str, index: Index) -> dict[str, int] | None:
    try:
        after = descendants(ledger, workspace, ref, index)
    except ForebayError:
        return None  # rows, or lists of groups, that were changed: the verification names them
    kept = {after.root}  # what its bytes shaped; decisions about it are told elsewhere
    behind = {edge.source: edge for edge in after.edges if edge.relation in SHAPING}
    return dict(Counter(ref[0] for ref in after.nodes if ref in behind and ref not in kept))
