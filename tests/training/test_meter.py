from __future__ import annotations

import time

import pytest

from fdscale.training.live import Live
from fdscale.training.meter import Meter
from fdscale.training.phases import PHASES
from fdscale.training.progress import Progress

PHASE_SECONDS = {f"phase_seconds/{phase}": 0.5 for phase in PHASES}


def metered(live: Live, progress: Progress) -> dict[str, float]:
    """A row of four steps in a fifth of a second, begun at step 6 of 20."""
    meter = Meter(global_batch=8, last=20, live=live, step=6, waited=1.0)
    time.sleep(0.2)
    return meter.row(progress, 3.0, PHASE_SECONDS)


def test_pace_waiting_and_time_left_are_those_of_the_steps_since_the_last_row() -> None:
    row = metered(Live(), Progress(step=10))
    assert 0.05 <= row["step_seconds"] < 0.2
    assert row["images_per_second"] == pytest.approx(8 / row["step_seconds"])
    assert row["eta_seconds"] == pytest.approx(10 * row["step_seconds"])
    assert row["data_wait_seconds"] == 0.5
    assert "goodput" not in row, "without a folder nobody knows when it began"
    assert "mfu" not in row


def test_goodput_is_the_time_of_steps_that_count_over_all_time_since_the_first_start() -> None:
    live = Live()
    live.note({"first_start_timestamp_seconds": time.time() - 100})
    progress = Progress(step=10, training_seconds=40.0)
    row = metered(live, progress)
    assert progress.training_seconds == 40 + 4 * 2.5  # the ranks' mean, not this rank's clock
    assert row["goodput"] == pytest.approx(50 / 100.2, rel=0.01)
    progress.become(Progress(step=6, training_seconds=40.0))  # back to a checkpoint: its steps no longer count
    assert metered(live, Progress(step=10, training_seconds=progress.training_seconds))["goodput"] < 0.51


def test_arithmetic_is_told_once_it_is_known_and_mfu_where_the_chip_is() -> None:
    live = Live()
    live.note({"model_flops_per_image": 1e9})
    row = metered(live, Progress(step=10))
    assert row["model_flops_per_second"] == pytest.approx(1e9 * row["images_per_second"])
    assert "mfu" not in row
    live.note({"peak_flops_per_second": 4e12})
    row = metered(live, Progress(step=10))
    assert row["mfu"] == pytest.approx(row["model_flops_per_second"] / 4e12)
