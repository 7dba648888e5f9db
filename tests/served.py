"""A server on loopback that really speaks HTTP, for what asks servers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], Any]
"""Status (0 hangs up without a word), headers, and a JSON value or raw bytes."""


class Server:
    """Under `url`, `answer(number of the request, path below /v1/, its JSON value or None)` gives the reply."""

    def __init__(self, answer: Callable[[int, str, dict[str, Any] | None], Reply]) -> None:
        self.seen: list[tuple[dict[str, str], dict[str, Any]]] = []
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

            def _answer(self, body: dict[str, Any] | None) -> None:
                with lock:
                    server.seen.append(({k.lower(): v for k, v in self.headers.items()}, body or {}))
                    number = len(server.seen)
                assert self.path.startswith("/v1/")
                status, headers, value = answer(number, self.path.removeprefix("/v1/"), body)
                if status == 0:
                    self.close_connection = True
                    return
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                for name, text in {"content-length": str(len(data)), **headers}.items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
