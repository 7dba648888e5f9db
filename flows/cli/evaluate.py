"""Evaluation outside a cycle."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli.console import HERE, Json, Set, Where, evaluate_app, open_context, out, print_json, watch
from tasks.core.errors import Refused


@evaluate_app.command("replay")
def evaluate_replay(
    on: Annotated[str, typer.Option("--on", help="Sealed dataset: logs, logs/v1 or the start of its root.")],
    candidate: Annotated[str, typer.Option(help="Agent that is judged.")] = "candidate",
    champion: Annotated[str, typer.Option(help="Agent that it is held against.")] = "champion",
    workspace: Where = HERE,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Judge off-policy what an agent would have earned on logged answers, under the policy's section replay_value.

    Prompts that either agent was trained on are left out. A log that says too little about an agent is INCONCLUSIVE, with
    the reasons. Exit code 5 where the candidate is worse. The same request again finds the evidence in the ledger.

    Examples: `forebay evaluate replay --candidate agent/3 --on logs/v1` · `forebay evaluate replay --on logs --json`
    """
    from flows.evidence import evaluate_replay as judge
    from flows.show import verdict

    watch(as_json)
    found = judge(open_context(workspace, overrides), candidate, champion, on)
    if as_json:
        print_json(found)
    else:
        out.print(
            verdict(found["verdict"]),
            f"agent/{found['candidate']} against agent/{found['champion']}",
            highlight=False,
        )
        out.print(found["says"], highlight=False, markup=False)
    if found["verdict"] == "FAIL":
        raise Refused(
            f"agent/{found['candidate']} earns less than agent/{found['champion']} on {found['on']}."
        )
