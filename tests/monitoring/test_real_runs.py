"""Real distillations under the shipped alerts: one goes through the queue, one meets every fault and is killed."""

from __future__ import annotations

import pytest

from tests.cluster.lab.prometheus import Prometheus
from tests.monitoring.conftest import Runs

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

FAULTS = {"NaNStreak", "Straggler", "DataStarvation", "CheckpointTooOld"}


def test_every_fault_is_told_and_then_that_the_run_was_killed(prometheus: Prometheus, runs: Runs) -> None:
    faulty, told = runs.faulty, set()

    def all_told() -> bool:
        told.update(alert for alert, run in prometheus.told() if run == faulty.name)
        return told >= FAULTS

    faulty.until(all_told, 300, f"{FAULTS}")
    faulty.kill()
    faulty.until(lambda: ("RunDisappeared", faulty.name) in prometheus.told(), 90, "that it has gone")
    assert prometheus.fired(faulty.name) == {*FAULTS, "RunDisappeared"}
    assert {alert for alert, run in prometheus.told() if run == faulty.name} == {"RunDisappeared"}


def test_a_run_that_is_stopped_started_again_and_completes_fires_nothing(prometheus: Prometheus, runs: Runs) -> None:
    runs.completed.result(500)
    samples = prometheus.query(f'count_over_time(run:fdscale_step:max{{run="{runs.healthy.name}"}}[10m])')
    assert float(samples[0]["value"][1]) > 15, "Prometheus has seen hardly anything"
    assert prometheus.fired(runs.healthy.name) == set()


def test_no_rule_fails_on_what_real_runs_tell(prometheus: Prometheus, runs: Runs) -> None:
    failures = {rule["name"]: rule["lastError"] for rule in prometheus.rules() if rule["health"] != "ok"}
    assert failures == {}
