"""What a run learns from, round by round: which groups, replayed and fresh, and what older policies say of them.

A round is a number of updates that share one proximal policy, the weights when the round began: their groups are
drawn, and fresh ones sampled, before its first update. Everything that decides the next round is in `Progress`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.objectives import effective_sample_size
from tasks.core.atomic import write_file_atomic
from tasks.training import admission, fields, mixture
from tasks.training.groups import GroupTable
from tasks.training.mixture import Mix
from tasks.training.parallel import Scorer, World, score
from tasks.training.sampler import Frontier, Sampler
from tasks.training.settings import TrainingSettings
from tasks.training.shards import Episodes, Policy, Replay, ShardRef, join, read_replay
from tasks.training.stability import Watch
from tasks.training.update import Update, needs

FreshSource = Callable[[PreTrainedModel, int, int, int], ShardRef]
"""Samples groups: (the model as it is, updates that it has made, groups asked for before, groups) -> a shard under the
shard root."""

_SCORED_AT_ONCE = 64  # groups; bounds the memory of a pass over the whole replay


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: updates made, where sampler and mixture stand, fresh groups asked for, and their shards; what the
    signals of a collapse say, and the update after which the run reacted to one."""

    step: int
    frontier: Frontier
    mix: Mix
    asked: int = 0
    fresh: tuple[ShardRef, ...] = ()
    watch: Watch = field(default_factory=Watch)
    reacted: int | None = None
    onset: int | None = None  # of the collapse that it reacted to, if it did not go back to before it

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json`."""
        return {
            "step": self.step,
            "frontier": self.frontier.to_json(),
            "mix": self.mix.to_json(),
            "asked": self.asked,
            "fresh": [[shard.path, shard.sha256] for shard in self.fresh],
            "watch": self.watch.to_json(),
            "reacted": self.reacted,
            "onset": self.onset,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Progress:
        """The progress of which `values` are the `to_json`."""
        return cls(
            values["step"],
            Frontier.from_json(values["frontier"]),
            Mix.from_json(values["mix"]),
            values["asked"],
            tuple(ShardRef(path, sha256) for path, sha256 in values["fresh"]),
            Watch.from_json(values["watch"]),
            values["reacted"],
            values["onset"],
        )


@dataclass(frozen=True, slots=True)
class Lesson:
    """The episodes of one update, the first `replayed` groups from replay, with what is known before it."""

    episodes: Episodes
    replayed: int
    old_logprobs: Tensor | None
    reference_logprobs: Tensor | None
    diversity: Tensor | None


@dataclass(frozen=True, slots=True)
class Policies:
    """The policy in training, and a context in which `reference` computes what the initial one did."""

    scorer: Scorer
    reference: Scorer
    as_reference: Callable[[], AbstractContextManager[None]]
    autocast: torch.dtype | None
    world: World


@dataclass(frozen=True, slots=True)
class Curriculum:
    """Draws the rounds of one run. `encoder` is needed by DSDR alone, `fresh` by schedules other than replay."""

    replay: Replay
    sampler: Sampler
    policies: Policies
    settings: TrainingSettings
    shard_root: Path
    policy: Policy
    encoder: fields.TextEncoder | None = None
    fresh: FreshSource | None = None
    _diversity: dict[str, Tensor] = field(default_factory=dict)  # of groups met before, by id

    def start(self) -> Progress:
        """The progress before the first update."""
        mix = mixture.start(self.settings.mixture, self.settings.groups_per_step)
        return Progress(0, self.sampler.start(), mix)

    def round(self, progress: Progress) -> tuple[list[Lesson], Progress]:
        """The lessons of the round that begins now, and the progress when they are learnt (but for `learnt`)."""
        began = progress.step
        count = min(self.settings.updates_per_round, self.settings.steps - began)
        lessons = []
        for _ in range(count):
            lesson, progress = self._lesson(progress, began)
            lessons.append(lesson)
        return lessons, progress

    def learnt(self, progress: Progress, lesson: Lesson, update: Update) -> Progress:
        """The progress with what `update` measured of the groups of `lesson`."""
        ids = lesson.episodes.group_ids[: lesson.replayed]
        seen = {name: update.groups[number] for number, name in enumerate(ids) if number in update.groups}
        if not seen:
            return progress
        by_ess = self.settings.sampling.order == "ess"
        values = {name: one.ess if by_ess else one.signal for name, one in seen.items()}
        # Over all of them at once: within a group the smallest possible is 1 / G, however far the policy has moved.
        replayed = [
            w
            for w, number in zip(update.log_ratios, lesson.episodes.groups, strict=True)
            if number < lesson.replayed
        ]
        replay_ess = effective_sample_size(torch.tensor(replayed, dtype=torch.float64))
        return replace(
            progress,
            frontier=self.sampler.measured(progress.frontier, values),
            mix=mixture.measured(
                self.settings.mixture, progress.mix, replay_ess, self.settings.groups_per_step
            ),
        )

    def _lesson(self, progress: Progress, updates: int) -> tuple[Lesson, Progress]:
        """The next lesson; the weights that sample fresh groups for it have made `updates` updates."""
        settings, step = self.settings, progress.step
        wanted, mix = mixture.fresh_groups(
            settings.mixture, progress.mix, step, settings.steps, settings.groups_per_step
        )
        parts, shards, admitted, asked = [], progress.fresh, 0, progress.asked
        for _ in range(settings.mixture.tries):
            if admitted == wanted:
                break
            shard = self._sample(updates, asked, wanted - admitted)
            shards, asked = (*shards, shard), asked + wanted - admitted
            found = read_replay(
                [shard],
                self.shard_root,
                self.policy,
                needs(settings),
                mask_truncated=settings.overlong.mask,
            )
            rules = settings.admission.model_copy(update={"holdout": 0.0})  # it is of replay
            ids = found.table.ids[admission.passes(found.table, rules)].tolist()
            admitted += len(ids)
            if ids:
                parts.append(found.episodes(ids))
        # Replay takes the place of fresh groups that teach nothing; later updates ask for more of them instead.
        mix = mixture.refused(mix, wanted - admitted, settings.groups_per_step)
        ids, frontier = self.sampler.draw(progress.frontier, settings.groups_per_step - admitted)
        if ids:
            parts.insert(0, self.replay.episodes(ids))
        lesson = self._known(join(parts), len(ids))
        return lesson, replace(progress, step=step + 1, frontier=frontier, mix=mix, asked=asked, fresh=shards)

    def _sample(self, updates: int, before: int, count: int) -> ShardRef:
        if self.fresh is None:
            raise ValueError("a schedule with fresh groups needs a source of them")
        device = self.policies.world.device.type
        precision = self.policies.autocast
        # In the precision of the training: else what is fresh would not be on-policy.
        with torch.autocast(device, dtype=precision, enabled=precision is not None):
            return self.fresh(self.policies.scorer.model, updates, before, count)

    def _known(self, episodes: Episodes, replayed: int) -> Lesson:
        settings, policies = self.settings, self.policies
        old = reference = None
        if "old_logprobs" in needs(settings) and settings.updates_per_round > 1:
            old = _score(policies.scorer, episodes, settings, policies)
        if "reference_logprobs" in needs(settings):
            with policies.as_reference():
                reference = _score(policies.reference, episodes, settings, policies)
        return Lesson(episodes, replayed, old, reference, self._answers(episodes))

    def _answers(self, episodes: Episodes) -> Tensor | None:
        """DSDR's diversity of every answer, [B]; the encoder reads each group once a run."""
        if self.encoder is None:
            return None
        places: dict[int, list[int]] = {}
        for place, number in enumerate(episodes.groups):
            places.setdefault(number, []).append(place)
        for number, rows in places.items():
            if episodes.group_ids[number] not in self._diversity:
                texts = [episodes.texts[row] for row in rows]
                self._diversity[episodes.group_ids[number]] = fields.answer_diversity(
                    texts, [0] * len(rows), self.encoder, self.settings.diversity.ceiling
                )
        return torch.cat([self._diversity[episodes.group_ids[number]] for number in sorted(places)])


def admitted(
    replay: Replay, settings: TrainingSettings, policies: Policies, memo: Path
) -> tuple[GroupTable, admission.Report]:
    """The groups that may be learnt from, judged with the initial policy if a divergence is set.

    What was measured is kept in the file `memo`: on a GPU a second measurement may differ in the last bit, and a run
    must go on with the groups it began with.

    Raises:
        Refused: none; the sentence says which setting to change.
    """
    table, report = admission.admit(replay.table, settings.admission)
    if settings.admission.max_divergence is None:
        return table, report
    if not (memo.exists() and memo.stat().st_size == 8 * len(table)):
        measured = np.concatenate([*_divergences(replay, table, settings, policies)])
        if policies.world.main:
            write_file_atomic(memo, lambda path: measured.tofile(path))
        policies.world.wait()
    divergence = np.fromfile(memo)
    nearer, later = admission.admit_measured(table, settings.admission, divergence)
    return nearer, report.then(later)


def _divergences(
    replay: Replay, table: GroupTable, settings: TrainingSettings, policies: Policies
) -> Iterator[np.ndarray]:
    """k3 estimate of KL(behaviour || policy) of each group, mean over its trained tokens; NaN where unknown."""
    for start in range(0, len(table), _SCORED_AT_ONCE):
        ids = table.ids[start : start + _SCORED_AT_ONCE].tolist()
        episodes = replay.episodes(ids)
        if episodes.behaviour_logprobs is None:
            yield np.full(len(ids), np.nan)
            continue
        difference = _score(policies.scorer, episodes, settings, policies).cpu().double()
        difference -= episodes.behaviour_logprobs
        group = torch.tensor(episodes.groups)[fields.sequence(episodes)]
        total = torch.zeros(len(ids), dtype=torch.float64).index_add_(
            0, group, difference.expm1() - difference
        )
        yield (total / torch.bincount(group, minlength=len(ids))).numpy()


def _score(scorer: Scorer, episodes: Episodes, settings: TrainingSettings, policies: Policies) -> Tensor:
    logprobs, _ = score(
        scorer, episodes.passes.samples, settings.token_budget, policies.autocast, policies.world
    )
    return logprobs
