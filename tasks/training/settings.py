"""Settings of the off-policy trainer. Light to import: the command line reads it at start-up."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tasks.core.settings import Section


class Guards(Section):
    """When to stop before harm is done; the last good checkpoint is kept."""

    min_ess: float = Field(0.02, ge=0, le=1, description="effective sample size of a step / its sequences")
    max_kl: float = Field(0.8, gt=0, description="k3 estimate of KL(behaviour || policy), nats a token")


class TrainingSettings(Section):
    """How an agent is trained on replay."""

    objective: Literal["grpo", "reinforce", "vespo"] = "vespo"
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"] = "token-mean"
    advantage: Literal["group_mean", "group_norm"] = "group_norm"
    steps: int = Field(16, ge=1, description="optimizer updates")
    groups_per_step: int = Field(8, ge=1)
    learning_rate: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    grad_clip: float = Field(1.0, gt=0, description="largest L2 norm of a step's gradient")
    token_budget: int = Field(2048, ge=1, description="tokens of one packed row")
    checkpoint_every: int = Field(8, ge=1, description="updates between two recovery checkpoints")
    guards: Guards = Field(default_factory=lambda: Guards.model_validate({}))
