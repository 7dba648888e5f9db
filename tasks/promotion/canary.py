"""The canary: is the new champion, in service, worse than its predecessor? A question that may be asked at any time.

Episodes of both agents since the promotion are gathered into groups (answers to one prompt), whose mean reward is one
value in [0, 1]. For each agent and environment the betting e-process of `tasks.evaluation.sequential` gives the wealth
against every mean m that it might have. The wealths are of separate streams, so their product is again an e-process
against all means together, and by Ville's inequality

    { means : product of wealths < 1 / alpha }

holds the true ones at all times at once with probability 1 - alpha. The greatest weighted difference (new - old) in
that set is an upper confidence bound which may be looked at after every group; the least one, with bets the other way,
is a lower bound. Taking one product costs far less than a bound for each stream and alpha shared among them: widths add
up as the root of the sum of squares.

What is assumed: groups are independent draws of questions, the same for both agents; within a group anything may depend
on anything. Weights are fixed before the first look. An environment in which one of the two has no traffic leaves that
mean anywhere in [0, 1].

Sources: Waudby-Smith and Ramdas (arXiv 2010.09686) for the wealth; Vovk and Wang (arXiv 1912.06116) for products of
e-values; the bound over the set is by weak duality, which errs on the safe side for every multiplier tried.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tasks.core.atomic import write_atomic
from tasks.core.digest import canonical_json, sha256_bytes
from tasks.core.errors import Corrupt, NotFound
from tasks.evaluation.sequential import FRACTIONS

SCHEMA = "forebay.canary/1"
Floats = NDArray[np.float64]
Verdict = Literal["HARM", "PROVEN", "WATCHING", "INCONCLUSIVE"]

_CELLS = 1024
_MEANS: Floats = np.linspace(0.0, 1.0, _CELLS + 1)  # between two of them a bound errs by less than 1e-4
_MULTIPLIERS: Floats = np.geomspace(0.1, 1e6, 128)
_DIGITS = 10


@dataclass(frozen=True)
class Group:
    """One question as an agent answered it: `reward` is the mean over its `n` answers, within [0, 1]."""

    id: str
    reward: float
    n: int


@dataclass(frozen=True)
class Traffic:
    """What both agents did in one environment, each group once."""

    new: tuple[Group, ...] = ()
    old: tuple[Group, ...] = ()


@dataclass(frozen=True)
class Rule:
    """What was fixed before the first look.

    Attributes:
        alpha: one-sided error of each bound, over all looks together.
        margin: mean reward that the new champion may lose.
        min_groups: of each agent, before anything follows.
        weights: share of each environment; environments that are not named do not count.
        baseline: "concurrent": the predecessor's episodes since the promotion; "before": its earlier ones too.
    """

    alpha: float
    margin: float
    min_groups: int
    weights: Mapping[str, float]
    baseline: Literal["concurrent", "before"] = "concurrent"


@dataclass(frozen=True)
class Judged:
    """What the traffic shows.

    Attributes:
        verdict: HARM: `high` is below -margin. PROVEN: `low` is above it. WATCHING: neither yet. INCONCLUSIVE: one of
            the two has too little traffic to say anything.
        estimate: weighted mean reward, new less old, over environments where both have traffic; None where none has.
        low, high: bounds of new less old over all environments, each valid at any time with error alpha.
        new, old: groups of each that count.
    """

    verdict: Verdict
    says: str
    estimate: float | None
    low: float
    high: float
    new: int
    old: int


def judge(
    traffic: Mapping[str, Traffic], rule: Rule, wealths: Mapping[tuple[str, str], _Wealths] | None = None
) -> Judged:
    """Compare the new champion with its predecessor on what both did in service.

    Args:
        wealths: of each (environment, role), where they are known already.

    Raises:
        ValueError: a reward is not within [0, 1].
    """
    counted = {env: traffic.get(env, Traffic()) for env in sorted(rule.weights)}
    new, old = (
        [np.array([g.reward for g in getattr(t, role)]) for t in counted.values()] for role in ("new", "old")
    )
    weights = np.array([rule.weights[env] for env in counted])
    if wealths is None:
        ours, theirs = ([_Wealths.of(x) for x in side] for side in (new, old))
    else:
        ours, theirs = ([wealths[env, role] for env in counted] for role in ("new", "old"))
    high = _upper_bound(ours, theirs, weights, rule.alpha)
    low = -_upper_bound(theirs, ours, weights, rule.alpha)
    both = [i for i in range(len(weights)) if new[i].size and old[i].size]
    shares = weights[both] / weights[both].sum() if both else weights[both]
    means = np.array([new[i].mean() - old[i].mean() for i in both])
    estimate = float(shares @ means) if both else None
    n = (sum(x.size for x in new), sum(x.size for x in old))
    verdict, says = _verdict(rule, estimate, low, high, n)
    return Judged(verdict, says, _rounded(estimate), _rounded(low), _rounded(high), *n)


def upper_bound(new: Sequence[Floats], old: Sequence[Floats], weights: Floats, alpha: float) -> float:
    """Return the upper confidence bound of the weighted mean of `new` less that of `old`, valid at any time.

    The bound is max w (m_new - m_old) over all means with sum of log wealths <= log 1/alpha. For every multiplier
    v > 0 it is at most log(1/alpha) / v + sum of max over m of (+-w m - log wealth(m) / v); the least of these is taken.

    Args:
        new, old: for each environment the groups' mean rewards, [n].
        weights: [environments].
        alpha: one-sided error.
    """
    return _upper_bound([_Wealths.of(x) for x in new], [_Wealths.of(y) for y in old], weights, alpha)


@dataclass(frozen=True)
class _Wealths:
    """The log wealth against each mean: that the true one is above it, and that it is below."""

    above: Floats
    below: Floats

    @classmethod
    def of(cls, values: Floats) -> _Wealths:
        return cls(log_wealth(values), log_wealth(1 - values)[::-1])


def _upper_bound(new: Sequence[_Wealths], old: Sequence[_Wealths], weights: Floats, alpha: float) -> float:
    total = np.log(1 / alpha) / _MULTIPLIERS
    for weight, x, y in zip(weights, new, old, strict=True):
        # Against large means of the new one: bets that its mean is below m. Against small means of the old.
        for sign, wealth in ((1, x.below), (-1, y.above)):
            with np.errstate(invalid="ignore"):
                gain = sign * weight * _MEANS[None, :] - wealth[None, :] / _MULTIPLIERS[:, None]
            total += gain.max(axis=1)
    reach = float(weights.sum())
    return float(np.clip(total.min(), -reach, reach))


def log_wealth(values: Floats) -> Floats:
    """Return the log of the e-process against "the mean is at most m" after all `values`, for each m of a grid on [0, 1].

    Args:
        values: [n] within [0, 1], in any order: the bets are constant.

    Raises:
        ValueError: a value is outside [0, 1].
    """
    if values.size and not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise ValueError("rewards must be within [0, 1]")
    if not values.size:
        return np.zeros(_MEANS.size)
    found, counts = np.unique(values, return_counts=True)
    logs = np.zeros((FRACTIONS.size, _MEANS.size - 1))
    for value, count in zip(found.tolist(), counts.tolist(), strict=True):
        logs += count * _log_gains(value)
    return _mixed(logs, bool(values.any()))


def _mixed(logs: Floats, positive: bool) -> Floats:
    """Return the log of the mean wealth over all fractions, [means]; `positive`: a value is, so the mean is not 0."""
    top = logs.max(axis=0)
    mixed = top + np.log(np.exp(logs - top).mean(axis=0))
    return np.concatenate([[np.inf if positive else 0.0], mixed])


@lru_cache(maxsize=64)
def _log_gains(value: float) -> Floats:
    """Return the log of what each fraction makes of one value against each mean but 0, [fractions, means - 1]."""
    return np.log1p(FRACTIONS[:, None] * (value / _MEANS[None, 1:] - 1.0))


def _verdict(
    rule: Rule, estimate: float | None, low: float, high: float, n: tuple[int, int]
) -> tuple[Verdict, str]:
    if n[1] == 0 and rule.baseline == "concurrent":
        return "INCONCLUSIVE", (
            "the predecessor has had no traffic since the promotion; keep it sampled with "
            "`forebay collect --version previous`"
        )
    if min(n) < rule.min_groups or estimate is None:
        return "INCONCLUSIVE", f"{n[0]} and {n[1]} groups; {rule.min_groups} of each are needed"
    bounds = f"new less old {estimate:+.3f}, at least {low:+.3f} and at most {high:+.3f} (error {rule.alpha:g} each)"
    if high < -rule.margin:
        return "HARM", f"worse in service: {bounds}"
    if low > -rule.margin:
        return "PROVEN", f"proven in service: {bounds}"
    return "WATCHING", f"not told apart yet: {bounds}"


class _Stream:
    """The groups of one agent in one environment, followed from look to look: only what is new is bet on."""

    def __init__(self) -> None:
        self._rewards: dict[str, float] = {}
        self._above: Floats = np.zeros((FRACTIONS.size, _MEANS.size - 1))
        self._below = self._above.copy()

    def follow(self, groups: Sequence[Group]) -> _Wealths:
        """Come from the groups of the look before to these; each difference costs the same, however many there are."""
        rewards = {group.id: group.reward for group in groups}
        if not all(0 <= reward <= 1 for reward in rewards.values()):
            raise ValueError("rewards must be within [0, 1]")
        if len(rewards) < len(groups):
            raise Corrupt("A group is counted twice.")
        for name in self._rewards.keys() | rewards.keys():
            old, new = self._rewards.get(name), rewards.get(name)
            if old != new:
                self._bet(old, -1)
                self._bet(new, 1)
        self._rewards = rewards
        values = np.array(list(rewards.values()))
        if not values.size:
            return _Wealths.of(values)
        return _Wealths(
            _mixed(self._above, bool(values.any())), _mixed(self._below, bool((1 - values).any()))[::-1]
        )

    def _bet(self, reward: float | None, sign: int) -> None:
        if reward is not None:
            self._above += sign * _log_gains(reward)
            self._below += sign * _log_gains(1 - reward)


def make_record(
    traffic: Mapping[str, Traffic],
    rule: Rule,
    about: Mapping[str, Any],
    wealths: Mapping[tuple[str, str], _Wealths] | None = None,
) -> tuple[dict[str, Any], Judged]:
    """Return the evidence of one look, from which `recompute` gives the same bytes again, and what it shows.

    Args:
        about: who is compared, since when, where the episodes are from.
        wealths: as for `judge`.
    """
    judged = judge(traffic, rule, wealths)
    groups = {
        env: {
            role: [[g.id, g.reward, g.n] for g in sorted(getattr(found, role), key=lambda g: g.id)]
            for role in ("new", "old")
        }
        for env, found in sorted(traffic.items())
    }
    record = {
        "schema": SCHEMA,
        **about,
        "rule": asdict(rule),
        "groups": groups,
        "result": asdict(judged),
    }
    return json.loads(canonical_json(record)), judged


def write_record(evidence: Path, record: Mapping[str, Any]) -> tuple[Path, str]:
    """Write evidence/canary/<SHA-256>.json; return path and digest."""
    data = canonical_json(dict(record))
    digest = sha256_bytes(data)
    path = evidence / "canary" / f"{digest}.json"
    write_atomic(path, data)
    return path, digest


def recompute(path: Path, sha256: str) -> Judged:
    """Judge again from the groups in a record.

    Raises:
        NotFound: the record is gone.
        Corrupt: its bytes are not those of the digest, or its groups lead to another result.
    """
    data = _read(path, sha256)
    traffic, rule, about = _parts(json.loads(data))
    again, judged = make_record(traffic, rule, about)
    if canonical_json(again) != data:
        raise Corrupt(f"The canary's evidence {path} leads to another result than it says.")
    return judged


class Recomputer:
    """Judges many looks of canaries again, each as `recompute` does.

    Looks of one canary have mostly the same groups, so each is reached from the one before it: the cost of all grows
    with the number of groups, not with its square. Sums made in another order differ in the last bits, so a look that
    does not agree to the byte that way is judged by itself, and only that counts against it.
    """

    def __init__(self) -> None:
        self._streams: dict[tuple[int | None, str, str], _Stream] = defaultdict(_Stream)

    def check(self, path: Path, sha256: str) -> None:
        """Judge one look again; quickest in the order in which they were made.

        Raises:
            NotFound, Corrupt: as `recompute`; what is no record raises ValueError, KeyError or TypeError.
        """
        data = _read(path, sha256)
        record = json.loads(data)
        traffic, rule, about = _parts(record)
        try:
            wealths = {
                (env, role): self._streams[record.get("promotion"), env, role].follow(
                    getattr(traffic.get(env, Traffic()), role)
                )
                for env in rule.weights
                for role in ("new", "old")
            }
            agrees = canonical_json(make_record(traffic, rule, about, wealths)[0]) == data
        except Corrupt:
            agrees = False
        if not agrees:
            recompute(path, sha256)


def _read(path: Path, sha256: str) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(
            f"The canary's evidence {path} is gone; restore it from a backup of .forebay/evidence."
        ) from None
    if sha256_bytes(data) != sha256:
        raise Corrupt(f"The canary's evidence {path} was changed: its bytes are not those of its digest.")
    return data


def _parts(record: Mapping[str, Any]) -> tuple[dict[str, Traffic], Rule, dict[str, Any]]:
    """Return the groups, the rule and the rest of a record."""
    traffic = {
        env: Traffic(*(tuple(Group(*row) for row in found[role]) for role in ("new", "old")))
        for env, found in record["groups"].items()
    }
    about = {k: v for k, v in record.items() if k not in ("schema", "rule", "groups", "result")}
    return traffic, Rule(**record["rule"]), about


def _rounded(value: Any) -> Any:
    return None if value is None else round(float(value), _DIGITS)
