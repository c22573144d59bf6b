"""One Prometheus for all tests of this folder that need one, and two real runs that it watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from fdscale.data.packing.digits import pack_digits
from tests.cluster.lab.packages import missing, why_not
from tests.cluster.lab.prometheus import Prometheus
from tests.monitoring.real_run import Run, faulty_run, healthy_run, through_the_queue


class Runs(NamedTuple):
    """`faulty` meets every fault, and stays in the last; `healthy` goes through the queue until `completed`."""

    faulty: Run
    healthy: Run
    completed: Future[None]


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


@pytest.fixture(scope="session")
def runs(prometheus: Prometheus, tmp_path_factory: pytest.TempPathFactory, port: Callable[[], int]) -> Iterator[Runs]:
    """Started by the first test that asks, beside which they go on: nobody waits for one after the other."""
    folder: Path = tmp_path_factory.mktemp("runs")
    pack_digits(folder / "digits", "test")
    common = (f"data.shards={folder / 'digits'}", f"log.prometheus_targets={prometheus.targets}")
    faulty, healthy = faulty_run(folder / "faulty", port(), *common), healthy_run(folder / "a run", *common)
    faulty.start()
    with ThreadPoolExecutor() as pool:
        try:
            yield Runs(faulty, healthy, pool.submit(through_the_queue, healthy, prometheus))
        finally:
            faulty.kill()
            healthy.kill()
