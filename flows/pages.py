"""Pages of decisions and audits: drawn in the workspace, attached to the agent's MLflow run, found again by both.

A page is derived from the record and its evidence and can be made again at any time (`forebay decision page`), so nothing
that goes wrong here may stand in the way of a decision.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import keys, progress
from flows.context import Context
from flows.processes import running_url
from tasks.core.ledger import Entry

if TYPE_CHECKING:
    from tasks.promotion.page.document import Recorded
    from tasks.promotion.promote import Office


def page_of(context: Context, payload: Mapping[str, Any]) -> Path:
    """Return where the page of a decision (payload of `decision.made`) lies, whether or not it is there."""
    record: Path = context.workspace.root / payload["record"]["path"]
    return record.with_suffix(".html")


def draw_page(context: Context, entry: Entry, target: Path | None = None) -> Path:
    """Verify signature, record and evidence of a decision and draw its page, beside the record or at `target`.

    Raises:
        NotFound, Corrupt: something is missing or was changed; it is named.
        Refused: the key that signed is unknown.
    """
    from tasks.core.atomic import write_atomic
    from tasks.promotion.page.document import read_record, render

    page = target or page_of(context, entry.payload)
    record = read_record(context.workspace.root / entry.payload["record"]["path"])
    write_atomic(page, render(record, context.workspace.evidence, _recorded(context, entry)).encode())
    return page


def attach_page(context: Context, entry: Entry, page: Path) -> str | None:
    """Keep the page with the candidate's run in MLflow and say the verdict at its version; safe to repeat.

    Returns:
        Its address in MLflow's UI, None where no server is known to show it or the agent has no run.
    """
    from flows.show import decision_record
    from tasks.promotion.page.document import headline, lead

    made = entry.payload
    record = decision_record(context, **made["record"])
    route = context.registry.show_decision(
        made["candidate"]["digest"],
        page,
        decision=made["decision"],
        verdict=made["verdict"],
        says=" ".join([headline(record), *lead(record)]),
    )
    server = _server(context)
    return None if route is None or server is None else f"{server}/{route}"


def page_address(context: Context, payload: Mapping[str, Any]) -> str | None:
    """Return the address of an attached page in MLflow's UI, None where no server is known to show it or it cannot say."""
    server = _server(context)
    try:
        route = server and context.registry.decision_route(
            payload["candidate"]["digest"], payload["decision"]
        )
    except Exception:  # MLflow's own: the page lies in the workspace too
        return None
    return f"{server}/{route}" if route else None


def make_page(context: Context, entry: Entry, target: Path | None = None) -> dict[str, Any]:
    """Draw the page of a decision again; without a `target` attach it in MLflow as well.

    Returns:
        {agent, decision, page: its path, mlflow: its address there or None, problem: why it is not attached or None}.

    Raises:
        NotFound, Corrupt, Refused: see `draw_page`. That MLflow is away is a problem that is told, not raised.
    """
    page = draw_page(context, entry, target and target.resolve())
    address = problem = None
    if target is None:
        try:
            address = attach_page(context, entry, page)
        except Exception as error:  # MLflow's own, or that of the network behind it
            problem = str(error)
    return {
        "agent": entry.subject,
        "decision": entry.payload["decision"],
        "page": str(page),
        "mlflow": address,
        "problem": problem,
    }


def keep_page(context: Context, entry: Entry) -> None:
    """Draw and attach the page of a decision that was just recorded; what goes wrong is said and goes no further."""
    say = progress.current().say
    try:
        attach_page(context, entry, draw_page(context, entry))
    except Exception as error:
        say(
            f"The page of the decision was not made ({error}); the decision stands, "
            f"`forebay decision page {entry.subject}` makes it."
        )


def make_audit(
    context: Context, ref: str, report: Mapping[str, Any] | None, target: Path | None = None
) -> dict[str, Any]:
    """Write the page of an audit; one that was verified and stays in the workspace is attached in MLflow as well.

    Args:
        report: the verification of `ref` (`flows.champions.verify_ref`), None where nothing was verified.
        target: where to write it; by default .forebay/audits/<name>-<digest>.html.

    Returns:
        {subject, digest, time, verdict, says, open, page: its path, mlflow: its address there or None, problem: why it is
        not attached or None}; `open` are the open flags.

    Raises:
        NotFound, UsageError, Corrupt: as `tasks.lineage.graph.lineage`.
    """
    from tasks.core.atomic import write_atomic
    from tasks.lineage.graph import open_index, resolve
    from tasks.lineage.page.document import build, headline, verdict
    from tasks.lineage.page.gather import gather

    subject = resolve(open_index(context.ledger, context.workspace), ref)
    page = target.resolve() if target else context.workspace.audits
    found = gather(
        context.ledger,
        context.workspace,
        ref,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        report=report,
        page=_decision_page(context, subject[1], page if target is None else page.parent),
    )
    node = found.lineage.nodes[found.lineage.root]
    if target is None:
        page /= f"{_file_name(node.name)}-{(node.digest or subject[1])[:12]}.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(page, build(found).encode())
    said = verdict(found)
    made = {
        "kind": node.kind,
        "subject": subject[1],
        "digest": node.digest,
        "time": found.time,
        "verdict": said.word,
        "headline": headline(found),
        "says": said.says,
        "open": [flag.says for flag in found.open],
        "page": str(page),
        "mlflow": None,
        "problem": None,
    }
    if target is None and report is not None:
        try:
            made["mlflow"] = _attach_audit(context, made, page)
        except Exception as error:  # MLflow's own, or that of the network behind it
            made["problem"] = str(error)
    return made


def _attach_audit(context: Context, made: Mapping[str, Any], page: Path) -> str | None:
    offices: Mapping[str, Office] = {"agent": "agent", "source": "reward"}
    office = offices.get(made["kind"])
    if office is None:
        return None
    flags = f" {len(made['open'])} open flags." if made["open"] else " No open flags."
    route = context.registry.for_office(office).show_audit(
        made["digest"], page, time=made["time"], verdict=made["verdict"], says=made["says"] + flags
    )
    server = _server(context)
    return f"{server}/{route}" if server and route else None


def _decision_page(context: Context, subject: str, folder: Path) -> str | None:
    """Return where the page of the newest decision about `subject` lies, seen from `folder`; None where it is not there."""
    made = context.ledger.last("decision.made", subject)
    page = page_of(context, made.payload) if made else None
    return Path(os.path.relpath(page, folder)).as_posix() if page is not None and page.exists() else None


def _file_name(name: str) -> str:
    return (
        "".join(char if char.isalnum() or char in "-." else "-" for char in name)[:60].strip(".-") or "audit"
    )


def _recorded(context: Context, entry: Entry) -> Recorded:
    from tasks.promotion.attest import check_decision, read_signature
    from tasks.promotion.page.document import Recorded

    if entry.payload.get("signature") is None:
        return Recorded(entry.seq, entry.time)
    envelope = read_signature(context.workspace.root, entry)
    signer = check_decision(entry, envelope, keys.trust(context), entry.seq)
    return Recorded(entry.seq, entry.time, signer.name, signer.id)


def _server(context: Context) -> str | None:
    """Return the base address of the MLflow server that a browser can open."""
    set_by_hand = context.settings.stores.mlflow or ""
    if set_by_hand.startswith(("http://", "https://")):
        return set_by_hand.rstrip("/")
    return running_url(context.workspace, "mlflow")
