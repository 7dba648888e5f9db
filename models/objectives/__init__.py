"""Policy-gradient objectives on flat tensors of trained tokens, and the numbers that tell whether they still
work.

Notation: l = log-probability of a token under the policy, mu = under the behaviour policy that sampled it, old
= under the proximal policy, A = advantage, rho = exp(l - old), or exp(l - mu) where no old is given, W = the
product of rho over a sequence. Losses are minimised. Every objective gives one loss per token; an aggregation
then divides by counts of the *whole* batch, so that a batch cut into micro-batches has the gradient of the
whole.
"""

from models.objectives.aggregation import AGGREGATIONS, Aggregation, aggregate
from models.objectives.batch import (
    LOG_RATIO_BOUND,
    Batch,
    Counts,
    Losses,
    lengths,
    scaled,
    sequence_log_ratio,
)
from models.objectives.clipped import (
    bapo,
    dapo,
    decoupled_ppo,
    dr_grpo,
    grpo,
    gspo,
    gspo_token,
    m2po,
    m2po_areal,
    ppo,
    sampo,
    sapo,
)
from models.objectives.corrections import WEIGHTS, Weight, corrected, sequence_mask, weights
from models.objectives.diagnostics import (
    chi_square,
    coefficients,
    effective_sample_size,
    kl_mass,
    masked_sequences,
    staleness,
    summarise,
    token_statistics,
)
from models.objectives.penalties import KL_ESTIMATORS, KLEstimator, kl, local_entropy, penalised
from models.objectives.registry import LossFunction, Objective, get, names, register, requires
from models.objectives.units import by_turn, turns
from models.objectives.weighted import (
    cispo,
    cispo_trl,
    dppo,
    icepop,
    mis,
    reinforce,
    sequence_mis,
    sequence_tis,
    tis,
    topr,
    vespo,
    vespo_trl,
)

__all__ = [
    "AGGREGATIONS",
    "KL_ESTIMATORS",
    "LOG_RATIO_BOUND",
    "WEIGHTS",
    "Aggregation",
    "Batch",
    "Counts",
    "KLEstimator",
    "LossFunction",
    "Losses",
    "Objective",
    "Weight",
    "aggregate",
    "bapo",
    "by_turn",
    "chi_square",
    "cispo",
    "cispo_trl",
    "coefficients",
    "corrected",
    "dapo",
    "decoupled_ppo",
    "dppo",
    "dr_grpo",
    "effective_sample_size",
    "get",
    "grpo",
    "gspo",
    "gspo_token",
    "icepop",
    "kl",
    "kl_mass",
    "lengths",
    "local_entropy",
    "m2po",
    "m2po_areal",
    "masked_sequences",
    "mis",
    "names",
    "penalised",
    "ppo",
    "register",
    "reinforce",
    "requires",
    "sampo",
    "sapo",
    "scaled",
    "sequence_log_ratio",
    "sequence_mask",
    "sequence_mis",
    "sequence_tis",
    "staleness",
    "summarise",
    "tis",
    "token_statistics",
    "topr",
    "turns",
    "vespo",
    "vespo_trl",
    "weights",
]
