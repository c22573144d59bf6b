"""One HTTP endpoint per node: TLS and a password where wanted, and nothing that a client does disturbs the training."""

from __future__ import annotations

import hmac
import io
import logging
import os
import socket
import ssl
import threading
from collections.abc import Iterable
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

logger = logging.getLogger(__name__)

CLIENT_SECONDS = 5.0
"""How long a client may keep the thread that serves it waiting."""

SECONDS_TO_CLOSE = 0.1


class Endpoint:
    """A running endpoint; `close` frees the port. `context` speaks TLS, `credentials` are what basic auth must send.

    Port 0 takes a free one. Raises OSError when it cannot be had: in use, forbidden, an unknown host.
    """

    def __init__(
        self,
        application: WSGIApplication,
        host: str,
        port: int,
        context: ssl.SSLContext | None = None,
        credentials: bytes | None = None,
    ) -> None:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self._server = _Server(family, (str(address[0]), port), context)
        self._server.set_app(application if credentials is None else _asking_for(credentials, application))
        # a loader's forked workers outlive a killed rank by seconds: with this socket they would hold its port
        os.register_at_fork(after_in_child=self._server.socket.close)
        serve = self._server.serve_forever
        self._thread = threading.Thread(target=serve, args=(SECONDS_TO_CLOSE,), name="prometheus", daemon=True)
        self._thread.start()
        self.scheme = "http" if context is None else "https"

    @property
    def host(self) -> str:
        """The address that it listens on, in numbers."""
        return self._server.server_name

    @property
    def port(self) -> int:
        return self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each client, which dies with the process."""

    daemon_threads = True

    def __init__(self, family: socket.AddressFamily, address: tuple[str, int], context: ssl.SSLContext | None) -> None:
        self.address_family = family
        self._context = context
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's would ask a name server for this machine's name, and wait for it
        host, self.server_port = self.socket.getsockname()[:2]
        self.server_name = str(host)
        self.setup_environ()

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self._context is None:
            super().finish_request(request, client_address)
            return
        request.settimeout(CLIENT_SECONDS)  # the handshake is made here, in the client's own thread, not in accept()
        with self._context.wrap_socket(request, server_side=True) as secured:
            super().finish_request(secured, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a client of the metrics, %s, went away", client_address, exc_info=True)


class _Handler(WSGIRequestHandler):
    """Without a word on standard error, whatever the client did."""

    timeout = CLIENT_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)

    def get_stderr(self) -> Any:
        return io.StringIO()


def _asking_for(credentials: bytes, application: WSGIApplication) -> WSGIApplication:
    def asking(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        scheme, _, sent = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        if scheme.lower() == "basic" and hmac.compare_digest(sent.strip().encode(), credentials):
            return application(environ, start_response)
        headers = [("WWW-Authenticate", 'Basic realm="fdscale"'), ("Content-Type", "text/plain")]
        start_response("401 Unauthorized", headers)
        return [b"user and password, please\n"]

    return asking


def address_towards(host: str) -> str:
    """The address of this machine from which it reaches `host`.

    To connect a UDP socket sends nothing: the kernel only looks up the route, and with it the sender's address.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
