"""Train an agent again from what git and DVC's remote hold, compare, and record what came of it."""

from __future__ import annotations

import getpass
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows import keys, progress
from flows.context import Context
from tasks.core.dsse import sign
from tasks.core.errors import ForebayError, NotFound, Refused, UsageError
from tasks.core.keys import Trust, read_trust
from tasks.core.ledger import Ledger
from tasks.core.stages import lock_digest
from tasks.core.workspace import Workspace
from tasks.lineage.recipe import chain_of, keep_recipes, read_revocations, require_recorded

REPRODUCED = "agent.reproduced"


def reproduce(
    where: Path,
    ref: str,
    *,
    into: Path | None = None,
    remote: str | None = None,
    from_base: bool = False,
    tolerance: float = 0.05,
    unsigned: bool = False,
) -> dict[str, Any]:
    """Train an agent again in a clean workspace and compare it with the recorded one.

    In a workspace the initial agent's kept weights are taken where their digests verify. With `from_base`, and in a clone that
    has no weights, every ancestor is trained again first, from the base model on, and must come out the same.

    Args:
        where: in a workspace, or in a git clone of one: its branch forebay/data and DVC's remote are all that is needed.
        ref: agent/12; in a workspace also agent@champion and so on.
        into: an empty folder; by default a temporary one, which is removed.
        remote: URL of DVC's remote, where it is not the one that was recorded.
        tolerance: of metrics, where bits cannot agree.
        unsigned: go by recipes too that no trusted key signed; what it says of the result says so.

    Returns:
        {verdict, agent, into, agents: [{agent, verdict, says, differs, metrics, seconds, …}]}; the last one is `ref`.

    Raises:
        NotFound: no such agent, recipe or commit. Refused: it learnt from data that is revoked or erased, its code is not
        here, or no trusted key signed a recipe. Corrupt: a recipe or shard is not what ledger or digest say. UsageError: `into`
        is no folder. Unavailable: remote, base model or disk.
    """
    context = _context(where)
    root = context.workspace.root if context else _top(where)
    if context is not None:
        remember(context)
    subject = _subject(context, ref)
    chain = chain_of(root, subject, _trust(context, root), unsigned)
    if context is not None:
        for recipe in chain:
            require_recorded(context.ledger, recipe)
    _refuse_revoked(context, root, chain)
    if into is None:
        with tempfile.TemporaryDirectory(prefix="forebay-reproduce-") as folder:
            return {
                **_reproduce(context, root, chain, Path(folder), remote, from_base, tolerance),
                "into": None,
            }
    return _reproduce(context, root, chain, into.resolve(), remote, from_base, tolerance)


def remember(context: Context) -> list[str]:
    """Commit the recipes of all agents that git lacks, signed where this workspace can; return the agents."""
    key = None
    with suppress(ForebayError):
        key = keys.service_key(context)

    def signed(recipe: Mapping[str, Any], digest: str) -> bytes:
        assert key is not None
        agent = recipe["agent"]
        subjects = {"recipe": digest, f"agent/{agent['version']}": agent["digest"]}
        return sign("recipe", subjects, {"run": agent["parents"]["run"]}, key)

    return keep_recipes(context.ledger, context.workspace, None if key is None else signed)


def _reproduce(
    context: Context | None,
    root: Path,
    chain: list[dict[str, Any]],
    into: Path,
    remote: str | None,
    from_base: bool,
    tolerance: float,
) -> dict[str, Any]:
    from tasks.lineage.reproduce import lay_workspace

    recorded = next((r["dataset"]["remote"] for r in reversed(chain) if r["dataset"]), None)
    workspace = lay_workspace(into, remote or _reachable(root, recorded))
    ledger = context.ledger if context else Ledger(workspace.ledger_url)
    folders: dict[str, Path] = {}
    begin = 0 if from_base else _kept(context, chain, workspace, folders)
    reports: list[dict[str, Any]] = []
    for recipe in chain[begin:]:
        vouched = context is not None or bool(recipe["signed_by"])
        report = _one(root, recipe, folders, workspace, tolerance, vouched)
        report["signed_by"] = recipe["signed_by"]
        if not recipe["signed_by"]:
            report["says"] += "; no trusted key signed its recipe"
            report["says"] += ", which is what the ledger says" if context else ""
        ledger.append(REPRODUCED, report["agent"], report)
        reports.append(report)
        progress.current().say(f"{report['agent']}: {report['says']}")
        if report["verdict"] == "different" and recipe is not chain[-1]:
            raise Refused(
                f"{report['agent']} came out {report['says']}; so what was trained from it cannot be reproduced from here."
            )
    last = reports[-1]
    return {"verdict": last["verdict"], "agent": last["agent"], "into": str(into), "agents": reports}


def _kept(
    context: Context | None, chain: list[dict[str, Any]], workspace: Workspace, folders: dict[str, Path]
) -> int:
    """Take the initial agent's weights from the workspace if they are whole; return where in the chain to begin."""
    from tasks.lineage.reproduce import folder_of

    if context is None or len(chain) == 1:
        return 0
    init = chain[-2]
    entry = context.registration(f"agent/{init['agent']['version']}")
    folder = None if entry is None else context.workspace.root / entry["path"]
    if folder is None or not folder_of(context.workspace, init, folder):
        return 0
    copy = workspace.models / f"agent-{init['agent']['version']}"
    shutil.copytree(folder, copy)
    folders[init["agent"]["digest"]] = copy
    return len(chain) - 1


def _one(
    root: Path,
    recipe: dict[str, Any],
    folders: dict[str, Path],
    workspace: Workspace,
    tolerance: float,
    vouched: bool,
) -> dict[str, Any]:
    """Make one agent again and compare; its folder is kept in `folders` for those that were trained from it."""
    import torch

    from flows.training import machine
    from tasks.core.digest import digest_files, digest_tree
    from tasks.lineage.reproduce import base_model, code_of, compare, fetch_data, train_again

    began, agent, run = time.perf_counter(), recipe["agent"], recipe["run"]
    name, device = f"agent/{agent['version']}", "cpu"
    if run is None:
        folder = base_model(recipe, root, workspace)
        made: dict[str, Any] = {"files": digest_tree(folder), "metrics": {}, "device": device}
        made["digest"] = digest_files(made["files"])
    else:
        fetch_data(root, workspace, recipe["dataset"])
        code = code_of(recipe, workspace.state, vouched)
        device = run["device"] if run["device"] == "cpu" or torch.cuda.is_available() else "cpu"
        init = folders[run["init"]["digest"]]
        version = int(run["init"]["agent"].partition("/")[2])
        files = digest_tree(init)
        first = {"version": version, "digest": digest_files(files), "files": files}
        first |= {n: agent[n] for n in ("tokenizer_digest", "template_digest")}
        with progress.current().bar(f"train {name}") as report:
            made = train_again(
                {**recipe, "init": first},
                init,
                workspace,
                code,
                device,
                Path(__file__).with_name("again.py"),
                lambda done, total: report(done, total, ""),
            )
        folder = workspace.root / made["path"]
    here = {"machine": machine(), "lock": lock_digest()}
    found = compare(recipe, made, here, tolerance)
    if found.verdict != "different":
        folders[agent["digest"]] = folder
    return {
        "agent": name,
        "digest": agent["digest"],
        "reproduced": made["digest"],
        **asdict(found),
        "differs": list(found.differs),
        "metrics": dict(found.metrics),
        "device": device,
        "environment": "the recorded one" if run is None or here["lock"] == run["lock"] else "another one",
        "tolerance": tolerance,
        "seconds": round(time.perf_counter() - began, 3),
        "by": getpass.getuser(),
    }


def _refuse_revoked(context: Context | None, root: Path, chain: list[dict[str, Any]]) -> None:
    """Training an agent again on revoked data would be learning from it once more."""
    from flows.revoke import published

    known = published(context) if context is not None else read_revocations(root)
    erased = known.get("erased", {})
    for recipe in chain:
        name = f"agent/{recipe['agent']['version']}"
        for shard in recipe["dataset"]["shards"] if recipe["dataset"] else ():
            if shard["sha256"] in erased:
                raise Refused(
                    f"{name} cannot be reproduced: {shard['path']} was erased on purpose ({erased[shard['sha256']]})."
                )
        if name in known.get("flagged", {}):
            raise Refused(
                f"{name} {known['flagged'][name]}; training it again would learn from that once more. "
                "`forebay revoke … --reinstate` takes a revocation back."
            )


def _context(where: Path) -> Context | None:
    try:
        return Context.open(where)
    except NotFound:
        return None


def _top(where: Path) -> Path:
    """The git repository at `where` or above it."""
    for folder in (where.resolve(), *where.resolve().parents):
        if (folder / ".git").exists():
            return folder
    raise NotFound(f"{where.resolve()} is neither in a workspace nor in a git clone of one.")


def _subject(context: Context | None, ref: str) -> str:
    if context is not None:
        return context.agent(ref).subject
    name = ref.removeprefix("agent/")
    if not name.isdecimal():
        raise UsageError(f"A clone has no ledger that knows `{ref}`; ask by number, as in agent/12.")
    return f"agent/{int(name)}"


def _trust(context: Context | None, root: Path) -> Trust | None:
    """The keys that may sign: of the workspace, or the file that the clone brought along; None where there is none."""
    path = context.workspace.trust if context else Workspace(root).trust
    if context is not None and not path.exists() and context.ledger.last("key.trusted") is not None:
        return keys.trust(context)  # which refuses: a lost file is not one that never was
    return read_trust(path) if path.exists() else None


def _reachable(root: Path, recorded: str | None) -> str | None:
    """The recorded remote; one that lay in the workspace is looked for beside the repository it was cloned to."""
    if recorded is None or "://" in recorded or Path(recorded).is_absolute():
        return recorded
    return str((root / recorded).resolve())
