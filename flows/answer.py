"""The flow `answer`: a reviewer's signed answer, given on the run's page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows.champions import answer_decision, says_promoted
from flows.context import Context
from flows.logs import report_to_prefect
from flows.registry import settle


@flow(name="answer", flow_run_name="answer", persist_result=False)
def answer(workspace: str, statement: str) -> dict[str, Any]:
    """Verify a signed answer to a decision, record it, and promote if it lets a passed decision act.

    Args:
        workspace: folder of the workspace.
        statement: the line that `forebay approve … --print` or `forebay reject … --print` gave. Who answers is the key
            that signed it, and not who starts this run.
    """
    context = Context.open(Path(workspace))

    @task(name="answer", cache_policy=NO_CACHE, timeout_seconds=600)
    def act() -> dict[str, Any]:
        found = answer_decision(context, statement)
        word = "approved" if found["answer"] == "approval" else "rejected"
        says = f"{found['agent']} is {word} by `{found['by']}`: {found['reason']}"
        if found["promoted"]:
            says += f". {says_promoted(found['promoted'])}"
        create_markdown_artifact(key="answer", markdown=says, description=says)
        return found

    with report_to_prefect():
        settle(context)
        return act()
