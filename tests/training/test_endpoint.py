"""The endpoint of a node: what clients do, well or badly, and what it never does to the training."""

from __future__ import annotations

import base64
import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from fdscale.config.endpoint_files import tls_context
from fdscale.training import endpoint as module
from fdscale.training.endpoint import Endpoint, address_towards
from fdscale.training.live import Live
from fdscale.training.prometheus import application, registry_of

APPLICATION = application(registry_of(Live(), "run", True))
CREDENTIALS = base64.b64encode("prometheus:pass:wörd".encode())


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tls")
    files = str(folder / "cert.pem"), str(folder / "key.pem")
    request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-days", "2"]
    subprocess.run([*request, *names, "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    return files


@pytest.fixture
def plain() -> Iterator[Endpoint]:
    endpoint = Endpoint(APPLICATION, "127.0.0.1", 0)
    yield endpoint
    endpoint.close()


def get(endpoint: Endpoint, authorization: str | None = None, trusted: str | None = None) -> tuple[int, str]:
    request = urllib.request.Request(f"{endpoint.scheme}://127.0.0.1:{endpoint.port}/metrics")
    if authorization is not None:
        request.add_header("Authorization", authorization)
    context = ssl.create_default_context(cafile=trusted) if trusted else None
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_client_is_answered_and_closing_frees_the_port(plain: Endpoint):
    code, text = get(plain)
    assert (code, plain.scheme, plain.host) == (200, "http", "127.0.0.1")
    assert 'fdscale_run_state{run="run",state="starting"} 1.0' in text
    plain.close()
    again = Endpoint(APPLICATION, "127.0.0.1", plain.port)
    assert get(again)[0] == 200
    again.close()


def test_a_port_that_is_taken_is_an_error_at_once(plain: Endpoint):
    with pytest.raises(OSError, match="in use"):
        Endpoint(APPLICATION, "127.0.0.1", plain.port)
    with pytest.raises(OSError):  # noqa: PT011 (the resolver's own words)
        Endpoint(APPLICATION, "no.such.host.invalid", 0)


def test_tls_is_spoken_and_only_tls(certificate: tuple[str, str]):
    endpoint = Endpoint(APPLICATION, "127.0.0.1", 0, tls_context(*certificate))
    assert endpoint.scheme == "https"
    assert get(endpoint, trusted=certificate[0])[0] == 200
    with pytest.raises((http.client.HTTPException, OSError)):
        urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics", timeout=10)
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        get(endpoint)
    assert get(endpoint, trusted=certificate[0])[0] == 200
    endpoint.close()


def test_a_password_is_asked_for():
    endpoint = Endpoint(APPLICATION, "127.0.0.1", 0, None, CREDENTIALS)
    right = CREDENTIALS.decode()
    wrong = [None, "", "Basic", f"Bearer {right}", f"Basic {right[:-2]}", "Basic ünï", f"Basic {right}x", "Basic \xff"]
    for authorization in wrong:
        code, text = get(endpoint, authorization)
        assert code == 401, authorization
        assert "fdscale_" not in text
    assert get(endpoint, f"Basic {right}")[0] == 200
    assert get(endpoint, f"basic  {right} ")[0] == 200
    endpoint.close()


@pytest.mark.parametrize("secured", [False, True], ids=["plain", "tls"])
def test_clients_that_say_nothing_keep_nobody_waiting(certificate: tuple[str, str], secured: bool):
    endpoint = Endpoint(APPLICATION, "127.0.0.1", 0, tls_context(*certificate) if secured else None)
    silent = [socket.create_connection(("127.0.0.1", endpoint.port)) for _ in range(5)]
    silent[0].sendall(b"GET /met")
    began = time.monotonic()
    assert get(endpoint, trusted=certificate[0])[0] == 200
    assert time.monotonic() - began < module.CLIENT_SECONDS / 2
    endpoint.close()
    assert time.monotonic() - began < module.CLIENT_SECONDS / 2
    for client in silent:
        client.close()


def test_a_silent_client_is_hung_up_on(monkeypatch: pytest.MonkeyPatch, plain: Endpoint):
    monkeypatch.setattr(module._Handler, "timeout", 0.1)
    with socket.create_connection(("127.0.0.1", plain.port), timeout=5) as client:
        assert client.recv(1) == b""


def test_nothing_is_said_on_standard_error(certificate: tuple[str, str], capfd: pytest.CaptureFixture[str]):
    def broken(environ, start_response):
        raise RuntimeError("a mistake of ours")

    for application_, context in ((APPLICATION, tls_context(*certificate)), (APPLICATION, None), (broken, None)):
        endpoint = Endpoint(application_, "127.0.0.1", 0, context)
        for sent in (b"", b"\x16\x03\x01garbage\r\n\r\n", b"GET /metrics HTTP/1.0\r\n\r\n", b"x" * 70000 + b"\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", endpoint.port), timeout=10) as client:
                client.sendall(sent)
        if application_ is broken:
            assert get(endpoint)[0] == 500
        endpoint.close()
    assert capfd.readouterr() == ("", "")


def test_a_forked_worker_does_not_hold_the_port_of_a_rank_that_was_killed():
    code = (
        "import os, time; from fdscale.training.endpoint import Endpoint\n"
        "endpoint = Endpoint(lambda environ, start: [], '127.0.0.1', 0)\n"
        "forked, told = os.pipe(); worker = os.fork()\n"
        "if not worker:\n"
        "    os.close(1); os.write(told, b'.'); time.sleep(60)\n"
        "os.read(forked, 1)\n"
        "print(endpoint.port, worker, flush=True); time.sleep(60)\n"
    )
    rank = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    port, worker = map(int, rank.stdout.readline().split())
    rank.kill()
    rank.wait()
    try:
        socket.create_server(("127.0.0.1", port)).close()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_the_address_of_this_machine_depends_on_who_is_to_be_reached():
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert address_towards("127.0.0.7") in ("127.0.0.1", "127.0.0.7")
    with pytest.raises(OSError):  # noqa: PT011 (the resolver's own words)
        address_towards("no.such.host.invalid")


def test_a_certificate_in_one_file_with_its_key(certificate: tuple[str, str], tmp_path: Path):
    both = tmp_path / "both.pem"
    both.write_text(Path(certificate[0]).read_text() + Path(certificate[1]).read_text())
    both.chmod(0o600)
    endpoint = Endpoint(APPLICATION, "localhost", 0, tls_context(str(both), None))
    assert endpoint.scheme == "https"
    endpoint.close()
