"""`forebay demo`: what a newcomer runs first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import monotonic

from rich.console import Console

from flows.context import Context
from flows.init import init_workspace
from flows.keys import ensure_service_key
from flows.run import run_retrain
from flows.show import cycle_report
from tasks.core.ledger import Ledger
from tasks.core.workspace import Workspace
from tasks.lineage.graph import lineage
from tasks.lineage.render import to_tree


def demo(folder: Path, overrides: Sequence[str], out: Console) -> None:
    """Lay a workspace, run the whole cycle on the default model, print the decision and the lineage."""
    start = monotonic()
    out.rule("[bold]Forebay: one cycle on a real language model")
    workspace = Workspace(folder.resolve())
    if not (workspace.state / "ledger.db").exists() or not Ledger(workspace.ledger_url).last(
        "promotion.committed"
    ):
        init_workspace(folder, None, overrides)
    context = Context.open(folder, overrides)
    ensure_service_key(context)  # a workspace of an earlier release has none
    result = run_retrain(context, "missing", None, force=False)
    out.print(cycle_report(context, result))
    candidate = result.get("candidate")
    ref = "agent@champion" if candidate is None else f"agent/{candidate}"
    out.rule(f"[bold]Lineage of {ref}")
    out.print(to_tree(lineage(context.ledger, context.workspace, ref)))
    out.print(
        f"\nDone in {monotonic() - start:.0f} s. Next: `forebay decision page --open`, `forebay verify {ref}`, "
        '`forebay up` and `forebay schedule retrain --cron "0 3 * * *"`.',
        highlight=False,
    )
