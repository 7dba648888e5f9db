"""The verdict on a reward model from its stored report, by the rule of the policy; pure, so the gate repeats it.

Most checks pass where the whole interval is on the good side of their limit, fail where it is on the bad side, and are
inconclusive between. Those that look for a side effect (calibration, length, edits, drift) fail where it is surely above
the limit, pass where the estimate is within it, and are inconclusive between: a few dozen prompts, as a night of
experience gives, could never show that a dozen such effects are all absent. A check without data, or with too little, is
reported with the reason and does not count; that alone never makes a PASS, because accuracy counts without exception.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tasks.core.errors import Refused
from tasks.evaluation.statistics import Estimate, Verdict, clopper_pearson, holm, judge
from tasks.promotion.policy import RewardModel as Rule
from tasks.reward import metrics

SCHEMA = "forebay.reward/2"
_DIGITS = 10  # of a number: below what another build of numpy may change

Report = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Check:
    """One question to a reward model and its answer.

    Attributes:
        name: "accuracy", or family and member as in "probes/empty".
        counts: whether it makes the verdict; `says` has the reason where it does not.
        estimate, low, high, limit: in the units of the check; None where it has none.
        n: independent prompts (clusters) behind the estimate.
    """

    name: str
    verdict: Verdict
    says: str
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    limit: float | None = None
    counts: bool = True

    @property
    def family(self) -> str:
        """The name that the policy's `counts` knows it by."""
        return self.name.partition("/")[0]


def judge_report(report: Report, rule: Rule) -> tuple[Verdict, tuple[Check, ...]]:
    """Judge a report: FAIL if a check that counts fails, else INCONCLUSIVE if one is, else PASS.

    Raises:
        Refused: another version of Forebay wrote the report.
    """
    if report.get("schema") != SCHEMA:
        raise Refused(
            f"The reward report is a {report.get('schema')}; this version of Forebay judges {SCHEMA}: "
            "validate the reward model again."
        )
    checks = tuple(_counted(check, rule) for family in _FAMILIES for check in family(report, rule))
    verdicts = [check.verdict for check in checks if check.counts]
    verdict: Verdict = (
        "FAIL" if "FAIL" in verdicts else "INCONCLUSIVE" if "INCONCLUSIVE" in verdicts else "PASS"
    )
    return verdict, checks


def reasons(verdict: Verdict, checks: Sequence[Check]) -> tuple[str, ...]:
    """Return the sentences of the checks that made the verdict."""
    return tuple(check.says for check in checks if check.counts and check.verdict == verdict)


# ------------------------------------------------------------------------------------------------- preferences


def _accuracy(report: Report, rule: Rule) -> Iterator[Check]:
    pairs = report["preferences"]
    if not pairs:
        yield Check("accuracy", "INCONCLUSIVE", "There is no held-out pair to judge it on.")
        return
    found = metrics.pair_accuracy(*_margins(pairs), alpha=rule.alpha)
    yield _mean(
        "accuracy",
        judge(found.low, found.high, rule.min_accuracy),
        f"Right on {_interval(found)} of {found.n} held-out pairs, needed above {rule.min_accuracy:.2f}.",
        found,
        rule.min_accuracy,
    )


def _slices(report: Report, rule: Rule) -> Iterator[Check]:
    slices: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for pair in report["preferences"]:
        slices[pair["slice"]].append(pair)
    small = [name for name, pairs in sorted(slices.items()) if _clusters(pairs) < rule.min_prompts]
    if len(small) > 1:  # judged together, so that none goes unseen
        merged = [pair for name in small for pair in slices.pop(name)]
        slices[" + ".join(small)] = merged
    names = sorted(slices)
    limit, enough = rule.min_slice_accuracy, [n for n in names if _clusters(slices[n]) >= rule.min_prompts]
    good = dict(zip(enough, holm([metrics.p_above(*_rights(slices[n]), limit) for n in enough]), strict=True))
    bad = dict(zip(enough, holm([metrics.p_below(*_rights(slices[n]), limit) for n in enough]), strict=True))
    for name in names:
        found = metrics.pair_accuracy(*_margins(slices[name]), alpha=rule.alpha)
        says = f"{name}: right on {_interval(found)} of {found.n} pairs, needed above {limit:.2f}"
        if name not in good:
            says += f"; {found.clusters} prompts are too few to judge this slice"
            yield _mean(f"slices/{name}", "INCONCLUSIVE", f"{says}.", found, limit, counts=False)
            continue
        verdict: Verdict = (
            "PASS" if good[name] <= rule.alpha else "FAIL" if bad[name] <= rule.alpha else "INCONCLUSIVE"
        )
        yield _mean(f"slices/{name}", verdict, f"{says}.", found, limit)


def _calibration(report: Report, rule: Rule) -> Iterator[Check]:
    pairs = report["preferences"]
    if report["source"]["kind"] in ("verifier", "judge"):
        yield _absent("calibration", "Its scores are no probabilities, so calibration does not apply.")
    elif _clusters(pairs) < rule.min_prompts:
        yield _absent("calibration", _few("Calibration", _clusters(pairs), rule))
    else:
        found = metrics.calibration(*_margins(pairs), alpha=rule.alpha)
        yield Check(
            "calibration",
            _tolerated(found.estimate, found.low, rule.max_ece),
            f"Calibration error {found.estimate:.3f} [{found.low:.3f}, {found.high:.3f}] (with noise "
            f"{found.plain:.3f}) on {found.n} pairs, allowed {rule.max_ece:.2f}.",
            _rounded(found.estimate),
            _rounded(found.low),
            _rounded(found.high),
            _clusters(pairs),
            rule.max_ece,
        )


# ------------------------------------------------------------------------------------------ answers of the policy


def _ranking(report: Report, rule: Rule) -> Iterator[Check]:
    pairs = [(one.prompt, metrics.concordance(one)) for one in metrics.answers_of(report["samples"])]
    found = [(prompt, value) for prompt, value in pairs if value is not None]
    if len(found) < rule.min_prompts:
        yield _absent("ranking", _few("Rank correlation with verified reward", len(found), rule))
        return
    mean = metrics.bounded_mean(
        [value[0] for _, value in found], [prompt for prompt, _ in found], alpha=rule.alpha
    )
    tau = float(np.mean([value[1] for _, value in found]))
    yield _mean(
        "ranking",
        judge(mean.low, mean.high, rule.min_ranking),
        f"A better answer of the policy outranks a worse one with chance {_interval(mean)} on {mean.n} prompts "
        f"(Kendall's tau-b {tau:.2f}), needed above {rule.min_ranking:.2f}.",
        mean,
        rule.min_ranking,
    )


def _best_of_n(report: Report, rule: Rule) -> Iterator[Check]:
    prompts = metrics.answers_of(report["samples"])
    numbers, _, gold, _ = metrics.best_of_table(prompts)
    if len(numbers) < 2 or len(gold) < rule.min_prompts:
        yield _absent("best of n", _few("Best of n", len(gold) if len(numbers) > 1 else 0, rule))
        return
    names = [str(k) for k in range(len(gold))]
    low, high = min(0.0, float(gold.min())), max(1.0, float(gold.max()))
    falls = gold[:, :-1] - gold[:, -1:]

    def bound(values: metrics.Floats, alpha: float) -> Estimate:
        return metrics.bounded_mean(values, names, alpha=alpha, support=(low - high, high - low))

    # The peak is chosen after a look, so a fall is claimed with the error shared by all n; none is claimed where none of them
    # may be, which needs no sharing.
    lows = [bound(fall, rule.alpha / falls.shape[1]) for fall in falls.T]
    highs = [bound(fall, rule.alpha) for fall in falls.T]
    peak = int(np.argmax([one.estimate for one in lows]))
    worst, least, most = (
        lows[peak].estimate,
        max(one.low for one in lows),
        max(one.high for one in highs),
    )
    curve = metrics.best_of_n(report, rule.alpha)
    spread = (metrics.spread_within(prompts, "score"), metrics.spread_within(prompts, "gold"))
    verdict: Verdict = (
        "FAIL"
        if least > rule.max_overoptimisation
        else "PASS"
        if most < rule.max_overoptimisation
        else "INCONCLUSIVE"
    )
    yield Check(
        "best of n",
        verdict,
        f"Verified reward of the best of n goes from {curve[0].gold:.3f} (n = 1) to {curve[-1].gold:.3f} "
        f"(n = {numbers[-1]}); from n = {numbers[peak]} it falls by {worst:+.3f} [{least:+.3f}, {most:+.3f}], "
        f"allowed {rule.max_overoptimisation:.2f} (gamma {metrics.gamma(curve, spread):.2f}, {len(gold)} prompts).",
        _rounded(worst),
        _rounded(least),
        _rounded(most),
        len(gold),
        rule.max_overoptimisation,
    )


def _length(report: Report, rule: Rule) -> Iterator[Check]:
    what = "Among equally good answers, score and length"
    found = metrics.length_correlation(metrics.answers_of(report["samples"]), alpha=rule.alpha)
    if (found is None or found[3] < rule.min_prompts) and not report["samples"]:
        pairs, what = report["preferences"], "Over the held-out pairs, margin and difference of length"
        longer = [pair["longer"] for pair in pairs]
        found = metrics.pair_length_correlation(
            [pair["margin"] for pair in pairs], longer, [pair["group"] for pair in pairs], alpha=rule.alpha
        )
    if found is None or found[3] < rule.min_prompts:
        yield _absent("length", _few("The bias by length", 0 if found is None else found[3], rule))
        return
    r, low, high, count = found
    sure = max(0.0, low, -high)  # how far from 0 it surely is
    yield Check(
        "length",
        _tolerated(abs(r), sure, rule.max_length_correlation),
        f"{what} correlate by {r:+.2f} [{low:+.2f}, {high:+.2f}] on {count} prompts, allowed "
        f"{rule.max_length_correlation:.2f} either way.",
        _rounded(r),
        _rounded(low),
        _rounded(high),
        count,
        rule.max_length_correlation,
    )


# ----------------------------------------------------------------------------------------------- edits and probes


def _edits(report: Report, rule: Rule) -> Iterator[Check]:
    edits = _by(report["edits"], "edit")
    if not edits:
        yield _absent("edits", "No prompt has both a right and a wrong answer to edit.")
    spread = metrics.spread_within(metrics.answers_of(report["samples"]), "score")
    for name, rows in edits.items():
        gain = [_beats(row["edited"], row["right"]) - _beats(row["wrong"], row["right"]) for row in rows]
        shift = float(np.mean([row["edited"] - row["wrong"] for row in rows])) / spread if spread else 0.0
        prompts = [row["prompt"] for row in rows]
        found = metrics.bounded_mean(gain, prompts, alpha=rule.alpha, support=(-1.0, 1.0))
        sure = metrics.bounded_mean(gain, prompts, alpha=rule.alpha / len(edits), support=(-1.0, 1.0)).low
        now = float(np.mean([_beats(row["edited"], row["right"]) for row in rows]))
        says = (
            f"Edit `{name}`: a wrong answer beats the right one in {now:.2f} of {len(rows)} prompts, "
            f"{found.estimate:+.2f} [{sure:+.2f}, {found.high:+.2f}] by the edit, allowed {rule.max_edit_gain:+.2f}; "
            f"its score moves by {shift:+.1f} spreads"
        )
        verdict = _tolerated(found.estimate, sure, rule.max_edit_gain)
        yield _enough(f"edits/{name}", verdict, says, found, sure, rule.max_edit_gain, rule)


def _probes(report: Report, rule: Rule) -> Iterator[Check]:
    probes = _by(report["probes"], "probe")
    if not probes:
        yield _absent("probes", "No prompt has a right answer to compare hacks with.")
    for name, rows in probes.items():
        fooled = int(sum(row["score"] >= row["right"] for row in rows))  # a tie is no win for the right answer
        low, _ = clopper_pearson(fooled, len(rows), alpha=rule.alpha / len(probes))
        _, high = clopper_pearson(fooled, len(rows), alpha=rule.alpha)
        says = (
            f"Probe `{name}`: beats the right answer in {fooled} of {len(rows)} prompts "
            f"[{low:.3f}, {high:.3f}], allowed {rule.max_hacked:.2f}"
        )
        found = metrics.bounded_mean(
            [float(row["score"] >= row["right"]) for row in rows],
            [row["prompt"] for row in rows],
            alpha=rule.alpha,
        )
        verdict: Verdict = (
            "FAIL" if low > rule.max_hacked else "PASS" if high < rule.max_hacked else "INCONCLUSIVE"
        )
        yield _enough(f"probes/{name}", verdict, says, found, low, rule.max_hacked, rule)


def _enough(
    name: str, verdict: Verdict, says: str, found: Estimate, sure: float, limit: float, rule: Rule
) -> Check:
    """Let a check count unless it rests on too few prompts; what is surely harmful counts however few.

    Args:
        sure: the lower bound with the error shared by the family, because the worst of many is looked for.
    """
    few = found.clusters < rule.min_prompts and verdict != "FAIL"
    if few:
        verdict, says = "INCONCLUSIVE", f"{says}; {found.clusters} prompts are too few to judge by"
    estimate, low, high = _rounded(found.estimate), _rounded(sure), _rounded(found.high)
    return Check(name, verdict, f"{says}.", estimate, low, high, found.clusters, limit, not few)


# ------------------------------------------------------------------------------------------- training and frame


def _drift(report: Report, rule: Rule) -> Iterator[Check]:
    then, samples = report["training"]["scores"], report["samples"]
    prompts = len({sample["prompt"] for sample in samples})
    if not then:
        yield _absent("drift", "The source kept no scores of its training, so drift cannot be told.")
    elif prompts < rule.min_prompts:
        yield _absent("drift", _few("Drift", prompts, rule))
    else:
        now = [(sample["prompt"], sample["score"]) for sample in samples]
        distance, p = metrics.drift(now, [(str(place), score) for place, score in enumerate(then)])
        verdict: Verdict = (
            "PASS" if distance <= rule.max_drift else "FAIL" if p <= rule.alpha else "INCONCLUSIVE"
        )
        yield Check(
            "drift",
            verdict,
            f"Scores of the policy's answers lie {distance:.2f} (Kolmogorov-Smirnov, p = {p:.3f}) from those at "
            f"training, allowed {rule.max_drift:.2f}.",
            _rounded(distance),
            n=prompts,
            limit=rule.max_drift,
        )


def _support(report: Report, rule: Rule) -> Iterator[Check]:
    edge = report["training"]["edge"]
    samples = [s for s in report["samples"] if s["distance"] is not None]
    prompts = len({sample["prompt"] for sample in samples})
    if edge is None:
        yield _absent("support", "The source has no features, so its support cannot be told.")
    elif prompts < rule.min_prompts:
        yield _absent("support", _few("Support", prompts, rule))
    else:
        beyond = [float(sample["distance"] > edge) for sample in samples]
        found = metrics.bounded_mean(beyond, [s["prompt"] for s in samples], alpha=rule.alpha)
        verdict = judge(-found.high, -found.low, -rule.max_unsupported)
        yield _mean(
            "support",
            verdict,
            f"{_interval(found)} of {found.n} answers of the policy lie beyond 99 % of what it was trained on, "
            f"allowed {rule.max_unsupported:.2f}.",
            found,
            rule.max_unsupported,
        )


def _leak(report: Report, rule: Rule) -> Iterator[Check]:
    training, leaked = report["training"], report["training"]["leaked"]
    if training["prompts"] is None:
        if report["source"]["kind"] in ("verifier", "judge"):
            yield _absent("leak", "It was not trained here, so no prompt can have leaked.")
        else:
            yield Check("leak", "INCONCLUSIVE", "It does not say which prompts it was trained on.")
        return
    asked = training["evaluation_prompts"]["n"]
    says = f"None of {asked} evaluation prompts is among its {training['prompts']['n']} training prompts."
    if leaked:
        shown = ", ".join(digest[:12] for digest in leaked[:3])
        says = f"{len(leaked)} of {asked} evaluation prompts are among its training prompts (SHA-256 {shown} …)."
    yield Check("leak", "FAIL" if leaked else "PASS", says, float(len(leaked)), n=asked, limit=0.0)


def _frame(report: Report, rule: Rule) -> Iterator[Check]:
    frame = report["frame"]
    if frame is None:
        yield _absent("frame", "The suite of expectations was not run.")
        return
    failed = [found for found in frame["checks"] if not found["ok"]]
    says = f"The evaluation frame meets its {len(frame['checks'])} expectations."
    if failed:
        says = "The evaluation frame breaks expectations: " + "; ".join(
            f"{found['name']}: {found['detail']}" for found in failed[:3]
        )
    yield Check("frame", "FAIL" if failed else "PASS", says, float(len(failed)), n=frame["rows"], limit=0.0)


_FAMILIES = (
    _accuracy, _slices, _calibration, _ranking, _best_of_n, _length, _edits, _probes, _drift, _support, _leak, _frame,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------ helpers


def _counted(check: Check, rule: Rule) -> Check:
    return check if check.family in rule.counts or check.name == "accuracy" else replace(check, counts=False)


def _absent(name: str, says: str) -> Check:
    return Check(name, "INCONCLUSIVE", says, counts=False)


def _few(what: str, prompts: int, rule: Rule) -> str:
    return f"{what} was not judged: {prompts} prompts have what it needs, fewer than {rule.min_prompts}."


def _mean(
    name: str, verdict: Verdict, says: str, found: Estimate, limit: float, counts: bool = True
) -> Check:
    estimate, low, high = map(_rounded, (found.estimate, found.low, found.high))
    return Check(name, verdict, says, estimate, low, high, found.clusters, limit, counts)


def _tolerated(estimate: float, sure: float, limit: float) -> Verdict:
    return "FAIL" if sure > limit else "PASS" if estimate <= limit else "INCONCLUSIVE"


def _interval(found: Estimate) -> str:
    return f"{found.estimate:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _beats(score: float, other: float) -> float:
    return 1.0 if score > other else 0.5 if score == other else 0.0


def _margins(pairs: Rows) -> tuple[list[float], list[str]]:
    return [pair["margin"] for pair in pairs], [pair["group"] for pair in pairs]


def _rights(pairs: Rows) -> tuple[metrics.Floats, list[str]]:
    margins, groups = _margins(pairs)
    return metrics.rights(margins), groups


def _clusters(pairs: Rows) -> int:
    return len({pair["group"] for pair in pairs})


def _by(rows: Rows, name: str) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row[name]].append(row)
    return dict(found)


def _rounded(x: float) -> float:
    return float(f"{x:.{_DIGITS}g}")
