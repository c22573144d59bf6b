"""The shipped alerts under real Prometheus, pushgateway and Alertmanager: what goes wrong is told, and only that."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

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


@pytest.fixture
def stand_in(prometheus: Prometheus) -> Iterator[Callable[..., StandIn]]:
    """Makes runs, and ends those that are left."""
    made: list[StandIn] = []

    def make(run: str, **values: float) -> StandIn:
        made.append(StandIn(prometheus.targets, run, **values))
        return made[-1]

    yield make
    for run in made:
        run.crash()
        run.file.unlink(missing_ok=True)


def found(prometheus: Prometheus, run: str) -> bool:
    return any(sample["value"][1] == "1" for sample in prometheus.query(f'up{{job="fdscale", run="{run}"}}'))


def test_what_goes_wrong_is_told_and_nothing_else(prometheus: Prometheus, stand_in: Callable[..., StandIn]) -> None:
    healthy, requeued, done = stand_in("healthy"), stand_in("requeued"), stand_in("done")
    wrong = {name: stand_in(name) for name in WRONG}
    killed, failed, stalled = stand_in("killed"), stand_in("failed"), stand_in("stalled")
    everyone = [healthy, requeued, done, *wrong.values(), killed, failed, stalled]
    pushed = Gauge("fdscale_step", "of a run that pushes", registry=(registry := CollectorRegistry()))
    pushed.set(1)
    for run in ("pushed", "pushed-and-done"):
        push_to_gateway(prometheus.pushgateway, "fdscale", registry, {"run": run, "node": "node1"})
    wait_until(lambda: all(found(prometheus, one.run) for one in everyone), 20, "every run to be found")
    delete_from_gateway(prometheus.pushgateway, "fdscale", {"run": "pushed-and-done", "node": "node1"})
    killed.crash()
    failed.end("mistake")
    requeued.end("stopped")
    done.end()
    began, again = time.monotonic(), None
    expected = {(alert, run) for run, (_, alert) in WRONG.items()}
    expected |= {("RunDisappeared", "killed"), ("RunFailed", "failed"), ("RunStalled", "stalled")}
    expected |= {("RunStoppedPushing", "pushed")}

    def told() -> bool:
        nonlocal again
        for name, run in wrong.items():
            run.step(**WRONG[name][0])
        healthy.step()
        if again is None and time.monotonic() - began > 8:  # what the queue takes
            requeued.file.unlink()
            again = stand_in("requeued")
        if again is not None:
            again.step()
        return prometheus.told() >= expected

    try:
        wait_until(told, 75, "the alerts")
    finally:
        print(f"after {time.monotonic() - began:.1f} s", sorted(expected - prometheus.told()))
    assert prometheus.told() == expected
    assert {run: prometheus.fired(run) for run in ("healthy", "requeued", "done", "pushed-and-done")} == {
        run: set() for run in ("healthy", "requeued", "done", "pushed-and-done")
    }
    assert {rule["name"]: rule.get("lastError") for rule in prometheus.rules() if rule["health"] != "ok"} == {}
