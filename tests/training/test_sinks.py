from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from fdscale.cluster.ranks import Rank
from fdscale.training.live import Live
from fdscale.training.sinks import Sinks, open_sinks


def opened(folder: Path, number: int, out: io.StringIO, resumed_step: int | None = None, monitor=None) -> Sinks:
    rank = Rank(number, number % 2, world_size=4, local_world_size=2, master_addr="127.0.0.1", master_port=29500)
    return open_sinks(rank, folder, "distill", 10, resumed_step, Console(file=out), Live(), monitor)


@pytest.mark.parametrize(
    ("number", "shows"),
    [(0, True), (1, False), (2, False), (3, False)],
    ids=["main rank", "its neighbour", "local rank 0 of the second node", "its neighbour there"],
)
def test_the_main_rank_shows_and_every_rank_has_the_latest(tmp_path, number, shows):
    out = io.StringIO()
    sinks = opened(tmp_path, number, out)
    sinks.write(1, {"loss": 0.25})
    sinks.say("hello")
    sinks.close()
    assert (out.getvalue() == "step 1/10  loss 0.2500\nhello\n") == shows
    assert [path.name for path in tmp_path.iterdir()] == (["metrics.jsonl"] if shows else [])
    assert sinks.live.values["loss"] == 0.25
    assert sinks.live.values["telemetry_seconds_total"] > 0


def test_a_resumed_run_keeps_its_rows(tmp_path):
    for resumed_step, step in ((None, 5), (5, 6)):
        sinks = opened(tmp_path, 0, io.StringIO(), resumed_step)
        sinks.write(step, {"loss": 0.25})
        sinks.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 6]


def test_going_back_cuts_the_file_and_leaves_a_monitor_alone(tmp_path):
    class Recorder:
        def __init__(self) -> None:
            self.steps: list[int] = []

        def write(self, step: int, values: object) -> None:
            self.steps.append(step)

        def close(self) -> None:
            self.steps.append(-1)

    recorder = Recorder()
    sinks = opened(tmp_path, 0, io.StringIO(), None, recorder)
    for step in (1, 2, 3):
        sinks.write(step, {"loss": 0.25})
    sinks.go_back(1)
    sinks.write(2, {"loss": 0.5})
    sinks.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert recorder.steps == [1, 2, 3, 2, -1]
