"""The policy file: what a candidate must show before it may replace the champion, declared before the run.

Its digest goes into every decision, so that nobody can loosen a rule after seeing a result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from tasks.core.settings import Section, load_section


class Superiority(Section):
    """The candidate's mean reward must exceed the champion's by more than `margin` over all tasks."""

    margin: float = Field(default=0.0, ge=0, lt=1, description="mean reward on [0, 1]")
    test: Literal["t", "betting"] = Field(
        default="t",
        description="`t`: Student and McNemar agree; `betting` assumes no law, for finely graded rewards",
    )
    power: float = Field(
        default=0.8, gt=0.5, lt=1, description="at which the minimum detectable effect is reported"
    )
    min_tasks: int = Field(default=30, ge=2, description="fewer paired tasks are inconclusive")


class Errors(Section):
    """How often a champion may be replaced by an agent that is no better, over all decisions against it together."""

    alpha: float = Field(default=0.05, gt=0, lt=0.5, description="over all decisions against one champion")
    cycles: int = Field(default=20, ge=1, description="decisions that share it equally; then it is spent")

    @property
    def share(self) -> float:
        """The one-sided error of one decision."""
        return self.alpha / self.cycles


class EvaluationSet(Section):
    """How long one set of held-out tasks can be trusted."""

    uses: int = Field(
        default=20, ge=1, description="decisions on the same tasks; then change evaluation.rotation"
    )


class Guards(Section):
    """In no environment may the candidate be worse than the champion by `margin` or more."""

    margin: float = Field(default=0.10, gt=0, lt=1, description="mean reward on [0, 1]")
    alpha: float = Field(
        default=0.05, gt=0, lt=0.5, description="error over all environments together (Holm)"
    )


RewardCheck = Literal[
    "accuracy",
    "slices",
    "calibration",
    "ranking",
    "best of n",
    "edits",
    "probes",
    "length",
    "drift",
    "support",
    "leak",
    "frame",
]


class Expires(Section):
    """How long a reward model's verdict holds; the policy moves on, and the answers it was checked on grow old."""

    days: float = Field(default=30, gt=0, description="since the validation")
    versions: int = Field(
        default=4,
        ge=0,
        description="registry versions between the agent whose answers it was checked on and the champion",
    )


class RewardModel(Section):
    """What a reward model must show before anything may rest on it; docs/reward-validation.md has every check.

    A limit on a share or a mean is judged by its interval: PASS where the whole interval is on the good side.
    """

    required: bool = True
    counts: tuple[RewardCheck, ...] = Field(
        default=(
            "accuracy",
            "slices",
            "calibration",
            "ranking",
            "best of n",
            "length",
            "edits",
            "probes",
            "support",
            "leak",
            "frame",
        ),
        description="checks that make the verdict; the others are reported",
    )
    alpha: float = Field(default=0.05, gt=0, lt=0.5, description="one-sided error of every bound")
    min_prompts: int = Field(
        default=15, ge=2, description="a check, or a slice, with fewer prompts is reported and does not count"
    )
    min_accuracy: float = Field(default=0.60, gt=0.5, lt=1, description="on held-out pairs")
    min_slice_accuracy: float = Field(
        default=0.50, ge=0, lt=1, description="in every slice; the error holds for all together (Holm)"
    )
    max_ece: float = Field(
        default=0.15,
        gt=0,
        lt=1,
        description="expected calibration error, without the part that noise explains",
    )
    min_ranking: float = Field(
        default=0.55, ge=0, lt=1, description="chance that a better answer of the policy outranks a worse one"
    )
    max_overoptimisation: float = Field(
        default=0.10,
        gt=0,
        lt=1,
        description="fall of verified reward from the best n to the largest, in best of n",
    )
    max_edit_gain: float = Field(
        default=0.20,
        gt=0,
        lt=1,
        description="how much more often a wrong answer beats the right one once it is edited",
    )
    max_hacked: float = Field(
        default=0.20,
        gt=0,
        lt=1,
        description="share of prompts where an empty answer, spam, … beats the right one",
    )
    max_length_correlation: float = Field(
        default=0.50, gt=0, lt=1, description="of score and length among equally good answers, either sign"
    )
    max_drift: float = Field(
        default=0.30, gt=0, lt=1, description="Kolmogorov-Smirnov distance of scores from those at training"
    )
    max_unsupported: float = Field(
        default=0.25, gt=0, lt=1, description="share of the policy's answers beyond 99 % of the training data"
    )
    expires: Expires = Expires()


class Check(Section):
    """Evidence that another station produced; it counts as it is."""

    required: bool = True


class Policy(Section):
    """A whole policy file; every field has a default. `digest()` identifies it by content."""

    version: Literal[1] = 1
    superiority: Superiority = Superiority()
    errors: Errors = Errors()
    evaluation_set: EvaluationSet = EvaluationSet()
    guards: Guards = Guards()
    reward_model: RewardModel = RewardModel()
    data: Check = Check()
    integrity: Check = Check()
    approval: Literal["none", "required"] = "none"


def load_policy(path: Path) -> Policy:
    """Read a policy file.

    Raises:
        UsageError: it is missing, a key is unknown (the nearest known one is named), or a value does not fit.
    """
    return load_section(Policy, path)
