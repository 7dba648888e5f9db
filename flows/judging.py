"""Compare the candidate with the champion on held-out tasks, and let the gate decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from flows import keys, progress
from flows.context import Context
from flows.experience import intact
from flows.pages import keep_page
from tasks.arena.environment import plain_name
from tasks.core.digest import digest_json
from tasks.core.errors import Conflict, NotFound, UsageError
from tasks.core.ledger import Entry, LedgerView
from tasks.core.stages import derive_seed, once

if TYPE_CHECKING:
    from tasks.arena.environment import Task
    from tasks.arena.guarded import Environments
    from tasks.core.settings import EarlyStop
    from tasks.evaluation.paired import Agent, Baseline, PairedOutcomes, Plan
    from tasks.promotion.budget import Spent
    from tasks.promotion.gate import Decision
    from tasks.promotion.promote import Entries, Office
    from tasks.reward.office import RewardDecision
    from tasks.rollout.rollout import Outcome


def heldout_tasks(context: Context) -> dict[str, list[Task]]:
    """Return the held-out tasks of every environment; their prompts are never in the training split.

    Another `evaluation.rotation` draws others; a family with few prompts may draw some of them again.
    """
    from tasks.arena.environment import get, plain_name

    settings = context.settings.evaluation
    turn = (settings.rotation,) if settings.rotation else ()
    return {
        name: get(name).tasks(
            "heldout", n, derive_seed(context.settings.seed, plain_name(name), "heldout", *turn)
        )
        for name, n in settings.tasks.items()
    }


def check_evaluation(context: Context) -> None:
    """Refuse to watch an evaluation whose test does not allow it.

    Raises:
        UsageError: the sentence says what to change.
    """
    if context.settings.evaluation.early_stop and context.policy.superiority.test != "betting":
        raise UsageError(
            "evaluation.early_stop looks at the answers while they come in, and superiority.test is `t`, which holds for one "
            "look alone; set superiority.test to betting in policy.yaml, or evaluation.early_stop to null."
        )


def tell_memories(context: Context) -> None:
    """Say which environments are judged with another memory than they are collected with: seldom is that meant."""
    collected = context.settings.collect.environments
    for name in context.settings.evaluation.tasks:
        others = [other for other in collected if plain_name(other) == plain_name(name)]
        if others and name not in others:
            progress.current().say(
                f"    evaluation.tasks has {name}, collect.environments {' and '.join(others)}: the agent will be judged with "
                "another memory than it learns with; name them alike unless you mean it"
            )


def evaluate_candidate(
    context: Context,
    candidate: int,
    champion: int,
    *,
    dataset: str,
    run: Mapping[str, Any],
    reward: Mapping[str, Any],
) -> dict[str, Any]:
    """Compare both agents and gather all other evidence about the candidate.

    Args:
        dataset: root of the dataset that it was trained on.
        run: receipt of the stage `train`.
        reward: receipt of the stage `reward`.

    Returns:
        The payload of `evaluation.done`, with evidence: {name of `gate.Inputs`: {path, sha256} or None}.
    """
    from flows import evidence
    from tasks.evaluation.paired import read_outcomes

    outputs, tasks = evaluate_pair(context, candidate, champion), heldout_tasks(context)
    file = outputs["outcomes"]
    outcomes = read_outcomes(context.workspace.root / file["path"], file["sha256"])
    further = {
        "proxy": evidence.score_by_proxy(context, reward, outcomes, tasks),
        "serving": evidence.measure_serving(context, candidate, champion, tasks)
        if context.policy.serving.required
        else None,
        "replay_value": evidence.estimate_on_replay(context, candidate, champion, dataset),
        "run": evidence.record_run(context, run),
    }
    return {**outputs, "evidence": further}


def evaluate_pair(context: Context, candidate: int, champion: int) -> dict[str, Any]:
    """Let both agents answer the same tasks, greedily, in the same job, and keep every answer as evidence.

    The champion answers again in the same job, so that both met the same code, precision and machine. With
    `evaluation.early_stop` they answer in turn, and stop when the verdict stands.
    """
    from tasks.arena.environment import get, verifier_digest
    from tasks.evaluation.paired import Agent, pair_outcomes, table, write_outcomes

    check_evaluation(context)
    agents = [context.agent(str(version)).payload for version in (candidate, champion)]
    tasks, early = heldout_tasks(context), context.settings.evaluation.early_stop
    tasks_digest = digest_json({name: [task.id for task in found] for name, found in tasks.items()})
    inputs = {
        "candidate": agents[0]["digest"],
        "champion": agents[1]["digest"],
        "tasks": tasks_digest,
        "verifiers": {name: verifier_digest(get(name)) for name in tasks},
        "dtype": context.dtype(),
    }
    if early is not None:
        inputs["early_stop"] = early.model_dump(mode="json")
        inputs["policy"] = context.policy.digest()

    def work(key: str) -> dict[str, Any]:
        names = (Agent(candidate, agents[0]["digest"]), Agent(champion, agents[1]["digest"]))
        with context.environments() as environments:
            baselines = _baselines(environments, tasks, context.settings.seed)
            if early is None:
                sides = [
                    _answer(context, environments, agent, tasks, role)
                    for agent, role in zip(agents, ("candidate", "champion"), strict=True)
                ]
                paired = pair_outcomes(sides[0], sides[1], names, baselines)
            else:
                pair = partial(_paired, names, baselines)
                paired = _watched(context, environments, agents, tasks, early, pair)
        path, sha256 = write_outcomes(context.workspace.evidence, paired)
        rows = table(paired, alpha=context.policy.errors.share)
        outputs = {
            "candidate": candidate,
            "champion": champion,
            "tasks_digest": tasks_digest,
            "outcomes": {"path": context.workspace.relative(path), "sha256": sha256},
            "slices": {row.env: asdict(row) for row in rows},
            "planned": sum(map(len, tasks.values())),
        }
        context.ledger.append("evaluation.done", sha256, outputs)
        return outputs

    def stands(outputs: Mapping[str, Any]) -> bool:
        return intact(context, outputs["outcomes"])

    outputs, _ = once(context.ledger, "evaluate", inputs, work, stands)
    return outputs


def decide_promotion(
    context: Context,
    *,
    candidate: int,
    evaluation: Mapping[str, Any],
    reward: Mapping[str, Any],
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """Weigh all evidence under the policy and record the decision, signed; equal evidence gives the same record.

    Raises:
        Conflict: another decision took from the same budgets meanwhile.
    """
    from flows.scoring import expiry, standing_fail
    from tasks.evaluation.paired import read_outcomes
    from tasks.promotion.budget import asked_before, spent
    from tasks.promotion.gate import FileRef, Finding, Inputs, decide

    evidence = context.workspace.evidence

    def ref(file: Mapping[str, str]) -> FileRef:
        return FileRef(
            (context.workspace.root / file["path"]).relative_to(evidence).as_posix(), file["sha256"]
        )

    further: dict[str, Any] = {
        name: file and ref(file) for name, file in evaluation.get("evidence", {}).items()
    }
    inputs = Inputs(
        outcomes=ref(evaluation["outcomes"]),
        reward=ref(reward["evidence"]),
        data=Finding(data["verdict"], data["root"], data["evidence"]["sha256"], tuple(data["reasons"])),
        integrity=check_integrity(context, candidate, data["root"]),
        lineage=check_lineage(context, candidate),
        **further,
        reward_expired=expiry(context, reward) or standing_fail(context, reward) or "",
    )
    outcomes = read_outcomes(evidence / inputs.outcomes.path, inputs.outcomes.sha256)

    def before(ledger: Entries) -> Spent:
        return spent(ledger.entries("decision.made"), outcomes.champion.digest, outcomes.tasks())

    known = asked_before(context.ledger.entries("decision.made"), inputs.question(context.policy))
    inputs = replace(inputs, spent=known or before(context.ledger))
    decision = decide(evidence, inputs, context.policy)

    def check(view: LedgerView) -> None:
        if known is None and before(view) != inputs.spent:
            raise Conflict(
                f"Another decision against agent/{outcomes.champion.version} or on the same tasks was recorded meanwhile; "
                "run `forebay stage decide` again."
            )

    return record_decision(context, decision, check)


def record_decision(
    context: Context,
    decision: Decision | RewardDecision,
    check: Callable[[LedgerView], None] | None = None,
    office: Office = "agent",
) -> dict[str, Any]:
    """Write the record, its signature beside it and the ledger's entry; the same decision again adds nothing.

    Args:
        check: refuses the entry by raising, under the ledger's lock.
    """
    from tasks.promotion.attest import sign_decision, signature_of, write_signature
    from tasks.promotion.gate import write_decision

    keys.ready(context)
    key = keys.service_key(context)
    path = write_decision(context.workspace.evidence, decision)
    payload = decision.payload(context.workspace.relative(path))
    envelope = sign_decision(payload, key)
    place = context.workspace.relative(write_signature(path, envelope))
    payload["signature"] = signature_of(place, envelope, key)
    subject = f"{office}/{decision.candidate.version}"
    made = context.ledger.last("decision.made", subject)
    if made is None or any(made.payload.get(name) != payload[name] for name in ("decision", "signature")):
        made = context.ledger.append("decision.made", subject, payload, check)
        keys.sign_head(context, made)
    keep_page(context, made)
    return payload


def replay_decision(context: Context, version: str, sign: bool = False) -> dict[str, Any]:
    """Verify the signature of the newest decision (about `version`) and recompute it from its evidence files.

    Args:
        sign: a decision without a signature, recomputed to the same bytes, is signed now.

    Raises:
        NotFound: nothing was decided, or evidence is gone.
        Corrupt: the signature is forged, evidence was changed, or it leads to another decision.
        Refused: the key that signed is unknown, removed, or not one of the service.
    """
    from tasks.promotion.attest import Unsigned, check_decision, read_signature
    from tasks.promotion.gate import recompute_decision

    entry = newest_decision(context, version)
    signer = None
    if entry.payload.get("signature") is not None and not sign:
        signer = check_decision(
            entry,
            read_signature(context.workspace.root, entry),
            keys.trust(context),
            entry.seq,
        ).name
    again = recompute_decision(context.workspace.root / entry.payload["record"]["path"])
    if sign:
        signer = keys.service_key(context).name
        record_decision(context, again)
    elif signer is None and _adopted_before(context, entry):
        raise Unsigned(
            f"The decision {again.digest[:12]}… follows from its evidence, but nobody signed it although this "
            f"workspace had keys; find out who wrote ledger entry {entry.seq}."
        )
    return {"decision": again.digest, "verdict": again.verdict, "agent": entry.subject, "signed_by": signer}


def _adopted_before(context: Context, entry: Entry) -> bool:
    first = next(iter(context.ledger.entries("key.trusted")), None)
    return first is not None and first.seq < entry.seq


def newest_decision(context: Context, version: str) -> Entry:
    """Return the ledger entry of the newest decision, or of the newest about `version`.

    Raises:
        NotFound: there is none.
    """
    subject = f"agent/{context.agent(version).payload['version']}" if version else None
    made = context.ledger.entries("decision.made", subject)
    entry = next((e for e in reversed(made) if e.subject.startswith("agent/")), None)
    if entry is None:
        raise NotFound(f"No decision about {subject or 'any agent'} yet; `forebay retrain` makes one.")
    return entry


def check_integrity(context: Context, candidate: int, root: str) -> Any:
    """Hash the candidate's files and its dataset's shards again, now, before anything rests on them."""
    from tasks.lineage.verify import verify
    from tasks.promotion.gate import Finding

    with progress.current().bar("integrity") as report:
        found = verify(context.ledger, context.workspace, f"agent/{candidate}", report)
    reasons = tuple(f"{item.path}: {item.problem}" for item in found.problems)
    agent = context.agent(str(candidate)).payload["digest"]
    return Finding(
        "PASS" if found.ok else "FAIL",
        agent,
        digest_json({"agent": agent, "data": root, "problems": reasons}),
        reasons,
    )


def check_lineage(context: Context, candidate: int) -> Any:
    """Find out whether the candidate learnt from anything that is revoked now, itself or through others."""
    from tasks.lineage.flagged import open_flags
    from tasks.promotion.gate import Finding

    flags = open_flags(context.ledger, context.workspace)
    subject, agent = f"agent/{candidate}", context.agent(str(candidate)).payload["digest"]
    reasons = tuple(f"{subject} {flag.why}" for flag in flags if flag.ref == subject) or (
        "nothing that it learnt from is revoked",
    )
    flagged = any(flag.ref == subject for flag in flags)
    evidence = digest_json({"agent": agent, "revoked": context.revoked, "reasons": reasons})
    return Finding("FAIL" if flagged else "PASS", agent, evidence, reasons)


def _baselines(
    environments: Environments, tasks: Mapping[str, Sequence[Task]], seed: int
) -> dict[str, Baseline]:
    from tasks.arena.floors import floor_of
    from tasks.evaluation.paired import Baseline

    floors = {name: floor_of(environments(name), found, seed) for name, found in tasks.items()}
    return {
        name: Baseline(floor.constant_action, floor.constant, floor.random, floor.error)
        for name, floor in floors.items()
    }


def _answer(
    context: Context,
    environments: Environments,
    agent: Mapping[str, Any],
    tasks: Mapping[str, Sequence[Task]],
    role: str,
) -> list[Outcome]:
    from models.causal_lm import load_policy, load_tokenizer
    from tasks.rollout.rollout import evaluate

    folder = context.weights(agent)
    model, tokenizer = load_policy(folder, context.device(), context.dtype()), load_tokenizer(folder)
    rows, total, answered = context.settings.evaluation.batch_rows, sum(map(len, tasks.values())), []
    with progress.current().bar(f"evaluate {role}") as report:
        for name, found in tasks.items():
            for start in range(0, len(found), rows):
                answered += evaluate(model, tokenizer, environments(name), found[start : start + rows], rows)
                score = sum(o.reward for o in answered) / len(answered)
                report(len(answered), total, f"agent/{agent['version']}  mean reward {score:.3f}")
    return answered


def _watched(
    context: Context,
    environments: Environments,
    agents: Sequence[Mapping[str, Any]],
    tasks: Mapping[str, Sequence[Task]],
    early: EarlyStop,
    pair: Callable[[Sequence[Sequence[Outcome]], Plan], PairedOutcomes],
) -> PairedOutcomes:
    """Let both agents answer chunk by chunk until the gate needs no more; both are in memory meanwhile."""
    from models.causal_lm import load_policy, load_tokenizer
    from tasks.evaluation.stopping import chunks, plan_of
    from tasks.promotion.evidence.watch import running_gain, stop_reason
    from tasks.rollout.rollout import evaluate

    plan, rows = plan_of(tasks, early.first, early.every), context.settings.evaluation.batch_rows
    folders = [context.weights(agent) for agent in agents]
    players = [(load_policy(f, context.device(), context.dtype()), load_tokenizer(f)) for f in folders]
    sides: tuple[list[Outcome], list[Outcome]] = ([], [])
    with progress.current().bar("evaluate, watched") as report:
        for chunk in chunks(tasks, early.first, early.every):
            for side, (model, tokenizer) in zip(sides, players, strict=True):
                for name, found in chunk.items():
                    side += evaluate(model, tokenizer, environments(name), found, rows)
            paired = pair(sides, plan)
            gain = running_gain(paired, context.policy)
            report(
                len(sides[0]), plan.total, f"gain {gain.estimate:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
            )
            reason = stop_reason(paired, context.policy)
            if reason is not None:
                break
    if reason is not None and len(sides[0]) < plan.total:
        progress.current().say(
            f"    stopped after {len(sides[0])} of {plan.total} tasks: {reason.rstrip('.')}"
        )
    return paired


def _paired(
    agents: tuple[Agent, Agent],
    baselines: Mapping[str, Baseline],
    sides: Sequence[Sequence[Outcome]],
    plan: Plan,
) -> PairedOutcomes:
    from tasks.evaluation.paired import pair_outcomes

    return pair_outcomes(sides[0], sides[1], agents, baselines, plan)
