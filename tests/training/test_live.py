from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest

from fdscale.training.live import Live
from fdscale.training.metrics import STATES


def test_the_latest_of_each_value_stays_and_readers_keep_what_they_have() -> None:
    live = Live()
    live.note({"loss": 0.5, "step": 1})
    before = live.values
    live.note({"loss": 0.25})
    assert live.values == {"loss": 0.25, "step": 1}
    assert before == {"loss": 0.5, "step": 1}, "a scrape may be walking it"


@pytest.mark.parametrize("name", ["los", "teacher_loss", "loss/dino", "rank_phase_seconds/0"])
def test_a_name_that_no_row_has_is_our_mistake(name: str) -> None:
    live = Live()
    with pytest.raises(KeyError, match=name):
        live.note({name: 1.0})
    assert live.values == {}


def test_what_cannot_be_looked_at_is_told_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    live = Live()
    live.look(lambda: {"step": 3})
    live.look(lambda: {"loss": float(Path("/no/such/file").read_text())})
    live.look(lambda: {"loss": {}["started"]})
    assert live.values == {"step": 3}
    assert len(caplog.records) == 2
    with pytest.raises(KeyError, match="los"):
        live.look(lambda: {"los": 1})


def test_counters_begin_at_nothing_and_only_counters_count() -> None:
    live = Live()
    live.count("skipped_steps_total")
    live.count("telemetry_failures_total/pushgateway", 2)
    live.count("skipped_steps_total")
    assert live.values == {"skipped_steps_total": 2, "telemetry_failures_total/pushgateway": 2}
    with pytest.raises(AssertionError):
        live.count("loss")


def test_nothing_is_lost_when_two_threads_write() -> None:
    live = Live()

    def fail() -> None:
        for _ in range(2000):
            live.count("telemetry_failures_total/pushgateway")

    thread = Thread(target=fail)
    thread.start()
    for step in range(2000):
        live.note({"step": step})
        live.count("skipped_steps_total")
    thread.join()
    assert live.values == {"step": 1999, "skipped_steps_total": 2000, "telemetry_failures_total/pushgateway": 2000}


def test_a_state_is_one_of_those_that_are_told() -> None:
    live = Live()
    assert live.state == "starting"
    for state in STATES:
        live.enter(state)
        assert live.state == state
    with pytest.raises(AssertionError):
        live.enter("thinking")


def test_the_time_of_telling_is_counted_also_when_it_fails() -> None:
    live = Live()
    with live.handing_over():
        time.sleep(0.02)
    with suppress(OSError), live.handing_over():
        time.sleep(0.02)
        raise OSError("full")
    assert 0.04 <= live.values["telemetry_seconds_total"] < 0.5
