"""The flow `audit`: hash every byte behind an agent again, write the page that says so, and keep both as artifacts.

It reads everything by default, unlike the command: nobody waits for it, and a disk that returns other bytes than were
written changes no file's stat, so that only reading finds it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows import progress
from flows.artifacts import publish
from flows.champions import verify_ref
from flows.context import Context
from flows.logs import report_to_prefect
from flows.pages import make_audit
from flows.registry import settle
from tasks.core.errors import Corrupt, ForebayError


@flow(name="audit", flow_run_name="audit-{ref}", persist_result=False)
def audit(workspace: str, ref: str = "agent@champion", full: bool = True) -> dict[str, Any]:
    """Verify `ref` and all its ancestors and write its page; the run fails if a byte differs.

    Args:
        full: read files again whose stat has not changed.
    """
    context = Context.open(Path(workspace))

    @task(name="verify", cache_policy=NO_CACHE, timeout_seconds=6 * 3600)
    def verify() -> dict[str, Any]:
        report = verify_ref(context, ref, full=full)
        publish(context, "verify", report)
        return report

    @task(name="page", cache_policy=NO_CACHE, timeout_seconds=3600)
    def page() -> None:
        try:
            publish(context, "audit", make_audit(context, ref, report))
        except ForebayError as error:  # a ledger past reading; the verification has named it
            progress.current().say(f"The page was not written: {error}")

    with report_to_prefect():
        settle(context)
        report = verify()
        page()
    if report["problems"]:
        raise Corrupt(
            f"{len(report['problems'])} things behind {ref} differ from their digests; the run's artifact lists them."
        )
    return report
