"""Certificates, keys and passwords: what cannot be used is told with the next step, and no secret is asked for."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fdscale.config.endpoint_files import basic_credentials, tls_context
from fdscale.config.errors import UserError


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, str]]:
    folder = tmp_path_factory.mktemp("tls")

    def make(name: str, *options: str) -> tuple[str, str]:
        files = str(folder / f"{name}.pem"), str(folder / f"{name}.key")
        request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        where = ["-subj", "/CN=localhost", "-out", files[0], "-keyout", files[1]]
        subprocess.run([*request, *(options or ("-nodes",)), *where], check=True, capture_output=True)
        return files

    return make


def refusal(certificate: str, key: str | None) -> str:
    with pytest.raises(UserError) as caught:
        tls_context(certificate, key)
    return str(caught.value)


def test_files_of_tls_are_looked_at(pem, tmp_path: Path) -> None:
    (certificate, key), (_, other_key) = pem("one"), pem("two")
    encrypted = pem("encrypted", "-passout", "pass:secret")
    tls_context(certificate, key)
    Path(key).chmod(0o644)
    assert refusal(certificate, key).startswith(f"log.prometheus_key: everyone may read '{key}', which holds a secret")
    Path(key).chmod(0o600)
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no certificate")
    assert refusal("/no/such/file", key).startswith(
        "log.prometheus_certificate: '/no/such/file' cannot be read (No such"
    )
    assert refusal(certificate, "/no/such/key").startswith("log.prometheus_key: '/no/such/key' cannot be read")
    assert refusal(str(tmp_path), key).startswith("log.prometheus_certificate: ")
    for files in ((certificate, other_key), (certificate, None), (str(garbage), key), (certificate, str(garbage))):
        told = refusal(*files)
        assert told.startswith(f"log.prometheus_certificate: '{files[0]}' cannot be used (")
        assert "key, not encrypted, is" in told
    assert "not encrypted" in refusal(*encrypted)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        *((text, True) for text in ("user:word", "user:word\n", "user:a:b ünï\n")),
        *((text, False) for text in ("", "user", "user:\n", ":word\n", "user:word\nmore\n", "\n")),
    ],
)
def test_a_password_file_is_one_line(tmp_path: Path, text: str, good: bool) -> None:
    file = tmp_path / "password"
    file.write_text(text)
    file.chmod(0o640)
    if good:
        assert base64.b64decode(basic_credentials(str(file))).decode() == text.strip()
    else:
        with pytest.raises(UserError, match="one line user:password"):
            basic_credentials(str(file))


def test_a_password_that_everyone_may_read_is_none(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("user:word")
    file.chmod(0o644)
    with pytest.raises(UserError, match=f"chmod o-rwx {file}"):
        basic_credentials(str(file))
    with pytest.raises(UserError, match="cannot be read"):
        basic_credentials(str(tmp_path / "none"))
