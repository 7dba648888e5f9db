"""Validate a reward source: measure it on what it has not seen, keep the raw numbers, judge them.

`measure` asks the source for all scores that the checks need and returns the report; `tasks.reward.checks` judges a
report; `validate_source` does both and keeps the evidence. The report holds scores, not opinions, so that the
gate, a page, or somebody with another rule can judge it again.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.core.atomic import write_atomic
from tasks.core.digest import canonical_json, digest_json, sha256_bytes
from tasks.core.errors import Refused
from tasks.core.workspace import Workspace
from tasks.promotion.policy import RewardModel as Rule
from tasks.reward import checks, metrics, probes
from tasks.reward.source import Answer, Kind, Preference, RewardSource

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

MOST_PROMPTS = 64  # that edits and hacks are tried on: enough for an upper bound of 5 % where none succeeds
LEAST_GAP = 0.5  # of verified reward between a right and a wrong answer
_CANDIDATES = 6  # that answer spam names
_LEAST_REACH = 40  # characters of a copied prompt, where the policy writes less
_DECIMALS = 6  # of a score in the evidence: nats, far below what any verdict rests on


@dataclass(frozen=True, slots=True)
class Sample:
    """An answer of the policy, with the reward that a verifier gave."""

    answer: Answer
    slice: str
    gold: float


@dataclass(frozen=True)
class Training:
    """What a trained source remembers of its training.

    Attributes:
        prompts: SHA-256 of all prompts.
        scores: of training answers, or quantiles of them.
        edge: the distance within which 99 % of answers like those of training lie.
        distance: how far answers with the features [n, D] lie from them, [n].
    """

    prompts: frozenset[str]
    scores: tuple[float, ...] = ()
    edge: float | None = None
    distance: Callable[[Any], Sequence[float]] | None = None

    @classmethod
    def of(cls, kind: Kind, folder: Path) -> Training | None:
        """Read what the trained source in `folder` remembers; None for a verifier or a judge.

        Raises:
            Corrupt: its list of prompts was changed.
        """
        from safetensors.torch import load_file

        from models.reward_support import distances
        from tasks.reward.folder import SUPPORT, training_prompts

        if kind in ("verifier", "judge"):
            return None
        support = load_file(folder / SUPPORT)

        def distance(features: Tensor) -> list[float]:
            found: list[float] = distances(support, features).tolist()
            return found

        # Quantiles in steps of one per cent.
        scores, edge = tuple(support["scores"].tolist()), float(support["distances"][99])
        return cls(training_prompts(folder), scores, edge, distance)


@dataclass(frozen=True)
class Material:
    """What a source is validated on: nothing of it was trained on.

    Attributes:
        preferences: held out.
        samples: of the policy that is to be judged or trained with the source; several answers a prompt.
        evaluation_prompts: SHA-256 of further prompts that must not have been trained on.
        policy: {version, digest} of the agent that wrote the samples.
        dataset: root of the dataset that all of it is from; "" where it is from elsewhere.
    """

    preferences: Sequence[Preference]
    samples: Sequence[Sample] = ()
    evaluation_prompts: frozenset[str] = field(default_factory=frozenset)
    policy: Mapping[str, Any] | None = None
    dataset: str = ""


def validate_source(
    source: RewardSource,
    material: Material,
    rule: Rule,
    workspace: Workspace,
    *,
    training: Training | None,
    time: str,
    path: Path | None = None,
) -> dict[str, Any]:
    """Measure and judge a source, keep report, data docs and plots; return the payload of `reward.validated`.

    Args:
        training: what the source remembers; None for one that was not trained, or does not say.
        time: ISO 8601 with a time zone; the verdict expires by it.
        path: folder of the source.

    Returns:
        {digest, kind, dataset, policy, time, verdict, reasons, checks, accuracy: {estimate, low, high, n}, ece,
        slices: {name: accuracy}, evidence: {path, sha256}, docs: {path, files}, plot and best_of_n: {path, sha256} or
        None, path}; paths relative to the workspace.

    Raises:
        Refused: the source gives a score that is no finite number.
    """
    from tasks.reward.expectations import check_frame

    report = measure(source, material, training)
    kept = workspace.evidence / "reward"
    aside = kept / f".{source.digest[:16]}"
    checkpoint = check_frame(frame_of(report), source.digest[:12], aside)
    report["frame"] = {
        "rows": sum(len(report[name]) for name in ("preferences", "samples", "edits", "probes")),
        "great_expectations": checkpoint.record["version"],
        "checks": [asdict(found) for found in checkpoint.checks],
    }
    evidence = _keep(workspace, canonical_json(report), "json")
    docs = kept / f"{evidence['sha256'][:16]}-docs-{checkpoint.record['files'][:16]}"
    if not docs.exists():
        aside.rename(docs)
    verdict, found = checks.judge_report(report, rule)
    curve = metrics.best_of_n(report, rule.alpha)
    bars = metrics.reliability([pair["margin"] for pair in report["preferences"]])
    by_name = {check.name: check for check in found}
    parts = metrics.slices(report, rule.alpha)
    return {
        "digest": source.digest,
        "kind": source.kind,
        "dataset": material.dataset,
        "policy": report["policy"],
        "time": time,
        "verdict": verdict,
        "reasons": list(checks.reasons(verdict, found)),
        "checks": [asdict(check) for check in found],
        "accuracy": _accuracy(by_name["accuracy"], len(report["preferences"])),
        "ece": by_name["calibration"].estimate,
        "slices": {p.name: {"estimate": p.estimate, "low": p.low, "high": p.high, "n": p.n} for p in parts},
        "evidence": evidence,
        "docs": {
            "path": workspace.relative(docs / checkpoint.record["html"]),
            "files": checkpoint.record["files"],
        },
        "plot": _keep(workspace, reliability_plot(bars), "png") if bars else None,
        "best_of_n": _keep(workspace, best_of_n_plot(curve), "png") if len(curve) > 1 else None,
        "path": None if path is None else workspace.relative(path),
    }


def measure(source: RewardSource, material: Material, training: Training | None = None) -> dict[str, Any]:
    """Ask the source for every score that the checks need; return the report, which is plain JSON.

    Raises:
        Refused: a score is no finite number.
    """
    contests = _contests(material)
    written = [s.answer.response for s in material.samples] or [p.chosen for p in material.preferences]
    reach = max(_LEAST_REACH, *map(len, written)) if written else _LEAST_REACH
    edited = [
        (contest, name, text)
        for contest in contests
        if contest.wrong is not None
        for name, edit in probes.EDITS.items()
        if (text := edit(contest.wrong)) != contest.wrong and not contest.answered_by(text)
    ]
    hacked = [
        (contest, name, text)
        for contest in contests
        for name, text in probes.hacks(contest.prompt, contest.candidates, reach).items()
        if not contest.answered_by(text)
    ]
    wanted = [answer for p in material.preferences for answer in (p.better, p.worse)]
    wanted += [sample.answer for sample in material.samples]
    wanted += [Answer(c.prompt, text) for c in contests for text in (c.right, c.wrong) if text is not None]
    wanted += [Answer(contest.prompt, text) for contest, _, text in (*edited, *hacked)]
    score, distance = _read(source, wanted, training)
    asked = {sha256_bytes(p.prompt.encode()) for p in material.preferences}
    asked |= {sha256_bytes(s.answer.prompt.encode()) for s in material.samples}
    asked |= material.evaluation_prompts
    return {
        "schema": checks.SCHEMA,
        "source": {"kind": source.kind, "digest": source.digest},
        "dataset": material.dataset,
        "policy": None if material.policy is None else dict(material.policy),
        "preferences": [
            {
                "group": p.group,
                "prompt": sha256_bytes(p.prompt.encode()),
                "slice": p.slice,
                "source": p.source,
                "licence": p.licence,
                "chosen": p.chosen_id or sha256_bytes(p.chosen.encode()),
                "rejected": p.rejected_id or sha256_bytes(p.rejected.encode()),
                "margin": round(score[p.better] - score[p.worse], _DECIMALS),
                "longer": round(math.log1p(len(p.chosen)) - math.log1p(len(p.rejected)), _DECIMALS),
            }
            for p in material.preferences
        ],
        "samples": [
            {
                "prompt": sha256_bytes(s.answer.prompt.encode()),
                "slice": s.slice,
                "score": score[s.answer],
                "gold": float(s.gold),
                "length": len(s.answer.response),
                "distance": distance.get(s.answer),
            }
            for s in material.samples
        ],
        "edits": [
            {
                "prompt": contest.group,
                "edit": name,
                "right": score[Answer(contest.prompt, contest.right)],
                "wrong": score[Answer(contest.prompt, contest.wrong or "")],
                "edited": score[Answer(contest.prompt, text)],
            }
            for contest, name, text in edited
        ],
        "probes": [
            {
                "prompt": contest.group,
                "probe": name,
                "right": score[Answer(contest.prompt, contest.right)],
                "score": score[Answer(contest.prompt, text)],
            }
            for contest, name, text in hacked
        ],
        "training": {
            "prompts": None if training is None else _named(training.prompts),
            "evaluation_prompts": _named(asked),
            "leaked": [] if training is None else sorted(asked & training.prompts),
            "scores": [] if training is None else [round(x, _DECIMALS) for x in training.scores],
            "edge": None if training is None else training.edge,
        },
        "frame": None,
    }


def frame_of(report: Mapping[str, Any]) -> pd.DataFrame:
    """Return one line a scored pair or answer of a report, for the suite of expectations."""
    import pandas as pd

    rows: list[tuple[Any, ...]] = [
        ("pair", p["prompt"], p["slice"], f"{p['chosen']} {p['rejected']}", p["margin"], None, p["licence"])
        for p in report["preferences"]
    ]
    rows += [
        ("sample", s["prompt"], s["slice"], None, s["score"], s["gold"], None) for s in report["samples"]
    ]
    rows += [("edit", e["prompt"], None, e["edit"], e["edited"], None, None) for e in report["edits"]]
    rows += [("probe", p["prompt"], None, p["probe"], p["score"], None, None) for p in report["probes"]]
    return pd.DataFrame(rows, columns=["kind", "prompt", "slice", "name", "score", "gold", "licence"])


# -------------------------------------------------------------------------------------------------------- parts


@dataclass(frozen=True, slots=True)
class _Contest:
    """A prompt with a right answer, a wrong one if there is one, what answer spam can name, and all right answers."""

    prompt: str
    group: str
    right: str
    wrong: str | None
    candidates: tuple[str, ...]
    rights: frozenset[str]

    def answered_by(self, text: str) -> bool:
        """Whether `text` is a right answer after all, blanks around it aside."""
        return text.strip() in {right.strip() for right in self.rights}


def _contests(material: Material) -> list[_Contest]:
    """Choose prompts by hash: the policy's samples first, then preferences until `MOST_PROMPTS` have a wrong answer too.

    A few samples must not take the place of many preferences.
    """
    own = _by_hash(_contests_of_samples(material.samples))[:MOST_PROMPTS]
    taken = {contest.prompt for contest in own}
    others = [c for c in _contests_of_preferences(material.preferences) if c.prompt not in taken]
    wanting = MOST_PROMPTS - sum(contest.wrong is not None for contest in own)
    chosen = own + _by_hash(others)[:wanting]
    return [replace(c, candidates=_with_neighbours(chosen, place)) for place, c in enumerate(chosen)]


def _by_hash(contests: Sequence[_Contest]) -> list[_Contest]:
    return sorted(contests, key=lambda contest: sha256_bytes(contest.group.encode()))


def _contests_of_samples(samples: Sequence[Sample]) -> list[_Contest]:
    prompts: dict[str, list[Sample]] = {}
    for sample in samples:
        prompts.setdefault(sample.answer.prompt, []).append(sample)
    found = []
    for prompt, rows in prompts.items():
        best, worst = max(rows, key=lambda row: row.gold), min(rows, key=lambda row: row.gold)
        if best.gold < LEAST_GAP:
            continue
        others = dict.fromkeys(row.answer.response for row in rows)
        others.pop(best.answer.response)
        wrong = worst.answer.response if best.gold - worst.gold >= LEAST_GAP else None
        rights = frozenset(row.answer.response for row in rows if row.gold >= LEAST_GAP)
        group = sha256_bytes(prompt.encode())
        found.append(_Contest(prompt, group, best.answer.response, wrong, tuple(others), rights))
    return found


def _contests_of_preferences(preferences: Sequence[Preference]) -> list[_Contest]:
    """One of each group, and of groups with the same prompt only one."""
    first = {p.group: p for p in reversed(preferences)}
    asked = {p.prompt: p for p in first.values()}
    return [
        _Contest(p.prompt, p.group, p.chosen, p.rejected, (p.rejected,), frozenset({p.chosen}))
        for p in asked.values()
    ]


def _with_neighbours(contests: Sequence[_Contest], place: int) -> tuple[str, ...]:
    """Return what spam names: the right answer in the midst of wrong ones, of other prompts where this has few."""
    own = contests[place]
    texts = dict.fromkeys(own.candidates)
    for step in range(1, len(contests)):
        if len(texts) >= _CANDIDATES - 1:
            break
        texts.setdefault(contests[(place + step) % len(contests)].right)
    texts.pop(own.right, None)
    wrong = list(texts)[: _CANDIDATES - 1]
    return (*wrong[: len(wrong) // 2], own.right, *wrong[len(wrong) // 2 :])


def _read(
    source: RewardSource, answers: Sequence[Answer], training: Training | None
) -> tuple[dict[Answer, float], dict[Answer, float]]:
    """Return the score of each answer, and its distance from training where the source has features."""
    # Answers to one prompt side by side: sources read a prompt once for all of them.
    distinct = sorted(set(answers), key=lambda answer: (answer.prompt, answer.response))
    read = getattr(source, "read", None)  # of trained sources: scores and features from one pass
    if distinct and read is not None and training is not None and training.distance is not None:
        scores, features = read(distinct)
        far = [round(float(x), _DECIMALS) for x in training.distance(features)]
    else:
        scores, far = source.score(distinct), []
    for answer, value in zip(distinct, scores, strict=True):
        if not math.isfinite(value):
            raise Refused(
                f"The reward source {source.digest[:12]} scores an answer by {value}, which is no finite number: "
                f"{answer.response[:60]!r}."
            )
    found = {answer: round(float(x), _DECIMALS) for answer, x in zip(distinct, scores, strict=True)}
    return found, dict(zip(distinct, far, strict=False))


def _named(digests: frozenset[str] | set[str]) -> dict[str, Any]:
    return {"n": len(digests), "digest": digest_json(sorted(digests))}


def _accuracy(check: checks.Check, pairs: int) -> dict[str, Any]:
    return {"estimate": check.estimate, "low": check.low, "high": check.high, "n": pairs}


# -------------------------------------------------------------------------------------------------------- plots


def reliability_plot(bars: Sequence[metrics.Bin]) -> bytes:
    """Draw how often the model is right against how sure it is; return a PNG."""
    figure, axes = _canvas("how sure", "how often right", "Reward model, held out")
    axes.plot([0.5, 1], [0.5, 1], color="0.6", linestyle="--", linewidth=1)
    axes.plot([bar.confidence for bar in bars], [bar.accuracy for bar in bars], marker="o", color="#1f6f8b")
    for bar in bars:
        axes.annotate(
            f"{bar.n}",
            (bar.confidence, bar.accuracy),
            textcoords="offset points",
            xytext=(5, -12),
            fontsize=8,
        )
    axes.set(xlim=(0.5, 1.02), ylim=(0, 1.05))
    return _png(figure)


def best_of_n_plot(curve: Sequence[metrics.BestOfN]) -> bytes:
    """Draw verified reward and the reward model's score of the best of n against KL; return a PNG."""
    figure, axes = _canvas("KL from the policy, nats", "verified reward", "Best of n by the reward model")
    kl = [point.kl for point in curve]
    axes.fill_between(
        kl, [p.low for p in curve], [p.high for p in curve], color="#1f6f8b", alpha=0.15, linewidth=0
    )
    axes.plot(kl, [p.gold for p in curve], marker="o", color="#1f6f8b", label="verified")
    axes.plot(kl, [p.best for p in curve], color="0.6", linestyle="--", label="if the verifier chose")
    other = axes.twinx()
    other.plot(kl, [p.proxy for p in curve], marker=".", color="#c8553d", label="reward model's score")
    other.set_ylabel("score", fontsize=9)
    for point in curve:
        axes.annotate(
            f"{point.n}", (point.kl, point.gold), textcoords="offset points", xytext=(3, -12), fontsize=8
        )
    lines, names = axes.get_legend_handles_labels()
    more, others = other.get_legend_handles_labels()
    axes.legend(lines + more, names + others, fontsize=8, loc="lower right")
    return _png(figure)


def _canvas(across: str, up: str, title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=across, ylabel=up, title=title)
    return figure, axes


def _png(figure: Any) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _keep(workspace: Workspace, data: bytes, suffix: str) -> dict[str, str]:
    digest = sha256_bytes(data)
    path = workspace.evidence / "reward" / f"{digest}.{suffix}"
    write_atomic(path, data)
    return {"path": workspace.relative(path), "sha256": digest}
