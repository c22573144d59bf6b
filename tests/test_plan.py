"""`fdscale plan`: what it says of a run that fits, and the nearest that does where one does not."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from fdscale.cli import main
from fdscale.config.errors import UserError
from fdscale.config.recipe import load_recipe
from fdscale.config.settings import DistillSettings
from fdscale.data.dense.scenes import write_coco
from fdscale.plan import _samples, plan
from fdscale.planning.outlook import Outlook, as_json
from fdscale.train import outline

SMALL = [
    "student.geometry.depth=2",
    "student.image_size=64",
    "target.grid=interpolate",
    "teacher.geometry.depth=1",
    "data.global_batch=512",
]


@functools.cache
def outlook(*overrides: str, nodes: int = 1, gpus: int = 2, gpu: str = "RTX4090-24GB") -> Outlook:
    settings = load_recipe("vit_b_clip_b", [*SMALL, *overrides])
    assert isinstance(settings, DistillSettings)
    return plan(settings, outline, "vit_b_clip_b", nodes, gpus, gpu, efficiency=0.5)


def test_a_run_that_fits_needs_neither_data_nor_weights() -> None:
    found = outlook()
    assert found.fits
    assert found.nearest is None
    assert (found.ranks, found.accumulation) == (2, 2)
    assert found.forecast.peak == found.forecast.states.resident + found.forecast.images + max(
        found.forecast.phases.values()
    )
    assert found.activations["blocks"] < found.activations["none"]
    pace = found.cost.pace
    assert pace is not None
    assert pace.images_per_second == pytest.approx(2 * 165.2e12 * 0.5 / found.cost.flops.total)
    assert pace.gpu_hours == pytest.approx(2 * 24 * pace.days)
    assert "ImageNet-1K" in found.cost.samples_are


def test_twice_the_ranks_divide_what_zero_divides() -> None:
    few, many = outlook(gpus=1), outlook(gpus=2)
    assert many.forecast.states.moments == pytest.approx(few.forecast.states.moments / 2, rel=0.01)
    assert many.forecast.states.weights == few.forecast.states.weights  # ZeRO-1


def test_a_teacher_whose_windows_are_masked_runs_in_half_precision() -> None:
    """Its masks are cast with its weights, as in a run."""
    small = ["student.geometry.depths=[1,1,1,1]", "teacher.geometry.depths=[2,1,1,1]"]
    settings = load_recipe("swinv2_b_esvit", small)
    assert isinstance(settings, DistillSettings)
    assert plan(settings, outline, "swinv2_b_esvit", 1, 8, "H100-80GB", efficiency=0.5).fits


def test_a_teacher_by_each_placement() -> None:
    teacher = outlook("teacher.placement=zero3", nodes=2).forecast.teachers["teacher"]
    assert teacher.placement == "zero3"
    assert teacher.placements["fairscale"] < teacher.placements["zero3"] < teacher.placements["replicated"]
    assert teacher.weights == teacher.placements["zero3"]
    assert teacher.forward.gathered > 0


def test_what_does_not_fit_is_told_with_the_nearest_that_does(capsys: pytest.CaptureFixture[str]) -> None:
    wide = ["student.geometry.embed_dim=4608", "student.geometry.num_heads=36", "student.geometry.depth=6"]
    arguments = ["plan", "vit_b_clip_b", *SMALL, *wide, "--nodes", "1", "--gpus-per-node", "2", "--gpu", "L4-24GB"]
    assert main([*arguments, "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is False
    assert told["rank_bytes"]["peak"] > told["machine"]["usable"] >= told["nearest_fit"]["peak"]
    assert told["nearest_fit"]["changes"]


def test_the_json_is_stable() -> None:
    told = as_json(outlook())
    assert json.loads(json.dumps(told)) == told
    assert told["format"] == 1
    assert sorted(told) == [
        "accumulation",
        "activation_checkpointing",
        "checkpoint_bytes",
        "fits",
        "flops_per_image",
        "format",
        "global_batch",
        "gpus_per_node",
        "host_bytes",
        "machine",
        "micro_batch",
        "nearest_fit",
        "nodes",
        "pace",
        "program",
        "rank_bytes",
        "ranks",
        "recipe",
        "run",
        "student",
        "teachers",
        "zero_stage",
    ]


def test_fine_tuning_has_a_plan_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "digits_teacher", "--gpus-per-node", "2", "--gpu", "cpu"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "digits_teacher on 1 x 2 ranks on this machine's CPUs = 2 ranks" in told
    assert "fits" in told
    assert "teacher's weights" not in told


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("ade20k_vit_b", ["student.geometry.depth=4", "backbone.indices=[0,1,2,3]"]),
        ("coco_swinv2_g", ["student.geometry.depths=[1,1,1,1]"]),
    ],
)
def test_dense_tasks_have_a_plan_without_their_data(
    recipe: str, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", recipe, *overrides, "--nodes", "4", "--gpus-per-node", "8", "--gpu", "H100-80GB"]
    small = ["data.global_batch=64", "student.activation_checkpointing=blocks"]
    assert main([*arguments, *small, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"]
    crop = load_recipe(recipe).data.crop  # type: ignore[union-attr]
    pixels = told["micro_batch"] * crop**2
    added = told["rank_bytes"]["forward_and_backward"]
    assert added["batch"] > 4 * 3 * pixels  # fp32 pixels, and labels or masks
    if recipe.startswith("ade20k"):
        assert added["batch"] == pytest.approx((4 * 3 + 1) * pixels, rel=0.01)
    else:
        assert added["batch"] >= (4 * 3 + 8) * pixels  # the masks of eight objects


def test_images_are_counted_where_they_are_and_else_those_that_were_published(tmp_path: Path) -> None:
    assert _samples(load_recipe("objects365_swinv2_g"))[0] == 1_742_289
    assert "Objects365's, since" in _samples(load_recipe("objects365_swinv2_g"))[1]
    assert _samples(load_recipe("coco_swinv2_g"))[0] == 117_266
    write_coco(tmp_path, 20, 0, 32)
    notes = tmp_path / "annotations" / "instances_train2017.json"
    named = [f"data.images={tmp_path / 'train2017'}", f"data.annotations={notes}"]
    count, told = _samples(load_recipe("coco_vit_b", [*named, "classes=5"]))
    assert (told, 16 <= count <= 20) == (f"counted in {tmp_path / 'train2017'} with {notes}", True)
    with pytest.raises(UserError, match="set classes=5"):
        _samples(load_recipe("coco_vit_b", named))
    with pytest.raises(UserError, match=r"data\.folder: .*images/training"):
        _samples(load_recipe("ade20k_vit_b", [f"data.folder={tmp_path}"]))


def test_a_network_given_in_python_has_no_plan(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"teacher\.name=own: a network given in Python is not known here"):
        outlook("teacher.name=own", "teacher.geometry={}")
