"""One update's gradient: episodes in, gradient left in the model's parameters, numbers about it out."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models import objectives
from models.advantages import ADVANTAGES
from models.packing import Sample, pack, packed_logprobs
from tasks.training.settings import TrainingSettings
from tasks.training.shards import Episodes

Metrics = dict[str, float]


def accumulate_gradients(
    model: PreTrainedModel, episodes: Episodes, settings: TrainingSettings, autocast: torch.dtype | None
) -> Metrics:
    """Put the clipped gradient of the mean loss over `episodes` into `model`; any gradient there before is
    dropped.

    Rows of at most `settings.token_budget` tokens are run one after another; how many they are does not
    change the result.

    Returns:
        The numbers of `objectives.summarise` (ess, phi, kl_k1, kl_k3, entropy, ratios) and: loss; grad_norm
        (before clipping); reward (mean of the episodes) and reward_estimate (self-normalised
        importance-sampling estimate of the policy's own); policy_lag (registry versions behind the newest
        behaviour in the dataset, mean); tokens (prompt and response, as stored), tokens_packed (run through
        the model) and tokens_trained.
    """
    place = model.device
    samples = _with_advantages(episodes, settings)
    whole = objectives.Counts(sum(sum(s.trained) for s in samples), sum(any(s.trained) for s in samples))
    model.zero_grad(set_to_none=True)
    loss, packed = 0.0, 0
    log_ratios: list[Tensor] = []
    phis: list[Tensor] = []
    order: list[int] = []
    statistics: dict[str, list[Tensor]] = {}
    for row in pack(samples, settings.token_budget):
        micro = row.to(place)
        with torch.autocast(place.type, dtype=autocast, enabled=autocast is not None):
            logprobs, entropies = packed_logprobs(model, micro)
        behaviour = micro.behaviour_logprobs if episodes.logprobs_known else None
        batch = objectives.Batch(logprobs, behaviour, micro.advantages, micro.sequence, micro.sequences)
        losses = objectives.get(settings.objective).loss(batch)
        part = objectives.aggregate(losses, batch, settings.aggregation, whole)
        part.backward()  # type: ignore[no-untyped-call]
        loss += float(part.detach())
        packed += len(row.input_ids)
        order += row.samples
        log_ratios.append(objectives.sequence_log_ratio(batch).cpu())
        phis.append(losses.phi.cpu())
        for name, values in objectives.token_statistics(batch, entropies).items():
            statistics.setdefault(name, []).append(values.cpu())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
    log_ratio = torch.cat(log_ratios)
    rewards = torch.tensor(episodes.rewards, dtype=torch.float64)[order]
    tokens = {name: torch.cat(values) for name, values in statistics.items()}
    return objectives.summarise(log_ratio, torch.cat(phis), tokens) | {
        "loss": loss,
        "grad_norm": float(norm),
        "reward": float(rewards.mean()),
        "reward_estimate": float(torch.softmax(log_ratio.double(), 0) @ rewards),
        "policy_lag": sum(episodes.lags) / len(episodes.lags),
        "tokens": float(sum(len(s.prompt_ids) + len(s.response_ids) for s in samples)),
        "tokens_packed": float(packed),
        "tokens_trained": float(whole.tokens),
    }


def _with_advantages(episodes: Episodes, settings: TrainingSettings) -> list[Sample]:
    rewards = torch.tensor(episodes.rewards, dtype=torch.float64)
    advantages = ADVANTAGES[settings.advantage](rewards, torch.tensor(episodes.groups)).tolist()
    return [replace(s, advantage=a) for s, a in zip(episodes.samples, advantages, strict=True)]
