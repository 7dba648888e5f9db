"""One cycle, stage by stage: plain functions that Prefect, DVC and the command line all call.

A cycle pins its champion, dataset, settings, policy and code when it starts. Each stage writes a receipt
(`data/cycle/<stage>.json`) and takes what it needs from earlier receipts. Results are found again by
content key in the ledger, so a killed cycle goes on where it was, and a finished one costs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flows.context import Context
from flows.experience import finished_collections, waiting_groups
from tasks.core.atomic import write_atomic
from tasks.core.digest import canonical_json, digest_json
from tasks.core.errors import NotFound, Refused
from tasks.core.ledger import Entry
from tasks.core.stages import STAGES

CollectMode = Literal["never", "missing", "always"]
Receipt = dict[str, Any]


@dataclass(frozen=True)
class Cycle:
    """A started cycle and what it pinned; `begin` is the agent to train from where it is not the champion."""

    key: str
    champion: int
    dataset: str | None
    collect: bool
    round: int
    receipts: Path
    begin: int | None = None

    @property
    def start(self) -> int:
        """The version that training starts from."""
        return self.champion if self.begin is None else self.begin

    def has(self, stage: str) -> bool:
        """Tell whether `stage` has run in this cycle."""
        path = self.receipts / f"{stage}.json"
        return path.exists() and json.loads(path.read_text())["cycle"] == self.key

    def receipt(self, stage: str) -> Receipt:
        """Return what `stage` gave in this cycle.

        Raises:
            NotFound: the stage has not run in this cycle.
        """
        if not self.has(stage):
            raise NotFound(f"Stage `{stage}` has not run in this cycle yet; run `forebay stage {stage}`.")
        return dict(json.loads((self.receipts / f"{stage}.json").read_text())["outputs"])


@dataclass(frozen=True)
class Finished:
    """A cycle that already came to its end with the same data, settings, policy and code."""

    entry: Entry


def sealed_payload(context: Context, ref: str) -> Mapping[str, Any]:
    """Return the ledger's payload of the sealed dataset that `ref` names: its name, name/vN, or the start of its root.

    Raises:
        NotFound: there is none; the sentence lists what there is.
    """
    from tasks.replay.seal import find

    entry = context.ledger.last("dataset.sealed", find(context.ledger, ref).manifest.subject)
    assert entry is not None  # find() has just read it
    return entry.payload


def newest_root(context: Context) -> str | None:
    """Return the Merkle root of the newest version of the workspace's dataset, None where nothing is sealed."""
    from tasks.replay.seal import newest

    found = newest(context.ledger, context.settings.replay.dataset)
    return None if found is None else found.root


def open_cycle(
    context: Context,
    collect: CollectMode = "missing",
    dataset: str | None = None,
    force: bool = False,
    start: str | None = None,
) -> Cycle | Finished:
    """Resume the unfinished cycle if it has the same pins, else start one, unless there is nothing new to do.

    Args:
        start: the agent to train from, where it is not the champion: a retraining after a revocation.
    """
    ledger, pins = context.ledger, context.pins
    champion = context.agent("champion").payload
    init = champion if start is None else context.agent(start).payload
    begun = {} if init["version"] == champion["version"] else {"start": init["version"]}
    root = sealed_payload(context, dataset)["root"] if dataset else None
    ended = {e.subject for e in ledger.entries("cycle.finished")}
    for entry in reversed(ledger.entries("cycle.started")):
        if entry.subject in ended:
            continue
        same = entry.payload["pins"] == pins and entry.payload.get("start") == begun.get("start")
        if same and root in (None, entry.payload["dataset"]) and not force:
            return _cycle(context, entry)
        finish(
            context,
            entry.subject,
            "abandoned",
            "settings, policy, code, dataset or revocations changed before it ended",
        )
    if root is None and collect != "always" and not waiting_groups(context):
        root = newest_root(context)
    wants = collect == "always" or (collect == "missing" and root is None and not waiting_groups(context))
    if not wants and root is not None and not force:
        for entry in reversed(ledger.entries("cycle.finished")):
            same = entry.payload.get("pins") == pins and entry.payload.get("dataset") == root
            same &= entry.payload.get("start") == begun.get("start")
            if same and entry.payload["outcome"] in ("promoted", "held"):
                return Finished(entry)
    payload = {
        **begun,
        "pins": pins,
        "champion": champion["version"],
        "champion_digest": champion["digest"],
        "dataset": root,
        "collect": wants,
        "round": finished_collections(context),
        "started": len(ledger.entries("cycle.started")),
    }
    return _cycle(context, ledger.append("cycle.started", digest_json(payload), payload))


def finish(context: Context, key: str, outcome: str, reason: str, **details: Any) -> Entry:
    """Record how the cycle ended: promoted, held, refused or abandoned."""
    payload = {"outcome": outcome, "reason": reason, "pins": context.pins, **details}
    return context.ledger.append("cycle.finished", key, payload)


def run_stage(context: Context, cycle: Cycle, stage: str) -> Receipt:
    """Run one stage of the cycle, or find its result, and write its receipt."""
    outputs = _FUNCTIONS[stage](context, cycle)
    receipt = {"cycle": cycle.key, "stage": stage, "outputs": outputs}
    write_atomic(cycle.receipts / f"{stage}.json", canonical_json(receipt))
    return outputs


def _cycle(context: Context, entry: Entry) -> Cycle:
    p = entry.payload
    return Cycle(
        entry.subject, p["champion"], p["dataset"], p["collect"], p["round"],
        context.workspace.root / "data" / "cycle", p.get("start"),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ stages


def _collect(context: Context, cycle: Cycle) -> Receipt:
    from flows.experience import collect_into_segment

    if not cycle.collect:
        return {"skipped": "experience is there already"}
    return collect_into_segment(context, f"agent/{cycle.champion}", cycle.round)


def _seal(context: Context, cycle: Cycle) -> Receipt:
    from flows.experience import seal_dataset

    if cycle.dataset is not None:
        return dict(sealed_payload(context, cycle.dataset))
    newest = newest_root(context)
    if newest is not None and not waiting_groups(context):
        return dict(sealed_payload(context, newest))  # sealed by this cycle before it was killed
    return seal_dataset(context, announce=False)


def _validate(context: Context, cycle: Cycle) -> Receipt:
    from flows.experience import validate_dataset

    return validate_dataset(
        context, cycle.receipt("seal")["root"], agent=cycle.start
    )  # judged by the next stage


def _reward(context: Context, cycle: Cycle) -> Receipt:
    from flows.training import train_and_validate_reward_model

    _require_valid(cycle)
    return train_and_validate_reward_model(context, cycle.receipt("seal"), cycle.start)


def _train(context: Context, cycle: Cycle) -> Receipt:
    from flows.training import train_agent

    _require_valid(cycle)
    return train_agent(context, cycle.receipt("seal"), cycle.start)


def _register(context: Context, cycle: Cycle) -> Receipt:
    from flows.training import register_trained

    run = cycle.receipt("train")
    if run["steps"] == 0:
        raise Refused(
            f"Training stopped before its first good checkpoint ({run['stop_reason']}), so there is no candidate to judge; "
            f"look at the run's metrics, and lower training.learning_rate or collect fresh experience."
        )
    return register_trained(context, run, cycle.receipt("seal"), cycle.start)


def _evaluate(context: Context, cycle: Cycle) -> Receipt:
    from flows.judging import evaluate_candidate

    return evaluate_candidate(
        context,
        cycle.receipt("register")["version"],
        cycle.champion,
        dataset=cycle.receipt("seal")["root"],
        run=cycle.receipt("train"),
        reward=cycle.receipt("reward"),
    )


def _decide(context: Context, cycle: Cycle) -> Receipt:
    from flows.judging import decide_promotion

    return decide_promotion(
        context,
        candidate=cycle.receipt("register")["version"],
        evaluation=cycle.receipt("evaluate"),
        reward=cycle.receipt("reward"),
        data=cycle.receipt("validate"),
    )


def _promote(context: Context, cycle: Cycle) -> Receipt:
    from flows.champions import promote_agent
    from flows.registry import settle

    decision = cycle.receipt("decide")
    subject = f"agent/{decision['candidate']['version']}"
    if decision["verdict"] != "PASS":
        return {
            "promoted": False,
            "reason": f"{subject} is not promoted: the gate says {decision['verdict']}.",
        }
    if decision["approval"] == "required":
        return {"promoted": False, "reason": f"{subject} passed and waits for `forebay approve {subject}`."}
    settle(context)  # a promotion of this cycle may have been cut short between intent and alias
    for entry in context.ledger.entries("promotion.committed", subject):
        in_office = context.agent("champion").subject == subject
        if in_office and entry.payload["decision"] == decision["decision"]:  # before the cycle was killed
            return {**entry.payload, "promoted": True, "reason": f"{subject} is promoted."}
    change = promote_agent(context, subject, f"cycle {cycle.key[:12]}")
    return {**change, "promoted": True, "reason": f"{subject} is promoted."}


def _require_valid(cycle: Cycle) -> None:
    """Judge by the verdict of this cycle's own validation: another one may have asked other questions."""
    report = cycle.receipt("validate")
    if report["verdict"] != "PASS":
        raise Refused(f"Dataset {report['root'][:12]} is quarantined: {'; '.join(report['reasons'])}.")


_FUNCTIONS: Mapping[str, Callable[[Context, Cycle], Receipt]] = dict(
    zip(
        STAGES,
        (_collect, _seal, _validate, _reward, _train, _register, _evaluate, _decide, _promote),
        strict=True,
    )
)
