from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from fdscale.training.console import ConsoleSink, duration

ROW = {
    "step": 60_000,
    "loss": 0.21034,
    "lr": 1.2e-3,
    "grad_norm": 0.5341,
    "images_per_second": 1412.3,
    "step_seconds": 0.4,
    "data_wait_seconds": 0.008,
    "eta_seconds": 3725.4,
    "feature_cosine": 0.8,
}


def shown(width: int, terminal: bool, *rows: dict, said: tuple[str, ...] = ()) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, legacy_windows=False)
    sink = ConsoleSink("distill", 375_300, console)
    for text in said:
        sink.say(text)
    for row in rows:
        sink.write(row["step"], row)
    sink.close()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())


def test_a_log_file_gets_one_whole_line_per_row():
    lines = shown(40, False, ROW, {**ROW, "step": 60_010}).splitlines()
    assert len(lines) == 2
    assert lines[0] == ("step 60000/375300  ETA 1:02:05  loss 0.2103  lr 1.20e-3  grad 0.534  1412 img/s  wait 2%")


def test_the_live_line_of_a_terminal_fits_a_hundred_columns():
    frames = shown(100, True, {**ROW, "eta_seconds": 3 * 86_400}).splitlines()
    (line,) = [frame.split("\r")[-1] for frame in frames if "img/s" in frame and "…" not in frame][-1:]
    assert len(line) <= 100
    assert "distill 60000/375300" in line
    for text in ("ETA 3d 00:00:00", "loss 0.2103", "lr 1.20e-3", "grad 0.534", "1412 img/s", "wait 2%"):
        assert text in line


@pytest.mark.parametrize("terminal", [False, True])
def test_held_out_results_and_checkpoints_are_lines_of_their_own(terminal):
    rows = (
        {"step": 50, "eval_loss": 0.2, "eval_knn_accuracy": 0.531, "eval_accuracy": 0.5},
        {"step": 60, "checkpoint_seconds": 1.25},
    )
    text = shown(100, terminal, *rows)
    assert "step 50: held-out loss 0.2000, held-out accuracy 50.0%, held-out k-NN accuracy 53.1%" in text
    assert "step 60: checkpoint committed in 1.2 s" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_what_is_said_is_printed_as_it_is(terminal):
    assert "resumed from runs/[a]/step-40" in shown(100, terminal, ROW, said=("resumed from runs/[a]/step-40",))


def test_values_that_are_not_finite_are_shown():
    row = {"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "eta_seconds": float("inf")}
    assert shown(100, False, row) == "step 1/375300  ETA ?  loss nan  grad inf\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (3599.4, "59:59"), (3600, "1:00:00"), (90_061, "1d 01:01:01")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
