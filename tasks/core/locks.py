"""One lock for everything that must not run twice at once. It dies with its process, so none is ever stale."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.core.errors import Conflict

_POLL_SECONDS = 0.02


@contextmanager
def file_lock(path: Path, timeout: float = 600.0, what: str = "this workspace") -> Iterator[None]:
    """Hold an exclusive `flock` on `path` for the length of the block.

    Args:
        timeout: seconds to wait; 0 fails at once.
        what: what the lock guards, for the error.

    Raises:
        Conflict: another process held it for longer than `timeout`; its process id is named.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout
    with path.open("a+") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    stream.seek(0)
                    holder = stream.read().strip() or "unknown"
                    raise Conflict(
                        f"Process {holder} is already working on {what}; wait for it to end, then run again."
                    ) from None
                time.sleep(_POLL_SECONDS)
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        try:
            yield
        finally:
            stream.truncate(0)
            fcntl.flock(stream, fcntl.LOCK_UN)
