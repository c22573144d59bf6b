"""The shipped alerts under real Prometheus, pushgateway and Alertmanager: what goes wrong is told, and only that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from prometheus_client import CollectorRegistry, Gauge, delete_from_gateway, push_to_gateway

from tests.cluster.lab.daemons import wait_until
from tests.cluster.lab.prometheus import Prometheus
from tests.monitoring.stand_in import StandIn

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(200)]

# what is wrong with each run while it goes on making steps, and what must be told of it
WRONG: dict[str, tuple[dict[str, float], str]] = {
    "slow-rank": ({"straggler_ratio": 1.6, "slowest_lag_seconds": 0.05}, "Straggler"),
    "starving": ({"phase_seconds/data": 0.05}, "DataStarvation"),
    "unsaved": ({"checkpoint_every": 2}, "CheckpointTooOld"),
    "loud": ({"residual_amplitude/3": 40000.0}, "ResidualAmplitudeGrowing"),
    "full": ({"node_memory_available_bytes": 1.0, "node_memory_limit_bytes": 100.0}, "MemoryNearLimit"),
    "crashing": ({"attempts_without_commit": 2}, "CrashLoop"),
    "canary": ({"previous_end/canary": 1}, "CanaryBroken"),
    "not-finite": ({"rollbacks_total": 1}, "NaNStreak"),
}
EXPECTED = {(alert, run) for run, (_, alert) in WRONG.items()} | {
    ("RunDisappeared", "killed"),
    ("RunFailed", "failed"),
    ("RunStalled", "stalled"),
    ("RunStoppedPushing", "pushed"),
}
UNDISTURBED = ("healthy", "done", "pushed-and-done")


@pytest.fixture
def stand_in(prometheus: Prometheus) -> Iterator[Callable[[str], StandIn]]:
    """Makes runs, and ends those that are left."""
    made: list[StandIn] = []

    def make(run: str) -> StandIn:
        made.append(StandIn(prometheus.targets, run))
        return made[-1]

    yield make
    for run in made:
        run.crash()
        run.file.unlink(missing_ok=True)


@pytest.fixture
def pushed(prometheus: Prometheus) -> Iterator[None]:
    """Two runs that push once, of which one takes it back."""
    registry = CollectorRegistry()
    Gauge("fdscale_step", "of a run that pushes", ["run"], registry=registry).labels("pushed").set(1)
    grouped = [{"run": run, "node": "node1"} for run in ("pushed", "pushed-and-done")]
    for group in grouped:
        push_to_gateway(prometheus.pushgateway, "fdscale", registry, group)
    delete_from_gateway(prometheus.pushgateway, "fdscale", grouped[1])
    yield
    delete_from_gateway(prometheus.pushgateway, "fdscale", grouped[0])


@pytest.mark.usefixtures("runs", "pushed")  # real runs go on beside it, for the tests that come after
def test_what_goes_wrong_is_told_and_nothing_else(prometheus: Prometheus, stand_in: Callable[[str], StandIn]) -> None:
    wrong, healthy, done = {run: stand_in(run) for run in WRONG}, stand_in("healthy"), stand_in("done")
    killed, failed, stalled = stand_in("killed"), stand_in("failed"), stand_in("stalled")
    everyone = [*wrong, "healthy", "done", killed.run, failed.run, stalled.run]
    wait_until(lambda: all(prometheus.answers(run) == ["1"] for run in everyone), 20, "every run to be found")
    killed.crash()
    failed.end("mistake")
    done.end()

    def told() -> set[tuple[str, str]]:
        for name, run in wrong.items():
            run.step(**WRONG[name][0])
        healthy.step()
        return {(alert, run) for alert, run in prometheus.told() if run in (*everyone, "pushed", *UNDISTURBED)}

    with suppress(TimeoutError):  # what is missing is told by the next line
        wait_until(lambda: told() >= EXPECTED, 75, "the alerts")
    assert told() == EXPECTED
    assert {run: prometheus.fired(run) for run in UNDISTURBED} == {run: set() for run in UNDISTURBED}
