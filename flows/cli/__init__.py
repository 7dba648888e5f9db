"""The command line: schedule, promote, audit, and the single steps of a cycle."""

from __future__ import annotations

import errno
import os
import sys

import typer
from rich.text import Text

# Each adds its commands, in the order in which --help shows them.
# isort: off
import flows.cli.workspace
import flows.cli.schedule
import flows.cli.promote
import flows.cli.keys
import flows.cli.lineage
import flows.cli.audit
import flows.cli.stability
import flows.cli.revoke
import flows.cli.export
import flows.cli.steps
import flows.cli.evaluate
import flows.cli.arena
import flows.cli.reward  # noqa: F401

# isort: on
from flows.cli.console import app, err, print_json
from tasks.core.errors import ForebayError, Unavailable, UsageError


def _fail(error: ForebayError, as_json: bool) -> int:
    if as_json:
        print_json({"error": str(error), "kind": type(error).__name__, "exit_code": error.exit_code})
    err.print(Text.assemble(("error: ", "bold red"), str(error)), highlight=False, soft_wrap=True)
    return error.exit_code


def main() -> None:
    """Run the command line; every expected failure is one sentence and a stable exit code.

    0 done · 1 unexpected · 2 wrong request · 3 not found · 4 lost a race or stale · 5 refused by a gate or
    validation · 6 bytes differ from their digest · 7 unavailable (port, GPU, disk, server) · 130 interrupted.
    """
    from flows.environment import QUIET

    os.environ.update(QUIET)
    os.environ.setdefault("TQDM_DISABLE", "1")  # our own bars tell what libraries would draw over them
    as_json = "--json" in sys.argv
    try:
        sys.exit(app(standalone_mode=False))  # typer.Exit comes back as a return value here
    except ForebayError as error:
        sys.exit(_fail(error, as_json))
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        err.print("Interrupted; run the same command again to go on from here.")
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(
            _fail(Unavailable("The disk is full; free some space and run the same command again."), as_json)
        )
    except Exception as error:
        if not hasattr(error, "format_message"):  # not a usage error of click
            raise
        sys.exit(_fail(UsageError(error.format_message()), as_json))
