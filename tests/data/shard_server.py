"""A real web server of a folder on this machine, which can do what servers do to people."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = Callable[
    [bytes, int], tuple[bytes, int]
]  # (content, the how-manieth request) -> (what is sent, promised bytes)


class ShardServer(ThreadingHTTPServer):
    """Serves the files of `folder`; by file name: `asked` counts, `faults` change what is sent, `statuses` refuse."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.folder = folder
        self.asked: Counter[str] = Counter()
        self.faults: dict[str, Fault] = {}
        self.statuses: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def serving(self) -> Iterator[ShardServer]:
        thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: ShardServer

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.asked[name] += 1
        file = self.server.folder / name
        if refused := self.server.statuses.get(name, 0 if file.is_file() else 404):
            self.send_error(refused)
            return
        content = file.read_bytes()
        promised = len(content)
        if fault := self.server.faults.get(name):
            content, promised = fault(content, self.server.asked[name])
        self.send_response(200)
        self.send_header("Content-Length", str(promised))
        self.end_headers()
        with suppress(BrokenPipeError, ConnectionResetError):  # whoever asked has heard enough
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass
