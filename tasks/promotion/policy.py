"""The policy file: what a candidate must show before it may replace the champion, declared before the run.

Its digest goes into every decision, so that nobody can loosen a rule after seeing a result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

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


class RewardModel(Section):
    """What the reward model must show on pairs it was not trained on."""

    required: bool = True
    min_accuracy: float = Field(
        default=0.60, gt=0.5, lt=1, description="for the lower bound of pair accuracy"
    )
    max_ece: float = Field(default=0.15, gt=0, lt=1, description="expected calibration error")
    alpha: float = Field(default=0.05, gt=0, lt=0.5, description="one-sided error of the accuracy's bounds")


class Check(Section):
    """Evidence that another station produced; it counts as it is."""

    required: bool = True


class Canary(Section):
    """What is done when the new champion's rewards in service fall behind its predecessor's."""

    alpha: float = Field(
        default=0.05, gt=0, lt=0.5, description="one-sided error over all looks at one promotion together"
    )
    margin: float = Field(default=0.0, ge=0, lt=1, description="mean reward it may lose; on [0, 1]")
    min_groups: int = Field(default=30, ge=1, description="of each agent; fewer lead to nothing")
    on_harm: Literal["rollback", "report"] = "rollback"
    weights: dict[str, float] = Field(
        default_factory=dict,
        description="of each environment; by default the shares of the tasks in evaluation.tasks. Others do not count",
    )
    baseline: Literal["concurrent", "before"] = Field(
        default="concurrent",
        description="`concurrent`: the predecessor's episodes since the promotion; `before`: also earlier ones, which is "
        "biased where the questions have changed",
    )

    @field_validator("weights")
    @classmethod
    def _positive(cls, value: dict[str, float]) -> dict[str, float]:
        if any(not 0 < weight < float("inf") for weight in value.values()):
            raise ValueError("weights are positive numbers")
        return value


class Registry(Section):
    """What is done when somebody changes the registry without Forebay."""

    on_drift: Literal["restore", "adopt", "report"] = Field(
        default="restore",
        description="`restore`: what the ledger says; `adopt`: a known agent that was given the alias `champion` becomes "
        "champion without a decision; `report`: nothing",
    )


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
    canary: Canary = Canary()
    registry: Registry = Registry()
    approval: Literal["none", "required"] = "none"


def load_policy(path: Path) -> Policy:
    """Read a policy file.

    Raises:
        UsageError: it is missing, a key is unknown (the nearest known one is named), or a value does not fit.
    """
    return load_section(Policy, path)
