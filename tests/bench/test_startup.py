"""What the benchmark of starts makes of what runs keep; the launchers themselves are started in tests/test_runs.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fdscale.bench.startup import started, startup_ratios, startup_tables
from fdscale.training.attempts import Attempt


def run_with(folder: Path, phases: dict[str, float], steps: list[float]) -> Path:
    attempt = folder / "attempts" / "0001"
    attempt.mkdir(parents=True)
    (attempt / "attempt.json").write_text("{}")
    Attempt(attempt).record_startup(phases)
    rows = [json.dumps({"step": step, "step_seconds": seconds}) for step, seconds in enumerate(steps, 1)]
    (folder / "metrics.jsonl").write_text("\n".join([*rows, '{"step": 4, "eval_loss": 1.0}']) + "\n")
    return folder


def test_a_start_is_read_from_what_the_run_kept(tmp_path: Path) -> None:
    row = started(run_with(tmp_path, {"imports": 3.0, "first step": 1.5}, [9.0, 0.9, 0.5, 0.4]))
    assert row["first_step"] == pytest.approx(4.5)
    assert row["second_step"] == 0.9
    assert row["median_step"] == 0.5
    assert row["second_to_median"] == pytest.approx(1.8)


def test_a_second_step_of_more_than_twice_the_median_misses(tmp_path: Path) -> None:
    rows = {
        way: started(run_with(tmp_path / way, {"imports": 3.0}, [1.0, second, 1.0, 1.0]))
        for way, second in (("bash", 1.9), ("deepspeed", 2.1))
    }
    reached = {way: ratio.reaches(ratio.must) for way, row in rows.items() for ratio in startup_ratios(way, row)}
    assert reached == {"bash": True, "deepspeed": False}
    lines = {line[0]: list(line[1:]) for line in startup_tables(rows)[0].lines}
    assert lines["imports"] == ["3.00 s", "3.00 s"]
    assert lines["second step"] == ["1.90 s", "2.10 s"]
