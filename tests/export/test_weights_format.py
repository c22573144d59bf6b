"""A student file straight from a checkpoint is, byte for byte, what the run itself leaves at its end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fdscale.cli import main
from fdscale.config.errors import UserError
from fdscale.export.weights_format import export_weights
from fdscale.students.files import load_weights
from fdscale.students.geometry import file_geometry
from fdscale.students.student import build_student
from fdscale.training.engine import Connection

SWIN = ["student.geometry.depths=[1,1,2,1]", "student.geometry.extra_norm_period=2", "data.interpolation=bicubic"]
VIT = ["student.image_size=32", "student.geometry.embed_dim=32", "student.geometry.depth=2"]
VIT += ["student.geometry.num_heads=4", "student.geometry.patch_size=8", "student.name=vit_b16"]


def ran(connection: Connection, arguments: list[str]) -> int:
    return main(arguments)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fdscale.data.packing.digits import pack_digits

    folder = tmp_path_factory.mktemp("shards") / "digits"
    pack_digits(folder, "test")
    return folder


def finished(folder: Path, digits: Path, ranks: Any, stage: int, *arguments: str) -> Path:
    """A run of three steps with checkpoints after each, and an average."""
    lean = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    zero = {"stage": stage, **(lean if stage == 3 else {})}
    config = {"train_micro_batch_size_per_gpu": 16, "zero_optimization": zero}
    (folder / "ds.json").write_text(json.dumps(config))
    given = [f"run_dir={folder}/run", f"data.shards={digits}", f"deepspeed={folder}/ds.json", "max_steps=3"]
    given += ["optim.ema_decay=0.8", "checkpoint.every=1", "checkpoint.keep=3"]
    assert set(ranks(ran, [*arguments, *given])) == {0}
    return folder / "run"


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory, digits: Path, two_ranks: Any) -> Path:
    folder = tmp_path_factory.mktemp("distilled")
    return finished(folder, digits, two_ranks, 3, "distill", "swinv2_g", "--smoke", *SWIN)


def exported(run: Path, output: Path, *options: str) -> Path:
    assert main(["export", str(run), "--output", str(output), "--format", "weights", *options]) == 0
    return output / "student.safetensors"


def test_it_is_the_file_that_the_run_leaves(distilled: Path, tmp_path: Path) -> None:
    written = exported(distilled, tmp_path / "a")
    assert written.read_bytes() == (distilled / "student.safetensors").read_bytes()
    assert written.with_suffix(".json").read_bytes() == (distilled / "student.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_the_average_is_the_runs_own(distilled: Path, tmp_path: Path) -> None:
    average = (distilled / "student_ema.safetensors").read_bytes()
    assert exported(distilled, tmp_path / "a", "--ema").read_bytes() == average
    assert average != (distilled / "student.safetensors").read_bytes()
    assert (distilled / "student_ema.json").read_bytes() == (distilled / "student.json").read_bytes()


@pytest.mark.parametrize(("stage", "norm"), [(0, "after_pooling"), (1, "student"), (2, "after_pooling")])
def test_of_a_classifier_it_is_the_student_with_the_new_norm(
    stage: int, norm: str, tmp_path: Path, digits: Path, two_ranks: Any
) -> None:
    arguments = ["finetune", "digits_finetune", *VIT, f"head.norm={norm}", "labelled=40"]
    run = finished(tmp_path, digits, two_ranks, stage, *arguments)
    for name, options in (("student", ()), ("student_ema", ("--ema",))):
        found = load_file(exported(run, tmp_path / name, *options))
        expected = load_file(run / f"{name}.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert (run / "classifier_ema.safetensors").is_file()


def test_bf16_rounds_the_trained_weights_and_loads_as_any_student_file(distilled: Path, tmp_path: Path) -> None:
    written = exported(distilled, tmp_path / "a", "--dtype", "bf16")
    exact, rounded = load_file(distilled / "student.safetensors"), load_file(written)
    assert {value.dtype for value in rounded.values()} == {torch.bfloat16}
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)
    student = build_student(file_geometry(written))
    load_weights(student, written)
    assert all(torch.equal(value, rounded[name].float()) for name, value in student.backbone.state_dict().items())


def test_an_older_checkpoint_is_taken_by_its_step_and_of_an_unfinished_run(distilled: Path, tmp_path: Path) -> None:
    older, newest = (exported(distilled, tmp_path / str(step), "--step", str(step)) for step in (2, 3))
    assert newest.read_bytes() == (distilled / "student.safetensors").read_bytes()
    assert older.read_bytes() != newest.read_bytes()


def copied(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder)
    return folder


def test_a_flipped_byte_is_found_and_the_one_before_taken_or_offered(
    distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(distilled, tmp_path / "run")
    victim = next((run / "attempts" / "0001" / "step_00000003").glob("*rank_1*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    before = exported(distilled, tmp_path / "before", "--step", "2")
    assert exported(run, tmp_path / "a").read_bytes() == before.read_bytes()
    told = capsys.readouterr().out
    assert f"{run}/attempts/0001/step_00000003 is not whole: {victim.name} has another SHA-256" in told
    options = ["--format", "weights", "--step", "3"]
    assert main(["export", str(run), "--output", str(tmp_path / "b"), *options]) == 2
    error = capsys.readouterr().err
    assert "--step 3: this checkpoint is not whole (see above); others are of the steps 1, 2" in error
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--step", "7"], "--step 7: this checkpoint does not exist; others are of the steps 1, 2, 3"),
        (["--dtype", "fp16"], "--dtype fp16: allowed: fp32, bf16"),
        (["--format", "onnx"], "--format onnx: allowed: timm, transformers, weights"),
        (["--format", "timm", "--ema"], "--dtype, --ema and --step belong to --format weights"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    options: list[str], message: str, distilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a"
    assert main(["export", str(distilled), "--output", str(output), "--format", "weights", *options]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_what_is_no_run_has_no_weights(tmp_path: Path, distilled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run, message in ((tmp_path / "absent", "not a run directory"), (tmp_path, "not a run directory")):
        assert main(["export", str(run), "--output", str(tmp_path / "a"), "--format", "weights"]) == 2
        assert message in capsys.readouterr().err
    own = copied(distilled, tmp_path / "own")
    (own / "student.json").unlink()
    assert main(["export", str(own), "--output", str(tmp_path / "a"), "--format", "weights"]) == 2
    assert "student.json: is not there: a run writes it when it starts" in capsys.readouterr().err


def test_the_average_of_a_run_without_one(distilled: Path, tmp_path: Path, digits: Path, two_ranks: Any) -> None:
    run = tmp_path / "run"
    arguments = ["distill", "swinv2_g", "--smoke", *SWIN, f"run_dir={run}", f"data.shards={digits}", "max_steps=1"]
    assert set(two_ranks(ran, arguments)) == {0}
    assert not (run / "student_ema.safetensors").exists()
    with pytest.raises(UserError, match="keeps no moving average"):
        export_weights(run, tmp_path / "a", average=True)
