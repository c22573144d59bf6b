from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from fdscale.config.errors import UserError
from fdscale.summary import summarise

DISTILL = """\
program = "distill"
[student]
name = "swinv2_t"
[teacher]
name = "student_file"
weights = "runs/[teacher]/student.safetensors"
"""
FINETUNE = """\
program = "finetune"
[student]
name = "vit_s16"
"""


def write_run(folder: Path, recipe: str, rows: list[dict], complete: bool) -> Path:
    folder.mkdir()
    (folder / "recipe.toml").write_text(recipe)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if complete:
        (folder / "complete.json").write_text('{"step": 1}')
    return folder


def shown(*run_dirs: Path) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(summarise(run_dirs))
    return out.getvalue()


def test_a_distillation_says_where_its_loss_began_and_ended(tmp_path):
    rows = [
        {"step": 10, "loss": 0.251, "loss_zero": 0.25, "step_seconds": 0.5},
        {"step": 10, "eval_loss": 0.3, "eval_knn_accuracy": 0.125},
        {"step": 30, "loss": 0.2, "loss_zero": 0.25, "step_seconds": 0.25},
        {"step": 30, "eval_loss": 0.225, "eval_knn_accuracy": 0.5},
    ]
    text = shown(write_run(tmp_path / "fd", DISTILL, rows, complete=True))
    for part in (
        str(tmp_path / "fd"), "distill: swinv2_t", "<- student_file runs/[teacher]", "0.2510 → 0.2000",
        "zero 0.2500", "loss 0.3000 → 0.2250", "k-NN 12.5% → 50.0%", "│ 30 ", "│ 10 ",
    ):  # fmt: skip
        assert part in text
    assert "not finished" not in text


def test_several_runs_share_one_table(tmp_path):
    rows = [{"step": 5, "loss": 2.3, "accuracy": 0.1, "eval_accuracy": 0.625}]
    first = write_run(tmp_path / "first", FINETUNE, rows, complete=False)
    second = write_run(tmp_path / "second", FINETUNE + 'weights = "runs/fd/student.safetensors"\n', rows, True)
    text = shown(first, second)
    assert f"{first} (not finished)" in text
    assert f"{second} (not finished)" not in text
    assert "finetune: vit_s16" in text
    assert "<- labels, from random weights" in text
    assert "<- labels, from runs/fd " in text
    assert "accuracy 62.5%" in text
    assert text.count("held out") == 1


def test_a_run_stopped_before_its_first_row_and_values_that_were_not_finite(tmp_path):
    empty = write_run(tmp_path / "empty", FINETUNE, [], complete=False)
    broken = write_run(tmp_path / "broken", FINETUNE, [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}], False)
    text = shown(empty, broken)
    assert "│ 0 " in text
    assert "1.0000 → not finite" in text


@pytest.mark.parametrize("absent", ["recipe.toml", "metrics.jsonl"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, absent):
    run = write_run(tmp_path / "fd", DISTILL, [], complete=True)
    (run / absent).unlink()
    with pytest.raises(UserError, match=f"not a run directory: it has no {absent}"):
        summarise([run])
