"""The GPU benchmark: its path on the CPU with tiny networks, its report, what it does when a part fails; once a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fdscale.bench.__main__ import main
from fdscale.bench.measured import forward, training_step
from fdscale.bench.parts import FULL, TINY, Forward, TrainingStep
from fdscale.bench.planned import first_micro_batch, planned
from fdscale.bench.report import markdown
from fdscale.training.engine import Connection

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a CUDA device")


def tiny_parts(connection: Connection) -> dict[str, Any]:
    """Every tiny part that needs an engine, in this process; fairscale needs CUDA streams."""
    rows = {
        name: training_step(part, None, connection) for name, part in TINY.items() if isinstance(part, TrainingStep)
    }
    for name, part in TINY.items():
        if isinstance(part, Forward) and part.placement != "fairscale":
            rows[name] = forward(part, connection)
    return rows


def test_tiny_networks_run_the_same_path(one_rank: Any) -> None:
    (rows,) = one_rank(tiny_parts)
    for name in ("step vit_l14", "step swinv2_g"):
        assert rows[name]["images_per_second"] > 0
        assert rows[name]["last_loss"] < rows[name]["first_loss"]
    assert rows["teacher zero3"]["tokens_sha256"] == rows["teacher replicated"]["tokens_sha256"]
    report = {"parts": {"matmul": {"tflops": 1e-3}, **rows}}
    page = markdown(
        report
        | {"device": "a CPU", "device_bytes": None, "cuda": None, "python": "3", "versions": {}}
        | {"networks": "tiny", "date": "today", "commit": "none"}
    )
    assert "| zero3 |" in page
    assert "yes |" in page


def test_full_and_tiny_have_the_same_parts_and_the_giant_is_the_giant() -> None:
    assert list(FULL) == list(TINY)
    giant = FULL["step swinv2_g"]
    assert isinstance(giant, TrainingStep)
    plan = planned(giant, 16, cuda=True)
    assert plan["student_parameters"] == plan["teacher_parameters"] == 2_997_843_680
    # bf16 weights, fp32 gradients, masters and moments, the teacher in bf16; projector and buckets on top
    assert plan["planned_state_bytes"] == pytest.approx(2_997_843_680 * (2 + 4 + 4 + 8 + 2), rel=0.02)
    assert plan["planned_peak_bytes"] > plan["planned_state_bytes"] + 3 * 2**30  # the activations of 16 images


def test_the_images_of_a_step_are_what_the_plan_has_room_for() -> None:
    small = TINY["step vit_l14"]
    assert isinstance(small, TrainingStep)
    half, whole = (planned(small, images, cuda=True)["planned_peak_bytes"] for images in (64, 128))
    assert first_micro_batch(small, 2 * whole) == small.micro_batch == 128
    assert first_micro_batch(small, int((half + whole) / 2 / 0.95)) == 64


@without_gpu
def test_without_a_gpu_it_says_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["gpu", "--output", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: bench gpu: no CUDA device is visible here")
    assert "--tiny" in line


@without_gpu
def test_a_part_in_its_own_process_is_reported_as_it_comes(tmp_path: Path) -> None:
    assert main(["gpu", "--tiny", "--only", "matmul", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gpu-tiny.json").read_text())
    assert report["parts"]["matmul"]["tflops"] > 0
    assert len(report["commit"]) == 40
    assert report["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "TFLOP/s" in (tmp_path / "gpu-tiny.md").read_text()


def test_what_has_no_time_left_is_told_and_the_rest_is_kept(tmp_path: Path) -> None:
    assert main(["gpu", "--tiny", "--seconds", "1", "--output", str(tmp_path)]) == 1
    page = (tmp_path / "gpu-tiny.md").read_text()
    assert page.count("failed: no time was left for it") == len(TINY)


@pytest.mark.gpu
@on_gpu
def test_every_tiny_part_runs_on_the_gpu(tmp_path: Path) -> None:
    assert main(["gpu", "--tiny", "--output", str(tmp_path)]) == 0
    parts = json.loads((tmp_path / "gpu-tiny.json").read_text())["parts"]
    assert all(row["peak_bytes"] > 0 for name, row in parts.items() if name != "matmul")
    assert len({row["tokens_sha256"] for name, row in parts.items() if name.startswith("teacher")}) == 1
