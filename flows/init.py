"""Lay a workspace. Safe to run again: whatever is there already is left as it is."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import yaml

from flows import keys, progress
from flows.champions import register_agent
from flows.context import Context
from tasks.core.atomic import write_atomic
from tasks.core.digest import digest_files, digest_tree
from tasks.core.errors import Unavailable, UsageError
from tasks.core.locks import file_lock
from tasks.core.workspace import Workspace
from tasks.replay.git_pointer import HEADS, set_aside

_PROJECT = Path(__file__).resolve().parents[1]
_FILES = ("params.yaml", "policy.yaml", "dvc.yaml")
_IGNORED = (".forebay/", "/data/cycle/")


def init_workspace(folder: Path, base_model: str | None = None, overrides: Sequence[str] = ()) -> Context:
    """Make `folder` a workspace with its base model registered as version 1, the first champion.

    Raises:
        UsageError: the settings file is not valid, or the base model cannot be read.
        Unavailable: git is missing, or the disk is full.
    """
    workspace = Workspace(folder.resolve())
    workspace.root.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        if not (workspace.root / name).exists():
            shutil.copy(_PROJECT / name, workspace.root / name)
    if base_model is not None:
        _set_base_model(workspace, base_model)
    with file_lock(workspace.locks / "init.lock", what=f"`forebay init` in {workspace.root}"):
        _prepare_git(workspace.root)
        write_atomic(workspace.state / "workspace.json", b'{"schema":1}\n')
        context = Context.open(workspace.root, overrides)
        _prepare_stores(context)
        if not context.ledger.entries("workspace.created"):
            aside = set_aside(
                workspace.root, HEADS
            )  # of a workspace that was here before, with its own ledger
            if aside is not None:
                progress.current().say(
                    f"git's branch forebay/heads is of an earlier ledger; it is {aside} now."
                )
            context.ledger.append("workspace.created", workspace.root.name, {"pins": context.pins})
        keys.ensure_service_key(context)
        _register_base(context)
    return context


def _prepare_git(root: Path) -> None:
    if shutil.which("git") is None:
        raise Unavailable(
            "Forebay keeps dataset pointers in git, and there is no `git` on the PATH; install it."
        )
    inside = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--show-toplevel"], capture_output=True, text=True
    )
    if inside.returncode != 0 or Path(inside.stdout.strip()).resolve() != root:
        subprocess.run(
            ["git", "init", "--quiet", "--initial-branch=main", str(root)], check=True, capture_output=True
        )
    ignore = root / ".gitignore"
    lines = ignore.read_text().splitlines() if ignore.exists() else []
    missing = [name for name in _IGNORED if name not in lines]
    if missing:
        write_atomic(ignore, ("\n".join([*lines, *missing]) + "\n").encode())


def _prepare_stores(context: Context) -> None:
    """Lay DVC and migrate the databases of MLflow and Prefect side by side: each takes seconds."""
    from flows.environment import prepare_prefect
    from tasks.replay.dvc_store import init as prepare_dvc

    with progress.current().bar("stores") as report, ThreadPoolExecutor(3) as pool:
        work = [
            pool.submit(prepare_prefect, context.workspace),
            pool.submit(prepare_dvc, context.workspace, context.settings.replay.remote),
            pool.submit(context.registry.prepare),
        ]
        for done, future in enumerate(work, start=1):
            future.result()
            report(done, len(work), "git, DVC, MLflow, Prefect")


def _register_base(context: Context) -> None:
    from models.causal_lm import ModelError, convert, source_digest, template_digest, tokenizer_digest
    from models.licences import licence_of
    from tasks.promotion.promote import champion, crown

    if champion(context.ledger) is not None:
        return
    name, workspace = context.settings.base_model, context.workspace
    if (workspace.root / name).is_dir():
        name = str(workspace.root / name)
    try:
        source = source_digest(name)
        folder = workspace.models / f"base-{source[:16]}"
        if not folder.exists():
            with progress.current().bar("base model") as report:
                report(0, 1, f"{context.settings.base_model} to safetensors, once")
                convert(name, folder)
        licence = licence_of(name)
    except ModelError as error:
        raise UsageError(f"base_model: {error}") from None
    files = digest_tree(folder)
    version = register_agent(
        context,
        folder,
        files,
        origin="base",
        parents={"base": None, "init": None, "dataset": None, "run": None},
        source={
            "name": context.settings.base_model,
            "digest": source,
            "licence": None if licence is None else asdict(licence),
        },
        metrics={},
        tokenizer=tokenizer_digest(folder),
        template=template_digest(folder),
    )
    keys.sign_head(context, crown(context.ledger, context.registry, version, by="forebay init"))
    progress.current().say(
        f"agent/{version} is {context.settings.base_model}, digest {digest_files(files)[:12]}."
    )


def _set_base_model(workspace: Workspace, base_model: str) -> None:
    """Write the base model into params.yaml, leaving every other line as it is."""
    local = Path(base_model)
    name = str(local.resolve()) if local.exists() else base_model
    lines = workspace.params.read_text().splitlines()
    line = f"base_model: {yaml.safe_dump(name, default_flow_style=True, width=1000).splitlines()[0]}"
    lines = [line if text.startswith("base_model:") else text for text in lines]
    if line not in lines:
        lines.insert(0, line)
    write_atomic(workspace.params, ("\n".join(lines) + "\n").encode())
