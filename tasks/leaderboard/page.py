"""A comparison on a page: the order of the methods, a table for each environment, and the curves of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from tasks.arena.floors import Floor
from tasks.leaderboard import causes
from tasks.leaderboard.methods import coordinates
from tasks.leaderboard.ranking import Line, Mean, Rank
from tasks.leaderboard.settings import Method
from tasks.pages import figures
from tasks.pages.figures import Axis, Interval, Item
from tasks.pages.parts import Chart, Group, Row, Section, Strips, Table, listed, number
from tasks.pages.templates import template

_PLAUSIBLE = 0.05  # share of the resamples in which another method is first, above which the page says so


@dataclass(frozen=True, slots=True)
class Failure:
    """A cell without a result; `error` says why, in a sentence."""

    env: str
    method: str
    seed: int
    key: str
    error: str


@dataclass(frozen=True, slots=True)
class Board:
    """Everything that a page shows.

    Attributes:
        results: of the cells that finished, as `cell.run_cell`.
        methods: what the methods are, as far as it was kept.
    """

    ranks: Sequence[Rank]
    lines: Sequence[Line]
    floors: Mapping[str, Floor]
    starts: Mapping[str, Mean]
    results: Sequence[Mapping[str, Any]]
    cpu_seconds: float
    machine: str
    recipe: str
    failures: Sequence[Failure] = ()
    methods: Mapping[str, Method] = field(default_factory=dict)

    def unranked(self) -> list[str]:
        """The methods that have no rank, for want of a cell that another method has."""
        ranked = {one.method for one in self.ranks}
        names = [*(one.method for one in self.lines), *(one.method for one in self.failures)]
        return [name for name in dict.fromkeys(names) if name not in ranked]


def leaderboard_page(board: Board) -> str:
    """Return the page as HTML; it loads nothing from elsewhere."""
    envs = list(dict.fromkeys(line.env for line in board.lines))
    sections = (
        *([_order(board)] if board.ranks else []),
        *([_methods(board)] if board.methods else []),
        *([_troubles(board)] if board.results else []),
        *_contrasts(board),
        *([_failed(board)] if board.failures else []),
        *(_environment(board, env) for env in envs),
        *(_courses(board, env) for env in envs),
    )
    runs, seeds = len(board.results), len({one["seed"] for one in board.results})
    page = template("tasks.leaderboard", "leaderboard.html.jinja")
    return str(
        page.render(
            says=verdict(board.ranks, board.unranked()),
            runs=runs,
            seeds=seeds,
            envs=len(envs),
            methods=len(board.ranks) + len(board.unranked()),
            cpu_minutes=board.cpu_seconds / 60,
            machine=board.machine,
            recipe=board.recipe,
            sections=sections,
        )
    )


def verdict(ranks: Sequence[Rank], unranked: Sequence[str] = ()) -> str:
    """Return in a sentence who leads, and how firmly; and in another one who has no rank."""
    said = _leader(ranks) if ranks else "No order: no method has every cell."
    return f"{said} Not ranked, for cells that failed: {listed(unranked)}." if ranks and unranked else said


def _leader(ranks: Sequence[Rank]) -> str:
    if len(ranks) == 1:
        return f"No order: {ranks[0].method} stands alone."
    first = [one for one in ranks if one.rank <= ranks[0].rank + 1e-9]
    names = listed([one.method for one in first])
    if len(first) == len(ranks):
        return f"No order: {names} have the same mean rank."
    head = f"{names} {'lead' if len(first) > 1 else 'leads'}, with a mean rank of {first[0].rank:.1f}"
    if first[0].best is None:
        return f"{head}, by one seed, which says nothing of others."
    tied = [one.method for one in ranks[len(first) :] if (one.best or 0) > _PLAUSIBLE]
    return f"{head}; other seeds might as well put {' or '.join(tied)} first." if tied else f"{head}."


def _order(board: Board) -> Section:
    axis = Axis(1 - 0.2, len(board.ranks) + 0.2)
    rows = tuple(
        Row(
            one.method,
            figures.strip(
                axis,
                Item(one.method, "", Interval(one.rank, one.low, one.high), None, None, f"{one.rank:.2f}"),
            ),
            (f"{one.rank:.2f}", *firmness(one), number(one.success)),
        )
        for one in board.ranks
    )
    heads = ("method", "mean rank", "95 %", "best in", "mean success")
    strips = Strips(heads, (Group(rows, figures.ruler(axis, left="better", right="worse")),))
    return Section(
        "Order of the methods over all environments",
        strips=strips,
        notes=(
            "A rank is taken on each environment with each seed (1 is best) and averaged; the interval is Student's over seeds. "
            "“Best in” is told by drawing one seed less than there are again and again. The held-out tasks are always the same.",
        ),
    )


def _methods(board: Board) -> Section:
    placed = {name: coordinates(method) for name, method in board.methods.items()}
    heads = ("method", *next(iter(placed.values())))
    return Section(
        "What the methods are, in four dimensions",
        says=("Two methods that differ in one column tell what that dimension does.",),
        table=Table(heads, tuple((name, *each.values()) for name, each in placed.items())),
    )


def _troubles(board: Board) -> Section:
    found = causes.troubles(board.results)
    heads = (
        "method",
        "environment",
        "seed",
        "driver",
        "began",
        "later",
        "look first at",
        "ended",
        "its curves",
    )
    rows = tuple(
        (
            one.method,
            one.env,
            str(one.seed),
            one.driver or "",
            "" if one.onset is None else str(one.onset),
            ", ".join(f"{driver} {onset}" for driver, onset in one.later),
            ", ".join(one.dimensions),
            one.stop_reason,
            one.command,
        )
        for one in found
    )
    return Section(
        "Runs that collapsed or were stopped",
        says=(causes.verdict(found),),
        table=Table(heads, rows) if rows else None,
        notes=tuple(causes.meanings(found)),
    )


def _contrasts(board: Board) -> list[Section]:
    found = causes.contrasts(board.methods, board.results)
    heads = ("dimension", "went wrong", "runs", "its setting", "beside", "runs", "its setting")
    rows = tuple(
        (
            one.dimension,
            one.worse,
            f"{one.wrong[0]} of {one.runs}",
            one.settings[0],
            one.better,
            f"{one.wrong[1]} of {one.runs}",
            one.settings[1],
        )
        for one in found
    )
    section = Section(
        "Which dimension made runs fail",
        says=(
            "Pairs of methods that differ in one dimension alone, of which one had more runs that collapsed or were stopped, on "
            "the same environments with the same seeds. Of few runs this is little firm.",
        ),
        table=Table(heads, rows),
    )
    return [section] if rows else []


def _failed(board: Board) -> Section:
    rows = tuple((one.method, one.env, str(one.seed), one.error) for one in board.failures)
    return Section(
        "Cells without a result",
        says=("A method without a cell that another one has is shown and not ranked.",),
        table=Table(("method", "environment", "seed", "why"), rows),
    )


def _environment(board: Board, env: str) -> Section:
    floor, start = board.floors[env], board.starts[env]
    found = [line for line in board.lines if line.env == env]
    names = list(found[0].figures)
    heads = ("method", "seeds", *names, "gain", "CPU s", "episodes", "trouble")
    rows = tuple(
        (
            line.method,
            str(line.seeds),
            *(_mean(line.figures[name]) for name in names),
            _mean(line.gain, signed=True),
            f"{line.cpu_seconds:.0f}",
            f"{line.episodes:,.0f}",
            counted({**line.collapses, **line.stopped}),
        )
        for line in found
    )
    return Section(
        env,
        says=(f"{floor.tasks} held-out tasks{_set(board, env)}. Start {_mean(start)}; {_floor(floor)}",),
        table=Table(heads, rows),
    )


def _set(board: Board, env: str) -> str:
    digest = tasks_asked(board.results).get(env)
    return f" (set `{digest[:12]}`)" if digest else ""


def tasks_asked(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the digest of each environment's held-out tasks, where it was kept: results did not always tell it."""
    return {one["env"]: one["tasks_digest"] for one in results if "tasks_digest" in one}


def _floor(floor: Floor) -> str:
    if floor.error:
        return f"no baselines: {floor.error}"
    return (
        f"always “{floor.constant_action}” {number(floor.constant)}; a blind choice {number(floor.random)}."
    )


def _courses(board: Board, env: str) -> Section:
    charts = []
    for method in dict.fromkeys(one["method"] for one in board.results):
        runs = [one["curve"] for one in board.results if (one["env"], one["method"]) == (env, method)]
        points = [
            (float(step + 1), mean(run[step] for run in runs if len(run) > step))
            for step in range(max(map(len, runs), default=0))
        ]
        if len(points) > 1:
            caption = f"{method}: {points[0][1]:.2f} to {points[-1][1]:.2f}."
            charts.append(Chart(figures.course(points, caption, below="update"), caption))
    return Section(f"Reward in training on {env}, mean over seeds", charts=tuple(charts))


def firmness(one: Rank) -> tuple[str, str]:
    """Write the interval of a rank, and how often it is the best."""
    if one.low is None or one.high is None or one.best is None:
        return "", ""
    return f"{one.low:.1f} to {one.high:.1f}", f"{one.best:.0%}"


def counted(runs: Mapping[str, int]) -> str:
    """Write how many runs there are of each kind."""
    return ", ".join(f"{name} {count}" for name, count in runs.items()) or "none"


def _mean(value: Mean, *, signed: bool = False) -> str:
    digits = 1 if abs(value.estimate) >= 2 else 2  # turns and tokens; shares
    written = f"{value.estimate:{'+' if signed else ''}.{digits}f}"
    half = "" if value.half is None else f" ± {value.half:.{digits}f}"
    return f"{written}{half}".replace("-", "−")
