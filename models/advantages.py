"""Advantages: how much better an answer, or one turn of it, was than others to the same prompt.

A trajectory is one answer with all its turns; the trajectories of a group answer the same prompt. A group
estimator compares the rewards of trajectories, `(rewards [B], groups [B]) -> [B]`. A turn estimator sees the
turns as well, `(Outcomes) -> [K]`, and may give two turns of one trajectory different numbers. `get` offers
both as turn estimators: a group estimator gives all turns of a trajectory the same number.

Sources: GRPO (arXiv 2402.03300), Dr.GRPO (2503.20783), RLOO (2402.14740), DAPO (2503.14476), GiGPO
(2505.10978), EMPG (2509.09265), ARLArena (2602.21534) and its code, social meta-learning (2602.16488).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from hashlib import blake2b
from importlib import import_module
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from models.packing import Sample

EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What B trajectories earned, and the table of their K turns; `turn_table` makes the first two columns.

    The turns of a trajectory come in the order of their numbers, which need not be consecutive; the rows of
    the table may be in any order.
    """

    rewards: Tensor  # [B] float, of the whole trajectory
    groups: Tensor  # [B] int64
    trajectory: Tensor  # [K] int64 in 0..B-1
    turn: Tensor  # [K] int64
    anchors: Tensor | None = None  # [K] int64, equal where the turn answers the same observation
    step_rewards: Tensor | None = None  # [K] float; None: the whole reward came with the last turn
    valid: Tensor | None = None  # [K] bool, the turn kept the format; None: all did
    entropies: Tensor | None = None  # [K] float, mean token entropy of the turn, nats


GroupFunction = Callable[[Tensor, Tensor], Tensor]
TurnFunction = Callable[..., Tensor]
"""A turn estimator: a pure function of `Outcomes`; further arguments are its own constants, with defaults."""


@dataclass(frozen=True, slots=True)
class Estimator:
    """A registered estimator. `needs` names the optional fields of `Outcomes` that must be there."""

    name: str
    estimate: TurnFunction
    needs: frozenset[str]


_REGISTRY: dict[str, Estimator] = {}


def register(name: str, needs: tuple[str, ...] = ()) -> Callable[[TurnFunction], TurnFunction]:
    """Decorator: make a turn estimator known under `name`.

    Raises:
        ValueError: the name is taken.
    """

    def keep(estimate: TurnFunction) -> TurnFunction:
        if name in _REGISTRY:
            raise ValueError(f"advantage {name} is registered already")
        _REGISTRY[name] = Estimator(name, estimate, frozenset(needs))
        return estimate

    return keep


def get(name: str) -> Estimator:
    """The estimator called `name`, or the function at the import path `package.module:function`.

    A function that was given by its path and registered as well keeps what it said it needs.

    Raises:
        ValueError: unknown; the message names the nearest known one, or what the import says.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        near = get_close_matches(name, _REGISTRY, n=1) or sorted(_REGISTRY)
        raise ValueError(f"there is no advantage {name}; did you mean {', '.join(near)}?")
    try:
        function: TurnFunction = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"advantage {name} cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"advantage {name} is a {type(function).__name__}, not a function")
    known = (one for one in _REGISTRY.values() if one.estimate is function)
    return next(known, Estimator(name, function, frozenset()))


def names() -> tuple[str, ...]:
    """Names of all estimators, sorted."""
    return tuple(sorted(_REGISTRY))


def group_mean(rewards: Tensor, groups: Tensor) -> Tensor:
    """Reward minus the mean reward of its group (Dr.GRPO); a group of one keeps its reward, its mean being no
    baseline.

    Args:
        rewards: [B].
        groups: [B] group index of each reward, any integers.

    Returns:
        [B], of the dtype of `rewards`; exactly 0 where all rewards of a group of two or more are equal.
    """
    centred, _, size = _moments(rewards, groups)
    return torch.where(size > 1, centred, rewards)


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:
    """Reward minus the mean of the *other* rewards of its group (RLOO); a group of one keeps its reward."""
    centred, _, size = _moments(rewards, groups)
    return torch.where(size > 1, centred * size / (size - 1).clamp(min=1), rewards)


def group_norm(rewards: Tensor, groups: Tensor) -> Tensor:
    """`group_mean` divided by the group's standard deviation (n - 1) plus 1e-6; a group of one divides by
    1 plus 1e-6. The convention of verl and ARL-Arena."""
    return torch.where(_size(groups) > 1, _standardised(rewards, groups), rewards / (1 + EPSILON))


def group_norm_population(rewards: Tensor, groups: Tensor) -> Tensor:
    """`group_norm` with the standard deviation over n in place of n - 1."""
    normed = _standardised(rewards, groups, freedom=0)
    return torch.where(_size(groups) > 1, normed, rewards / (1 + EPSILON))


def group_norm_trl(rewards: Tensor, groups: Tensor) -> Tensor:
    """`group_norm` by TRL's convention: 1e-4 beside the standard deviation, and 0 for a group of one."""
    return _standardised(rewards, groups, epsilon=1e-4)


ADVANTAGES: Final[dict[str, GroupFunction]] = {
    "group_mean": group_mean,
    "group_norm": group_norm,
    "group_norm_population": group_norm_population,
    "group_norm_trl": group_norm_trl,
    "leave_one_out": leave_one_out,
}
"""The group estimators, by name."""


def _for_turns(estimate: GroupFunction, outcomes: Outcomes) -> Tensor:
    return estimate(outcomes.rewards, outcomes.groups)[outcomes.trajectory]


for _name, _estimate in ADVANTAGES.items():
    register(_name)(partial(_for_turns, _estimate))


@register("group_norm_per_turn")
def group_norm_per_turn(outcomes: Outcomes, *, penalty: float = 0.1) -> Tensor:
    """`group_norm` with every turn as one sample, so that longer trajectories weigh more (ARL-Arena's GRPO).

    Args:
        penalty: taken from the score of a turn that broke the format.

    Returns:
        [K].
    """
    scores = outcomes.rewards[outcomes.trajectory] - _penalties(outcomes, penalty)
    return group_norm(scores, outcomes.groups[outcomes.trajectory])


@register("group_norm_discounted")
def group_norm_discounted(outcomes: Outcomes, *, gamma: float = 0.7) -> Tensor:
    """`group_norm` of `discounted_rewards`: one advantage for all turns of a conversation, larger the sooner it was
    solved (social meta-learning, arXiv 2602.16488; how its discount enters is known to us from notes alone, this is
    the reading that fits a reward for the whole conversation).

    A late success can come below the mean of its group, and is then punished.

    Returns:
        [K].
    """
    return group_norm(discounted_rewards(outcomes, gamma), outcomes.groups)[outcomes.trajectory]


@register("group_norm_to_go")
def group_norm_to_go(outcomes: Outcomes, *, gamma: float = 0.7, penalty: float = 0.0) -> Tensor:
    """`group_norm` of each turn's discounted return, over all turns of the group (the other reading of 2602.16488).

    Args:
        penalty: taken from the return of a turn that broke the format, after discounting.

    Returns:
        [K].
    """
    returns = returns_to_go(outcomes, gamma) - _penalties(outcomes, penalty)
    return group_norm(returns, outcomes.groups[outcomes.trajectory])


@register("gigpo", needs=("anchors",))
def gigpo(
    outcomes: Outcomes,
    *,
    omega: float = 1.0,
    gamma: float = 0.95,
    penalty: float = 0.1,
    mode: Literal["mean_std_norm", "mean_norm"] = "mean_std_norm",
) -> Tensor:
    """GiGPO (arXiv 2505.10978, as ARL-Arena runs it; the advantage of SAMPO): A_episode + omega A_step.

    A_episode compares the trajectory's reward over all turns of its group. A_step compares the discounted
    return from the turn on over all turns of the group that answer the same observation; 0 where there is no
    second one. A turn that broke the format loses `penalty` in both, after discounting, so that the turns
    before it do not pay.

    Args:
        omega: weight of A_step.
        gamma: discount a turn.
        mode: whether differences from the mean are divided by the standard deviation (n - 1) plus 1e-6.

    Returns:
        [K].

    Raises:
        ValueError: `anchors` are missing, or no such mode.
    """
    compare = {"mean_std_norm": group_norm, "mean_norm": group_mean}.get(mode)
    if compare is None:
        raise ValueError(f"GiGPO has no mode {mode}; choose mean_std_norm or mean_norm")
    task = outcomes.groups[outcomes.trajectory]
    penalties = _penalties(outcomes, penalty)
    episode = compare(outcomes.rewards[outcomes.trajectory] - penalties, task)
    state = torch.stack([task, _required(outcomes, "anchors")])
    _, cell = torch.unique(state, dim=1, return_inverse=True)
    step = compare(returns_to_go(outcomes, gamma) - penalties, cell)
    return episode + omega * torch.where(_size(cell) > 1, step, torch.zeros_like(step))


register("gigpo_mean", needs=("anchors",))(partial(gigpo, mode="mean_norm"))


@register("empg", needs=("entropies",))
def empg(outcomes: Outcomes, *, k: float = 1.0, k_future: float = 1.0, zeta: float = 0.05) -> Tensor:
    """EMPG (arXiv 2509.09265): `group_norm`, larger on confident turns, with a bonus for leading to one.

    With H a turn's entropy, min-max normalised over the batch: A' = A exp(-k H) / mean(exp(-k H)) + zeta
    exp(-k_future H of the next turn), without the second term on a last turn; then the batch's mean of A' is
    subtracted. Where all entropies are equal, H is 0.

    Returns:
        [K].

    Raises:
        ValueError: `entropies` are missing.
    """
    return _by_confidence(_for_turns(group_norm, outcomes), outcomes, k, k_future, zeta)


@register("empg_per_turn", needs=("entropies",))
def empg_per_turn(
    outcomes: Outcomes, *, k: float = 1.0, k_future: float = 1.0, zeta: float = 0.05, penalty: float = 0.1
) -> Tensor:
    """`empg` of `group_norm_per_turn`, as ARL-Arena runs it: a turn that broke the format has a score of its own.

    Returns:
        [K].

    Raises:
        ValueError: `entropies` are missing.
    """
    return _by_confidence(group_norm_per_turn(outcomes, penalty=penalty), outcomes, k, k_future, zeta)


def _by_confidence(advantages: Tensor, outcomes: Outcomes, k: float, k_future: float, zeta: float) -> Tensor:
    """EMPG's A' of the `advantages` [K] of the turns, see `empg`."""
    entropies = _required(outcomes, "entropies")
    lowest, highest = entropies.aminmax()
    spread = highest - lowest
    level = (entropies - lowest) / torch.where(spread > 0, spread, torch.ones_like(spread))
    confidence = torch.exp(-k * level)
    future = _padded(torch.exp(-k_future * level))[_next_turn(outcomes)]
    changed = advantages * confidence / confidence.mean() + zeta * future
    return changed - changed.mean()


def discounted_rewards(outcomes: Outcomes, gamma: float) -> Tensor:
    """gamma^(n - 1) r of trajectories of reward r and n turns, [B]: the return as it is seen from the first turn."""
    turns = torch.bincount(outcomes.trajectory, minlength=len(outcomes.rewards))
    return outcomes.rewards * gamma ** (turns - 1).clamp(min=0).to(outcomes.rewards.dtype)


def returns_to_go(outcomes: Outcomes, gamma: float) -> Tensor:
    """Discounted sum of the rewards from each turn on, [K]: r_k + gamma r_(k+1) + gamma^2 r_(k+2) + ..."""
    after = _next_turn(outcomes)
    rewards = outcomes.step_rewards
    if rewards is None:
        last = after == len(after)
        rewards = outcomes.rewards[outcomes.trajectory] * last.to(outcomes.rewards.dtype)
    # Each round doubles how many turns a sum covers, so that the rounds are the logarithm of the longest
    # trajectory. The end is a place of its own, worth 0 and followed by itself.
    total, after = _padded(rewards), torch.cat([after, after.new_tensor([len(after)])])
    while bool((after < len(rewards)).any()):
        total, after, gamma = total + gamma * total[after], after[after], gamma * gamma
    return total[:-1]


def overlong_penalty(lengths: Tensor, longest: int, buffer: int) -> Tensor:
    """DAPO's soft penalty of long answers (arXiv 2503.14476, equation 13), to be added to the reward.

    Args:
        lengths: [B] tokens of each answer.
        longest: tokens from which the penalty is -1.
        buffer: tokens before that in which it grows from 0.

    Returns:
        [B] float64 in [-1, 0].
    """
    return ((longest - buffer - lengths.double()) / buffer).clamp(-1, 0)


def turn_table(sequence: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the turns among trained tokens.

    Args:
        sequence: [N] int64, the trajectory of each trained token.
        turns: [N] int64, the turn that wrote it.

    Returns:
        (trajectory [K], turn [K], place [N]): the two columns of `Outcomes`, ascending, and the row of each
        token, so that `advantages[place]` are the advantages of the tokens.
    """
    rows, place = torch.unique(torch.stack([sequence, turns]), dim=1, return_inverse=True)
    return rows[0], rows[1], place


def turn_means(values: Tensor, place: Tensor, turns: int) -> Tensor:
    """Mean of `values` [N] over the tokens of each of K turns, [K]; `place` [N] is that of `turn_table`."""
    count = torch.bincount(place, minlength=turns).to(values.dtype)
    return torch.zeros_like(count).index_add_(0, place, values) / count


def turn_anchors(samples: Sequence[Sample], turns: Sequence[int] | Tensor) -> Tensor:
    """A hash of the observation that each turn answers: equal token ids, equal hash, in every process.

    The first turn answers the prompt, a later one the tokens that the policy read since its turn before. If it
    read none, it answers all that came before it: nothing read says nothing about the state.

    Args:
        samples: the trajectories.
        turns: [N] turn of each trained token of all samples, ascending within a sample.

    Returns:
        [K] int64, in the order of `turn_table`.

    Raises:
        ValueError: turns that are not as many as the trained tokens, or that descend within a sample.
    """
    numbers = np.asarray(turns, dtype=np.int64)
    places = [np.flatnonzero(np.asarray(sample.trained, dtype=bool)) for sample in samples]
    if len(numbers) != sum(map(len, places)):
        raise ValueError(f"{len(numbers)} turn numbers for {sum(map(len, places))} trained tokens")
    anchors: list[int] = []
    for sample, place in zip(samples, places, strict=True):
        own, numbers = numbers[: len(place)], numbers[len(place) :]
        if (np.diff(own) < 0).any():
            raise ValueError("turn numbers descend within a sample")
        ids = np.concatenate([np.asarray(part, "<i8") for part in (sample.prompt_ids, sample.response_ids)])
        tokens = place + len(sample.prompt_ids)
        read = 0  # what comes before this place was there at the turn before
        for opening in np.flatnonzero(np.diff(own, prepend=own[:1] - 1)):
            if opening:
                read = int(tokens[opening - 1]) + 1
            start = int(tokens[opening])
            anchors.append(_hash(ids[read:start] if read < start else ids[:start]))
    return torch.tensor(anchors, dtype=torch.int64)


def _size(groups: Tensor) -> Tensor:
    """[B] how many share the group."""
    _, index, count = torch.unique(groups, return_inverse=True, return_counts=True)
    return count[index]


def _moments(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distance from the mean, sum of the squared distances, and size of each value's own group, [B] each."""
    _, index = torch.unique(groups, return_inverse=True)
    size = torch.bincount(index).to(values.dtype)

    def total(values: Tensor) -> Tensor:
        return torch.zeros_like(size).index_add_(0, index, values)

    # From the group's least value on, equal values have distance 0 without any rounding.
    lowest = torch.zeros_like(size).scatter_reduce(0, index, values, "amin", include_self=False)
    above = values - lowest[index]
    centred = above - (total(above) / size)[index]
    return centred, total(centred.square())[index], size[index]


def _standardised(values: Tensor, groups: Tensor, *, freedom: int = 1, epsilon: float = EPSILON) -> Tensor:
    """Distance from the group's mean over its deviation (n - freedom) plus epsilon; 0 in a group of one."""
    centred, squares, size = _moments(values, groups)
    return centred / ((squares / (size - freedom).clamp(min=1)).sqrt() + epsilon)


def _penalties(outcomes: Outcomes, penalty: float) -> Tensor:
    """[K]: `penalty` for the turns that broke the format."""
    if outcomes.valid is None:
        return outcomes.rewards.new_zeros(len(outcomes.turn))
    return penalty * (~outcomes.valid).to(outcomes.rewards.dtype)


def _next_turn(outcomes: Outcomes) -> Tensor:
    """[K] row of the same trajectory's next turn; K where there is none."""
    by_turn = torch.argsort(outcomes.turn, stable=True)
    order = by_turn[torch.argsort(outcomes.trajectory[by_turn], stable=True)]
    after = torch.full_like(outcomes.turn, len(outcomes.turn))
    same = outcomes.trajectory[order[:-1]] == outcomes.trajectory[order[1:]]
    after[order[:-1][same]] = order[1:][same]
    return after


def _padded(values: Tensor) -> Tensor:
    """`values` and a 0 at the place behind the last, to which `_next_turn` points at the end."""
    return torch.cat([values, values.new_zeros(1)])


def _required(outcomes: Outcomes, field: str) -> Tensor:
    values: Tensor | None = getattr(outcomes, field)
    if values is None:
        raise ValueError(f"this advantage needs the {field} of the turns, and they are not there")
    return values


def _hash(ids: np.ndarray) -> int:
    return int.from_bytes(blake2b(ids.tobytes(), digest_size=8).digest(), "little", signed=True)
