"""A Prefect server for one process: `python -m flows.private_server FD`. It ends when its stdin does."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading


def _end_with_parent() -> None:
    """Leave when the starter closes its end of the pipe, by intention or because it was killed."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


def main(descriptor: int) -> None:
    """Serve the Prefect API on an already listening socket, without schedules and user interface."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import uvicorn
    from prefect.server.api.server import create_app

    with socket.socket(fileno=descriptor) as listener:
        app = create_app(ephemeral=True, final=True)
        uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on")).run(sockets=[listener])


if __name__ == "__main__":
    main(int(sys.argv[1]))
