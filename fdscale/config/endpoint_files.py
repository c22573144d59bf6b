"""The files that secure a node's metrics: certificate and key, and who may read. Looked at before anything starts."""

from __future__ import annotations

import base64
import ssl
import stat
from pathlib import Path

from fdscale.config.errors import UserError


def tls_context(certificate: str, key: str | None) -> ssl.SSLContext:
    """A server's TLS with a certificate chain and its key, PEM files; without `key` the first file holds both.

    Raises UserError for files that are missing, unreadable, encrypted, or do not belong together, and for a key that
    everyone on the machine may read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for setting, path in (("log.prometheus_certificate", certificate), ("log.prometheus_key", key)):
        if path is not None:
            _readable(setting, path)
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")  # of an encrypted key nobody is asked
    except (OSError, ValueError) as error:
        beside = "log.prometheus_key" if key else "the key, which must be in the same file,"
        raise UserError(
            f"log.prometheus_certificate: {certificate!r} cannot be used ({error}): allowed: a PEM file whose key, not "
            f"encrypted, is {beside if key is None else f'{beside}={key}'}"
        ) from error
    _private("log.prometheus_key" if key else "log.prometheus_certificate", key or certificate)
    return context


def basic_credentials(password_file: str) -> bytes:
    """What a client of HTTP basic authentication sends, of a file with one line `user:password`.

    Raises UserError for a file that is missing, that everyone on the machine may read, or that holds something else.
    """
    setting = "log.prometheus_password_file"
    _readable(setting, password_file)
    _private(setting, password_file)
    lines = Path(password_file).read_bytes().splitlines()
    user, colon, password = lines[0].partition(b":") if len(lines) == 1 else (b"", b"", b"")
    if not (user and colon and password):
        raise UserError(f"{setting}: {password_file!r} is not one line user:password: write that and nothing else")
    return base64.b64encode(lines[0])


def _private(setting: str, path: str) -> None:
    if Path(path).stat().st_mode & stat.S_IROTH:
        raise UserError(f"{setting}: everyone may read {path!r}, which holds a secret: chmod o-rwx {path}")


def _readable(setting: str, path: str) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise UserError(
            f"{setting}: {path!r} cannot be read ({error.strerror}): name one that every node can read"
        ) from error
