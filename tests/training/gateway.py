"""A real HTTP server in a gateway's place, which notes what it is sent."""

from __future__ import annotations

import base64
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class Gateway(ThreadingHTTPServer):
    """It answers with `status`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = 202
        self.requests: list[tuple[str, str, str]] = []
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def methods(self) -> list[str]:
        return [method for method, _, _ in self.requests]


class _Handler(BaseHTTPRequestHandler):
    server: Gateway

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self.server.requests.append((self.command, self.path, body))
        self.send_response(self.server.status)
        self.end_headers()

    do_DELETE = do_PUT

    def log_message(self, *args: object) -> None:
        pass


def grouping(path: str) -> dict[str, str]:
    """The labels that a group's path names."""
    parts = path.removeprefix("/metrics/").split("/")
    found = {}
    for name, value in zip(parts[::2], parts[1::2], strict=True):
        coded = name.endswith("@base64")
        found[name.removesuffix("@base64")] = (
            base64.urlsafe_b64decode(value).decode() if coded and value != "=" else unquote(value.strip("="))
        )
    return found
