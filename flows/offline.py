"""One stage at a time, without Prefect: what `dvc repro` runs."""

from __future__ import annotations

from flows import progress
from flows.context import Context
from flows.cycle import Finished, finish, open_cycle, run_stage
from flows.run import close_cycle, summary
from tasks.core.errors import Conflict, Refused, UsageError
from tasks.core.stages import STAGES


def run_one_stage(context: Context, stage: str) -> None:
    """Run one stage of the open cycle, starting one where there is none.

    Raises:
        UsageError: no such stage.
        NotFound: the stages before it have not run in this cycle.
    """
    if stage not in STAGES:
        raise UsageError(f"There is no stage `{stage}`; the stages are {', '.join(STAGES)}.")
    with context.exclusive(f"stage {stage}"):
        cycle = open_cycle(context)
        if isinstance(cycle, Finished):
            progress.current().say(f"{stage}: nothing to do, {cycle.entry.payload['reason']}")
            return
        try:
            # DVC skips stages whose receipts are unchanged; to a cycle with other settings they are of another one.
            for earlier in STAGES[: STAGES.index(stage)]:
                if not cycle.has(earlier):
                    run_stage(context, cycle, earlier)
            outputs = run_stage(context, cycle, stage)
        except (Refused, Conflict) as error:
            outcome = "refused" if isinstance(error, Refused) else "stale"
            finish(context, cycle.key, outcome, str(error), dataset=cycle.dataset)
            raise
        progress.current().say(f"{stage}: {summary(stage, outputs)}")
        if stage == STAGES[-1]:
            close_cycle(context, cycle, {name: cycle.receipt(name) for name in STAGES})
