"""What all commands share: the application, its two consoles, common options."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from flows import progress

app = typer.Typer(
    name="forebay",
    help="Post-train LLM agents off-policy, on a schedule, and promote only the proven ones.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done · 1 unexpected · 2 wrong request · 3 not found · 4 lost a race or stale · 5 refused by a gate "
    "or validation · 6 bytes differ from their digest · 7 unavailable (port, GPU, disk, server) · 130 interrupted.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
decision_app = typer.Typer(help="Read and recompute gate decisions.", no_args_is_help=True)
app.add_typer(decision_app, name="decision", rich_help_panel="Promote")
evaluate_app = typer.Typer(help="Judge an agent outside a cycle.", no_args_is_help=True)
app.add_typer(evaluate_app, name="evaluate", rich_help_panel="Promote")
arena_app = typer.Typer(
    help="Compare methods of training on environments, under one recipe.", no_args_is_help=True
)
app.add_typer(arena_app, name="arena", rich_help_panel="Arena")
lineage_app = typer.Typer(
    help="Where an agent or a dataset came from, and what followed from it.", no_args_is_help=True
)
app.add_typer(lineage_app, name="lineage", rich_help_panel="Audit")
keys_app = typer.Typer(help="Make signing keys and choose whom to trust.", no_args_is_help=True)
app.add_typer(keys_app, name="keys", rich_help_panel="Promote")
reward_app = typer.Typer(
    help="Train, validate, promote and use reward models; register verifiers and judges.",
    no_args_is_help=True,
)
app.add_typer(reward_app, name="reward", rich_help_panel="Single steps")

out = Console()
err = Console(stderr=True)

Where = Annotated[
    Path,
    typer.Option(
        "--workspace", "-w", envvar="FOREBAY_WORKSPACE", help="Workspace folder (default: here or above)."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override one value of params.yaml; repeatable."),
]
Runner = Annotated[
    Literal["processes", "ray"], typer.Option(help="Processes of this machine, or a Ray cluster.")
]
RayAddress = Annotated[
    str | None, typer.Option(help="Cluster, as ray://host:10001; not given: one is started here.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


HERE = Path(".")
SCHEDULE, PROMOTE, AUDIT, STEPS = "Schedule", "Promote", "Audit", "Single steps"


def open_context(where: Path, overrides: list[str] | None = None) -> Any:
    """Open the workspace at or above `where`, with these overrides of its settings."""
    from flows.context import Context

    return Context.open(where, overrides or ())


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, sort_keys=True, default=str) + "\n")


def watch(as_json: bool) -> None:
    """Show progress to a person, in lines to a log, and on stderr when stdout carries JSON."""
    console = err if as_json else out
    progress.use(
        progress.Terminal(console)
        if console.file.isatty()
        else progress.Lines(partial(console.print, highlight=False))
    )
