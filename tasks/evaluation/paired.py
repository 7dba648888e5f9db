"""The evidence of one evaluation: two agents' answers to the same tasks, paired and kept by digest."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tasks.arena.environment import plain_name
from tasks.core.atomic import write_atomic
from tasks.core.digest import canonical_json, digest_json, sha256_bytes
from tasks.core.errors import Corrupt, NotFound, UsageError
from tasks.evaluation.statistics import Estimate, paired_difference

SCHEMA = "forebay.outcomes/2"


class Outcome(Protocol):
    """One agent's answer to one task, as `tasks.rollout` gives it. The reward is within [0, 1].

    It may also tell its `family` (by default the task's id), `components`, `finish_reason` and `tokens`.
    """

    @property
    def task_id(self) -> str:
        """Which task."""

    @property
    def env(self) -> str:
        """The environment it belongs to."""

    @property
    def reward(self) -> float:
        """What the verifier gave."""

    @property
    def response_text(self) -> str:
        """All the agent wrote and read after the prompt."""


@dataclass(frozen=True)
class Agent:
    """A registered agent: its version and the digest of its files."""

    version: int
    digest: str


@dataclass(frozen=True)
class Baseline:
    """What an environment's tasks give without any skill; no number where it did not live through it, but an `error`.

    Attributes:
        answer, score: the best constant answer and its mean reward.
        random: mean reward of a blind choice; None in outcomes of earlier releases, too.
    """

    answer: str | None
    score: float | None
    random: float | None = None
    error: str = ""


@dataclass(frozen=True)
class Pair:
    """Both agents' k-th answer (`sample`) to one task.

    Attributes:
        family: tasks of one family share their difficulty (one template with the same numbers, say): one cluster.
        candidate_finish, champion_finish: how the episode ended: done, length, turns or error; "" where unknown.
        candidate_tokens, champion_tokens: how many the agent wrote; 0 where unknown.
    """

    env: str
    task_id: str
    sample: int
    candidate_reward: float
    champion_reward: float
    candidate_response: str
    champion_response: str
    family: str
    candidate_components: Mapping[str, float] = field(default_factory=dict)
    champion_components: Mapping[str, float] = field(default_factory=dict)
    candidate_finish: str = ""
    champion_finish: str = ""
    candidate_tokens: int = 0
    champion_tokens: int = 0

    @property
    def cluster(self) -> str:
        """The name of the family among those of all environments; a task is the same with and without a memory."""
        return f"{plain_name(self.env)}/{self.family}"


@dataclass(frozen=True)
class Plan:
    """What was to be answered by an evaluation that may stop early, by environment.

    Attributes:
        tasks: how many.
        digests: of the ids of all of them, answered or not.
        largest: answers in the largest family.
        looks: after how many tasks it was looked at first, and after how many more each time.
    """

    tasks: Mapping[str, int]
    digests: Mapping[str, str]
    largest: Mapping[str, int]
    looks: tuple[int, int]

    @property
    def total(self) -> int:
        """How many tasks there are in all."""
        return sum(self.tasks.values())


@dataclass(frozen=True)
class PairedOutcomes:
    """All an evaluation found; `baselines` by environment, `pairs` sorted by environment, task and sample.

    `plan` is None where all was answered before anybody looked.
    """

    candidate: Agent
    champion: Agent
    baselines: Mapping[str, Baseline]
    pairs: tuple[Pair, ...]
    plan: Plan | None = None

    def slices(self) -> list[str]:
        """Return the environments, sorted."""
        return sorted({pair.env for pair in self.pairs})

    def rewards(self, env: str | None = None) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Return candidate and champion rewards [n] and cluster names [n], of one environment or all.

        Answers to the tasks of one family are one cluster.
        """
        pairs = [pair for pair in self.pairs if env in (None, pair.env)]
        candidate = np.array([pair.candidate_reward for pair in pairs])
        champion = np.array([pair.champion_reward for pair in pairs])
        return candidate, champion, [pair.cluster for pair in pairs]

    def largest(self, env: str | None = None) -> int | None:
        """Return the size of the largest cluster planned, of one environment or all; None where all are here."""
        if self.plan is None:
            return None
        return self.plan.largest[env] if env is not None else max(self.plan.largest.values())

    def noise(self) -> np.ndarray:
        """Return a number in [0, 1) for each pair, [n], that follows from its environment, task and sample alone."""
        names = (f"{pair.env}/{pair.task_id}/{pair.sample}" for pair in self.pairs)
        return np.array([int(sha256_bytes(name.encode())[:13], 16) / 16**13 for name in names])

    def tasks(self) -> dict[str, str]:
        """Return {environment: digest of its tasks, unanswered ones too}: it tells one held-out set from another."""
        if self.plan is not None:
            return dict(self.plan.digests)
        ids = {env: sorted({p.task_id for p in self.pairs if p.env == env}) for env in self.slices()}
        return {env: digest_json(found) for env, found in ids.items()}

    def constant(self, env: str | None = None) -> float | None:
        """What the best constant answers earn, over all environments weighted by answers; None where one is unknown."""
        return self._without_skill(lambda baseline: baseline.score, env)

    def random(self, env: str | None = None) -> float | None:
        """What blind choices earn, as `constant`."""
        return self._without_skill(lambda baseline: baseline.random, env)

    def difference(self, env: str | None = None, *, alpha: float, power: float = 0.8) -> Estimate:
        """Estimate the mean reward of the candidate less the champion's."""
        candidate, champion, clusters = self.rewards(env)
        return paired_difference(candidate, champion, clusters, alpha=alpha, power=power)

    def _without_skill(self, figure: Callable[[Baseline], float | None], env: str | None) -> float | None:
        scores = {name: figure(baseline) for name, baseline in self.baselines.items()}
        if env is not None:
            return scores.get(env)
        known = [score for pair in self.pairs if (score := scores.get(pair.env)) is not None]
        return float(np.mean(known)) if len(known) == len(self.pairs) else None


@dataclass(frozen=True)
class SliceRow:
    """One line of the table: mean rewards in one environment (or "all"), and the paired difference.

    Attributes:
        constant, random: what the best constant answer and blind choices earn (for "all" the mean weighted by answers),
            None where unknown.
        baseline_error: why this environment has neither, "" where it has.
    """

    env: str
    n: int
    candidate: float
    champion: float
    constant: float | None
    random: float | None
    baseline_error: str
    difference: float
    low: float
    high: float


def pair_outcomes(
    candidate: Sequence[Outcome],
    champion: Sequence[Outcome],
    agents: tuple[Agent, Agent],
    baselines: Mapping[str, Baseline],
    plan: Plan | None = None,
) -> PairedOutcomes:
    """Match the answers of the candidate and the champion (`agents`, in this order) task by task.

    Raises:
        UsageError: no outcomes, or the two did not answer the same tasks equally often.
    """
    sides = _by_key(candidate), _by_key(champion)
    odd = sorted(sides[0].keys() ^ sides[1].keys())
    if odd:
        env, task, sample = odd[0]
        raise UsageError(
            f"The evaluation is not paired: {len(odd)} answers have no counterpart, first task {task} of "
            f"{env} (answer {sample + 1}); evaluate both agents on the same tasks."
        )
    if not sides[0]:
        raise UsageError("The evaluation has no outcomes; ask for at least one task in `evaluation.tasks`.")
    pairs = tuple(_pair(key, sides[0][key], sides[1][key]) for key in sorted(sides[0]))
    return PairedOutcomes(*agents, dict(baselines), pairs, plan)


def write_outcomes(evidence: Path, outcomes: PairedOutcomes) -> tuple[Path, str]:
    """Write evidence/outcomes/<SHA-256>.jsonl; return path and digest. Equal outcomes give equal bytes."""
    head = {
        "schema": SCHEMA,
        "candidate": asdict(outcomes.candidate),
        "champion": asdict(outcomes.champion),
        "baselines": {env: _kept(baseline) for env, baseline in outcomes.baselines.items()},
        "plan": outcomes.plan and asdict(outcomes.plan),
    }
    lines = [head, *(asdict(pair) for pair in outcomes.pairs)]
    data = b"".join(canonical_json(line) + b"\n" for line in lines)
    digest = sha256_bytes(data)
    path = evidence / "outcomes" / f"{digest}.jsonl"
    write_atomic(path, data)
    return path, digest


def read_outcomes(path: Path, sha256: str) -> PairedOutcomes:
    """Read outcomes back.

    Raises:
        NotFound: there is no such file.
        Corrupt: its bytes are not those of the digest.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(
            f"The outcomes {path.name} are not in {path.parent}; restore them or evaluate again."
        ) from None
    if sha256_bytes(data) != sha256:
        raise Corrupt(f"The outcomes {path} differ from their digest {sha256[:12]}…; evaluate again.")
    head, *rows = (json.loads(line) for line in data.splitlines())
    return PairedOutcomes(
        Agent(**head["candidate"]),
        Agent(**head["champion"]),
        {env: Baseline(**baseline) for env, baseline in head["baselines"].items()},
        # An earlier version knew no families: every task was its own.
        tuple(Pair(**{"family": row["task_id"], **row}) for row in rows),
        _plan(head.get("plan")),
    )


def table(outcomes: PairedOutcomes, *, alpha: float) -> list[SliceRow]:
    """Return one row per environment and one for all, with intervals of one-sided error `alpha`."""
    return [*(_row(outcomes, env, alpha) for env in outcomes.slices()), _row(outcomes, None, alpha)]


def _row(outcomes: PairedOutcomes, env: str | None, alpha: float) -> SliceRow:
    candidate, champion, _ = outcomes.rewards(env)
    gain = outcomes.difference(env, alpha=alpha)
    baseline = None if env is None else outcomes.baselines.get(env)
    return SliceRow(
        env or "all",
        gain.n,
        float(candidate.mean()),
        float(champion.mean()),
        outcomes.constant(env),
        outcomes.random(env),
        "" if baseline is None else baseline.error,
        gain.estimate,
        gain.low,
        gain.high,
    )


def _kept(baseline: Baseline) -> dict[str, Any]:
    """The fields of a baseline; those that earlier releases did not know are left out where they say nothing."""
    fields = asdict(baseline)
    return {
        name: value
        for name, value in fields.items()
        if name in ("answer", "score") or value not in (None, "")
    }


def _pair(key: tuple[str, str, int], candidate: Any, champion: Any) -> Pair:
    """Both sides of one answer; what an outcome does not tell keeps its default."""
    told = {
        f"{side}_{name}": getattr(answer, source)
        for side, answer in (("candidate", candidate), ("champion", champion))
        for name, source in (("components", "components"), ("finish", "finish_reason"), ("tokens", "tokens"))
        if hasattr(answer, source)
    }
    return Pair(
        *key,
        float(candidate.reward),
        float(champion.reward),
        candidate.response_text,
        champion.response_text,
        getattr(candidate, "family", "") or candidate.task_id,
        **told,
    )


def _plan(values: Mapping[str, Any] | None) -> Plan | None:
    return None if values is None else Plan(**{**values, "looks": tuple(values["looks"])})


def _by_key(outcomes: Iterable[Outcome]) -> dict[tuple[str, str, int], Any]:
    seen: dict[tuple[str, str], int] = defaultdict(int)
    keyed = {}
    for outcome in outcomes:
        task = (outcome.env, outcome.task_id)
        keyed[(*task, seen[task])] = outcome
        seen[task] += 1
    return keyed
