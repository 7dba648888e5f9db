"""Progress inside a Prefect run goes to the run's log, unless a person is watching this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.text import Text

from flows import progress


@contextmanager
def report_to_prefect() -> Iterator[None]:
    """Write progress to the log of the current run where nothing else shows it."""
    before = progress.current()
    if isinstance(before, progress.Silent):
        from prefect.logging import get_run_logger

        logger = get_run_logger()
        progress.use(progress.Lines(lambda text: logger.info(Text.from_markup(text).plain)))
    try:
        yield
    finally:
        progress.use(before)


def flow_run_id() -> str | None:
    """Return the id of the Prefect run that this code is part of, None where it is part of none."""
    if "prefect" not in sys.modules:  # then nothing runs under it, and importing it takes seconds
        return None
    from prefect.runtime import flow_run

    found = flow_run.id
    return None if found is None else str(found)
