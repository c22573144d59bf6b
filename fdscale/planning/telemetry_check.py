"""What the ways out of metrics ask of the machine: files of the endpoint, packages of DeepSpeed's monitor."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from fdscale.config.deepspeed_json import MONITORS
from fdscale.config.endpoint_files import basic_credentials, tls_context
from fdscale.config.errors import attempt
from fdscale.config.keeping import LogSettings


def telemetry_problems(log: LogSettings, deepspeed_json: Mapping[str, Any]) -> list[str]:
    """Every problem, in words, on a machine where ranks run."""
    problems: list[str] = []
    certificate, password_file = log.prometheus_certificate, log.prometheus_password_file
    if certificate is not None:
        attempt(lambda: tls_context(certificate, log.prometheus_key), problems)
    if password_file is not None:
        attempt(lambda: basic_credentials(password_file), problems)
    for block, package in MONITORS.items():
        if package and deepspeed_json.get(block, {}).get("enabled") and find_spec(package) is None:
            problems.append(
                f"{block}.enabled in the DeepSpeed JSON needs the package {package}, which is not installed: "
                f"pip install {package}, or take the block out"
            )
    return problems
