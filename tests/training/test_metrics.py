from __future__ import annotations

import json
import math
import re
import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdscale.downstream.detection.average_precision import KINDS, NAMES
from fdscale.training.json_lines import JsonLines, read_rows
from fdscale.training.metrics import ENDS, METRICS, STATES, WAYS_OUT, counters, row_of
from fdscale.training.phases import PHASES
from fdscale.training.sinks import Sinks


def strict_rows(path: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def write_steps(path: Path, steps: range, resumed_step: int | None = None) -> None:
    sink = JsonLines(path, resumed_step)
    for step in steps:
        sink.write(step, {"step": step, "loss": 1 / step})
    sink.close()


def curve(path: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in strict_rows(path)]


class Recorder:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict]] = []
        self.closed = False

    def write(self, step: int, values: dict) -> None:
        self.rows.append((step, dict(values)))

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_names_follow_the_conventions_of_prometheus(metric):
    assert re.fullmatch(r"fdscale_[a-z]+(_[a-z]+)*", metric.prometheus_name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.name.removesuffix("_total").endswith("_seconds") == (metric.unit == "seconds")
    assert metric.help


def test_every_sink_gets_the_row_with_its_step():
    recorders = [Recorder(), Recorder()]
    sinks = Sinks(recorders)
    sinks.write(7, {"loss": 0.25})
    sinks.close()
    assert [r.rows for r in recorders] == [[(7, {"step": 7, "loss": 0.25})]] * 2
    assert all(r.closed for r in recorders)


def test_an_unknown_metric_is_our_mistake_on_every_rank():
    recorder = Recorder()
    with pytest.raises(KeyError, match="lost"):
        Sinks([recorder]).write(1, {"loss": 1.0, "lost": 1.0})
    with pytest.raises(KeyError, match="lost"):
        Sinks().write(1, {"lost": 1.0})
    assert recorder.rows == []


def test_a_metric_with_a_label_is_named_with_what_it_was_measured_of(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sinks = Sinks([JsonLines(path)])
    sinks.write(1, {"teacher_loss/dino": 0.5})
    assert read_rows(path)[0]["teacher_loss/dino"] == 0.5
    for wrong in ("teacher_loss", "loss/dino"):
        with pytest.raises(KeyError, match=wrong):
            sinks.write(1, {wrong: 0.5})


def test_events_reach_the_console_and_nobody_where_there_is_none():
    said: list[str] = []
    Sinks((), said.append).say("resumed")
    Sinks().say("resumed")
    assert said == ["resumed"]


@given(loss=st.floats(allow_nan=False, allow_infinity=False))
def test_floats_read_back_bit_for_bit(tmp_path_factory, loss):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    sink = JsonLines(path)
    sink.write(1, {"step": 1, "loss": loss})
    (row,) = strict_rows(path)  # before close: every row is flushed
    sink.close()
    assert row["loss"].hex() == loss.hex()
    assert row["step"] == 1
    assert row["time"] > 1.6e9


def test_a_disk_that_is_full_ends_no_run(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path)
    sink.write(1, {"loss": 1.0})
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, unlimited[1]))
    try:
        sink.write(2, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    sink.write(3, {"loss": 1.0})
    sink.close()
    assert "the row of step 2 could not be written" in caplog.text
    assert [row["step"] for row in strict_rows(path)] == [1, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_null(tmp_path, value):
    sink = JsonLines(tmp_path / "metrics.jsonl")
    sink.write(1, {"loss": value, "images": 3})
    sink.close()
    (row,) = strict_rows(tmp_path / "metrics.jsonl")
    assert row["loss"] is None
    assert row["images"] == 3


def test_the_curve_of_a_killed_and_resumed_run_is_that_of_an_undisturbed_one(tmp_path):
    killed, undisturbed = tmp_path / "killed.jsonl", tmp_path / "undisturbed.jsonl"
    write_steps(undisturbed, range(1, 11))
    write_steps(killed, range(1, 8))
    with killed.open("a") as file:
        file.write('{"step": 8, "ti')  # killed while it wrote
    write_steps(killed, range(5, 11), resumed_step=4)
    assert curve(killed) == curve(undisturbed)
    assert [path.name for path in tmp_path.glob("*.new")] == []


def test_rows_up_to_the_resumed_step_stay_as_they_were(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 8))
    before = path.read_text().splitlines()
    write_steps(path, range(0), resumed_step=4)
    assert path.read_text().splitlines() == before[:4]


def test_a_last_line_without_its_line_end_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4))
    path.write_text(path.read_text().rstrip("\n"))
    write_steps(path, range(4, 6), resumed_step=3)
    assert [step for step, _ in curve(path)] == [1, 2, 3, 4, 5]


def test_a_fresh_start_begins_with_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 8))
    write_steps(path, range(1, 3))
    assert [step for step, _ in curve(path)] == [1, 2]


def test_a_run_without_a_file_can_be_resumed(tmp_path):
    write_steps(tmp_path / "metrics.jsonl", range(5, 7), resumed_step=4)
    assert [step for step, _ in curve(tmp_path / "metrics.jsonl")] == [5, 6]


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"{", b"[1]", b'{"loss": 1}', b'{"step": null}'])
def test_lines_that_are_no_rows_are_named_and_left_out(tmp_path, caplog, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    assert [row["step"] for row in read_rows(path)] == [1, 3]
    assert "metrics.jsonl line 2" in caplog.text


def test_every_counter_begins_at_zero():
    begun = counters()
    assert set(begun.values()) == {0.0}
    for metric in METRICS.values():
        assert any(metric.measures(name) for name in begun) == (metric.kind == "counter"), metric.name


@pytest.mark.parametrize(
    ("name", "metric"),
    [("loss", "loss"), ("teacher_loss/dino", "teacher_loss"), ("rank_phase_seconds/3/data", "rank_phase_seconds")],
)
def test_a_value_belongs_to_the_row_that_its_name_begins_with(name, metric):
    assert row_of(name) is METRICS[metric]


@pytest.mark.parametrize("name", ["los", "loss/dino", "teacher_loss", "rank_phase_seconds/3"])
def test_a_value_with_other_labels_than_its_row_belongs_to_none(name):
    assert row_of(name) is None


def test_the_series_of_a_thousand_ranks_are_bounded():
    """128 nodes of 8 ranks: what each rank adds is known, and nothing else grows with ranks or steps."""
    values = {
        "stage": STATES[:4],
        "teacher": STATES[:3],
        "phase": PHASES,
        "state": STATES,
        "reason": ENDS,
        "way": WAYS_OUT,
        "part": ("objectness", "rpn_box", "class", "box", "mask"),  # Mask2Former has three
        "of": KINDS,
        "at": NAMES,
    }
    series = {"run": 0, "node": 0, "rank": 0}
    for metric in METRICS.values():
        kinds = [len(values[label]) for label in metric.labels if label in values]
        scope = "rank" if "rank" in metric.labels else metric.scope
        series[scope] += math.prod(kinds)
        assert metric.kind == "info" or set(metric.labels) <= {*values, "rank"}, "a label whose values are not bounded"
    assert series == {"run": series["run"], "node": 6, "rank": 10}
    assert series["run"] < 120
    assert series["run"] + 128 * series["node"] + 1024 * series["rank"] < 12_000
