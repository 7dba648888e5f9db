"""Whether a run of training was healthy: asked of the metrics that its updates left."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows.context import Context
from tasks.core.errors import NotFound, UsageError


def stability(context: Context, ref: str | None = None, target: Path | None = None) -> dict[str, Any]:
    """Return where a run began to collapse and what drives it; one that still goes on is judged so far.

    Args:
        ref: an agent (the run that made it), or run:DIGITS; None: the newest run.
        target: where to write the page with its curves, if anywhere.

    Returns:
        {run, steps, stop_reason, says, findings: [driver, metric, onset, noticed, before, after, advice], page}.

    Raises:
        NotFound: there is no such thing, or it left no metrics. UsageError: it is no run, and no run made it.
    """
    from tasks.core.atomic import write_atomic
    from tasks.training.curve import read_curve
    from tasks.training.stability import find_collapse
    from tasks.training.stability_page import Run, stability_page, verdict

    key = _run_of(context, ref)
    curve = read_curve(context.workspace.runs / key[:16])
    if not curve:
        raise NotFound(f"Run {key[:12]} left no metrics here; it has made no update, or its folder is gone.")
    findings = find_collapse(curve)
    finished = context.ledger.last("run.finished", key)
    reason = finished.payload["outputs"]["stop_reason"] if finished else "not finished"
    run = Run(key, int(curve[-1]["step"]), reason)
    if target is not None:
        write_atomic(target, stability_page(run, curve, findings).encode())
    return {
        "run": key,
        "steps": run.steps,
        "stop_reason": reason,
        "says": verdict(findings),
        "findings": [asdict(finding) for finding in findings],
        "page": str(target) if target else None,
    }


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
