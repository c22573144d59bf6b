from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from fdscale.training.engine import Connection
from fdscale.training.live import Live
from fdscale.training.meter import Meter
from fdscale.training.phases import Phases
from fdscale.training.progress import Progress


def metered(connection: Connection, folder: str, known: dict[str, float], training_seconds: float = 0.0) -> Any:
    """A row of four steps in 0.2 s, begun at step 6 of 20, with a save of 0.3 s amid them; and what progress keeps."""
    live = Live()
    live.note(known)
    phases = Phases(connection, ["here"] * connection.rank.world_size, Path(folder) / "phases.json", live)
    meter = Meter(global_batch=8, last=20, live=live, phases=phases)
    meter.restart(6, waited=1.0)
    with phases("forward"):
        time.sleep(0.1)
    with meter.apart(), phases("collective"):
        time.sleep(0.3)
    with phases("collective"):
        time.sleep(0.1)
    progress = Progress(step=10, training_seconds=training_seconds)
    return meter.row(progress, 1.4), progress.training_seconds


def test_pace_and_phases_are_those_of_the_steps_alone(two_ranks: Any, tmp_path: Path) -> None:
    for row, kept in two_ranks(metered, str(tmp_path), {}):
        assert 0.05 <= row["step_seconds"] < 0.075, "a save is in no step's time"
        assert 0.025 <= row["collective_seconds"] < 0.05, "nor are its collectives"
        assert row["images_per_second"] == pytest.approx(8 / row["step_seconds"])
        assert row["eta_seconds"] == pytest.approx(10 * row["step_seconds"])
        assert row["data_wait_seconds"] == pytest.approx(0.1)
        assert 0.5 <= kept < 0.6  # 0.4 s of waiting and 0.1 s of forward, the ranks' mean: equal on both
        assert "goodput" not in row, "without a folder nobody knows when it began"
        assert "mfu" not in row


def test_what_a_row_takes_is_in_the_steps_to_come(two_ranks: Any, tmp_path: Path) -> None:
    assert [seconds > 0.05 for seconds in two_ranks(following, str(tmp_path))] == [True, True]


def following(connection: Connection, folder: str) -> float:
    phases = Phases(connection, ["here"] * 2, Path(folder) / "phases.json", Live())
    meter, progress = Meter(8, 20, Live(), phases), Progress(step=1)
    meter.restart(0, 0.0)
    time.sleep(0.1 * connection.rank.rank)  # the other one waits in its row
    meter.row(progress, 0.0)
    progress.step = 2
    return meter.row(progress, 0.0)["step_seconds"] + 0.06 * connection.rank.rank


def test_goodput_is_the_time_of_steps_that_count_over_all_time_since_the_first_start(
    two_ranks: Any, tmp_path: Path
) -> None:
    known = {"first_start_timestamp_seconds": time.time() - 100}
    for row, kept in two_ranks(metered, str(tmp_path), known, 49.5):
        assert row["goodput"] == pytest.approx(kept / 100.5, rel=0.02)
        assert kept == pytest.approx(50, rel=0.01)


def test_arithmetic_is_told_once_it_is_known_and_mfu_where_the_chip_is(two_ranks: Any, tmp_path: Path) -> None:
    (row, _), _ = two_ranks(metered, str(tmp_path), {"model_flops_per_image": 1e9})
    assert row["model_flops_per_second"] == pytest.approx(1e9 * row["images_per_second"])
    assert "mfu" not in row
    known = {"model_flops_per_image": 1e9, "peak_flops_per_second": 4e12}
    (row, _), _ = two_ranks(metered, str(tmp_path), known)
    assert row["mfu"] == pytest.approx(row["model_flops_per_second"] / 4e12)
