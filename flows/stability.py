"""Whether a run of training, or a cell of the arena, was healthy: asked of the metrics that its updates left."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from flows.context import Context
from tasks.core.errors import NotFound, UsageError

_ARENA, _CELL = "arena/", "cell:"
_TOLD = 20  # cells that an error names


@dataclass(frozen=True, slots=True)
class _Asked:
    """A run: what it is called and its key, where its metrics are, and why it ended."""

    what: str
    key: str
    folder: Path
    stop_reason: str


def stability(context: Context, ref: str | None = None, target: Path | None = None) -> dict[str, Any]:
    """Return where a run began to collapse and what drives it; one that still goes on is judged so far.

    Args:
        ref: an agent (the run that made it), or run:DIGITS; None: the newest run. Of the arena, arena/METHOD/ENV/SEED is a
            cell of the newest comparison, and cell:DIGITS any cell whose folder is there.
        target: where to write the page with its curves, if anywhere.

    Returns:
        {run, what, steps, stop_reason, says, findings: [driver, metric, onset, noticed, before, after, advice], page}.

    Raises:
        NotFound: there is no such thing, or it left no metrics. UsageError: it is no run, and no run made it; or several
            cells begin with these digits.
    """
    from tasks.core.atomic import write_atomic
    from tasks.training.curve import read_curve
    from tasks.training.stability import find_collapse
    from tasks.training.stability_page import Run, stability_page, verdict

    asked = _asked(context, ref)
    curve = read_curve(asked.folder)
    if not curve:
        raise NotFound(
            f"{asked.what[:1].upper()}{asked.what[1:]} {asked.key[:12]} left no metrics here; it has made no update, or its folder is gone."
        )
    findings = find_collapse(curve)
    run = Run(asked.key, int(curve[-1]["step"]), asked.stop_reason, asked.what)
    if target is not None:
        write_atomic(target, stability_page(run, curve, findings).encode())
    return {
        "run": run.key,
        "what": run.what,
        "steps": run.steps,
        "stop_reason": run.stop_reason,
        "says": verdict(findings),
        "findings": [asdict(finding) for finding in findings],
        "page": str(target) if target else None,
    }


def _asked(context: Context, ref: str | None) -> _Asked:
    if ref is not None and ref.startswith((_ARENA, _CELL)):
        return _cell_of(context, ref)
    key = _run_of(context, ref)
    finished = context.ledger.last("run.finished", key)
    reason = finished.payload["outputs"]["stop_reason"] if finished else "not finished"
    return _Asked("run", key, context.workspace.runs / key[:16], reason)


def _cell_of(context: Context, ref: str) -> _Asked:
    cells = context.workspace.state / "arena" / "cells"
    key = _key_of(context, ref) if ref.startswith(_ARENA) else _only(cells, ref.removeprefix(_CELL))
    folder, what, reason = cells / key[:16], "cell", "not finished"
    if (done := folder / "result.json").exists():
        result = json.loads(done.read_text())
        what = f"cell {result['method']} on {result['env']} with seed {result['seed']}"
        key, reason = result["key"], result["stop_reason"]
    return _Asked(what, key, folder, reason)


def _key_of(context: Context, ref: str) -> str:
    """The key of a cell of the newest comparison, by its name: a method and an environment may have any letters."""
    from flows.leaderboard import last_board, results_of

    board = last_board(context)
    cells = {
        f"{_ARENA}{one['method']}/{one['env']}/{one['seed']}": str(one["key"])
        for one in [*results_of(context, board), *board["failures"]]
    }
    if ref not in cells:
        near = get_close_matches(ref, cells, n=1, cutoff=0.0)[0]
        asked = board["question"]
        raise NotFound(
            f"The newest comparison has no cell {ref}; the nearest is {near}. It has {', '.join(asked['methods'])} on "
            f"{', '.join(asked['envs'])}, with seeds 0 to {asked['seeds'] - 1}."
        )
    return cells[ref]


def _only(cells: Path, digits: str) -> str:
    """The one folder among `cells` whose name begins with `digits`; a name has 16 of them."""
    names = sorted(path.name for path in cells.iterdir()) if cells.exists() else []
    fits = [name for name in names if digits and name.startswith(digits[:16]) and _is(cells / name, digits)]
    if not fits:
        told = (
            f"those here begin with {', '.join(name[:12] for name in names[:_TOLD])}"
            if names
            else "none is here"
        )
        more = ", …" if len(names) > _TOLD else ""
        raise NotFound(
            f"There is no cell of the arena whose key begins with {digits or 'nothing'}; {told}{more}."
        )
    if len(fits) > 1:
        raise UsageError(f"{len(fits)} cells begin with {digits}; give more digits.")
    return fits[0]


def _is(folder: Path, digits: str) -> bool:
    """Whether the key, where a finished cell has written it, goes on as `digits` do."""
    done = folder / "result.json"
    return not done.exists() or str(json.loads(done.read_text())["key"]).startswith(digits)


def _run_of(context: Context, ref: str | None) -> str:
    from tasks.lineage.graph import open_index, resolve

    if ref is None:
        newest = context.ledger.last("run.started")
        if newest is None:
            raise NotFound("Nothing was trained here yet; `forebay retrain` does it.")
        return newest.subject
    index = open_index(context.ledger, context.workspace)
    kind, key = found = resolve(index, ref)
    if kind == "run":
        return key
    number = index.id(found)
    made_by = [target for _, relation, target in index.edges([number or 0]) if relation == "trained by"]
    for (_, run), _ in index.refs(made_by).values():
        return run
    raise UsageError(f"{key} was not trained here; give an agent that was, or run:DIGITS.")
