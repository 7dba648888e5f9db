"""What a stage leaves on its run's page: tables and plots."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from flows.context import Context


def publish(context: Context, stage: str, outputs: Mapping[str, Any]) -> None:
    """Create the artifacts of one stage; stages with nothing to look at have none."""
    if stage == "collect" and "environments" in outputs:
        _table(
            "collect",
            [{"environment": n, **row} for n, row in outputs["environments"].items()],
            "Experience collected",
        )
    elif stage == "seal":
        keys = ("name", "version", "rows", "groups", "new_rows", "root", "git_commit")
        _table("seal", [{key: outputs.get(key) for key in keys}], "Dataset version")
    elif stage == "validate":
        _table("validate", list(outputs["checks"]), f"Validation: {outputs['verdict']}")
    elif stage == "reward":
        _table(
            "reward",
            [_check_row(check) for check in outputs["checks"]],
            f"Reward model: {outputs['verdict']}",
        )
        create_markdown_artifact(
            key="reward-plots", markdown=_reward_page(context, outputs), description="Reward model"
        )
    elif stage == "train":
        create_markdown_artifact(
            key="train", markdown=_training_page(context, outputs), description="Training"
        )
    elif stage == "evaluate":
        _table(
            "evaluate",
            [{"tasks": n, **row} for n, row in outputs["slices"].items()],
            "Candidate and champion",
        )
    elif stage == "decide":
        _decision(context, outputs)
    elif stage == "promote":
        create_markdown_artifact(key="promote", markdown=outputs["reason"], description="Promotion")
    elif stage == "verify":
        rows = list(outputs["problems"]) or [{"problem": "none", "checked": outputs["checked"]}]
        _table("verify", rows, f"Verification: {outputs['checked']} digests")
    elif stage == "audit":
        _audit(context, outputs)


def _how_to_answer(outputs: Mapping[str, Any]) -> str:
    """Say how a reviewer answers a decision that waits for one: who they are is their key, wherever it is."""
    if outputs["verdict"] != "PASS" or outputs["approval"] != "required":
        return ""
    form = _run_form("answer")
    there = f"[the form of the flow `answer`]({form})" if form else "`forebay answer LINE` in the workspace"
    return f"""

## This decision waits for your answer

Where your key is (no workspace is needed there), sign one line:

```
forebay approve {outputs["decision"]} --print --reason "…"
forebay reject {outputs["decision"]} --print --reason "…"
```

and give it to {there}. An approval promotes agent/{outputs["candidate"]["version"]}; a rejection is final.
"""


def _run_form(flow: str) -> str | None:
    """Return the address of the form that starts a flow's deployment, None where the server serves none."""
    from httpx import HTTPError
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectException
    from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL

    from flows.deployments import DEPLOYMENT

    ui = PREFECT_UI_URL.value() or (PREFECT_API_URL.value() or "").removesuffix("/api")
    try:
        with get_client(sync_client=True) as client:
            found = client.read_deployment_by_name(f"{flow}/{DEPLOYMENT}")
    except (PrefectException, HTTPError):
        return None
    return f"{ui}/deployments/deployment/{found.id}/run"


def _table(key: str, rows: Sequence[Mapping[str, Any]], description: str) -> None:
    plain = [{k: _cell(v) for k, v in row.items()} for row in rows]
    create_table_artifact(key=key, table=plain, description=description)


def _cell(value: Any) -> Any:
    return (
        round(value, 4)
        if isinstance(value, float)
        else value
        if isinstance(value, int | str | None)
        else str(value)
    )


def _training_page(context: Context, outputs: Mapping[str, Any]) -> str:
    from flows.training import training_curves

    picture = base64.b64encode(training_curves(context, outputs["key"])).decode()
    return (
        f"**{outputs['steps']} steps**, {outputs['stop_reason']}; checkpoint `{outputs['digest'][:12]}`, "
        f"{outputs['groups']['count']} groups consumed.\n\n![training curves](data:image/png;base64,{picture})"
    )


def _check_row(check: Mapping[str, Any]) -> dict[str, Any]:
    columns = ("name", "verdict", "counts", "estimate", "low", "high", "limit", "n", "says")
    return {name: check[name] for name in columns}


def _reward_page(context: Context, outputs: Mapping[str, Any]) -> str:
    lines = [f"# {outputs['verdict']}", "", *(f"- {reason}" for reason in outputs["reasons"]), ""]
    for name in ("plot", "best_of_n"):
        if outputs[name] is not None:
            picture = (context.workspace.root / outputs[name]["path"]).read_bytes()
            lines.append(f"![{name}](data:image/png;base64,{base64.b64encode(picture).decode()})")
    return "\n".join(lines)


def _audit(context: Context, made: Mapping[str, Any]) -> None:
    file = f"`{context.workspace.relative(Path(made['page']))}` in the workspace"
    where = (
        f"[The whole page]({made['mlflow']}), also {file}." if made["mlflow"] else f"The whole page: {file}."
    )
    flags = [f"- open: {flag}" for flag in made["open"]] or ["- open flags: none"]
    lines = [f"# {made['verdict']}", f"**{made['headline']}**", "", made["says"], "", *flags, "", where]
    create_markdown_artifact(key="audit", markdown="\n".join(lines), description=f"Audit: {made['verdict']}")
    if made["mlflow"]:
        create_link_artifact(
            key="audit-page", link=made["mlflow"], link_text="The audit's page", description="In MLflow"
        )


def _decision(context: Context, outputs: Mapping[str, Any]) -> None:
    from flows.pages import page_address, page_of

    address = page_address(context, outputs)
    create_markdown_artifact(
        key="decide",
        markdown=_decision_page(context, outputs, page_of(context, outputs), address)
        + _how_to_answer(outputs),
        description=f"Gate: {outputs['verdict']}",
    )
    if address:
        create_link_artifact(
            key="decide-page", link=address, link_text="The decision's page", description="In MLflow"
        )


def _decision_page(context: Context, outputs: Mapping[str, Any], page: Path, address: str | None) -> str:
    from flows.show import decision_record
    from tasks.promotion.page.document import headline, lead
    from tasks.promotion.page.forest import forest_picture

    record = decision_record(context, **outputs["record"])
    picture = base64.b64encode(forest_picture(record["evidence"]).encode()).decode()
    file = f"`{context.workspace.relative(page)}` in the workspace"
    return "\n".join(
        [
            f"# {record['verdict']}",
            f"**{headline(record)}**",
            "",
            *(f"- {reason}" for reason in lead(record)),
            "",
            f"[The whole page]({address}), also {file}." if address else f"The whole page: {file}.",
            "",
            f"![intervals of all evidence](data:image/svg+xml;base64,{picture})",
            "",
            "| evidence | verdict | n | detectable |",
            "|---|---|--:|--:|",
            *(_evidence_row(item) for item in record["evidence"]),
            "",
            *(f"- {item['says']}" for item in record["evidence"]),
        ]
    )


def _evidence_row(item: Mapping[str, Any]) -> str:
    name = item["name"] if item["counts"] else f"{item['name']} (not required)"
    n, mde = (item["n"] or ""), ("" if item["mde"] is None else f"{item['mde']:.3f}")
    return f"| {name} | {item['verdict']} | {n} | {mde} |"
