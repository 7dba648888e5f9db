"""Progress of long work: the stations report counts, whoever watches draws them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

Report = Callable[[int, int, str], None]
"""report(done, total, note)"""

_LINE_SECONDS = 2.0


class Reporter(Protocol):
    """Where progress goes."""

    def say(self, text: str) -> None:
        """Print one line that stays."""

    @contextmanager
    def bar(self, label: str) -> Iterator[Report]:
        """Show one piece of long work."""


class Silent:
    """For scripts and tests."""

    def say(self, text: str) -> None:
        """Print nothing."""

    @contextmanager
    def bar(self, label: str) -> Iterator[Report]:
        """Show nothing."""
        yield lambda done, total, note: None


class Lines:
    """For logs and pipes: a line when a tenth more is done, and no more than one in two seconds."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write

    def say(self, text: str) -> None:
        """Write one line."""
        self._write(text)

    @contextmanager
    def bar(self, label: str) -> Iterator[Report]:
        """Write a line for every tenth that took a while."""
        tenth, written = 0, monotonic()

        def report(done: int, total: int, note: str) -> None:
            nonlocal tenth, written
            now = 10 * done // max(total, 1)
            if now > tenth and monotonic() - written > _LINE_SECONDS:
                tenth, written = now, monotonic()
                self._write(f"    {label}: {done}/{total} {note}".rstrip())

        yield report


class Terminal:
    """For people: a live bar."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        """Print one line above the bars."""
        self._console.print(text, highlight=False)

    @contextmanager
    def bar(self, label: str) -> Iterator[Report]:
        """Show a bar with count, elapsed time and a note."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(label, total=None, note="")
            yield lambda done, total, note: progress.update(task, completed=done, total=total, note=note)


_current: Reporter = Silent()


def current() -> Reporter:
    """Return the reporter of this process."""
    return _current


def use(reporter: Reporter) -> None:
    """Make `reporter` the one of this process; a process shows its work in one place."""
    global _current
    _current = reporter
