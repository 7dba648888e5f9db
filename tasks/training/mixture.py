"""How many groups of an update are fresh, sampled from the policy in training; the others are replay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tasks.training.settings import Mixture

GAIN = 0.25  # change of the share for an effective sample size that is off by 1


@dataclass(frozen=True, slots=True)
class Mix:
    """Where the schedule stands; kept with the run's progress.

    share: fresh part of an update that ess steers, 0 to 1.
    owed: fresh groups that the schedule wants and that were not had yet: the rounding of the last update, from -1/2
        to 1/2, and those that were sampled and refused, up to an update's groups.
    """

    share: float
    owed: float = 0.0

    def to_json(self) -> dict[str, float]:
        """Plain values for `json`, which keeps every bit of a float."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Mix:
        """The mix of which `values` are the `to_json`."""
        return cls(**values)


def start(settings: Mixture, groups_per_step: int) -> Mix:
    """The mix before the first update."""
    return Mix(min(settings.fresh, _most(groups_per_step)))


def fresh_groups(settings: Mixture, mix: Mix, step: int, steps: int, groups_per_step: int) -> tuple[int, Mix]:
    """Fresh groups of update `step` (from 0) of `steps`, and the mix to go on with.

    The part of a group that rounding takes or gives is carried to the next update (error diffusion), so after
    any number of updates the total is at most 1/2 away from the sum of the shares asked for.
    """
    wanted = _share(settings, mix, step, steps) * groups_per_step + mix.owed
    given = min(math.floor(wanted + 0.5), groups_per_step)
    return given, replace(mix, owed=min(wanted - given, float(groups_per_step)))


def refused(mix: Mix, count: int, groups_per_step: int) -> Mix:
    """The mix after `count` fresh groups were sampled and not admitted: the next updates make up for them.

    So the share that is learnt from is the one asked for, as with DAPO's dynamic sampling (arXiv 2503.14476, section
    3.2), while enough groups are admitted for it; what can never be had is not owed without end.
    """
    return replace(mix, owed=min(mix.owed + count, float(groups_per_step)))


def measured(settings: Mixture, mix: Mix, replay_ess: float, groups_per_step: int) -> Mix:
    """Steer by the effective sample size (0 to 1) of the replay in the last update: below the target, the share of
    fresh groups rises, above it falls. Other schedules do not heed it.

    An integral controller that stops at its bounds. It settles where the target is met if the effective sample size
    rises with the share by less than 2 / GAIN = 8, and leaves at least one group of replay (every second update, if
    there is one group) so that there is always something to measure.
    """
    if settings.schedule != "ess":
        return mix
    share = mix.share + GAIN * (settings.target_ess - replay_ess)
    return replace(mix, share=min(max(share, 0.0), _most(groups_per_step)))


def _share(settings: Mixture, mix: Mix, step: int, steps: int) -> float:
    if settings.schedule == "replay":
        return 0.0
    if settings.schedule == "constant":
        return settings.fresh
    if settings.schedule == "linear":
        done = step / max(steps - 1, 1)
        return settings.fresh + (settings.fresh_end - settings.fresh) * done
    return mix.share


def _most(groups_per_step: int) -> float:
    return 1 - 1 / max(groups_per_step, 2)
