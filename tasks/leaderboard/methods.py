"""The methods that ARLArena compares, with its settings for ALFWorld, and VESPO: points in four independent
dimensions.

Aggregation, clipping of the importance weight, filtering with resampling, advantage (arXiv 2602.21534, section 3 and table
S1; VESPO: 2602.10693). SAMPO is the combination that it ends with. `_sm` is with the sequence mask of DeepSeek-V3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Final

from tasks.core.settings import build_section
from tasks.leaderboard.settings import Clipping, Method, Recipe
from tasks.training.settings import TrainingSettings
from tasks.training.stability import Dimension

_WIDE: Final = {"eps_lo": 0.2, "eps_hi": 0.2}
_HIGHER: Final = {"eps_lo": 0.2, "eps_hi": 0.28}  # DAPO's own (2503.14476); table S1 has none for text games
_SEQUENCE: Final = {"eps_lo": 3e-3, "eps_hi": 4e-3}
_SAPO: Final = {"tau_pos": 1.0, "tau_neg": 1.05}
_CISPO: Final = {"eps_lo": 1.0, "eps_hi": 0.2}

# Nats a token. Table S1 has no mask: the default of ARLArena's code, ln 1.25, and what its ALFWorld recipes give to
# the two methods that collapse there.
_MASK: Final = 0.223
_TIGHT_MASK: Final = 3e-3

METHODS: Final[dict[str, Method]] = {
    "grpo": Method(clipping=Clipping(objective="grpo", options=_WIDE)),
    "grpo_st": Method(aggregation="seq-mean-token-mean", clipping=Clipping(objective="grpo", options=_WIDE)),
    "grpo_sm": Method(clipping=Clipping(objective="grpo", options=_WIDE, sequence_mask=_MASK)),
    "dapo": Method(clipping=Clipping(objective="dapo", options=_HIGHER), filtering=True),
    "dapo_gigpo": Method(
        clipping=Clipping(objective="dapo", options=_HIGHER), advantage="gigpo", filtering=True
    ),
    "gspo": Method(
        aggregation="seq-mean-token-mean", clipping=Clipping(objective="gspo_token", options=_SEQUENCE)
    ),
    "sapo": Method(clipping=Clipping(objective="sapo", options=_SAPO)),
    "sapo_sm": Method(clipping=Clipping(objective="sapo", options=_SAPO, sequence_mask=_TIGHT_MASK)),
    "cispo": Method(clipping=Clipping(objective="cispo", options=_CISPO)),
    "cispo_sm": Method(clipping=Clipping(objective="cispo", options=_CISPO, sequence_mask=_TIGHT_MASK)),
    "vespo": Method(clipping=Clipping(objective="vespo", unit="trajectory")),
    "gigpo": Method(clipping=Clipping(objective="grpo", options=_WIDE), advantage="gigpo"),
    "empg": Method(clipping=Clipping(objective="grpo", options=_WIDE), advantage="empg_per_turn"),
    "sampo": Method(
        clipping=Clipping(objective="sampo", options=_SEQUENCE), advantage="gigpo", filtering=True
    ),
}


def coordinates(method: Method) -> dict[Dimension, str]:
    """Write where a method stands in each dimension."""
    clipping = method.clipping
    parts = [*_constants(clipping.options), f"unit {clipping.unit}"]
    if clipping.sequence_mask is not None:
        parts.append(f"mask {clipping.sequence_mask:g}")
    return {
        "aggregation": method.aggregation,
        "clipping": f"{clipping.objective} {', '.join(parts)}",
        "filtering": "yes" if method.filtering else "no",
        "advantage": f"{method.advantage} {', '.join(_constants(method.advantage_options))}".strip(),
    }


def _constants(options: Mapping[str, float]) -> list[str]:
    return [f"{name}={value:g}" for name, value in options.items()]


def training_settings(method: Method, recipe: Recipe, name: str = "") -> TrainingSettings:
    """Return how the trainer is to run `method`: on fresh groups of the policy in training, several updates a round.

    An advantage that has a constant `penalty`, one of the user's own too, gets the recipe's format penalty as that.

    Raises:
        UsageError: the method names what does not exist; `name` is the method's in the sentence.
    """
    options = dict(method.advantage_options)
    if _has_penalty(method.advantage):
        options.setdefault("penalty", recipe.format_penalty)
    values = {
        "objective": method.clipping.objective,
        "options": method.clipping.options,
        "aggregation": method.aggregation,
        "unit": method.clipping.unit,
        "advantage": method.advantage,
        "advantage_options": options,
        "correction": {"sequence_mask": method.clipping.sequence_mask},
        "penalties": {"kl": recipe.kl},
        "admission": {"min_reward_std": 0.0 if method.filtering else None},
        "mixture": {
            "schedule": "constant",
            "fresh": 1.0,
            "tries": recipe.tries if method.filtering else 1,
        },
        "steps": recipe.steps,
        "updates_per_round": recipe.updates_per_round,
        "groups_per_step": recipe.groups_per_step,
        "learning_rate": recipe.learning_rate,
        "token_budget": 2048,
        "checkpoint_every": max(recipe.updates_per_round, 10),
        "guards": {"collapse": recipe.collapse},
    }
    return build_section(TrainingSettings, values, f"arena.methods.{name}")


def _has_penalty(advantage: str) -> bool:
    from models import advantages  # takes torch with it

    try:
        return "penalty" in signature(advantages.get(advantage).estimate).parameters
    except (
        ValueError
    ):  # there is none of this name, which the settings say, or it tells nothing of its constants
        return False
