"""A collector of OpenLineage events: a real HTTP server on loopback that keeps what it gets."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class Collector:
    """Answers 201, but 500 to the event of number `fail_at`."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.paths: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                refused = fail_at == len(collector.bodies) + 1
                collector.paths.add(self.path)
                if not refused:
                    collector.bodies.append(body)
                self.send_response(500 if refused else 201)
                self.end_headers()
                self.wfile.write(b"there is\nno room" if refused else b"")

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Collector:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
