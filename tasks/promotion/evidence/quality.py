"""The claim about the mean reward over all held-out tasks, and the guard of every environment."""

from __future__ import annotations

from tasks.evaluation.bounded import bounded_mean
from tasks.evaluation.paired import PairedOutcomes
from tasks.evaluation.sequential import betting_mean
from tasks.evaluation.statistics import Estimate, Verdict, clustered_mean, holm, judge, mcnemar
from tasks.promotion.evidence.item import Evidence, FileRef, measured, words
from tasks.promotion.evidence.means import DIFFERENCE, differences, mean_of, p_above, stream_of
from tasks.promotion.policy import Policy


def quality_evidence(outcomes: PairedOutcomes, source: FileRef, policy: Policy) -> Evidence:
    """Weigh the policy's claim, superiority or non-inferiority, over all tasks.

    Superiority at margin 0 by the t interval, with which the exact McNemar test must agree: that interval is too short
    where the agents differ on few tasks, or where great losses are rare. At any other margin by Gaffke's bound, which is
    McNemar's test at margin 0 for rewards of 0 and 1. By betting nothing else has to agree, and the evaluation may have
    been watched.
    """
    rule, alpha = policy.superiority, policy.errors.share
    margin = rule.threshold
    gain = gold_gain(outcomes, policy, alpha)
    verdict = judge(gain.low, gain.high, margin)
    says = f"{words(gain)}, needed above {margin:.3f}{_progress(outcomes)}"
    if outcomes.plan is not None and rule.test != "betting":
        verdict = "INCONCLUSIVE"
        says = "the evaluation was watched while it ran, so only `superiority.test: betting` can judge it"
    elif gain.clusters < rule.min_tasks:
        verdict = "INCONCLUSIVE"
        says = f"{gain.clusters} tasks are too few, the policy asks for {rule.min_tasks}"
    elif verdict == "PASS" and rule.test == "t" and margin == 0:
        candidate, champion, _ = outcomes.rewards()
        p = mcnemar(candidate, champion, outcomes.noise())
        if p > alpha:
            verdict = "INCONCLUSIVE"
            says += f"; too few tasks differ to be sure (exact p = {p:.4f}, needed {alpha:.4g})"
    if verdict == "INCONCLUSIVE" and gain.clusters >= rule.min_tasks:
        says += f"; a true gain of {margin + gain.mde:.3f} would be found {rule.power:.0%} of the time"
    name = "Quality" if rule.claim == "superiority" else "Quality (no worse)"
    return measured("quality", verdict, f"{name}: {says}.", source.sha256, gain, margin)


def gold_gain(outcomes: PairedOutcomes, policy: Policy, alpha: float) -> Estimate:
    """Estimate the difference of mean rewards over all tasks by the policy's own test, at the one-sided error `alpha`."""
    rule = policy.superiority
    values, clusters = differences(outcomes)
    if rule.test == "betting":
        largest = outcomes.largest()
        return betting_mean(
            values, clusters, alpha=alpha, support=DIFFERENCE, power=rule.power, largest=largest
        )
    estimate = clustered_mean if rule.threshold == 0 else bounded_mean
    return estimate(values, clusters, alpha=alpha, support=DIFFERENCE, power=rule.power)


def guard_evidence(outcomes: PairedOutcomes, source: FileRef, policy: Policy) -> list[Evidence]:
    """Weigh non-inferiority in each environment, with Holm's correction over environments.

    By Gaffke's bound, which covers where nearly all tasks are answered alike or a whole environment is won or lost; by
    betting where the evaluation was watched.
    """
    rule, margin = policy.guards, -policy.guards.margin
    names = outcomes.slices()
    streams = [stream_of(outcomes, env) for env in names]
    harmless = holm([p_above(outcomes, stream, margin) for stream in streams])
    harmful = holm([p_above(outcomes, stream.mirrored(), -margin) for stream in streams])
    items = []
    for env, p_good, p_bad in zip(names, harmless, harmful, strict=True):
        gain = mean_of(
            outcomes, *differences(outcomes, env), alpha=rule.alpha, support=DIFFERENCE,
            power=policy.superiority.power, env=env,
        )  # fmt: skip
        verdict: Verdict = (
            "PASS" if p_good <= rule.alpha else "FAIL" if p_bad <= rule.alpha else "INCONCLUSIVE"
        )
        claim = {"PASS": "is no worse", "FAIL": "is worse", "INCONCLUSIVE": "may be worse"}[verdict]
        says = f"Guard {env}: the candidate {claim}, {words(gain)}, needed above {margin:.3f}"
        if verdict == "INCONCLUSIVE" and gain.low > margin:
            says += f" for all environments together (Holm p = {p_good:.3f}, needed {rule.alpha:.3g})"
        items.append(measured(f"guard/{env}", verdict, f"{says}.", source.sha256, gain, margin))
    return items


def _progress(outcomes: PairedOutcomes) -> str:
    """How much of what was planned has been answered."""
    if outcomes.plan is None:
        return ""
    answered = len({(pair.env, pair.task_id) for pair in outcomes.pairs})
    return f", after {answered} of {outcomes.plan.total} tasks"
