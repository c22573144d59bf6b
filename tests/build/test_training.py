"""Parameter groups and rates of the official configurations, at their real size; what a view is made with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from fdscale.build.shards import augmentation
from fdscale.build.training import optimizer_groups, schedule_of
from fdscale.config.recipe import load_recipe
from fdscale.config.settings import DistillSettings, FinetuneSettings, OptimSettings
from fdscale.distill.distiller import Distiller, Lesson
from fdscale.distill.layout import TokenLayout
from fdscale.distill.targets import TargetMaker
from fdscale.downstream.backbone import Backbone
from fdscale.downstream.classifier import Classifier
from fdscale.students.geometry import TimmGeometry, student_geometry
from fdscale.students.student import Student, build_student
from fdscale.training.optim import Schedule

SHARED_TABLE = "student.backbone.rel_pos_bias.relative_position_bias_table"
Groups = list[dict[str, Any]]
LAYERED = OptimSettings(lr=1e-4, layer_decay=0.8)


def meta_student(name: str, position_bias: str | None = None) -> Student:
    return build_student(student_geometry(name, 224, {}, None, position_bias), device="meta")


def classifier_of(student: Student, norm: str) -> Classifier:
    with torch.device("meta"):
        return Classifier(student, 1000, 0.1, norm)  # type: ignore[arg-type]


def optim(**more: Any) -> OptimSettings:
    return OptimSettings(lr=1.25e-3, warmup_lr=2.5e-7, min_lr=2.5e-7, **more)


def group_of(module: nn.Module, groups: Groups) -> dict[str, tuple[float, float]]:
    """(lr_scale, weight decay) by name; every parameter is in one group."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = [(names[id(p)], (g["lr_scale"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(found) == len(names) == len(dict(found))
    return dict(found)


@pytest.fixture(scope="module")
def vit() -> Classifier:
    """The official fine-tuning network of CLIP ViT-B/16."""
    return classifier_of(meta_student("vit_b16", "per_block"), "after_pooling")


@pytest.fixture(scope="module")
def swin() -> Classifier:
    return classifier_of(meta_student("swinv2_b"), "student")


def test_vit_b_is_grouped_as_officially(vit: Classifier) -> None:
    groups = optimizer_groups(vit, vit.student, optim(layer_decay=0.65))
    assert len(groups) == 2 * 14  # layers 0 to 13, decayed and not
    scales = {name: group[0] for name, group in group_of(vit, groups).items()}
    backbone = "student.backbone."
    for part, layer in {"cls_token": 0, "patch_embed.proj.weight": 0, "patch_embed.proj.bias": 0}.items():
        assert scales[backbone + part] == pytest.approx(0.65 ** (13 - layer))
    for name, scale in scales.items():
        if name.startswith(f"{backbone}blocks."):
            assert scale == pytest.approx(0.65 ** (13 - 1 - int(name.split(".")[3]))), name
    assert scales[f"{backbone}cls_token"] == pytest.approx(0.0037, abs=5e-5)
    assert scales[f"{backbone}blocks.0.attn.relative_position_bias_table"] == pytest.approx(0.0057, abs=5e-5)
    assert scales[f"{backbone}blocks.11.gamma_2"] == pytest.approx(0.65)
    assert {scales[name] for name in ("head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias")} == {1.0}
    counts = [len(group["params"]) for group in groups]
    assert counts == [1, 2, *[5, 11] * 12, 1, 3]  # a block decays four matrices and its table


def test_a_student_deep_inside_a_dense_network_is_grouped_as_on_top() -> None:
    """By its place in the module, whatever stands around it; all else learns at the head's rate."""
    with torch.device("meta"):
        parts = {"model": Backbone(meta_student("swinv2_b")), "head": nn.Conv2d(8, 8, 1), "queries": nn.Embedding(5, 8)}
        dense = nn.ModuleDict(parts)
    student = dense["model"].student
    assert isinstance(student, Student)
    groups = group_of(dense, optimizer_groups(dense, student, LAYERED))
    scales = {name: scale for name, (scale, _) in groups.items()}
    inside = "model.student.backbone."
    assert scales[f"{inside}patch_embed.proj.weight"] == pytest.approx(0.8**25)
    assert scales[f"{inside}layers.3.blocks.1.mlp.fc2.weight"] == pytest.approx(0.8)
    assert {scales[name] for name in scales if not name.startswith(inside)} == {1.0}
    assert (groups["head.weight"][1], groups["queries.weight"][1]) == (0.05, 0.0)


def test_a_run_is_so_many_epochs_or_steps_long() -> None:
    recipe = load_recipe("digits_finetune", ["epochs=3"])
    assert recipe.total_steps(7) == 21
    in_steps = recipe.model_copy(update={"epochs": None, "steps": 160_000})
    assert in_steps.total_steps(7) == 160_000
    schedule = schedule_of(optim(warmup_steps=1500), 512, 7, 160_000)
    assert (schedule.warmup_steps, schedule.total_steps) == (1500, 160_000)


def test_swin_v2_b_is_grouped_as_officially(swin: Classifier) -> None:
    groups = optimizer_groups(swin, swin.student, optim(layer_decay=0.8))
    assert len(groups) == 2 * 26
    found = {name.removeprefix("student.backbone."): group for name, group in group_of(swin, groups).items()}
    scales = {name: group[0] for name, group in found.items()}
    assert scales["patch_embed.proj.weight"] == scales["patch_embed.norm.bias"] == pytest.approx(0.00378, abs=5e-6)
    assert scales["layers.0.blocks.0.mlp.fc1.weight"] == pytest.approx(0.8**24)
    for opened, layer in ((1, 2), (2, 4), (3, 22)):  # timm names a merging by the stage that it opens
        assert scales[f"layers.{opened}.downsample.reduction.weight"] == pytest.approx(0.8 ** (25 - layer))
    assert scales["layers.3.downsample.norm.weight"] == pytest.approx(0.512)
    assert scales["layers.2.blocks.17.attn.cpb_mlp.0.weight"] == pytest.approx(0.512)
    assert scales["layers.3.blocks.1.attn.proj.weight"] == pytest.approx(0.8)
    assert scales["norm.weight"] == scales["head.weight"] == 1.0
    assert found["layers.2.blocks.17.attn.cpb_mlp.0.weight"][1] == found["layers.0.blocks.0.attn.logit_scale"][1] == 0


def distiller_of(student: Student, width: int) -> Distiller:
    layout = TokenLayout(student.grid, student.prefix_tokens)
    with torch.device("meta"):
        return Distiller(student, student.width, [Lesson("teacher", width, TargetMaker(layout, layout))], beta=2.0)


def test_distillation_has_its_two_groups_at_one_rate() -> None:
    student = meta_student("vit_b16")
    distiller = distiller_of(student, 768)
    groups = optimizer_groups(distiller, student, optim())
    assert [(len(group["params"]), group["weight_decay"], group["lr_scale"]) for group in groups] == [
        (51, 0.05, 1.0),
        (137, 0.0, 1.0),
    ]
    found = group_of(distiller, groups)
    assert found["projectors.0.weight"] == found[SHARED_TABLE] == (1.0, 0.05)


def test_position_bias_tables_can_be_left_undecayed(vit: Classifier) -> None:
    student = meta_student("vit_b16")
    distiller = distiller_of(student, 768)
    groups = optimizer_groups(distiller, student, optim(decay_position_bias=False))
    assert [len(group["params"]) for group in groups] == [50, 138]
    assert group_of(distiller, groups)[SHARED_TABLE] == (1.0, 0.0)
    per_block = group_of(vit, optimizer_groups(vit, vit.student, optim(layer_decay=0.65, decay_position_bias=False)))
    tables = [group for name, group in per_block.items() if name.endswith("relative_position_bias_table")]
    assert tables == [(pytest.approx(0.65 ** (12 - block)), 0.0) for block in range(12)]


def test_a_shared_table_learns_with_the_head_or_the_stem(vit: Classifier) -> None:
    student = meta_student("vit_b16")
    classifier = classifier_of(student, "after_pooling")
    official, stem = (
        group_of(classifier, optimizer_groups(classifier, student, optim(layer_decay=0.65, **where)))
        for where in ({}, {"shared_position_bias_layer": "stem"})
    )
    assert official[SHARED_TABLE] == (1.0, 0.05)
    assert stem[SHARED_TABLE] == (pytest.approx(0.65**13), 0.05)
    assert {name for name in official if official[name] != stem[name]} == {SHARED_TABLE}
    both = [
        group_of(vit, optimizer_groups(vit, vit.student, optim(layer_decay=0.65, shared_position_bias_layer=where)))
        for where in ("head", "stem")
    ]
    assert both[0] == both[1]  # a block's own table stays where the block is


def test_timms_networks_have_their_layers_by_timms_own_rule() -> None:
    student = build_student(TimmGeometry("test_vit", 64))
    classifier = Classifier(student, 10, 0.0)
    found = group_of(classifier, optimizer_groups(classifier, student, optim(layer_decay=0.5)))
    last = student.layers
    assert found["student.backbone.patch_embed.proj.weight"] == (0.5**last, 0.05)
    assert found["student.backbone.pos_embed"] == (0.5**last, 0.0)
    assert found["head.weight"] == (1.0, 0.05)


def test_rates_of_the_official_fine_tuning_at_five_steps(vit: Classifier) -> None:
    """CLIP-B, 100 epochs of 625 steps at 2048: peak 5e-3, start and end 1e-6 for all (method, sections 2.2 and 3)."""
    groups = optimizer_groups(vit, vit.student, optim(layer_decay=0.65))
    schedule = Schedule(62_500, 12_500, peak=5e-3, start=1e-6, end=1e-6)
    stem, head = groups[0]["lr_scale"], groups[-1]["lr_scale"]
    rates = {step: [schedule.of_group(scale).at(step) for scale in (stem, head)] for step in (0, 6250, 12_500, 37_500)}
    peak = 5e-3 * 0.65**13
    assert rates[0] == [1e-6, 1e-6]
    assert rates[6250] == pytest.approx([(1e-6 + peak) / 2, (1e-6 + 5e-3) / 2])
    assert rates[12_500] == pytest.approx([peak, 5e-3])
    assert rates[37_500] == pytest.approx([(1e-6 + peak) / 2, (1e-6 + 5e-3) / 2])
    assert [schedule.of_group(scale).at(62_500) for scale in (stem, head)] == pytest.approx([1e-6, 1e-6])
    assert schedule.of_group(stem).for_step(0) == schedule.of_group(stem).for_step(1) == 1e-6


IMAGENET = 1_281_167


@pytest.mark.parametrize(
    ("name", "steps_per_epoch", "rates"),
    [
        # at the start, half-way up, at the peak, half-way down, at the end
        ("vit_b_clip_b", 625, [2e-6, 6.01e-4, 1.2e-3, 6.1e-4, 2e-5]),
        ("swinv2_b_esvit", 625, [4e-6, 4.02e-4, 8e-4, 4.2e-4, 4e-5]),
        ("finetune_vit_b_clip_b_100ep", 625, [1e-6, 2.5005e-3, 5e-3, 2.5005e-3, 1e-6]),
        ("finetune_swinv2_b_esvit", 1251, [5e-7, 1.25025e-3, 2.5e-3, 1.25025e-3, 5e-7]),
    ],
)
def test_a_released_recipes_schedule_at_five_steps(name: str, steps_per_epoch: int, rates: list[float]) -> None:
    settings = load_recipe(name)
    batch, optim = settings.data.global_batch, settings.optim
    assert IMAGENET // batch == steps_per_epoch
    total, warmup = round(settings.epochs * steps_per_epoch), round(optim.warmup_epochs * steps_per_epoch)
    schedule = schedule_of(optim, batch, steps_per_epoch, total)
    steps = [0, warmup / 2, warmup, (warmup + total) / 2, total]
    assert [schedule.at(step) for step in steps] == pytest.approx(rates, rel=1e-6)


def test_randaugment_is_fine_tunings_and_is_set_up_for_the_student() -> None:
    student = build_student(student_geometry("vit_s16", 32, {"embed_dim": 16, "depth": 1, "num_heads": 2}))
    overrides = ["run_dir=x", "student.name=vit_s16", "augment.randaugment=rand-m9"]
    tuned, plain = (load_recipe("digits_finetune", overrides[:count]) for count in (3, 2))
    assert isinstance(tuned, FinetuneSettings)
    assert isinstance(plain, FinetuneSettings)
    found = augmentation(tuned, student)
    assert found.randaugment is not None
    assert found.randaugment.transform.ops[0].hparams["translate_const"] == 14
    assert found.randaugment.transform.ops[0].kwargs["resample"] is Image.Resampling.BICUBIC
    assert (found.crop_scale, found.interpolation, found.flip) == ((0.8, 1.0), "bicubic", 0.0)
    assert augmentation(plain, student).randaugment is None
    distil = load_recipe("vit_b_clip_b", ["run_dir=x"])
    assert isinstance(distil, DistillSettings)
    assert augmentation(distil, student).randaugment is None


# Peak, and warm-up and minimum rate, at the recipe's batch; layer decay; layers below the head's (method, section 2.2).
FINE_TUNED = {
    "finetune_vit_b_clip_b_100ep": (5e-3, 1e-6, 0.65, 13),
    "finetune_vit_b_clip_b": (5e-3, 1e-6, 0.60, 13),
    "finetune_vit_l_clip_l": (1e-3, 2e-6, 0.75, 25),
    "finetune_vit_b_deit": (5e-3, 1e-6, 0.65, 13),
    "finetune_vit_b_dino": (6e-3, 1e-6, 0.60, 13),
    "finetune_swinv2_b_esvit": (2.5e-3, 5e-7, 0.80, 25),
}
MERGED = {"1": 2, "2": 4, "3": 22}  # the stage that a merging opens: the last layer of the one before it


def official_layer(name: str, last: int) -> int:
    """Method, section 3: the stem is 0, a block its number from 1 (counted through the stages), the rest is last."""
    part, *rest = name.removeprefix("student.backbone.").split(".")
    if part in ("cls_token", "patch_embed"):
        return 0
    if part == "blocks":
        return int(rest[0]) + 1
    if part == "layers":
        return MERGED[rest[0]] if rest[1] == "downsample" else (0, 2, 4, 22)[int(rest[0])] + int(rest[2]) + 1
    assert part in ("norm", "fc_norm", "head"), name
    return last


def officially_undecayed(name: str, dimensions: int) -> bool:
    listed = name.endswith(("cls_token", "pos_embed"))
    return dimensions == 1 or name.endswith(".bias") or listed or "cpb_mlp" in name or "logit_scale" in name


@pytest.mark.parametrize("name", FINE_TUNED)
def test_every_group_of_an_official_fine_tuning_has_its_rates_and_decay(name: str) -> None:
    peak, ends, decay, last = FINE_TUNED[name]
    settings = load_recipe(name)
    assert isinstance(settings, FinetuneSettings)
    module = classifier_of(meta_student(settings.student.name, settings.student.position_bias), settings.head.norm)
    steps, warm = 1000, round(settings.optim.warmup_epochs * 10)
    schedule = schedule_of(settings.optim, settings.data.global_batch, 10, steps)
    groups = optimizer_groups(module, module.student, settings.optim)
    assert len(groups) == 2 * (last + 1)
    shapes = {parameter_name: parameter.ndim for parameter_name, parameter in module.named_parameters()}
    for parameter_name, (scale, weight_decay) in group_of(module, groups).items():
        layer = official_layer(parameter_name, last)
        of_group = schedule.of_group(scale)
        assert of_group.at(warm) == pytest.approx(peak * decay ** (last - layer)), parameter_name
        assert (of_group.at(0), of_group.at(steps)) == (pytest.approx(ends), pytest.approx(ends))
        expected = 0.0 if officially_undecayed(parameter_name, shapes[parameter_name]) else 0.05
        assert weight_decay == expected, parameter_name
