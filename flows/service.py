"""Agents in service: the new champion is watched against its predecessor, and the way back is tried out."""

from __future__ import annotations

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import keys, progress
from flows.context import Context
from flows.experience import unsealed_rows
from flows.registry import absence, restore
from tasks.core.digest import digest_json
from tasks.core.errors import Conflict, ForebayError
from tasks.core.ledger import Entry, LedgerView
from tasks.core.stages import code_digest, lock_digest

if TYPE_CHECKING:
    from tasks.promotion.canary import Judged, Traffic

_COLUMNS = ("episode_id", "group_id", "env", "reward", "created_at", "behaviour_digest")
_REHEARSED_FOR = timedelta(days=1)
_PROMPTS = 2


# ------------------------------------------------------------------------------------------------- canary


def running_canary(context: Context) -> Entry | None:
    """Return the entry with which the canary of the present champion began, None where none is running."""
    newest = _newest_change(context)
    started = context.ledger.last("canary.started")
    if started is None or newest is None or started.payload["promotion"] != newest.seq:
        return None
    ended = context.ledger.last("canary.ended")
    return None if ended is not None and ended.payload["promotion"] == newest.seq else started


def start_canary(context: Context) -> Entry | None:
    """Fix who is compared and by which rule, before any look; nothing where the newest change was no promotion.

    A promotion whose process died before this is made up for by the next look.
    """
    newest = _newest_change(context)
    if newest is None or newest.kind != "promotion.committed" or newest.payload["from"] is None:
        return None
    rule = context.policy.canary
    tasks = context.settings.evaluation.tasks
    weights = rule.weights or {env: float(n) for env, n in tasks.items()}
    total = sum(weights.values())
    new, old = (context.agent(str(newest.payload[role])).payload for role in ("to", "from"))
    payload = {
        "promotion": newest.seq,
        "since": newest.time,
        "new": {"version": new["version"], "digest": new["digest"]},
        "old": {"version": old["version"], "digest": old["digest"]},
        "rule": {
            "alpha": rule.alpha,
            "margin": rule.margin,
            "min_groups": rule.min_groups,
            "baseline": rule.baseline,
            "weights": {env: weight / total for env, weight in weights.items()},
        },
        "on_harm": rule.on_harm,
        "policy_digest": context.policy.digest(),
    }

    def check(view: LedgerView) -> None:
        if any(e.payload["promotion"] == newest.seq for e in view.entries("canary.started")):
            raise Conflict("Another process started this canary.")

    try:
        return context.ledger.append("canary.started", newest.subject, payload, check)
    except Conflict:
        return None


def watch_canary(context: Context) -> dict[str, Any]:
    """Look at what both agents did in service so far, and roll back if the new one is shown to be worse.

    Returns:
        {"running": False, "says": …} where there is nothing to watch; else the result of this look, with
        "rolled_back": the ledger's entry of the rollback, or None.

    Raises:
        Conflict: the champion changed meanwhile. Corrupt: the predecessor's files, or a shard, were changed.
        Refused: the workspace cannot sign.
    """
    start_canary(context)
    started = running_canary(context)
    if started is None:
        return {"running": False, "says": _not_running(context)}
    from tasks.promotion.canary import Rule, make_record, write_record

    p = started.payload
    traffic, left_out = _traffic(context, p)
    about = {"promotion": p["promotion"], "since": p["since"], "new": p["new"], "old": p["old"]}
    record, judged = make_record(traffic, Rule(**p["rule"]), {**about, "left_out": left_out})
    result: dict[str, Any] = {
        "running": True,
        "agent": started.subject,
        "against": f"agent/{p['old']['version']}",
    }
    result |= {**asdict(judged), "left_out": left_out, "rolled_back": None}
    groups = digest_json(record["groups"])
    last = context.ledger.last("canary.looked", started.subject)
    fresh = last is None or (last.payload["promotion"], last.payload["groups"]) != (p["promotion"], groups)
    if fresh:
        path, sha256 = write_record(context.workspace.evidence, record)
        file = {"path": context.workspace.relative(path), "sha256": sha256}
        look = {"promotion": p["promotion"], "groups": groups, "record": file, **asdict(judged)}
        last = context.ledger.append("canary.looked", started.subject, look)
    assert last is not None
    result["record"] = last.payload["record"]
    if judged.verdict == "HARM" and p["on_harm"] == "rollback":
        done = result["rolled_back"] = _roll_back(context, started, judged, last.payload["record"])
        if "flag" in done:
            result["says"] += f"; agent/{done['to']}, which is back, is flagged: it {done['flag']}"
    if judged.verdict == "PROVEN":
        _end(context, started, judged, last.payload["record"])
    return result


def canary_status(context: Context) -> dict[str, Any] | None:
    """Return how the newest canary stands, None where there never was one. Reads the ledger only."""
    started = context.ledger.last("canary.started")
    if started is None:
        return None
    number = started.payload["promotion"]
    looked, ended = context.ledger.last("canary.looked"), context.ledger.last("canary.ended")
    look = looked.payload if looked is not None and looked.payload["promotion"] == number else None
    over = ended is not None and ended.payload["promotion"] == number
    running = running_canary(context) is not None
    state = "running" if running else str(ended.payload["verdict"]) if over and ended else "superseded"
    return {
        "agent": started.subject,
        "against": f"agent/{started.payload['old']['version']}",
        "since": started.payload["since"],
        "state": state,
        "verdict": None if look is None else look["verdict"],
        "says": "no look yet; `forebay canary`" if look is None else look["says"],
        "groups": [0, 0] if look is None else [look["new"], look["old"]],
    }


def _roll_back(context: Context, started: Entry, judged: Judged, record: Mapping[str, str]) -> dict[str, Any]:
    from flows.scoring import flag_of
    from tasks.promotion.promote import rollback

    keys.ready(context)
    new, old = (started.payload[role]["version"] for role in ("new", "old"))
    context.weights(context.agent(str(old)).payload)  # never back to files that were changed
    restore(context, context.registry, old)
    try:  # a flag is no harm in service, as this champion is shown to do: it is said, and keeps nobody from going back
        flag = flag_of(context, f"agent/{old}")
    except ForebayError as error:
        flag = f"may have learnt from revoked data, which cannot be told now: {error}"
    entry = rollback(
        context.ledger,
        context.registry,
        expected_champion=new,
        to=old,
        reason=f"canary: {judged.says}",
        by="canary",
        evidence=record,
        flag=flag,
    )
    keys.sign_head(context, entry)
    _end(context, started, judged, record)
    return {"kind": entry.kind, "seq": entry.seq, **entry.payload}


def _end(context: Context, started: Entry, judged: Judged, record: Mapping[str, str]) -> None:
    payload = {
        "promotion": started.payload["promotion"],
        "verdict": judged.verdict,
        "says": judged.says,
        "record": dict(record),
    }
    context.ledger.append("canary.ended", started.subject, payload)


def _newest_change(context: Context) -> Entry | None:
    kinds = ("promotion.committed", "rollback.committed")
    found = [e for kind in kinds for e in context.ledger.entries(kind) if e.subject.startswith("agent/")]
    return max(found, key=lambda e: e.seq, default=None)


def _not_running(context: Context) -> str:
    last = canary_status(context)
    if last is None:
        return "There is nothing to watch: no agent was promoted over another yet."
    return f"The canary of {last['agent']} is over ({last['state']}): {last['says']}."


def _traffic(context: Context, started: Mapping[str, Any]) -> tuple[dict[str, Traffic], dict[str, int]]:
    """Gather the episodes of both agents that count, by environment; return also what was left out, and why."""
    from tasks.promotion.canary import Group, Traffic

    since = datetime.fromisoformat(started["since"])
    role_of = {started["old"]["digest"]: "old", started["new"]["digest"]: "new"}
    weights, before = started["rule"]["weights"], started["rule"]["baseline"] == "before"
    rewards: dict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    left_out = {"undated": 0, "earlier": 0, "environments without weight": 0, "rewards outside [0, 1]": 0}
    for row in _rows(context, None if before else started["promotion"]):
        role = role_of.get(row["behaviour_digest"])
        if role is None:
            continue
        when = _when(row["created_at"])
        if row["env"] not in weights:
            left_out["environments without weight"] += 1
        elif not 0 <= row["reward"] <= 1:  # one such row must not blind the canary for good
            left_out["rewards outside [0, 1]"] += 1
        elif when is None:
            left_out["undated"] += 1
        elif when < since and not (before and role == "old"):
            left_out["earlier"] += 1
        else:
            rewards[row["env"], role, row["group_id"]][row["episode_id"]] = row["reward"]
    found: dict[str, dict[str, list[Group]]] = defaultdict(lambda: {"new": [], "old": []})
    for (env, role, group), values in sorted(rewards.items()):
        mean = sum(values[key] for key in sorted(values)) / len(values)
        found[env][role].append(Group(group, mean, len(values)))
    traffic = {env: Traffic(tuple(both["new"]), tuple(both["old"])) for env, both in found.items()}
    return traffic, {name: n for name, n in left_out.items() if n}


def _rows(context: Context, promotion: int | None) -> Iterator[Mapping[str, Any]]:
    """Yield episodes that wait, then sealed ones: of shards that came after entry `promotion`, where it is given."""
    import pyarrow.parquet as pq

    from tasks.replay import seal, shards

    name = context.settings.replay.dataset
    yield from unsealed_rows(context, name)
    newest = seal.newest(context.ledger, name)
    if newest is None:
        return
    known: set[str] = set()
    if promotion is not None:
        for entry in context.ledger.entries(seal.SEALED):
            if entry.seq < promotion and entry.payload["name"] == name:
                known |= {shard["sha256"] for shard in entry.payload["shards"]}
    wanted = [shard for shard in newest.manifest.shards if shard.sha256 not in known]
    shards.verify(context.workspace, wanted)
    for shard in wanted:
        yield from pq.read_table(context.workspace.root / shard.path, columns=list(_COLUMNS)).to_pylist()


def _when(text: str) -> datetime | None:
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


# ---------------------------------------------------------------------------------------------- rehearsal


def rehearse(context: Context, always: bool = True) -> dict[str, Any]:
    """Pin the predecessor's files, load it in a clean process, let it answer, and keep how long that took.

    Args:
        always: do it although the same predecessor was rehearsed within a day, by the same code, without a problem.

    Returns:
        {"agent": None} where there is no predecessor, else the ledger's payload. A bad predecessor is a result.
        `registry` says what MLflow lacks of it, "" where nothing: a rollback puts that back, so it serves all the same.
    """
    from tasks.promotion.promote import previous

    version = previous(context.ledger)
    if version is None:
        return {"agent": None, "says": "There is no predecessor to go back to."}
    agent = context.agent(str(version))
    marks = {
        "digest": agent.payload["digest"],
        "registry": absence(context, version),
        "code": code_digest(),
        "lock": lock_digest(),
    }
    last = context.ledger.last("rollback.rehearsed", agent.subject)
    if not always and last is not None and last.payload["ok"] and marks.items() <= last.payload.items():
        when = _when(last.time)
        if when is not None and datetime.now(UTC) - when < _REHEARSED_FOR:
            return dict(last.payload)
    started = time.perf_counter()
    payload = {"agent": agent.subject, **marks, "device": context.device(), **_serve(context, agent.payload)}
    payload["total_seconds"] = round(time.perf_counter() - started, 3)
    context.ledger.append("rollback.rehearsed", agent.subject, payload)
    return payload


def _serve(context: Context, agent: Mapping[str, Any]) -> dict[str, Any]:
    from flows.judging import heldout_tasks
    from tasks.evaluation.serving import measure

    try:
        folder = _pinned(context, agent)
    except ForebayError as error:
        return {"ok": False, "problem": str(error), "load_seconds": 0.0, "answer_seconds": 0.0}
    tasks = next(iter(heldout_tasks(context).values()))
    found = measure(
        folder,
        [task.prompt for task in tasks[:_PROMPTS]],
        device=context.device(),
        dtype=context.dtype(),
        repeats=1,
        threads=context.settings.compute.threads or None,
    )
    return {
        "ok": found.ok,
        "problem": found.problem,
        "load_seconds": round(found.load_seconds, 3),
        "answer_seconds": round(found.answer_seconds(0.5), 3),
    }


def _pinned(context: Context, agent: Mapping[str, Any]) -> Path:
    """Return the agent's folder, its bytes verified, after laying hard links that keep them from being cleaned up.

    A file that vanished from the folder comes back from its link.
    """
    pins, folder = context.workspace.pinned, context.workspace.root / str(agent["path"])
    mine = pins / str(agent["digest"])
    for name in agent["files"]:
        if mine.exists() and not (folder / name).exists() and (mine / name).exists():
            progress.current().say(f"{folder / name} was gone; it is back from {mine}.")
            _link(mine / name, folder / name)
    folder = context.weights(agent)
    for name in agent["files"]:
        if not (mine / name).exists():
            _link(folder / name, mine / name)
    for other in pins.iterdir():
        if other != mine:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
