"""Settings of the leaderboard. Light to import: the command line reads them at start-up."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from tasks.core.settings import Section


class Start(Section):
    """The policy that every method of a seed begins with: behaviour cloning of filtered episodes."""

    policy: str = Field(
        "scratch",
        description="`scratch`: a small model without pretraining; else an agent, as champion or agent/1",
    )
    hidden: int = Field(64, ge=8, le=4096, description="width of a model from scratch")
    layers: int = Field(2, ge=1, le=64)
    heads: int = Field(4, ge=1, le=64)
    vocabulary: int = Field(512, ge=257, le=65536)
    demonstrations: int = Field(
        1024, ge=1, description="episodes that a model from scratch clones, all with full reward"
    )
    successes: int = Field(256, ge=1, description="the same, of a language model's own episodes")
    noise: float = Field(
        0.3, ge=0, le=1, description="share of the demonstrator's actions that are drawn at random (scratch)"
    )
    steps: int = Field(400, ge=1, description="updates of behaviour cloning")
    learning_rate: FiniteFloat = Field(3e-3, gt=0)

    @model_validator(mode="after")
    def _even_heads(self) -> Self:
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden ({self.hidden}) must be a multiple of twice the heads ({self.heads})")
        return self


class Clipping(Section):
    """How far the ratio of policy and behaviour counts."""

    objective: str = "grpo"
    options: dict[str, FiniteFloat] = Field(default_factory=dict)
    unit: Literal["trajectory", "turn"] = Field("turn", description="what a sequence ratio runs over")
    sequence_mask: float | None = Field(None, gt=0, description="as training.correction.sequence_mask")


class Method(Section):
    """A point in ARLArena's four dimensions (arXiv 2602.21534, section 3)."""

    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"] = "token-mean"
    clipping: Clipping = Clipping()
    filtering: bool = Field(
        False, description="learn only from groups whose rewards differ, and sample again for the others"
    )
    advantage: str = "group_norm_per_turn"
    advantage_options: dict[str, FiniteFloat] = Field(default_factory=dict)


class Recipe(Section):
    """What all methods share."""

    steps: int = Field(40, ge=1, description="optimizer updates")
    groups_per_step: int = Field(8, ge=1)
    updates_per_round: int = Field(2, ge=1, description="updates that learn from what one policy sampled")
    group_size: int = Field(8, ge=2)
    learning_rate: FiniteFloat = Field(5e-4, gt=0)
    kl: FiniteFloat = Field(0.01, ge=0, description="coefficient of k3 to the start")
    format_penalty: FiniteFloat = Field(
        0.1, ge=0, description="of a turn that has a wrong form or is impossible"
    )
    tries: int = Field(3, ge=1, description="samplings at most, where a method filters")
    first_groups: int = Field(32, ge=1, description="of the start, to fill up what filtering leaves out")
    temperature: FiniteFloat = Field(1.0, gt=0)
    collapse: Literal["report", "stop", "mask", "raise_kl"] = Field(
        "report", description="what every cell does when a collapse begins, as training.guards.collapse"
    )


class Judging(Section):
    """How the policies are compared, on held-out tasks."""

    tasks: int = Field(60, ge=2)
    samples: int = Field(4, ge=1, description="attempts at each task")
    temperature: FiniteFloat = Field(1.0, gt=0)


class Arena(Section):
    """The leaderboard: `forebay arena run`."""

    start: Start = Start()
    recipe: Recipe = Recipe()
    judging: Judging = Judging()
    methods: dict[str, Method] = Field(
        default_factory=dict, description="your own, beside those that `forebay arena methods` lists"
    )

    @model_validator(mode="before")
    @classmethod
    def _names(cls, values: Any) -> Any:
        from tasks.leaderboard.methods import METHODS

        mine = values.get("methods") if isinstance(values, dict) else None
        taken = sorted(set(mine) & set(METHODS)) if isinstance(mine, dict) else []
        if taken:
            raise ValueError(f"arena.methods.{taken[0]} is a method already; choose another name")
        return values

    def known(self) -> dict[str, Method]:
        """Every method by name."""
        from tasks.leaderboard.methods import METHODS

        return {**METHODS, **self.methods}
