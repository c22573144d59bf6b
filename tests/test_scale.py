"""A run whose networks are divided while they are built is the plain run: its losses, and what it leaves."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fdscale import train
from fdscale.build import networks
from fdscale.config.recipe import load_recipe
from fdscale.config.settings import DistillSettings, FinetuneSettings
from fdscale.data.packing.digits import pack_digits
from fdscale.downstream import classify
from fdscale.planning.smoke import smoke_patch
from fdscale.training.engine import Connection

LEAN = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}
SWIN = ["student.geometry.depths=[1,1,1,1]", "student.geometry.extra_norm_period=1"]
VIT = ["student.geometry.depth=2"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards") / "digits"
    pack_digits(folder, "test")
    return str(folder)


def json_file(folder: Path, stage: int, **more: Any) -> str:
    zero = {"stage": stage, **(LEAN if stage == 3 else {})}
    path = folder / f"stage{stage}.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, **more}))
    return str(path)


def run(connection: Connection, recipe: str, overrides: list[str], whole_up_to: int) -> bool:
    """Distil or fine-tune for three steps; networks above `whole_up_to` parameters are divided while they are built."""
    settings = load_recipe(recipe, ["max_steps=3", "log.every=1", "data.global_batch=8", *overrides], smoke_patch)
    student_of = partial(networks.student_of, whole_up_to=whole_up_to)
    teacher_of = partial(networks.teacher_of, whole_up_to=whole_up_to)
    with pytest.MonkeyPatch.context() as patch:
        for program, name, function in (
            (train, "student_of", student_of),
            (train, "teacher_of", teacher_of),
            (classify, "student_of", student_of),
        ):
            patch.setattr(program, name, function)
        if isinstance(settings, FinetuneSettings):
            return classify.finetune(settings)
        assert isinstance(settings, DistillSettings)
        return train.distill(settings)


def rows_of(run_dir: Path) -> list[tuple[float, float | None]]:
    """Loss and gradient norm of each step."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row.get("grad_norm")) for row in rows if "loss" in row]


def sizes_of(run_dir: Path) -> dict[str, int]:
    """What the last checkpoint weighs, file by file."""
    (folder,) = (run_dir / "attempts" / "0001").glob("step_*")
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.suffix == ".pt"}


def assert_the_same_run(one: Path, other: Path) -> None:
    assert len(rows_of(one)) == 3
    assert rows_of(one) == rows_of(other)
    assert (one / "student.safetensors").read_bytes() == (other / "student.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("recipe", "small", "stage", "bf16"),
    [("swinv2_g", SWIN, 3, False), ("vit_b_clip_b", VIT, 3, True), ("vit_b_clip_b", VIT, 1, False)],
    ids=["swin_v2", "vit in bf16", "vit under ZeRO-1"],
)
def test_divided_while_built_and_trained(
    recipe: str, small: list[str], stage: int, bf16: bool, digits: str, tmp_path: Path, two_ranks: Any
) -> None:
    """Nothing of the teacher is in a checkpoint: files weigh the same to the byte."""
    common = [*small, f"data.shards={digits}", f"deepspeed={json_file(tmp_path, stage, bf16={'enabled': bf16})}"]
    plain, divided = tmp_path / "plain", tmp_path / "divided"
    assert all(two_ranks(run, recipe, [*common, f"run_dir={plain}"], 10**9))
    placed = ["teacher.placement=zero3", f"run_dir={divided}"]
    assert all(two_ranks(run, recipe, [*common, *placed], 0))
    assert_the_same_run(plain, divided)
    assert sizes_of(plain) == sizes_of(divided)
    saved = torch.load(next((divided / "attempts" / "0001").rglob("*model_states.pt")), weights_only=False)
    assert not any("teacher" in name for name in [*saved["module"], *(saved.get("buffer_names") or [])])


def test_a_divided_student_is_fine_tuned(digits: str, tmp_path: Path, two_ranks: Any) -> None:
    config = f"deepspeed={json_file(tmp_path, 3, bf16={'enabled': True})}"
    student = ["student.name=vit_b16", *VIT, "student.geometry.embed_dim=32", "student.geometry.num_heads=4"]
    student += ["student.image_size=64", "head.norm=after_pooling", "optim.layer_decay=0.65"]
    common = [*student, config, f"data.shards={digits}", "labelled=64"]
    plain, divided = tmp_path / "plain", tmp_path / "divided"
    for run_dir, whole_up_to in ((plain, 10**9), (divided, 0)):
        assert all(two_ranks(run, "digits_finetune", [*common, f"run_dir={run_dir}"], whole_up_to))
    assert_the_same_run(plain, divided)
    assert (plain / "classifier.safetensors").read_bytes() == (divided / "classifier.safetensors").read_bytes()
