"""One update's gradient: episodes in, gradient left in the model's parameters, numbers about it out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from models import objectives
from models.objectives import Batch, Counts, Losses
from models.packing import MicroBatch, Sample
from tasks.training import fields
from tasks.training.parallel import Scorer, World, clip, rows_of, score, wide
from tasks.training.settings import TrainingSettings
from tasks.training.shards import Episodes, Passes

Metrics = dict[str, float]

_OF_TOKENS = ("advantages", "behaviour_logprobs", "old_logprobs", "reference_logprobs", "turn")
_OF_SEQUENCES = ("group", "diversity")


@dataclass(frozen=True, slots=True)
class Measured:
    """What an update tells of one group: `ess` is its normalised effective sample size in (0, 1], `signal` the mean
    over its tokens of |c A|, what the objective pushes their log-probabilities by."""

    ess: float
    signal: float


@dataclass(frozen=True, slots=True)
class Update:
    """The numbers of an update, and what it measured of each group with trained tokens, by its index in
    `Episodes.groups`."""

    metrics: Metrics
    groups: dict[int, Measured]
    log_ratios: tuple[float, ...]  # [B], log W of every episode against its behaviour


def needs(settings: TrainingSettings) -> frozenset[str]:
    """The optional fields of `objectives.Batch` that the loss needs; the others need not be computed.

    And "deep_thinking" where rewards pay for that ratio, which rows have or not.
    """
    found = set(objectives.get(settings.objective).needs)
    penalties, correction = settings.penalties, settings.correction
    if correction.weight != "none":
        found |= {"old_logprobs", "behaviour_logprobs"}
    if correction.sequence_mask is not None:
        found.add("behaviour_logprobs")
    if penalties.kl:
        found.add("reference_logprobs")
    if penalties.kl and penalties.kl_estimator == "k3-unbiased":
        found.add("behaviour_logprobs")
    if settings.diversity.entropy:
        found |= {"diversity", "behaviour_logprobs"}
    if settings.deep_thinking.coefficient:
        found.add("deep_thinking")
    if settings.guards.collapse in ("mask", "raise_kl"):  # what it may come to need is there from the start
        found |= needs(settings.against_collapse())
    measured = settings.mixture.schedule == "ess" or settings.sampling.order == "ess"
    if measured or settings.admission.max_divergence is not None:
        found.add("behaviour_logprobs")
    return frozenset(found)


def rehearse(settings: TrainingSettings) -> None:
    """Compute advantages and loss of a few made-up tokens, so that settings which cannot work fail here and at once.

    Raises:
        Exception: whatever the functions that the settings name raise.
    """
    samples = tuple(Sample((1,), (2, 3), (True, True)) for _ in range(4))
    tokens = torch.linspace(-1.0, -0.5, 8)
    rewards, groups, turns = (0.0, 1.0, 1.0, 0.0), (0, 0, 1, 1), torch.tensor([0, 1] * 4)
    ratios = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    episodes = Episodes(
        samples, rewards, groups, (0,) * 4, turns, tokens, ("a", "b"), ("",) * 4, deep_thinking=ratios
    )
    found = {"old_logprobs": tokens - 0.1, "reference_logprobs": tokens - 0.2}
    wanted = settings.diversity.reward or settings.diversity.entropy
    diversity = torch.full((4,), 0.5, dtype=torch.float64) if wanted else None
    advantages = fields.token_advantages(episodes, settings, entropies=tokens.neg(), diversity=diversity)
    known = _known(
        episodes,
        torch.zeros(2, 8),
        advantages=advantages,
        behaviour_logprobs=tokens,
        diversity=None if diversity is None else fields.entropy_shares(episodes, settings, diversity),
        **{name: value for name, value in found.items() if name in needs(settings)},
    )
    scored = torch.stack([tokens, tokens.neg()]).requires_grad_()
    _loss(_scored(known, scored, settings), settings, _counts(episodes, settings), 2).backward()  # type: ignore[no-untyped-call]


def accumulate_gradients(
    scorer: Scorer,
    episodes: Episodes,
    settings: TrainingSettings,
    autocast: torch.dtype | None,
    world: World,
    *,
    old_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    diversity: Tensor | None = None,
) -> Update:
    """Put the clipped gradient of the loss over `episodes` into the model; any gradient there before is dropped.

    Rows of at most `settings.token_budget` tokens are run one after another, each by one of the processes; neither
    number changes the result. All processes must call with the same arguments.

    Args:
        old_logprobs: [N] of the proximal policy, where `needs` names them; None: it is the policy as it is now,
            which costs nothing.
        reference_logprobs: [N] of the initial policy, where `needs` names them.
        diversity: [B] from `fields.answer_diversity`, where DSDR is on.

    Returns:
        The numbers of `objectives.summarise` (ess, phi, kl_k1, kl_k3, entropy, ratios) and, where behaviour
        log-probabilities are known, of `objectives.staleness`, over what `settings.unit` calls a sequence. And: loss;
        grad_norm (before clipping); masked_sequences (their share, where there is a sequence mask); kl_reference (the penalty's estimate, where there is one); reward (mean of the
        episodes), deep_thinking_ratio (mean, where every episode has one) and reward_estimate (self-normalised importance-sampling estimate of the policy's own); policy_lag
        (registry versions behind the newest behaviour in the dataset, mean); tokens (prompt and response, as stored),
        tokens_packed (run through the model), tokens_trained and response_length (of these, an episode);
        valid_format (share of the turns whose action had the right form and was possible: that of `Step.valid`, the
        `valid_action` of an evaluation; the key is older than the distinction). The same in every process.

    Raises:
        ValueError: the settings name what does not exist or does not go together, or a field is missing.
    """
    samples, passes = episodes.samples, episodes.passes
    advised = fields.needs_entropies(settings)
    # A trajectory that was read in parts may lie in several rows, so its sums are not whole in one.
    parted = episodes.parts is not None and settings.unit != "turn"
    coupled = objectives.get(settings.objective).coupled or parted
    scores = torch.zeros(2, len(episodes.turns), device=world.device, dtype=wide(scorer))
    if coupled or advised:
        scores = torch.stack(score(scorer, passes.samples, settings.token_budget, autocast, world))
    advantages = fields.token_advantages(
        episodes, settings, entropies=scores[1] if advised else None, diversity=diversity
    )
    known = _known(
        episodes,
        scores,
        advantages=advantages,
        behaviour_logprobs=episodes.behaviour_logprobs,
        old_logprobs=old_logprobs,
        reference_logprobs=reference_logprobs,
        diversity=None if diversity is None else fields.entropy_shares(episodes, settings, diversity),
    )
    counts, groups = _counts(episodes, settings), len(set(episodes.groups))
    slopes = _slopes(known, scores, settings, counts, groups) if coupled else None
    packed = torch.zeros((), device=world.device, dtype=torch.float64)
    found = torch.zeros_like(scores)
    scorer.zero_grad(set_to_none=True)
    for row in rows_of(passes.samples, settings.token_budget, world):
        here = row.to(world.device)
        with torch.autocast(world.device.type, dtype=autocast, enabled=autocast is not None):
            scored = torch.stack(scorer(here))
        if not row.samples:  # idle, run for the sake of the other processes
            loss = scored.sum()
        elif slopes is not None:
            loss = (slopes[:, here.index] * scored).sum()
        else:
            loss = _loss(_scored(_part(known, here, passes), scored, settings), settings, counts, groups)
        loss.backward()  # type: ignore[no-untyped-call]
        found[:, here.index] = scored.detach()
        packed += len(row.input_ids) if row.samples else 0
    norm = clip([p for p in scorer.parameters() if p.requires_grad], settings.grad_clip)
    # Each process has scored its own rows; together they have scored the whole batch.
    whole = _scored(known, world.total(found).requires_grad_(), settings)
    losses, units = _losses(whole, settings)
    numbers = {
        "loss": float(_loss(whole, settings, counts, groups).detach()),
        "grad_norm": norm,
        "policy_lag": sum(episodes.lags) / len(episodes.lags),
        "tokens": float(sum(len(s.prompt_ids) + len(s.response_ids) for s in samples)),
        "tokens_packed": float(world.total(packed)),
        "tokens_trained": float(counts.tokens),
        "response_length": counts.tokens / len(samples),
        "valid_format": fields.valid_share(episodes),
    }
    pushes = objectives.coefficients(losses, units)
    log_ratio = objectives.sequence_log_ratio(whole)
    report = _report(whole, units, losses, pushes, settings) | _rewards(log_ratio, episodes)
    return Update(report | numbers, _measured(log_ratio, pushes, episodes), tuple(log_ratio.tolist()))


def _known(episodes: Episodes, scores: Tensor, **given: Tensor | None) -> Batch:
    """The whole batch but for what depends on the weights, on the device and in the type of `scores`."""
    groups = torch.tensor(episodes.groups, device=scores.device)
    values: Any = {name: value if value is None else value.to(scores) for name, value in given.items()}
    return Batch(
        logprobs=scores[0],
        sequence=fields.sequence(episodes).to(scores.device),
        sequences=len(episodes.samples),
        turn=episodes.turns.to(scores.device),
        group=groups,
        **values,
    )


def _part(known: Batch, row: MicroBatch, passes: Passes) -> Batch:
    """What is known of the sequences in `row`, which are those of `passes`."""
    episode = torch.tensor([passes.episode[number] for number in row.samples], device=row.index.device)
    places = dict.fromkeys(_OF_TOKENS, row.index) | dict.fromkeys(_OF_SEQUENCES, episode)
    values = {name: getattr(known, name) for name in places}
    chosen: Any = {name: value[places[name]] for name, value in values.items() if value is not None}
    part = replace(known, sequence=row.sequence, sequences=row.sequences, **chosen)
    if part.diversity is not None:  # an episode's share goes to its turns by their tokens
        whole = objectives.lengths(known)[episode].clamp(min=1)
        part = replace(part, diversity=part.diversity * (objectives.lengths(part) / whole))
    return part


def _scored(known: Batch, scored: Tensor, settings: TrainingSettings) -> Batch:
    """The batch with the policy's log-probabilities and entropies, [2, N]."""
    logprobs, entropies = scored
    old = known.old_logprobs
    if old is None and "old_logprobs" in needs(settings):
        old = logprobs.detach()
    return replace(known, logprobs=logprobs, entropies=entropies, old_logprobs=old)


def _counts(episodes: Episodes, settings: TrainingSettings) -> Counts:
    sequence = fields.sequence(episodes)
    if settings.unit == "turn":
        return Counts(len(sequence), objectives.turns(sequence, episodes.turns))
    return Counts(len(sequence), len(set(sequence.tolist())))


def _losses(batch: Batch, settings: TrainingSettings) -> tuple[Losses, Batch]:
    """The objective's losses with their corrections, and the batch in the unit that they have."""
    correction = settings.correction
    if settings.unit == "turn":
        batch, _ = objectives.by_turn(batch)
    losses = objectives.corrected(
        objectives.get(settings.objective),
        batch,
        correction.weight,
        low=correction.low,
        high=correction.high,
        options=settings.options,
    )
    if correction.sequence_mask is not None:
        losses = objectives.scaled(losses, batch, objectives.sequence_mask(batch, correction.sequence_mask))
    return losses, batch


def _loss(batch: Batch, settings: TrainingSettings, counts: Counts, groups: int) -> Tensor:
    """What (a part of) the batch adds to the loss of the whole, which has so many tokens, sequences and groups."""
    losses, units = _losses(batch, settings)
    losses = objectives.penalised(
        losses,
        units,
        kl_coefficient=settings.penalties.kl,
        estimator=settings.penalties.kl_estimator,
        entropy_coefficient=settings.penalties.entropy,
    )
    loss = objectives.aggregate(losses, units, settings.aggregation, counts, constant=settings.constant)
    if settings.diversity.entropy:
        loss = loss + settings.diversity.entropy * objectives.local_entropy(units, groups)
    return loss


def _slopes(known: Batch, scores: Tensor, settings: TrainingSettings, counts: Counts, groups: int) -> Tensor:
    """[2, N] derivatives of the whole batch's loss by log-probabilities and entropies, at `scores`."""
    scores = scores.detach().requires_grad_()
    loss = _loss(_scored(known, scores, settings), settings, counts, groups)
    (slopes,) = torch.autograd.grad(loss, scores)
    return slopes


def _report(
    whole: Batch, units: Batch, losses: Losses, pushes: Tensor, settings: TrainingSettings
) -> Metrics:
    assert whole.entropies is not None  # it has been scored
    tokens = objectives.token_statistics(whole, whole.entropies)
    found = objectives.summarise(objectives.sequence_log_ratio(units), losses.phi, tokens)
    if whole.behaviour_logprobs is not None:
        found |= objectives.staleness(units, losses.phi, pushes)
    if settings.correction.sequence_mask is not None:
        kept = objectives.sequence_mask(units, settings.correction.sequence_mask)
        found["masked_sequences"] = objectives.masked_sequences(units, kept)
    if settings.penalties.kl:
        divergence = objectives.kl(whole, settings.penalties.kl_estimator)
        found["kl_reference"] = float(divergence.detach().mean())
    return found


def _rewards(log_ratio: Tensor, episodes: Episodes) -> Metrics:
    rewards = torch.tensor(episodes.rewards, dtype=torch.float64, device=log_ratio.device)
    ratios = episodes.deep_thinking
    measured = {} if ratios is None else {"deep_thinking_ratio": float(ratios.mean())}
    return measured | {
        "reward": float(rewards.mean()),
        "reward_estimate": float(torch.softmax(log_ratio.double(), 0) @ rewards),
    }


def _measured(log_ratio: Tensor, pushes: Tensor, episodes: Episodes) -> dict[int, Measured]:
    group = torch.tensor(episodes.groups)
    token_group = group[fields.sequence(episodes)]
    log_ratio, mass = log_ratio.cpu(), pushes.cpu().abs().double()
    return {
        number: Measured(
            objectives.effective_sample_size(log_ratio[group == number]),
            float(mass[token_group == number].mean()),
        )
        for number in sorted(set(token_group.tolist()))
    }
