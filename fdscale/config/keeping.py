"""The settings of what is kept of a run, what ends it, and where its measurements go."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from fdscale.config.kinds import Count, Name, NonNegative, Port, Positive, Settings


def _gateway(url: str) -> str:
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and "@" not in parts.netloc
    except ValueError:  # of a port that is no number
        whole = False
    if not whole or parts.query or parts.fragment or any(one.isspace() or not one.isprintable() for one in url):
        raise ValueError("http://HOST:PORT or https://HOST:PORT, without a password, which recipes would keep")
    return url


class CheckpointSettings(Settings):
    """Steps between checkpoints; the newest `keep` stay, and for ever those every `keep_every` steps (0: none).

    Every `verify_every`-th is read back from the disk before it counts (0: none).
    """

    every: Positive = 1000
    keep: Positive = 2
    keep_every: Count = 0
    verify_every: Count = 10


class GuardSettings(Settings):
    """What ends a step or a run before harm is done.

    Without progress for `hang_seconds` (0: for ever) every rank writes down where it is, and the run starts again.
    After `skipped_in_a_row` steps whose loss or gradient is not finite it goes back to its last checkpoint. The
    `canary` looks for changed teacher weights and faulty arithmetic before each checkpoint, and every `canary_every`
    steps (0: not in between). After so many `attempts` of one submission without a new checkpoint the next is refused.
    """

    hang_seconds: NonNegative = 900.0
    skipped_in_a_row: Positive = 3
    canary: bool = True
    canary_every: Count = 0
    attempts: Positive = 3


class LogSettings(Settings):
    """Steps between log lines, and the ways out for what is measured.

    Each node serves it on `prometheus_port` (0: any free one): on loopback where all ranks share a machine, else on the
    address by which it reaches the main rank, unless `prometheus_host` says another. In `prometheus_targets`, a folder
    that Prometheus watches, each node says where. It is pushed to a `pushgateway`, too, where one is named.
    """

    every: Positive = 10
    prometheus_host: Name | None = None
    prometheus_certificate: Name | None = None
    prometheus_key: Name | None = None
    prometheus_password_file: Name | None = None
    prometheus_targets: Name | None = None
    prometheus_port: Annotated[Port | None, Field(validate_default=True)] = None
    pushgateway: Annotated[Name, AfterValidator(_gateway)] | None = None

    @field_validator("prometheus_key")
    @classmethod
    def _beside_a_certificate(cls, key: str | None, others: ValidationInfo) -> str | None:
        if key is not None and others.data.get("prometheus_certificate", key) is None:
            raise ValueError("beside log.prometheus_certificate only")
        return key

    @field_validator("prometheus_port")
    @classmethod
    def _to_be_found(cls, port: int | None, others: ValidationInfo) -> int | None:
        needing = ("prometheus_targets", "prometheus_certificate", "prometheus_password_file")
        given = [f"log.{name}" for name in needing if others.data.get(name) is not None]
        if port is None and given:
            raise ValueError(f"a port, since {given[0]} is set; 0 takes any free one, with log.prometheus_targets")
        if port == 0 and others.data.get("prometheus_targets", "") is None:
            raise ValueError("1 to 65535, or 0 (any free one) with log.prometheus_targets, which says where it is")
        return port
