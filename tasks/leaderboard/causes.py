"""What went wrong in the runs of a comparison, and which dimension of a method to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from tasks.leaderboard.methods import coordinates
from tasks.leaderboard.settings import Method
from tasks.training.stability import SIGNALS, Dimension, Signal

_SIGNALS: Mapping[str, Signal] = {signal.driver: signal for signal in SIGNALS}


@dataclass(frozen=True, slots=True)
class Trouble:
    """A run that collapsed, or that a guard stopped.

    Attributes:
        key: of the cell, whose curves `forebay stability cell:DIGITS` draws.
        driver: what departed first, and `onset` the update with which it did; None where nothing departed.
        later: [(driver, onset)] of what followed.
        dimensions: where to look first, as `Signal.dimensions`.
        stop_reason: `finished`, or why it ended before.
    """

    env: str
    method: str
    seed: int
    key: str
    driver: str | None
    onset: int | None
    later: tuple[tuple[str, int], ...]
    dimensions: tuple[Dimension, ...]
    stop_reason: str

    def course(self) -> str:
        """What became of the run, in a clause."""
        began = [] if self.driver is None else [f"{self.driver} from update {self.onset} on"]
        followed = [f"then {driver} from {onset}" for driver, onset in self.later]
        return ", ".join([*began, *followed, self.stop_reason])

    @property
    def command(self) -> str:
        """What to type to see its curves."""
        return f"forebay stability cell:{self.key[:12]}"


def troubles(results: Sequence[Mapping[str, Any]]) -> list[Trouble]:
    """Return the runs that collapsed or were stopped, in the order of `results`."""
    found = []
    for one in results:
        departed = [(each["driver"], each["onset"]) for each in one["findings"]]
        if not departed and one["stop_reason"] == "finished":
            continue
        driver, onset = departed[0] if departed else (None, None)
        signal = _SIGNALS.get(driver or "")
        found.append(
            Trouble(
                env=one["env"],
                method=one["method"],
                seed=one["seed"],
                key=one["key"],
                driver=driver,
                onset=onset,
                later=tuple(departed[1:]),
                dimensions=signal.dimensions if signal else (),
                stop_reason=one["stop_reason"],
            )
        )
    return found


@dataclass(frozen=True, slots=True)
class Contrast:
    """Two methods that differ in one dimension alone, of which one had more runs that collapsed or were stopped.

    Attributes:
        settings: of both in that dimension, as `coordinates`.
        wrong: how many runs of each went wrong, `worse` first; runs: of how many, the environments and seeds of both.
    """

    dimension: Dimension
    worse: str
    better: str
    settings: tuple[str, str]
    wrong: tuple[int, int]
    runs: int


def contrasts(methods: Mapping[str, Method], results: Sequence[Mapping[str, Any]]) -> list[Contrast]:
    """Return the pairs of methods that show which dimension made runs fail, the clearest first.

    They are counts of few runs, without a test: a pair says where the difference lies, more seeds how firm it is.
    """
    placed = {name: _places(method) for name, method in methods.items()}
    ill = {(one.method, one.env, one.seed) for one in troubles(results)}
    cells: dict[str, set[tuple[str, int]]] = {name: set() for name in placed}
    for one in results:
        cells.setdefault(one["method"], set()).add((one["env"], one["seed"]))
    found = []
    for worse, better in permutations(placed, 2):
        apart = [name for name, setting in placed[worse].items() if setting != placed[better][name]]
        shared = cells[worse] & cells[better]
        wrong = tuple(sum((name, *cell) in ill for cell in shared) for name in (worse, better))
        if len(apart) == 1 and wrong[0] > wrong[1]:
            settings = tuple(coordinates(methods[name])[apart[0]] for name in (worse, better))
            found.append(
                Contrast(
                    apart[0], worse, better, (settings[0], settings[1]), (wrong[0], wrong[1]), len(shared)
                )
            )
    return sorted(found, key=lambda one: one.wrong[1] - one.wrong[0])


def _places(method: Method) -> dict[Dimension, object]:
    """The settings of each dimension, equal where the methods are."""
    return {
        "aggregation": method.aggregation,
        "clipping": method.clipping,
        "filtering": method.filtering,
        "advantage": (method.advantage, method.advantage_options),
    }


def verdict(found: Sequence[Trouble]) -> str:
    """Return in a sentence how many runs collapsed and how many were stopped."""
    collapsed = sum(one.driver is not None for one in found)
    stopped = sum(one.stop_reason != "finished" for one in found)
    if not found:
        return "No run collapsed, and none was stopped."
    return f"{_runs(collapsed)} collapsed, {stopped or 'none'} stopped by a guard."


def _runs(count: int) -> str:
    return "No run" if not count else f"{count} run{'s' if count > 1 else ''}"


def meanings(found: Sequence[Trouble]) -> list[str]:
    """Return for each first driver among `found` which dimensions it concerns, what it means and what helps."""
    drivers = dict.fromkeys(one.driver for one in found)
    return [
        f"{signal.driver} ({', '.join(signal.dimensions)}): {signal.advice}."
        for driver in drivers
        if (signal := _SIGNALS.get(driver or "")) is not None
    ]
