"""What the ledger says of a node: one function for each kind, from the entries that speak of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tasks.core.ledger import Entry
from tasks.lineage.types import File, Kind, Node, Ref

Roles = Mapping[str, Sequence[str]]
"""Aliases held at present, by subject: {"agent/3": ["champion"]}."""


def describe(
    ref: Ref, digest: str | None, said: Sequence[Entry], kept: Mapping[str, Any] | None, roles: Roles
) -> Node:
    """Return the node `ref` as `said` (or the facts that were `kept` of it) describes it; one that has no entry where its
    kind must have one is unknown.

    Raises:
        KeyError, TypeError: an entry lacks a field that its kind must have.
    """
    kind, key = ref
    if kind in _UNSAID:
        return _UNSAID[kind](key)
    if kept is not None:
        return (_dataset if kind == "dataset" else _shard)(key, digest or "", kept)
    entries: dict[str, list[Entry]] = {}
    for entry in said:
        entries.setdefault(entry.kind, []).append(entry)
    try:
        return _SAID[kind](key, entries, roles)
    except (_Unknown, StopIteration):
        return Node(
            kind, _SHORT[kind](key) if kind in _SHORT else key, digest or _own(kind, key), known=False
        )


class _Unknown(Exception):
    pass


def _unknown(key: str, entries: Mapping[str, list[Entry]], roles: Roles) -> Node:
    raise _Unknown


def _newest(entries: Mapping[str, Sequence[Entry]], *kinds: str) -> Entry:
    for kind in kinds:
        if entries.get(kind):
            return entries[kind][-1]
    raise _Unknown


def _own(kind: Kind, key: str) -> str | None:
    return key if kind in ("base", "run", "preferences") else None


_SHORT: Mapping[Kind, Callable[[str], str]] = {"base": lambda key: "base model", "run": lambda key: key[:12]}


def _agent(key: str, entries: Mapping[str, list[Entry]], roles: Roles) -> Node:
    entry = _newest(entries, "agent.registered")
    p = entry.payload
    facts = _pick(p, "origin", "path", "mlflow", "tokenizer_digest", "source", roles=list(roles.get(key, ())))
    facts["registered"] = entry.time
    return Node("agent", key, p["digest"], facts, _files_under(p["path"], p["files"]))


def _base(key: str, entries: Mapping[str, list[Entry]], roles: Roles) -> Node:
    if not entries.get("agent.registered"):
        raise _Unknown
    entry = entries["agent.registered"][0]
    source = entry.payload["source"]
    return Node("base", source["name"], key, {"source": source, "registered_as": entry.subject})


def _run(key: str, entries: Mapping[str, list[Entry]], roles: Roles) -> Node:
    started, finished = _newest(entries, "run.started"), _newest(entries, "run.finished")
    p, end = started.payload, finished.payload["outputs"]
    facts = {
        **_pick(p, "settings", "seed", "device", "dtype", started=started.time),
        "outside_code": p.get("outside_code", {}),
        **_pick(end, "steps", "stop_reason", "metrics", "path", "digest", finished=finished.time),
    }
    files = [*_files_under(end["path"], end["files"])]
    files += (File(shard["path"], shard["sha256"]) for shard in end.get("fresh", ()))
    if isinstance(end.get("groups"), Mapping):
        files.append(_file(end["groups"]))
        facts["groups"] = end["groups"]["count"]
    return Node("run", key[:12], key, facts, tuple(files))


def _dataset(key: str, root: str, kept: Mapping[str, Any]) -> Node:
    facts = _pick(kept, "rows", "groups", "new_rows", "git_commit", "dvc", "sealed", "contents")
    return Node("dataset", key, root, facts, (File(kept["manifest"], kept["manifest_sha256"]),))


def _shard(key: str, sha256: str, kept: Mapping[str, Any]) -> Node:
    return Node("shard", key, sha256, kept, (File(key, sha256),))  # no facts: collected by a run


def _source(key: str, entries: Mapping[str, list[Entry]], roles: Roles) -> Node:
    entry = _newest(entries, "reward.registered")
    p = entry.payload
    facts = _pick(p, "kind", "path", "mlflow", "holdout", "licences", registered=entry.time)
    facts["roles"] = list(roles.get(key, ()))
    learnt = (_file(p["learnt"]),) if p.get("learnt") else ()  # which pairs; an earlier release kept none
    return Node("source", key, p["digest"], facts, (*_files_under(p["path"], p["files"]), *learnt))


def _preferences(key: str, entries: Mapping[str, list[Entry]], roles: Roles) -> Node:
    entry = _newest(entries, "preferences.imported", "preferences.made")
    p = entry.payload
    facts = _pick(p, "name", "pairs", "groups", "slices", "sources", "licences", "origin", time=entry.time)
    return Node("preferences", p["name"], key, facts, (File(p["path"], key),))


def _validation(key: str, entries: Mapping[str, list[Entry]], roles: Roles) -> Node:
    entry = _newest(entries, "dataset.validated")
    p, evidence = entry.payload, _file(entry.payload["evidence"])
    facts = _pick(p, "verdict", "reasons", checks=len(p["checks"]), time=entry.time)
    return Node("validation", p["verdict"], evidence.sha256, facts, (evidence,))


def _reward(key: str, entries: Mapping[str, list[Entry]], roles: Roles) -> Node:
    entry = _newest(entries, "reward.validated")
    p = entry.payload
    files = tuple(_file(p[name]) for name in ("evidence", "plot", "best_of_n") if p.get(name))
    facts = _pick(p, "verdict", "reasons", "accuracy", "ece", "path", time=entry.time)
    return Node("reward", p["verdict"], p["digest"], facts, files)


def _evaluation(key: str, entries: Mapping[str, list[Entry]], roles: Roles) -> Node:
    entry = _newest(entries, "evaluation.done")
    p, outcomes = entry.payload, _file(entry.payload["outcomes"])
    facts = _pick(p, "candidate", "champion", "tasks_digest", "slices", time=entry.time)
    return Node("evaluation", f"agent/{p['candidate']} and agent/{p['champion']}", key, facts, (outcomes,))


def _decision(key: str, entries: Mapping[str, list[Entry]], roles: Roles) -> Node:
    entry = _newest(entries, "decision.made")
    p = entry.payload

    def answers(kind: str) -> list[dict[str, Any]]:
        return [
            _pick(e.payload, "by", "reason", time=e.time)
            for e in entries.get(kind, ())
            if e.subject == entry.subject
        ]

    facts = _pick(
        p, "verdict", "reasons", "evidence",
        approvals=answers("approval.granted"), rejections=answers("approval.rejected"), time=entry.time,
    )  # fmt: skip
    files = [_file(p[name]) for name in ("record", "signature") if name in p]
    return Node("decision", p["verdict"], key, facts, tuple(files))


def _promotion(key: str, entries: Mapping[str, list[Entry]], roles: Roles) -> Node:
    entry = _newest(entries, "promotion.committed", "rollback.committed")
    facts = _pick(entry.payload, "to", "from", "by", "reason", "decision", time=entry.time, seq=entry.seq)
    facts["office"] = entry.subject.partition("/")[0]
    return Node("promotion", entry.kind.partition(".")[0], key, facts)


def _code(key: str) -> Node:
    place, _, digest = key.rpartition("@")
    commit = place.removesuffix("+")
    facts = {"commit": commit or None, "changed": place.endswith("+")}
    return Node("code", f"commit {commit[:12]}" if commit else "outside git", digest, facts)


def _outside(key: str) -> Node:
    name, _, digest = key.rpartition("@")
    return Node("outside", name, digest or None)


_SAID: Mapping[Kind, Callable[[str, Mapping[str, list[Entry]], Roles], Node]] = {
    "agent": _agent,
    "base": _base,
    "run": _run,
    "dataset": _unknown,
    "shard": _unknown,
    "validation": _validation,
    "reward": _reward,
    "source": _source,
    "preferences": _preferences,
    "evaluation": _evaluation,
    "decision": _decision,
    "promotion": _promotion,
}
_UNSAID: Mapping[Kind, Callable[[str], Node]] = {
    "code": _code,
    "outside": _outside,
    "lock": lambda key: Node("lock", "constraints.txt", key),
    "policy": lambda key: Node("policy", "policy.yaml", key),
    "tasks": lambda key: Node("tasks", "held-out tasks", key),
    "environment": lambda key: Node("environment", key, None),
    "origin": lambda key: Node("origin", key, None),
    "licence": lambda key: Node("licence", key, None),
}


def _files_under(folder: str, files: Mapping[str, str]) -> tuple[File, ...]:
    return tuple(File(f"{folder}/{name}", sha256) for name, sha256 in sorted(files.items()))


def _file(value: Mapping[str, str]) -> File:
    return File(value["path"], value["sha256"])


def _pick(payload: Mapping[str, Any], *names: str, **more: Any) -> dict[str, Any]:
    return {**{name: payload[name] for name in names}, **more}
