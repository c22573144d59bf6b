"""One Prometheus for all tests of this folder that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.lab.packages import missing, why_not
from tests.cluster.lab.prometheus import Prometheus


@pytest.fixture(scope="session")
def prometheus() -> Iterator[Prometheus]:
    """The lab; a machine that cannot have it fails the tests, since nothing is known there."""
    assert why_not() is None, why_not()
    assert not missing(), f"{missing()} are missing: python -m tests.cluster.lab packages"
    lab = Prometheus()
    try:
        lab.up()
        yield lab
    finally:
        lab.down()
